"""The mesh: what --mesh says, what it refuses, and how a batch lies on it."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxtrain import sharding
from jaxtrain.core.errors import InputError


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data=8", (8, 1, 1)),
        ("data=*", (8, 1, 1)),
        ("fsdp=8", (1, 8, 1)),
        ("data=2,fsdp=4", (2, 4, 1)),
        ("model=2,data=4", (4, 1, 2)),
        ("data=2, fsdp=2, model=2", (2, 2, 2)),
        ("fsdp=*,model=4", (1, 2, 4)),
        ("data=8,fsdp=*", (8, 1, 1)),
    ],
)
def test_parse_mesh(text, sizes):
    assert tuple(sharding.parse_mesh(text, 8).values()) == sizes
    assert tuple(sharding.parse_mesh(text, 8)) == ("data", "fsdp", "model")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data", "write axis=size"),
        ("data=0", "write axis=size"),
        ("data=-1", "write axis=size"),
        ("data=two", "write axis=size"),
        ("data=²", "write axis=size"),
        ("", "write axis=size"),
        ("=8", "no axis is called ''"),
        ("dat=8", "did you mean data"),
        ("tensor=8", "there are data, fsdp, model"),
        ("replica=8", "reserved for independent seeds"),
        ("data=2,data=4", "names data twice"),
        ("data=*,fsdp=*", "only one size can be"),
        ("data=*,model=3", "8 devices do not divide by 3; use --devices 6"),
        ("data=*,model=16", "8 devices do not divide by 16"),
        ("data=3,fsdp=2", "uses 6 of 8 devices and leaves 2 idle: use --devices 6"),
        ("data=4,fsdp=4", "needs 16 devices and there are 8: lower a size.* --simulate-devices 16"),
    ],
)
def test_malformed_mesh_is_refused_with_a_fix(text, message):
    with pytest.raises(InputError, match=message):
        sharding.parse_mesh(text, 8)


def test_a_mesh_never_leaves_devices_idle():
    with pytest.raises(InputError, match="does not have 8 devices"):
        sharding.make_mesh(jax.devices(), {"data": 3, "model": 2})


def test_axis_types_are_auto_and_neighbours_differ_in_the_last_axis():
    mesh = sharding.make_mesh(jax.devices(), {"data": 4, "model": 2})
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert [d.id for d in mesh.devices[1, 0]] == [2, 3]


@pytest.mark.parametrize("text", ["data=8", "data=2,fsdp=4", "data=2,fsdp=2,model=2", "model=8"])
def test_a_batch_is_split_over_data_and_fsdp_and_replicated_over_model(text):
    mesh = sharding.make_mesh(jax.devices(), sharding.parse_mesh(text, 8))
    rows = jax.device_put(np.arange(16), sharding.batch_split(mesh))
    parts = sharding.batch_parts(mesh)
    seen: dict[tuple[int, ...], int] = {}
    for shard in rows.addressable_shards:
        key = tuple(np.asarray(shard.data).tolist())
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == parts == 8 // mesh.shape["model"]
    assert set(seen.values()) == {mesh.shape["model"]}
    assert sorted(sum(seen, ())) == list(range(16))


@pytest.mark.parametrize(
    ("batch", "text", "accumulate", "message"),
    [
        (12, "data=8", 1, r"12 does not divide over 8 devices: use --devices 6 .*, or --set batch=8 or 16"),
        (4, "data=8", 1, r"use --devices 4 at most, or --set batch=8"),
        (6, "data=2,fsdp=2,model=2", 1, r"over 4 devices: use a --mesh with data × fsdp = 3 at most"),
        (16, "data=8", 4, r"batch 16 does not divide into accumulate=4 parts on data=8: use --set batch=32"),
        (0, "data=8", 1, r"batch 0 does not divide"),
    ],
)  # fmt: skip
def test_a_batch_that_does_not_divide_is_refused_with_a_fix(batch, text, accumulate, message):
    mesh = sharding.make_mesh(jax.devices(), sharding.parse_mesh(text, 8))
    with pytest.raises(InputError, match=message):
        sharding.check_batch(batch, mesh, accumulate=accumulate)


def test_batches_that_divide_pass():
    mesh = sharding.make_mesh(jax.devices(), {"data": 2, "fsdp": 2, "model": 2})
    sharding.check_batch(4, mesh)
    sharding.check_batch(16, mesh, accumulate=4)
