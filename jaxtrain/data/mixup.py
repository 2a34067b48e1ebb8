"""Mixup: blend the images of a training batch, on the device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Batch


@dataclasses.dataclass(frozen=True)
class Mixup:
    """Blend each image with the previous one in the batch (Zhang et al. 2018, arXiv:1710.09412).

    ``image * mix + partner * (1 - mix)``, with one ``mix`` per batch, drawn from Beta(alpha, alpha). The
    partner is the batch rolled by one, because on a sharded batch that moves only one row between devices.
    Adds the fields that the loss needs:

    - ``label_mixed``: the partner's label, shaped as ``label``;
    - ``mix: float32 [batch]``: the weight of the image's own label, in [0, 1].

    Attributes:
      alpha: above 0; with small values ``mix`` is mostly near 0 or 1.

    >>> batch = {"image": jnp.zeros((2, 4, 4, 3), jnp.uint8), "label": jnp.array([5, 6])}
    >>> mixed = Mixup()(batch, jax.random.key(0))
    >>> mixed["image"].dtype, mixed["label_mixed"].tolist(), mixed["mix"].shape
    (dtype('float32'), [6, 5], (2,))
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise InputError(
                f"Mixup(alpha={self.alpha}): alpha must be above 0; remove the stage for no mixing"
            )

    def __call__(self, batch: Batch, key: jax.Array) -> Batch:
        """Mix ``image``, uint8 or float ``[batch, ...]``; the result is float32 in the same units."""
        image = batch["image"]
        mix = jax.random.beta(key, self.alpha, self.alpha, dtype=jnp.float32)
        return {
            **batch,
            "image": image * mix + jnp.roll(image, 1, axis=0) * (1 - mix),
            "label_mixed": jnp.roll(batch["label"], 1, axis=0),
            "mix": jnp.full(image.shape[:1], mix),
        }
