"""Decode images as the data sources do, with limits on files and pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from jaxtrain.artifact.manifest import InputSpec
from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow's others may start other programs
MAX_PIXELS = 2**26
"""Largest image that is decoded: 67 million pixels."""
MAX_BYTES = 2**28
"""Largest image file that is read."""


def read_image(
    path: Path, size: tuple[int, int], channels: int, crop: float | None, resize: bool
) -> np.ndarray:
    """Decode an image file; see ``decode_image``.

    Raises:
      InputError: it is larger than ``MAX_BYTES``, or as ``decode_image``.
    """
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} is larger than {MAX_BYTES} bytes: it is not read as an image")
    return decode_image(path.read_bytes(), str(path), size, channels, crop, resize)


def decode_image(
    data: bytes,
    where: str,
    size: tuple[int, int],
    channels: int,
    crop: float | None,
    resize: bool,
    formats: tuple[str, ...] = FORMATS,
    max_pixels: int | None = None,
) -> np.ndarray:
    """Decode an image as the data sources do: uint8 ``[height, width, channels]``.

    Args:
      data: the content of the file.
      where: what to call it in messages.
      size: width and height in pixels.
      channels: 1 (grey) or 3 (RGB); an image of the other kind is converted, and an alpha channel dropped.
      crop: with ``resize``, the part of the largest centred rectangle of the size's proportions that is kept;
        None: all of it.
      resize: crop and resize with Pillow's antialiased bilinear filter; False: the size must be exact.
      formats: Pillow's names of the formats to read.
      max_pixels: the largest image to decode, known from its header; None: ``MAX_PIXELS``.

    Raises:
      InputError: it is no image, larger than ``max_pixels``, or of another size.
    """
    from PIL import Image, UnidentifiedImageError

    limit = MAX_PIXELS if max_pixels is None else max_pixels
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
        if image.width * image.height > limit:
            raise InputError(
                f"{where} has {image.width} × {image.height} pixels: at most {limit:,} are decoded"
            )
        if image.size != size and not resize:
            raise InputError(
                f"{where} has {image.width} × {image.height} pixels, and the model takes {size[0]} × "
                f"{size[1]}: add --resize (centre crop, then bilinear)"
            )
        if image.mode[0] in "IF":
            raise InputError(f"{where} has more than 8 bits per channel, which is not supported")
        image.load()
        if "transparency" in image.info:
            image = image.convert("RGBA")
        image = image.convert("L" if channels == 1 else "RGB")
    except InputError:
        raise
    except UnidentifiedImageError as error:  # its message has the address of an object
        raise InputError(f"{where} cannot be decoded (it is none of {', '.join(formats)})") from error
    except Image.DecompressionBombError as error:  # of Pillow, while it reads the header
        raise InputError(f"{where} has more than {limit:,} pixels, and is not decoded") from error
    except Exception as error:  # each of Pillow's formats raises its own types
        raise InputError(f"{where} cannot be decoded ({first_line(error)})") from error
    if image.size != size:
        scale = min(image.width / size[0], image.height / size[1]) * (crop or 1.0)
        width, height = size[0] * scale, size[1] * scale
        left, top = (image.width - width) / 2, (image.height - height) / 2
        image = image.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    pixels = np.asarray(image)
    return pixels[..., None] if channels == 1 else pixels


def scale_pixels(pixels: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Return pixels in 0..255 in the range and dtype of the model's data, whose white is ``spec.white``."""
    if spec.white != 255:
        scaled = pixels.astype(np.float64) * (spec.white or 255.0) / 255
        pixels = np.rint(scaled) if np.issubdtype(spec.numpy_dtype, np.integer) else scaled
    return pixels.astype(spec.numpy_dtype)
