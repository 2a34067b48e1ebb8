"""Augmentations of single images on the host: RandAugment, and the random numbers of an example."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtrain.core.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image


class Draws:
    """The random number generator of one example in one epoch.

    It uses raw Philox words, because NumPy guarantees their values across versions but not those of
    ``Generator``'s methods.

    >>> Draws(seed=0, epoch=3, example=7).integer(6) == Draws(seed=0, epoch=3, example=7).integer(6)
    True
    """

    def __init__(self, seed: int, epoch: int, example: int) -> None:
        key = np.array([seed, epoch], np.int64).view(np.uint64)
        # The counter's highest word is the example, so examples share no words with each other, nor with
        # the permutation of the epoch, which has the same key and counts from 0.
        self._words = np.random.Philox(key=key, counter=np.array([0, 0, 0, example + 1], np.uint64))

    def uniform(self, low: float, high: float) -> float:
        """Return a float in ``[low, high)``, of 53 random bits."""
        return low + (high - low) * (int(self._words.random_raw()) >> 11) * 2.0**-53

    def integer(self, n: int) -> int:
        """Return an integer in ``[0, n)``; ``n`` far below 2^64, so that all are equally likely."""
        return int(self._words.random_raw()) * n >> 64

    def coin(self, p: float) -> bool:
        """Return True with probability ``p``."""
        return self.uniform(0.0, 1.0) < p


HostStage = Callable[[Any, Draws], Any]
"""``(RGB PIL image, draws) -> RGB PIL image`` of the same size; random only through ``draws``."""


# Grey for pixels from outside the image.
_FILL = (128, 128, 128)


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Apply ``num`` operations in sequence, each drawn from fourteen (Cubuk et al. 2020, arXiv:1909.13719).

    The fourteen of the paper: identity, autocontrast, equalize, rotate, solarize, color, posterize, contrast,
    brightness, sharpness, shear and translate in x and in y. A stage for ``RandomCrops``.

    Magnitude runs from 0, which changes nothing, to 10, the far end of each range of AutoAugment
    (arXiv:1805.09501, table 6): rotate 30 degrees, shear 0.3 (the upper left corner stays), translate 150
    pixels of 331, solarize above 0, posterize to 4 bits, and a factor of 0.1 or 1.9 for color, contrast,
    brightness and sharpness. Directions are drawn. Autocontrast and equalize have no magnitude.

    Attributes:
      num: operations per image, at least 0; drawn with replacement.
      magnitude: in [0, 10].

    >>> from PIL import Image
    >>> RandAugment(num=2)(Image.new("RGB", (8, 8)), Draws(seed=0, epoch=0, example=0)).size
    (8, 8)
    """

    num: int = 2
    magnitude: float = 10

    def __post_init__(self) -> None:
        if self.num < 0 or not 0 <= self.magnitude <= 10:
            raise InputError(
                f"RandAugment(num={self.num}, magnitude={self.magnitude}): num must be at least 0 "
                "and magnitude in [0, 10]"
            )

    def __call__(self, image: Image, draws: Draws) -> Image:
        """Augment an RGB image; the result has the same size."""
        operations = _operations()
        names = list(operations)
        for _ in range(self.num):
            name = names[draws.integer(len(names))]
            sign = 1 if draws.coin(0.5) else -1
            image = operations[name](image, sign * self.magnitude / 10)
        return image


@functools.cache
def _operations() -> dict[str, Callable[[Any, float], Any]]:
    """Return ``(image, signed strength in [-1, 1]) -> image`` by name; ``draws`` index this order."""
    from PIL import Image, ImageEnhance, ImageOps

    def affine(image: Any, *matrix: float) -> Any:
        """Pixel (x, y) of the result comes from ``(a x + b y + c, d x + e y + f)``."""
        kind, filter_ = Image.Transform.AFFINE, Image.Resampling.BILINEAR
        return image.transform(image.size, kind, matrix, filter_, fillcolor=_FILL)

    def enhance(kind: Any) -> Callable[[Any, float], Any]:
        return lambda p, s: kind(p).enhance(1 + 0.9 * s)

    shift = 150 / 331
    return {
        "identity": lambda p, s: p,
        "autocontrast": lambda p, s: ImageOps.autocontrast(p),
        "equalize": lambda p, s: ImageOps.equalize(p),
        "rotate": lambda p, s: p.rotate(30 * s, Image.Resampling.BILINEAR, fillcolor=_FILL),
        "solarize": lambda p, s: ImageOps.solarize(p, round(256 * (1 - abs(s)))),
        "color": enhance(ImageEnhance.Color),
        "posterize": lambda p, s: ImageOps.posterize(p, 8 - round(4 * abs(s))),
        "contrast": enhance(ImageEnhance.Contrast),
        "brightness": enhance(ImageEnhance.Brightness),
        "sharpness": enhance(ImageEnhance.Sharpness),
        "shear_x": lambda p, s: affine(p, 1, 0.3 * s, 0, 0, 1, 0),
        "shear_y": lambda p, s: affine(p, 1, 0, 0, 0.3 * s, 1, 0),
        "translate_x": lambda p, s: affine(p, 1, 0, shift * s * p.width, 0, 1, 0),
        "translate_y": lambda p, s: affine(p, 1, 0, 0, 0, 1, shift * s * p.height),
    }
