"""Image files of various sizes as square arrays, decoded and cropped on the host.

A loader with ``workers`` does this in worker processes. The pixels are a pure function of the data set
and of ``(seed, epoch, example id)``, independent of batch, workers and the step at which a run resumes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.core.process import cores
from jaxtrain.data.decode_image import decode_mask, decode_rgb, open_image
from jaxtrain.data.randaugment import Draws, HostStage
from jaxtrain.data.tfds import TFDS

if TYPE_CHECKING:
    from PIL.Image import Image

_TRIES = 10


class _View(NamedTuple):
    """The crop of an image, and what is done to it."""

    box: tuple[float, float, float, float]
    """Left, top, right and bottom in pixels of the stored image."""
    shrink: int = 1
    """A JPEG may be decoded at ``1 / shrink`` of its size."""
    flip: bool = False
    stages: tuple[HostStage, ...] = ()


@dataclasses.dataclass(frozen=True)
class Images:
    """Centre crops, ``size`` x ``size``, of the images of a TFDS split. Nothing is random.

    The centred square whose side is ``crop`` times the shorter side of the image is resized. This is one step
    for what others do in two: resize the shorter side to ``size / crop``, then crop the centre. Images are
    resized with Pillow's antialiased bilinear filter, masks with nearest neighbour.

    Grey, palette and CMYK images become RGB; an alpha channel is dropped. EXIF orientation is ignored, as in
    TFDS.

    With ``mask``, the label is a class per pixel. Only pixels inside the square are scored, so use
    ``crop=1.0`` for segmentation; the ends of a wide or tall image are still not scored.

    Attributes:
      source: the split; ``image`` must be one of its features, and ``label`` or ``mask`` another.
      size: side of the result in pixels, at least 1.
      crop: in (0, 1].
      image: the feature that holds the image.
      label: the feature that holds the class, unless there is a mask.
      mask: the feature that holds a png of one uint8 channel, the size of the image.
      offset: the mask's value for class 0 (1 in ``oxford_iiit_pet``); no value may be below it.

    >>> Images(TFDS("imagenet2012", "validation"), size=224).example()["image"].shape
    (1, 224, 224, 3)
    """

    source: TFDS
    size: int
    crop: float = 0.875
    image: str = "image"
    label: str = "label"
    mask: str | None = None
    offset: int = 1

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if not callable(getattr(self.source, "raw", None)):
            raise InputError(
                f"{kind}(source={self.source!r}): source must be a TFDS split; apply data.Subset to {kind}"
            )
        if self.size < 1 or not 0 < self.crop <= 1 or self.offset < 0:
            raise InputError(
                f"{kind}(size={self.size}, crop={self.crop}, offset={self.offset}): size is at least 1, "
                "crop in (0, 1] and offset not negative"
            )

    @property
    def name(self) -> str:
        """The data set's name."""
        return self.source.name

    @property
    def data_dir(self) -> str | None:
        """The folder of all data sets, None for the default."""
        return self.source.data_dir

    def prepared(self) -> bool:
        """Return whether the data set is on disk."""
        return self.source.prepared()

    @property
    def classes(self) -> int | None:
        """The number of classes of the feature ``label``; None if the label is another feature."""
        return self.source.classes if self._is_standard() else None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes in label order; None as for ``classes``."""
        return self.source.class_names if self._is_standard() else None

    def __len__(self) -> int:
        return len(self.source)

    def data_files(self) -> tuple[Path, ...]:
        """Return the files that are read."""
        return self.source.data_files()

    def example(self) -> dict[str, np.ndarray]:
        """Return zeros in the shapes of one example, leading axis 1; reads nothing."""
        return self._zeros(1)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the centre crop of each image.

        Args:
          indices: int [k], as for ``TFDS.gather``.

        Returns:
          ``image: uint8 [k, size, size, 3]`` and ``label: int32 [k]``, or ``[k, size, size]`` with a mask.

        Raises:
          InputError: no such feature, a feature of another kind, a mask whose size differs from its image's,
            or a mask value below ``offset``.
          RunError: an image or mask is damaged.
        """
        return self._batch(np.asarray(indices), None)

    def _is_standard(self) -> bool:
        return self.mask is None and self.label == "label"

    def _zeros(self, n: int) -> dict[str, np.ndarray]:
        label = (n,) if self.mask is None else (n, self.size, self.size)
        return {
            "image": np.zeros((n, self.size, self.size, 3), np.uint8),
            "label": np.zeros(label, np.int32),
        }

    def _view(self, width: int, height: int, draws: Draws | None) -> _View:
        side = self.crop * min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return _View((left, top, left + side, top + side))

    def _batch(self, indices: np.ndarray, draws: Sequence[Draws] | None) -> dict[str, np.ndarray]:
        target = self.label if self.mask is None else self.mask
        raw = self.source.raw(indices, (self.image, target))
        batch = self._zeros(len(indices))

        def fill(row: int) -> None:
            row_draws = None if draws is None else draws[row]
            index = int(indices[row])
            where = f"{self.source.locate(index)}, example {index} of split {self.source.split}"
            where = f"data set {self.name}: {where}"
            example = self._example(where, raw[self.image][row], raw[target][row], row_draws)
            batch["image"][row], batch["label"][row] = example

        threads = _thread_count()
        if threads == 1 or len(indices) < 2:
            for row in range(len(indices)):
                fill(row)
        else:  # Pillow decodes and resizes without the GIL.
            with concurrent.futures.ThreadPoolExecutor(threads) as pool:
                list(pool.map(fill, range(len(indices))))
        return batch

    def _example(self, where: str, encoded: Any, target: Any, draws: Any) -> tuple[Any, Any]:
        from PIL.Image import Resampling, Transpose

        image = open_image(encoded, where, self.image)
        size = image.size
        mask = None if self.mask is None else open_image(target, where, self.mask)
        if mask is None and type(target) is not int:
            raise InputError(f"{where}: feature {self.label!r} is not an integer, so it is not a class label")
        if mask is not None and mask.size != size:
            raise InputError(
                f"{where}: its mask {self.mask!r} has {mask.width} x {mask.height} pixels and its image "
                f"{size[0]} x {size[1]}: they must agree"
            )
        view = self._view(*size, draws)
        image = decode_rgb(image, view.shrink, where, self.image)

        def crop(full: Image, filter_: Resampling) -> Image:
            shrunk = view.shrink if full.size != size else 1
            box = tuple(edge / shrunk for edge in view.box)
            part = full.resize((self.size, self.size), filter_, box=box)  # type: ignore[arg-type]
            return part.transpose(Transpose.FLIP_LEFT_RIGHT) if view.flip else part

        image = crop(image, Resampling.BILINEAR)
        for stage in view.stages:
            image = stage(image, draws)
            if image.mode != "RGB" or image.size != (self.size, self.size):
                raise InputError(f"{stage}: it must return an RGB image of the same size")
        if mask is None:
            return np.asarray(image), target
        mask = decode_mask(mask, where, str(self.mask), self.offset)
        return np.asarray(image), np.asarray(crop(mask, Resampling.NEAREST), np.int32) - self.offset


