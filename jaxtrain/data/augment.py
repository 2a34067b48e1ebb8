"""Augmentations and preprocessing: frozen dataclasses that are pure functions of (image, key).

They run on the device, compiled into the step. ``compose`` turns a tuple of them into the ``prepare`` that
``jaxtrain.step.factories`` takes; any callable with the same signature may be one of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Batch, Prepare


@dataclasses.dataclass(frozen=True)
class Flip:
    """Mirror each image left to right with probability ``p`` in [0, 1].

    >>> image = jnp.arange(3).reshape(1, 1, 3, 1)
    >>> Flip(p=1.0)({"image": image}, jax.random.key(0))["image"].ravel().tolist()
    [2, 1, 0]
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise InputError(f"Flip(p={self.p}): p must be in [0, 1]")

    def __call__(self, batch: Batch, key: jax.Array) -> Batch:
        image = batch["image"]
        mirrored = jax.random.bernoulli(key, self.p, (image.shape[0], 1, 1, 1))
        return {**batch, "image": jnp.where(mirrored, image[:, :, ::-1], image)}


@dataclasses.dataclass(frozen=True)
class AlternatingFlip:
    """Mirror each image left to right in every other epoch, with a random first epoch per image.

    Over two epochs each image is seen once each way, where ``Flip`` repeats itself half the time
    (Jordan 2024, arXiv:2404.00498). Needs the batch fields ``example_id`` and ``epoch``, ``int32 [batch]``,
    which training batches have; raises InputError without them. Does not use its key.

    Attributes:
      seed: of the first orientation of each example id; at least 0.

    >>> batch = {"image": jnp.arange(3).reshape(1, 1, 3, 1), "example_id": jnp.array([7])}
    >>> [AlternatingFlip()({**batch, "epoch": jnp.array([e])})["image"].ravel().tolist() for e in (0, 1, 2)]
    [[0, 1, 2], [2, 1, 0], [0, 1, 2]]
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InputError(f"AlternatingFlip(seed={self.seed}): seed must be at least 0")

    def __call__(self, batch: Batch, key: jax.Array | None = None) -> Batch:
        missing = [name for name in ("example_id", "epoch") if name not in batch]
        if missing:
            raise InputError(
                f"AlternatingFlip needs the batch field {' and '.join(missing)}, int32 [batch], which the "
                "loaders add to training batches: put the stage in augment=, or add the fields to the batch"
            )
        image = batch["image"]
        # Threefry explicitly: with another default generator the coins of a batch would depend on each other.
        base = jax.random.key(self.seed, impl="threefry2x32")
        keys = jax.vmap(jax.random.fold_in, (None, 0))(base, batch["example_id"])
        coin = jax.vmap(jax.random.bits)(keys) & 1
        mirrored = (coin + batch["epoch"].astype(coin.dtype)) % 2 == 1
        return {**batch, "image": jnp.where(mirrored[:, None, None, None], image[:, :, ::-1], image)}


@dataclasses.dataclass(frozen=True)
class Crop:
    """Pad each image on all sides and crop it to its original size at random.

    Attributes:
      pad: pixels added on each side, at least 1.
      mode: ``"zero"`` pads with 0, ``"reflect"`` mirrors at the border.

    >>> out = Crop(pad=2)({"image": jnp.ones((4, 8, 8, 3))}, jax.random.key(0))
    >>> out["image"].shape
    (4, 8, 8, 3)
    """

    pad: int = 4
    mode: Literal["zero", "reflect"] = "zero"

    def __post_init__(self) -> None:
        if self.pad < 1 or self.mode not in ("zero", "reflect"):
            raise InputError(f"{self}: pad must be at least 1 and mode zero or reflect")

    def __call__(self, batch: Batch, key: jax.Array) -> Batch:
        image, pad = batch["image"], self.pad
        widths = ((0, 0), (pad, pad), (pad, pad), (0, 0))
        padded = jnp.pad(image, widths, mode="constant" if self.mode == "zero" else "reflect")
        corner = jax.random.randint(key, (image.shape[0], 2), 0, 2 * pad + 1)

        def crop(one: jax.Array, at: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(one, (at[0], at[1], 0), image.shape[1:])

        return {**batch, "image": jax.vmap(crop)(padded, corner)}


@dataclasses.dataclass(frozen=True)
class Cutout:
    """Fill one random square of each image (DeVries & Taylor 2017, arXiv:1708.04552).

    Attributes:
      size: side of the square in pixels; its centre is uniform over the image, so part of it may be outside.
      fill: the value, in the units of the image at this stage: one number or one per channel.
    """

    size: int = 8
    fill: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"Cutout(size={self.size}): size must be at least 1")

    def __call__(self, batch: Batch, key: jax.Array) -> Batch:
        image = batch["image"]
        n, height, width, _ = image.shape
        row_key, column_key = jax.random.split(key)
        rows = _span_mask(jax.random.randint(row_key, (n, 1), 0, height), self.size, height)
        columns = _span_mask(jax.random.randint(column_key, (n, 1), 0, width), self.size, width)
        inside = rows[:, :, None, None] & columns[:, None, :, None]
        fill = jnp.asarray(self.fill, image.dtype).reshape(1, 1, 1, -1)
        return {**batch, "image": jnp.where(inside, fill, image)}


@dataclasses.dataclass(frozen=True)
class Normalise:
    """``(image / scale - mean) / std`` in float32, per channel.

    Attributes:
      mean, std: one number or one per channel, in units of ``image / scale``.
      scale: 255 maps uint8 pixels to [0, 1].

    >>> Normalise((0.5,), (0.5,))({"image": jnp.full((1, 1, 1, 1), 255, jnp.uint8)}, None)["image"].item()
    1.0
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 255.0

    def __post_init__(self) -> None:
        if min(self.std) <= 0 or self.scale <= 0:
            raise InputError(f"Normalise(std={self.std}, scale={self.scale}): std and scale must be positive")

    def __call__(self, batch: Batch, key: jax.Array | None = None) -> Batch:
        image = batch["image"]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, image.shape[-1]):
                raise InputError(
                    f"Normalise has {len(values)} values of {name} for images of {image.shape[-1]} "
                    f"channels (image {image.shape}, [batch, height, width, channel]): give one, or one "
                    "per channel"
                )
        shape = (1,) * (image.ndim - 1) + (-1,)
        mean = jnp.asarray(self.mean, jnp.float32).reshape(shape)
        std = jnp.asarray(self.std, jnp.float32).reshape(shape)
        return {**batch, "image": (image.astype(jnp.float32) / self.scale - mean) / std}


def compose(*stages: Callable[..., Batch]) -> Prepare:
    """Compose stages into one ``prepare``: each gets the previous batch and its own key.

    >>> prepare = compose(Flip(), Normalise())
    >>> prepare({"image": jnp.zeros((2, 4, 4, 3), jnp.uint8)}, jax.random.key(0))["image"].dtype
    dtype('float32')
    """

    def prepare(batch: Batch, key: jax.Array | None) -> Batch:
        for number, stage in enumerate(stages):
            batch = stage(batch, None if key is None else jax.random.fold_in(key, number))
            if not isinstance(batch, Mapping):
                name = getattr(stage, "__name__", type(stage).__name__)
                raise InputError(
                    f"the stage {name} returns a {type(batch).__name__}: return the batch, a dict"
                )
        return batch

    return prepare


def _span_mask(centre: jax.Array, size: int, length: int) -> jax.Array:
    """Return bool [n, length], true at the ``size`` positions around ``centre`` [n, 1]."""
    offset = jnp.arange(length)[None, :] - centre + size // 2
    return (offset >= 0) & (offset < size)
