"""One program on any mesh: the same parameters, in float64, after 20 steps."""

from __future__ import annotations

import functools

import jax
import numpy as np
import parallel_cases as cases
import pytest

from jaxtrain.sharding import rules


@pytest.fixture(autouse=True)
def _put_back(monkeypatch):
    """What ``cases.make`` changes: small arrays are split too, and attention is in float64 throughout."""
    monkeypatch.setattr(rules, "SMALLEST", rules.SMALLEST)
    monkeypatch.setattr(jax.nn, "dot_product_attention", jax.nn.dot_product_attention)


@functools.cache
def one_device(name):
    with jax.enable_x64(True):
        return cases.train(cases.make(name, None))


@pytest.mark.parametrize("mesh", cases.MESHES)
@pytest.mark.parametrize("name", list(cases.experiments()))
def test_twenty_steps_in_float64_are_those_of_one_device(name, mesh):
    want, want_ids = one_device(name)
    with jax.enable_x64(True):
        program = cases.make(name, mesh)
        split = [leaf for leaf in jax.tree.leaves(program.like) if not leaf.sharding.is_fully_replicated]
        got, ids = cases.train(program)
    np.testing.assert_array_equal(ids, want_ids)
    assert bool(split) == (mesh != "data=8")
    assert all(array.dtype == np.float64 for path, array in got.items() if path.startswith("params/"))
    assert cases.distance(got, want) < 1e-9


def test_the_cases_move_and_can_differ():
    """The distance is not small because nothing happens: another seed is far away."""
    for name in cases.experiments():
        got, _ = one_device(name)
        with jax.enable_x64(True):
            state = cases.make(name, None).init()
        first = {f"params/{k}": np.asarray(v) for k, v in cases.leaf_paths(state.params).items()}
        assert cases.distance({k: got[k] for k in first}, first) > 1e-3
