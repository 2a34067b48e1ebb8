"""Fingerprints: the same on any mesh, different after any change, computed without gathering arrays."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain import sharding
from jaxtrain.checkpoint import fingerprint

RNG = np.random.default_rng(0)
FLOATS = RNG.standard_normal((16, 3, 8)).astype(np.float32)
ARRAYS = {
    "float32": FLOATS,
    "bfloat16": FLOATS.astype(jnp.bfloat16),
    "float16": FLOATS.astype(np.float16),
    "int8": RNG.integers(-128, 127, (8, 24)).astype(np.int8),
    "int4": jnp.asarray(RNG.integers(-8, 7, 5), jnp.int4),
    "bool": RNG.random((16, 8)) > 0.5,
    "complex64": FLOATS[0] + 1j * FLOATS[1],
    "scalar": np.int32(7),
    "empty": np.zeros((0, 3), np.float32),
}
SPLIT = {"float32": PartitionSpec("fsdp", None, "model"), "bfloat16": PartitionSpec(("fsdp", "model"))}


def prints(tree):
    return fingerprint.finish(tree, fingerprint.start(tree))


def one(x):
    return prints({"x": x})["x"]


@pytest.mark.full("tests/checkpoint/test_checkpoint.py::test_round_trip_between_one_and_eight_devices")
def test_fingerprints_are_equal_on_every_mesh_and_nothing_is_gathered(mesh1, mesh8):
    split = sharding.make_mesh(jax.devices(), sharding.parse_mesh("data=2,fsdp=2,model=2", 8))
    found = []
    for mesh in (mesh1, mesh8, split):
        places = {name: NamedSharding(mesh, SPLIT.get(name, PartitionSpec())) for name in ARRAYS}
        tree = {**jax.device_put(ARRAYS, places), "key": jax.device_put(jax.random.key(3), places["scalar"])}
        found.append(prints(tree))
    assert found[0] == found[1] == found[2]
    assert len(set(found[0].values())) == len(found[0]) == len(ARRAYS) + 1
    text = fingerprint._program(split).lower(jax.tree.leaves(tree)).compile().as_text()
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text)
    assert gathered and max(np.prod([*map(int, shape.split(","))]) for shape in gathered) <= 8  # partial sums
    assert not re.search(r"all-to-all\(|collective-permute\(", text)


def test_one_program_for_all_arrays(mesh1, caplog):
    tree = jax.device_put({f"w{i}": np.ones((i + 2, 5), np.float32) for i in range(3)}, jax.devices()[0])
    with jax.log_compiles(), caplog.at_level("WARNING"):
        prints(tree)
        prints(tree)
    assert len([r for r in caplog.records if r.getMessage().startswith("Compiling")]) == 1


def test_prepare_compiles_the_program_of_start(mesh8, caplog):
    place = NamedSharding(mesh8, PartitionSpec("data"))
    tree = jax.device_put({f"w{i}": np.ones((8 * i + 8, 3), np.float32) for i in range(2)}, place)
    fingerprint.prepare(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        prints(tree)
    assert not [r for r in caplog.records if r.getMessage().startswith("Compiling")]
    fingerprint.prepare({})


@pytest.mark.parametrize("name", [name for name in ARRAYS if name != "empty"])
def test_any_flipped_bit_changes_the_fingerprint(name):
    x = jnp.asarray(ARRAYS[name])
    if name in ("bool", "int4", "complex64"):
        changed = [x.at[(0,) * x.ndim].set(~x[0, 0] if name == "bool" else x[(0,) * x.ndim] + 1)]
    else:
        raw = np.asarray(x)
        bits = raw.reshape(-1).view(f"u{raw.itemsize}")
        changed = []
        for bit in range(8 * raw.itemsize):
            other = bits.copy()
            other[(5 * bit) % len(other)] ^= np.array(1, bits.dtype) << np.array(bit, bits.dtype)
            changed.append(jnp.asarray(other.view(raw.dtype).reshape(raw.shape)))
    was = one(x)
    for other in changed:
        now = one(other)
        assert now[:8] != was[:8] and now[8:] != was[8:]  # either half detects it


def test_swaps_shifts_and_zeros_change_the_fingerprint():
    x = jnp.asarray(FLOATS)
    swapped = x.at[0, 0, 0].set(x[9, 2, 5]).at[9, 2, 5].set(x[0, 0, 0])
    zeroed = x.at[3].set(0)
    others = [
        swapped,
        jnp.roll(x, 1),
        jnp.roll(x, 1, 0),
        zeroed,
        zeroed.at[3].set(-0.0),
        zeroed.at[3].set(jnp.nan),
    ]
    assert len({one(y) for y in [x, *others]}) == len(others) + 1


def test_64_bit_elements():
    with jax.enable_x64(True):
        x = jnp.asarray(FLOATS[0], jnp.float64)
        low = x.at[2, 2].set(np.nextafter(float(x[2, 2]), 9.0))  # the last bit
        high = x.at[2, 2].set(-x[2, 2])  # the first
        scalar = jnp.asarray(2**40, jnp.int64)
        assert len({one(y) for y in (x, low, high, scalar, scalar + 1)}) == 5


def test_empty_tree():
    assert prints({}) == {} and fingerprint.start({}) is None
