"""Decode image files with Pillow; every error names the example."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtrain.core.errors import InputError, RunError

if TYPE_CHECKING:
    from PIL.Image import Image


def open_image(data: Any, where: str, feature: str) -> Image:
    """Open an image file, of which only the header is read here."""
    from PIL import Image

    if not isinstance(data, bytes):
        raise InputError(f"{where}: feature {feature!r} is not an image")
    with _decode_errors(where, feature):
        return Image.open(io.BytesIO(data))


def decode_rgb(image: Image, shrink: int, where: str, feature: str) -> Image:
    """Decode to RGB; a JPEG at ``1 / shrink`` of its size."""
    if image.mode[0] in "IF":
        raise InputError(
            f"{where}: feature {feature!r} has more than 8 bits per channel, which is not supported"
        )
    with _decode_errors(where, feature):
        if shrink > 1:
            image.draft(None, (image.width // shrink, image.height // shrink))  # ignored unless JPEG
        image.load()
        if "transparency" in image.info:  # Pillow warns when such a palette is converted to RGB directly.
            image = image.convert("RGBA")
        return image.convert("RGB")


def decode_mask(mask: Image, where: str, feature: str, offset: int) -> Image:
    """Decode a mask to a grey image of classes; a palette's indices are the classes, not its colours."""
    from PIL import Image

    if mask.mode not in ("L", "P"):
        raise InputError(f"{where}: its mask {feature!r} is {mask.mode}, and must be one uint8 channel")
    with _decode_errors(where, feature):
        values = np.asarray(mask)
    least = int(values.min())
    if least < offset:
        raise InputError(f"{where}: its mask {feature!r} holds {least}, which is below offset={offset}")
    return Image.fromarray(values)


@contextlib.contextmanager
def _decode_errors(where: str, feature: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Each of Pillow's formats raises its own types.
        line = str(error).partition("\n")[0] or type(error).__name__
        raise RunError(
            f"{where}: feature {feature!r} cannot be decoded ({line}): prepare the data set again, or leave "
            "the example out with data.Subset"
        ) from error
