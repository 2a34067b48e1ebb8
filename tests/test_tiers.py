"""The tiers of the tests: what only a longer tier runs has a witness in the default tier."""

from __future__ import annotations

import pytest
from conftest import TIERS, needs


def test_every_test_of_a_longer_tier_has_a_witness_in_the_default_tier(
    request: pytest.FixtureRequest,
) -> None:
    """A test marked ``full(*witnesses)`` names tests, or cases of itself, that run every time.

    A witness is a test's id, with or without its case, or a file. Checked over what this session collected:
    of a part of the suite only the witnesses in its own files.
    """
    items = request.session.items
    default = {item.nodeid for item in items if not any(needs(item, tier) for tier in TIERS[1:])}
    default |= {nodeid.partition("[")[0] for nodeid in default} | {
        nodeid.partition("::")[0] for nodeid in default
    }
    files = {item.nodeid.partition("::")[0] for item in items}
    missing = []
    for item in items:
        marks = [mark for tier in TIERS[1:] for mark in item.iter_markers(tier)]
        for mark in marks:
            function = item.nodeid.partition("[")[0]
            witnesses = [function + name if name.startswith("[") else name for name in mark.args]
            known = [name for name in witnesses if name.partition("::")[0] in files]
            if not witnesses or any(name not in default for name in known):
                missing.append(f"{item.nodeid}: {witnesses or 'no witness'}")
    assert not missing
