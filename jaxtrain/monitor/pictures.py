"""Arrays as PNG pictures: colour maps with a legend, tiles of feature maps and kernels. Pillow draws them."""

from __future__ import annotations

import io
import math
from typing import Any, Literal

import numpy as np

Scale = Literal["sequential", "diverging"]

COLOURS: dict[Scale, tuple[tuple[int, int, int], ...]] = {
    # matplotlib's inferno, and ColorBrewer's RdBu from blue to red: both are readable to the colour-blind
    "sequential": (
        (0, 0, 4),
        (50, 10, 94),
        (120, 28, 109),
        (188, 55, 84),
        (237, 105, 37),
        (251, 180, 26),
        (252, 255, 164),
    ),
    "diverging": (
        (33, 102, 172),
        (103, 169, 207),
        (209, 229, 240),
        (247, 247, 247),
        (253, 219, 199),
        (239, 138, 98),
        (178, 24, 43),
    ),
}
"""Colours from the lowest to the highest value; of a diverging scale, 0 is in the middle."""

SIDE = 224
"""Pixels of the longer side of a small picture, at least about half of which it is enlarged to."""
BAR, GAP, TEXT, LINE = 14, 8, 62, 14
CLIP = 4096
"""Arrays with more numbers are clipped at their 99.5th percentile: a few pixels would darken all others."""


def limit(array: np.ndarray) -> tuple[float, bool]:
    """Return the largest absolute value that is drawn, and whether larger ones are clipped to it.

    >>> limit(np.array([-3.0, 1.0]))
    (3.0, False)
    """
    size = np.abs(array[np.isfinite(array)])
    largest = float(size.max(initial=0.0))
    if size.size <= CLIP:
        return largest, False
    high = float(np.percentile(size, 99.5))
    return (high, True) if 0 < high < largest else (largest, False)


def colour(array: np.ndarray, scale: Scale, high: float) -> np.ndarray:
    """Return the colours of numbers: uint8 ``[..., 3]``.

    Args:
      array: numbers; NaN is drawn as 0.
      scale: ``sequential`` from 0 to ``high``, or ``diverging`` from ``-high`` to ``high``.
      high: the end of the scale; with 0 everything is 0.

    >>> colour(np.array([-1.0, 0.0, 1.0]), "diverging", 1.0).tolist()
    [[33, 102, 172], [247, 247, 247], [178, 24, 43]]
    """
    part = np.nan_to_num(np.asarray(array, np.float64)) / (high or 1.0)
    part = (part + 1) / 2 if scale == "diverging" else part
    points = np.array(COLOURS[scale], np.float64)
    at = np.clip(part, 0, 1) * (len(points) - 1)
    channels = [np.interp(at, np.arange(len(points)), points[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, -1)).astype(np.uint8)


def enlarge(pixels: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Repeat the pixels of a small picture ``[height, width, 3]``, as often as they fit into ``side``.

    >>> enlarge(np.zeros((8, 6, 3)), side=20).shape
    (16, 12, 3)
    """
    factor = max(1, side // max(pixels.shape[:2]))
    return pixels.repeat(factor, 0).repeat(factor, 1)


def grey_or_rgb(array: np.ndarray, black: float, white: float) -> np.ndarray:
    """Return numbers ``[height, width, 1 or 3]`` as a picture, uint8 ``[height, width, 3]``."""
    scaled = np.nan_to_num((np.asarray(array, np.float64) - black) / ((white - black) or 1.0))
    pixels = np.rint(255 * np.clip(scaled, 0, 1)).astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def heat_map(array: np.ndarray, scale: Scale, shape: tuple[int, int] | None = None) -> bytes:
    """Return a PNG of numbers ``[height, width]`` in colour, with a bar that says what the colours mean.

    Args:
      array: numbers.
      scale: ``sequential`` for numbers of at least 0, else ``diverging``.
      shape: height and width of the picture that it belongs to, to which a coarser map is interpolated
        (bilinear); None is its own.
    """
    from PIL import Image, ImageDraw, ImageFont

    high, clipped = limit(array)
    if shape is not None and shape != array.shape:
        resized = Image.fromarray(np.asarray(array, np.float32)).resize(
            shape[::-1], Image.Resampling.BILINEAR
        )
        array = np.asarray(resized)
    pixels = enlarge(colour(array, scale, high))
    height = max(pixels.shape[0], 4 * LINE)
    image = Image.new("RGB", (pixels.shape[1] + GAP + BAR + TEXT, height), "white")
    image.paste(Image.fromarray(pixels))
    levels = np.linspace(high, -high if scale == "diverging" else 0.0, height)
    bar = np.repeat(colour(levels, scale, high)[:, None], BAR, 1)
    left = pixels.shape[1] + GAP
    image.paste(Image.fromarray(bar), (left, 0))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    above = ">= " if clipped else ""
    texts = {0: f"{above}{high:.2g}", height - LINE: "0"}
    if scale == "diverging":
        texts = {
            0: f"{above}+{high:.2g}",
            (height - LINE) // 2: "0",
            height - LINE: f"{'<= ' if clipped else ''}-{high:.2g}",
        }
    for top, text in texts.items():
        draw.text((left + BAR + 4, top), text, fill="black", font=font)
    return png(image)


def tiles(maps: np.ndarray, most: int = 64) -> np.ndarray:
    """Return the first ``most`` of pictures ``[n, height, width, 3]`` as one, in rows, a grey pixel apart.

    >>> tiles(np.zeros((5, 4, 4, 3), np.uint8)).shape
    (9, 14, 3)
    """
    maps = maps[:most]
    columns = math.ceil(math.sqrt(len(maps)))
    rows = math.ceil(len(maps) / columns)
    height, width = maps.shape[1:3]
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 64, np.uint8)
    for number, one in enumerate(maps):
        top, left = (height + 1) * (number // columns), (width + 1) * (number % columns)
        sheet[top : top + height, left : left + width] = one
    return sheet


def png(picture: Any) -> bytes:
    """Return a PNG of a Pillow image, or of pixels uint8 ``[height, width, 3]``."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(picture)) if isinstance(picture, np.ndarray) else picture
    out = io.BytesIO()
    image.save(out, "PNG", optimize=False)
    return out.getvalue()
