"""``pack_metrics``: the same metrics, as one vector for each dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.metrics import ConfusionMatrix, Mean
from jaxtrain.step.packing import PackedMetrics, pack_metrics


def metrics(x):
    counts = ConfusionMatrix(jnp.arange(4, dtype=jnp.int32).reshape(2, 2) + x.astype(jnp.int32))
    return {"loss": Mean(x, jnp.float32(3)), "half": Mean(x.astype(jnp.bfloat16), 2.0), "all": counts}


def same(found, wanted):
    assert list(found) == sorted(wanted)
    jax.tree.map(np.testing.assert_array_equal, dict(found), jax.device_get(wanted))


def test_metrics_survive_packing():
    found = jax.jit(lambda x: PackedMetrics.of(metrics(x)))(jnp.float32(5))
    assert sorted(str(v.dtype) for v in found.vectors) == ["bfloat16", "float32", "int32"] and len(found) == 3
    (row,) = found.rows()
    same(row, metrics(jnp.float32(5)))
    same({name: found[name] for name in found}, metrics(jnp.float32(5)))
    assert {leaf.dtype for leaf in jax.tree.leaves(row)} == {np.dtype("float64"), np.dtype("int64")}


def test_metrics_of_several_updates_survive_packing():
    steps = jax.jit(lambda xs: jax.lax.scan(pack_metrics(lambda state, x: (state, metrics(x))), 0, xs))
    _, found = steps(jnp.array([1.0, 2.0]))
    for row, x in zip(found.rows(), (1, 2), strict=True):
        same(row, metrics(jnp.float32(x)))
    assert found["all"].counts.shape == (2, 2, 2)


def test_host_sums_exceed_the_device_dtypes():
    large = {
        "seen": Mean(jnp.float32(2**24), jnp.float32(2**24)),
        "n": ConfusionMatrix(jnp.full((1, 1), 2**31 - 1)),
    }
    (row,) = PackedMetrics.of(large).rows()
    (one,) = PackedMetrics.of(
        {"seen": Mean(jnp.float32(1), jnp.float32(1)), "n": ConfusionMatrix(jnp.ones((1, 1), int))}
    ).rows()
    assert row["seen"].merge(one["seen"]).total == 2**24 + 1
    assert row["n"].merge(one["n"]).counts.item() == 2**31


@pytest.mark.parametrize("number", [1, 3])
def test_empty_metrics(number):
    """There is still something to wait for, and as many updates as there were."""
    _, found = jax.lax.scan(pack_metrics(lambda state, x: (state, {})), 0, jnp.zeros(number))
    assert found.rows() == [{}] * number and len(found) == 0


def test_traced_metrics_have_their_names():
    found = jax.eval_shape(lambda x: PackedMetrics.of(metrics(x)), jnp.float32(1))
    assert list(found) == ["all", "half", "loss"]