@dataclasses.dataclass(frozen=True)
class RandomCrops(Images):
    """As ``Images``, with a new random crop of each image in every epoch of training.

    This is Inception's random resized crop (Szegedy et al. 2015, arXiv:1409.4842, section 6): a random share
    of the image's area and a random aspect ratio (uniform in its logarithm), resized to the square. After ten
    draws that do not fit, it is the largest centred crop of an allowed ratio, as in other libraries.
    ``gather``, which evaluation uses, is that of ``Images``.

    A JPEG whose crop is at least twice the size of the result is decoded at a half, a quarter or an eighth
    of its size, which is faster and averages pixels as resizing would.

    Attributes:
      area: smallest and largest share of the area, in (0, 1].
      ratio: smallest and largest width / height, above 0.
      flip: mirror half of the crops left to right, at random.
      stages: further augmentations of each crop, such as ``RandAugment()``; not with a mask, which they would
        not transform.

    >>> train = RandomCrops(TFDS("imagenet2012", "train"), size=224)
    >>> if train.prepared():
    ...     batch = train.draw(np.arange(2), epochs=np.array([0, 0]), seed=0)
    ...     assert batch["image"].shape == (2, 224, 224, 3)
    """

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    stages: tuple[HostStage, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.area[0] <= self.area[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise InputError(
                f"RandomCrops(area={self.area}, ratio={self.ratio}): each is (smallest, largest), area in "
                "(0, 1] and ratio above 0"
            )
        if self.stages and self.mask is not None:
            raise InputError(
                "RandomCrops has stages and a mask: stages do not transform the mask, so leave one of "
                "them out"
            )

    def draw(self, indices: np.ndarray, epochs: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """Return a random crop of each image, a pure function of (seed, epoch, example id).

        Args:
          indices: int [k], as for ``gather``.
          epochs: int [k], the epoch in which each example is seen.
          seed: the run's seed.

        Returns, raises: as ``gather``.
        """
        indices = np.asarray(indices)
        pairs = zip(indices.tolist(), np.asarray(epochs).tolist(), strict=True)
        return self._batch(indices, [Draws(seed, epoch, example) for example, epoch in pairs])

    def _view(self, width: int, height: int, draws: Draws | None) -> _View:
        if draws is None:
            return super()._view(width, height, draws)
        left, top, w, h = self._crop(width, height, draws)
        shrink = next(s for s in (8, 4, 2, 1) if s == 1 or s * self.size <= min(w, h))
        flip = self.flip and draws.coin(0.5)
        return _View((left, top, left + w, top + h), shrink, flip, self.stages)

    def _crop(self, width: int, height: int, draws: Draws) -> tuple[int, int, int, int]:
        """Return left, top, width and height in integer pixels."""
        low, high = self.ratio
        for _ in range(_TRIES):
            area = draws.uniform(*self.area) * width * height
            ratio = math.exp(draws.uniform(math.log(low), math.log(high)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return draws.integer(width - w + 1), draws.integer(height - h + 1), w, h
        w, h = min(width, max(1, round(height * high))), min(height, max(1, round(width / low)))
        return (width - w) // 2, (height - h) // 2, w, h


def _thread_count() -> int:
    """Return how many threads decode a batch: one in a loader's worker process, which is one of several."""
    return 1 if multiprocessing.parent_process() is not None else min(8, cores())
