"""A folder of JPEG files of ImageNet's usual size. Worker processes of ``benchmarks.streaming`` import it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SIZE = (500, 375)  # width and height of the usual picture of ImageNet, whose file has about 110 KB


@dataclasses.dataclass(frozen=True)
class Folder:
    """``n`` files ``0.jpg``, ``1.jpg`` … as ``data.Images`` reads a TFDS split."""

    path: str
    n: int
    name: str = "photographs"
    split: str = "train"

    def __len__(self) -> int:
        return self.n

    def raw(self, indices: np.ndarray, fields: Sequence[str]) -> dict[str, list[Any]]:
        """The files' bytes and the classes."""
        numbers = np.asarray(indices).tolist()
        image = [(Path(self.path) / f"{k}.jpg").read_bytes() for k in numbers]
        return {"image": image, "label": [k % 1000 for k in numbers]}

    def place(self, index: int) -> str:
        """Where example ``index`` lies."""
        return f"{self.path}/{index}.jpg"


def write(path: str, n: int, seed: int = 0) -> Folder:
    """Write ``n`` pictures of smooth colours under noise, which as JPEG take about as much as photographs."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    for k in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(SIZE)
        noise = rng.normal(0, 14, (SIZE[1], SIZE[0], 1))
        picture = np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(Path(path) / f"{k}.jpg", quality=90)
    return Folder(path, n)
