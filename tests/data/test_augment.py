"""jaxtrain.data.augment: every stage against NumPy, and as a pure function of (batch, key)."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.core.errors import InputError
from jaxtrain.data import augment
from jaxtrain.data.augment import AlternatingFlip, Crop, Cutout, Flip, Normalise, compose

RNG = np.random.default_rng(0)
KEY = jax.random.key(3)
RANDOM = [Flip(), Crop(pad=2), Crop(pad=2, mode="reflect"), Cutout(size=3)]


def images(n: int = 32, height: int = 6, width: int = 8, channels: int = 3, dtype: Any = np.uint8) -> Any:
    return RNG.integers(1, 255, (n, height, width, channels)).astype(dtype)


def apply(stage: Any, image: np.ndarray, key: Any = KEY) -> np.ndarray:
    ids = {"example_id": jnp.arange(len(image)), "epoch": jnp.zeros(len(image), jnp.int32)}
    return np.asarray(stage({"image": jnp.asarray(image), **ids}, key)["image"])


def test_flip_mirrors_about_half_of_the_images_left_to_right() -> None:
    image = images(256)
    out = apply(Flip(), image)
    unchanged = (out == image).all((1, 2, 3))
    mirrored = (out == image[:, :, ::-1]).all((1, 2, 3))
    assert np.all(unchanged ^ mirrored)
    assert 96 < mirrored.sum() < 160


@pytest.mark.parametrize(("p", "step"), [(0.0, 1), (1.0, -1)])
def test_flip_with_probability_0_or_1(p: float, step: int) -> None:
    image = images()
    np.testing.assert_array_equal(apply(Flip(p), image), image[:, :, ::step])


def mirrored_by(stage: Any, image: np.ndarray, ids: Any, epoch: Any) -> np.ndarray:
    """Return which images the stage mirrors; check that the others are unchanged."""
    epochs = np.broadcast_to(np.asarray(epoch, np.int32), len(image))
    batch = {"image": jnp.asarray(image), "example_id": jnp.asarray(ids, jnp.int32), "epoch": epochs}
    out = np.asarray(stage(batch, KEY)["image"])
    mirrored = (out == image[:, :, ::-1]).all((1, 2, 3))
    assert np.all((out == image).all((1, 2, 3)) ^ mirrored)
    return mirrored


@pytest.mark.parametrize("epoch", [0, 1, 6])
def test_alternating_flip_alternates_over_two_epochs(epoch: int) -> None:
    image, ids = images(256), RNG.permutation(50_000)[:256]
    one, two, three = (mirrored_by(AlternatingFlip(), image, ids, epoch + k) for k in range(3))
    assert np.all(one ^ two)
    np.testing.assert_array_equal(one, three)
    assert 96 < one.sum() < 160


def test_alternating_flip_depends_only_on_id_epoch_and_seed() -> None:
    image, ids = images(256), np.arange(256)
    flipped = mirrored_by(AlternatingFlip(seed=2), image, ids, 0)
    order = RNG.permutation(256)
    np.testing.assert_array_equal(mirrored_by(AlternatingFlip(seed=2), image, ids[order], 0), flipped[order])
    odd = np.arange(256) % 3  # A batch with examples of two epochs.
    np.testing.assert_array_equal(mirrored_by(AlternatingFlip(seed=2), image, ids, odd), flipped ^ (odd == 1))
    other = mirrored_by(AlternatingFlip(seed=3), image, ids, 0)
    assert 96 < (other ^ flipped).sum() < 160
    assert 96 < np.sum(flipped[1:] ^ flipped[:-1]) < 160, "neighbours are independent"


def test_alternating_flip_is_jittable_and_needs_no_key() -> None:
    image = images()
    batch = {"image": jnp.asarray(image), "example_id": jnp.arange(32), "epoch": jnp.zeros(32, jnp.int32)}
    once, jitted = AlternatingFlip()(batch), jax.jit(AlternatingFlip())(batch, jax.random.key(9))
    np.testing.assert_array_equal(once["image"], jitted["image"])
    assert once["image"].dtype == jnp.uint8 and set(once) == set(batch)


@pytest.mark.parametrize("default", ["threefry2x32", "rbg"])
def test_alternating_flip_ignores_the_default_generator(default: str) -> None:
    image, ids = images(), np.arange(32)
    before = mirrored_by(AlternatingFlip(), image, ids, 0)
    with jax.default_prng_impl(default):
        np.testing.assert_array_equal(mirrored_by(AlternatingFlip(), image, ids, 0), before)


@pytest.mark.parametrize(
    ("present", "message"),
    [
        (("example_id",), "the batch field epoch, int32"),
        (("epoch",), "the batch field example_id, int32"),
        ((), "example_id and epoch, int32 .batch., which the loaders add to training batches: put"),
    ],
)
def test_alternating_flip_names_the_missing_field(present: Any, message: str) -> None:
    batch = {"image": jnp.zeros((2, 4, 4, 3)), **{name: jnp.zeros(2, jnp.int32) for name in present}}
    with pytest.raises(InputError, match=message) as raised:
        AlternatingFlip()(batch, KEY)
    assert "\n" not in str(raised.value)


def offsets(out: np.ndarray, padded: np.ndarray, pad: int) -> list[tuple[int, int]]:
    """Return the offset of each crop in its padded image."""
    height, width = out.shape[1:3]
    corners = [(i, j) for i in range(2 * pad + 1) for j in range(2 * pad + 1)]
    found = []
    for one, full in zip(out, padded, strict=True):
        at = [(i, j) for i, j in corners if np.array_equal(one, full[i : i + height, j : j + width])]
        assert len(at) == 1, "a crop must be a window of its padded image"
        found += at
    return found


@pytest.mark.parametrize(("mode", "numpy_mode"), [("zero", "constant"), ("reflect", "reflect")])
@pytest.mark.parametrize("pad", [1, 3])
def test_crop_takes_every_window_of_the_padded_image(pad: int, mode: Any, numpy_mode: Any) -> None:
    image = images(600)
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode=numpy_mode)
    counts = np.zeros((2 * pad + 1, 2 * pad + 1), int)
    for at in offsets(apply(Crop(pad, mode), image), padded, pad):
        counts[at] += 1
    mean = len(image) / counts.size
    assert counts.min() > 0, "every window is possible, the corners included"
    assert counts.max() < mean + 5 * np.sqrt(mean)


@pytest.mark.full("tests/data/test_augment.py::test_cutout_fills_per_channel_and_nothing_else")
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("height", "width"), [(6, 5), (5, 5)])
def test_cutout_fills_one_square_clipped_at_the_border(size: int, height: int, width: int) -> None:
    image = images(300, height, width)
    filled = apply(Cutout(size, fill=(0.0,)), image) == 0
    assert np.array_equal(filled.all(-1), filled.any(-1)), "all channels or none"
    corners = set()
    for hole in filled.any(-1):
        rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        for span, length in ((rows, height), (columns, width)):
            complete = len(span) == size
            clipped = 0 < len(span) < size and (span[0] == 0 or span[-1] == length - 1)
            assert (complete or clipped) and np.all(np.diff(span) == 1)
        assert hole.sum() == len(rows) * len(columns)
        corners.add((rows[0], rows[-1], columns[0], columns[-1]))
    assert len(corners) == height * width, "one square for each centre"


def test_cutout_fills_per_channel_and_nothing_else() -> None:
    image = images(dtype=np.float32)
    out = apply(Cutout(3, fill=(-1.0, -2.0, -3.0)), image)
    changed = out != image
    assert 0 < changed.mean() < 0.5
    np.testing.assert_array_equal(out[changed.any(-1)], np.tile([-1, -2, -3], (changed.any(-1).sum(), 1)))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.25,)), ((0.1, 0.2, 0.3), (0.5, 1.0, 2.0))])
def test_normalise_matches_its_formula_in_float32(mean: Any, std: Any, dtype: type) -> None:
    image = images(dtype=dtype)
    out = apply(Normalise(mean, std, scale=100.0), image, None)
    assert out.dtype == np.float32
    wanted = (image.astype(np.float64) / 100 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("mean", "std", "name"), [((0.0, 0.0), (1.0,), "mean"), ((0.0,), (1.0,) * 4, "std")])
def test_normalise_refuses_wrong_number_of_channels(mean: Any, std: Any, name: str) -> None:
    with pytest.raises(InputError, match=rf"of {name} for images of 3 channels .*\(32, 6, 8, 3\)"):
        apply(Normalise(mean, std), images())


REFUSED = {
    "no spread": lambda: Normalise(std=(1.0, 0.0)),
    "negative spread": lambda: Normalise(std=(-1.0,)),
    "no scale": lambda: Normalise(scale=0.0),
    "probability above 1": lambda: Flip(p=1.5),
    "negative probability": lambda: Flip(p=-0.5),
    "no padding": lambda: Crop(pad=0),
    "unknown padding": lambda: Crop(mode="edge"),  # type: ignore[arg-type]
    "negative seed": lambda: AlternatingFlip(seed=-1),
    "no square": lambda: Cutout(size=0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_settings_are_refused(name: str) -> None:
    with pytest.raises(InputError):
        REFUSED[name]()


@pytest.mark.parametrize("stage", RANDOM, ids=repr)
def test_stage_is_pure_jittable_and_preserves_dtype_shape_and_fields(stage: Any) -> None:
    batch = {"image": jnp.asarray(images()), "label": jnp.arange(32)}
    before = np.array(batch["image"])
    once, again, jitted = stage(batch, KEY), stage(batch, KEY), jax.jit(stage)(batch, KEY)
    np.testing.assert_array_equal(batch["image"], before)
    assert once["image"].dtype == jnp.uint8 and once["image"].shape == before.shape
    for other in (again, jitted):
        np.testing.assert_array_equal(once["image"], other["image"])
        np.testing.assert_array_equal(other["label"], np.arange(32))


@pytest.mark.parametrize("stage", RANDOM, ids=repr)
def test_randomness_differs_between_keys_and_between_images(stage: Any) -> None:
    same = np.repeat(images(1), 32, axis=0)
    out = apply(stage, same)
    assert len(np.unique(out, axis=0)) > 1
    assert not np.array_equal(out, apply(stage, same, jax.random.key(4)))


@pytest.mark.parametrize("stage", RANDOM, ids=repr)
def test_result_of_an_image_does_not_depend_on_the_batch(stage: Any) -> None:
    image, other = images(), images()
    other[7] = image[7]
    np.testing.assert_array_equal(apply(stage, image)[7], apply(stage, other)[7])


def test_compose_runs_in_order_with_a_key_per_stage() -> None:
    seen: list[Any] = []

    def add(batch: Any, key: Any) -> Any:
        seen.append(jax.random.key_data(key).tolist())
        return {"image": batch["image"] + 1}

    def double(batch: Any, key: Any) -> Any:
        seen.append(jax.random.key_data(key).tolist())
        return {"image": batch["image"] * 2}

    assert compose(add, double, add)({"image": 1}, KEY)["image"] == 5
    assert len({tuple(key) for key in [*seen, jax.random.key_data(KEY).tolist()]}) == 4
    first = list(seen)
    compose(add, double, add)({"image": 1}, KEY)
    assert seen == first * 2


def test_two_flips_in_one_composition_are_independent() -> None:
    out = apply(compose(Flip(), Flip()), image := images(128))
    assert 0 < (out != image).any((1, 2, 3)).sum() < 128


def test_evaluation_needs_no_key() -> None:
    prepare = compose(Normalise((0.5,), (0.5,)), lambda batch, key: {**batch, "key": key})
    out = prepare({"image": jnp.asarray(images())}, None)
    assert out["image"].dtype == jnp.float32 and out["key"] is None


CASES: dict[type, dict[str, Any]] = {
    AlternatingFlip: {"seed": 1},
    Flip: {"p": 0.9},
    Crop: {"pad": 2, "mode": "reflect"},
    Cutout: {"size": 3, "fill": (9.0,)},
    Normalise: {"mean": (0.5,), "std": (2.0,), "scale": 16.0},
}
FIELDS = [(cls, f.name) for cls in CASES for f in dataclasses.fields(cls)]


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_every_field_of_a_stage_changes_its_result(cls: type, field: str) -> None:
    image = images()
    changed = apply(cls(**{field: CASES[cls][field]}), image)
    assert not np.array_equal(changed, apply(cls(), image))


def test_every_stage_is_in_the_table() -> None:
    members = inspect.getmembers(augment, dataclasses.is_dataclass)
    assert {cls for _, cls in members if cls.__module__ == augment.__name__} == set(CASES)
