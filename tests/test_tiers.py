"""The tiers of the tests: what only a longer tier runs has a witness in the default tier."""

from __future__ import annotations

import pytest
from conftest import ROOT, TIERS, needs


def test_longer_tiers_have_witnesses_in_the_default_tier(request: pytest.FixtureRequest) -> None:
    """A test marked ``full(*witnesses)`` names tests, or cases of itself, that run every time.

    A witness is a test's id, with or without its case, or a file. When a part of the suite is collected, of
    witnesses in other files only the file is checked.
    """
    items = request.session.items
    default = {item.nodeid for item in items if not any(needs(item, tier) for tier in TIERS[1:])}
    default |= {nodeid.partition(sign)[0] for nodeid in default for sign in ("[", "::")}
    files = {item.nodeid.partition("::")[0] for item in items}
    missing = []
    for item in items:
        marks = [mark for tier in TIERS[1:] for mark in item.iter_markers(tier)]
        for mark in marks:
            function = item.nodeid.partition("[")[0]
            witnesses = [function + name if name.startswith("[") else name for name in mark.args]
            elsewhere = [name for name in witnesses if name.partition("::")[0] not in files]
            absent = [name for name in elsewhere if not (ROOT / name.partition("::")[0]).is_file()]
            if not witnesses or absent or not default.issuperset({*witnesses} - {*elsewhere}):
                missing.append(f"{item.nodeid}: {witnesses or 'no witness'}")
    assert not missing
