"""Photographs of various sizes as square arrays, decoded and cropped on the host.

A loader with ``workers`` does this in processes of its own. The pixels are a pure function of the data set
and of ``(seed, epoch, example id)``, whatever the batch, the workers or the step that a run resumes at.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import io
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.process import cores
from jaxtrain.core.text import first_line
from jaxtrain.data.randaugment import Draws, HostStage
from jaxtrain.data.tfds import TFDS

if TYPE_CHECKING:
    from PIL.Image import Image

_TRIES = 10


class _View(NamedTuple):
    """Which part of a picture is looked at, and how."""

    box: tuple[float, float, float, float]
    """Left, top, right and bottom in pixels of the stored picture."""
    shrink: int = 1
    """A JPEG may be decoded to this fraction of its size."""
    flip: bool = False
    stages: tuple[HostStage, ...] = ()


@dataclasses.dataclass(frozen=True)
class Images:
    """A TFDS split of pictures of any size, each as its centre, ``size`` x ``size``. Nothing is random.

    The centred square whose side is ``crop`` times the shorter side of the picture is resized: in one step
    what resizing the shorter side to ``size / crop`` and cutting the centre does. Pictures are resized by
    Pillow's bilinear filter, which widens when it shrinks (antialiasing), and masks to the nearest pixel.

    Grey, palette and CMYK pictures become RGB; an alpha channel is dropped. EXIF orientation is ignored, as
    TFDS ignores it.

    With ``mask``, the label is a map of classes, one for each pixel: a segmentation is scored on the same
    square that a classification sees, so use ``crop=1.0`` there; what lies outside the square of a wider or
    taller picture is not scored.

    Attributes:
      source: the split; ``image`` must be one of its features, and ``label`` or ``mask`` another.
      size: side of the result in pixels, at least 1.
      crop: in (0, 1].
      image: the feature that holds the picture.
      label: the feature that holds the class, unless there is a mask.
      mask: the feature that holds a png of one uint8 channel, as large as the picture.
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
                f"{kind}(source={self.source!r}): it reads a TFDS split; a data.Subset goes around it"
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
        """Whether the data set lies ready on disk."""
        return self.source.prepared()

    @property
    def classes(self) -> int | None:
        """The number of classes of the feature ``label``; None where that is not the label."""
        return self.source.classes if self._is_standard() else None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes in label order; None as for ``classes``."""
        return self.source.class_names if self._is_standard() else None

    def __len__(self) -> int:
        return len(self.source)

    def example(self) -> dict[str, np.ndarray]:
        """Zeros of one example's shapes, leading axis 1; reads nothing."""
        return self._zeros(1)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The centre of each picture.

        Args:
          indices: int [k], as for ``TFDS.gather``.

        Returns:
          ``image: uint8 [k, size, size, 3]`` and ``label: int32 [k]``, with a mask ``[k, size, size]``.

        Raises:
          InputError: no such feature, one of another kind, a mask of another size than its picture, or a
            mask value below ``offset``.
          RunError: a picture or mask is damaged.
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
            drawn = None if draws is None else draws[row]
            index = int(indices[row])
            where = f"{self.source.place(index)}, example {index} of split {self.source.split}"
            where = f"data set {self.name}: {where}"
            found = self._example(where, raw[self.image][row], raw[target][row], drawn)
            batch["image"][row], batch["label"][row] = found

        threads = _threads()
        if threads == 1 or len(indices) < 2:
            for row in range(len(indices)):
                fill(row)
        else:  # Pillow decodes and resizes without the GIL.
            with concurrent.futures.ThreadPoolExecutor(threads) as pool:
                list(pool.map(fill, range(len(indices))))
        return batch

    def _example(self, where: str, image: Any, target: Any, draws: Any) -> tuple[Any, Any]:
        from PIL.Image import Resampling, Transpose

        picture = _opened(image, where, self.image)
        size = picture.size
        mask = None if self.mask is None else _opened(target, where, self.mask)
        if mask is None and type(target) is not int:
            raise InputError(f"{where}: feature {self.label!r} is no whole number, so it is no class label")
        if mask is not None and mask.size != size:
            raise InputError(
                f"{where}: its mask {self.mask!r} has {mask.width} x {mask.height} pixels and its picture "
                f"{size[0]} x {size[1]}: they must agree"
            )
        view = self._view(*size, draws)
        picture = _rgb(picture, view.shrink, where, self.image)

        def cut(whole: Image, filter_: Resampling) -> Image:
            shrunk = view.shrink if whole.size != size else 1
            box = tuple(edge / shrunk for edge in view.box)
            part = whole.resize((self.size, self.size), filter_, box=box)  # type: ignore[arg-type]
            return part.transpose(Transpose.FLIP_LEFT_RIGHT) if view.flip else part

        picture = cut(picture, Resampling.BILINEAR)
        for stage in view.stages:
            picture = stage(picture, draws)
            if picture.mode != "RGB" or picture.size != (self.size, self.size):
                raise InputError(f"{stage}: it must return an RGB picture of the size that it was given")
        if mask is None:
            return np.asarray(picture), target
        mask = _values(mask, where, self.mask, self.offset)
        return np.asarray(picture), np.asarray(cut(mask, Resampling.NEAREST), np.int32) - self.offset


@dataclasses.dataclass(frozen=True)
class RandomCrops(Images):
    """As ``Images``, with another random crop of each picture in every epoch for training.

    A crop has a random share of the picture's area and a random ratio of width to height (uniform in its
    logarithm), and is stretched to the square. After ten draws that do not fit, it is the largest centred
    one of an allowed ratio (Szegedy et al. 2015, arXiv:1409.4842, section 6, with the ratio and the fallback
    that have become usual). ``gather`` and what is evaluated stay as they are in ``Images``.

    A JPEG whose crop has at least twice the size of the result is decoded at a half, a quarter or an
    eighth of its size, which is faster and averages pixels as the resizing would.

    Attributes:
      area: the least and the greatest share of the area, in (0, 1].
      ratio: the least and the greatest width / height, above 0.
      flip: mirror half of the crops left to right.
      stages: what else is done to each crop, such as ``RandAugment()``; not beside a mask, which would not
        follow.

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
                f"RandomCrops(area={self.area}, ratio={self.ratio}): each is (least, greatest), area in "
                "(0, 1] and ratio above 0"
            )
        if self.stages and self.mask is not None:
            raise InputError(
                "RandomCrops has stages and a mask: stages would move pixels away from their mask, so "
                "leave one of them out"
            )

    def draw(self, indices: np.ndarray, epochs: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """A random crop of each picture: a pure function of its arguments, example by example.

        Args:
          indices: int [k], as for ``gather``.
          epochs: int [k], the pass that each example is seen in.
          seed: the run's.

        Returns, raises: as ``gather``.
        """
        indices = np.asarray(indices)
        places = zip(indices.tolist(), np.asarray(epochs).tolist(), strict=True)
        return self._batch(indices, [Draws(seed, epoch, example) for example, epoch in places])

    def _view(self, width: int, height: int, draws: Draws | None) -> _View:
        if draws is None:
            return super()._view(width, height, draws)
        left, top, w, h = self._crop(width, height, draws)
        shrink = next(s for s in (8, 4, 2, 1) if s == 1 or s * self.size <= min(w, h))
        flip = self.flip and draws.coin(0.5)
        return _View((left, top, left + w, top + h), shrink, flip, self.stages)

    def _crop(self, width: int, height: int, draws: Draws) -> tuple[int, int, int, int]:
        """Left, top, width and height, in whole pixels."""
        low, high = self.ratio
        for _ in range(_TRIES):
            area = draws.uniform(*self.area) * width * height
            ratio = math.exp(draws.uniform(math.log(low), math.log(high)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return draws.integer(width - w + 1), draws.integer(height - h + 1), w, h
        w, h = min(width, max(1, round(height * high))), min(height, max(1, round(width / low)))
        return (width - w) // 2, (height - h) // 2, w, h


def _threads() -> int:
    """A loader's worker is one of several processes already: its batch is decoded in its own thread."""
    return 1 if multiprocessing.parent_process() is not None else min(8, cores())


def _opened(data: Any, where: str, feature: str) -> Image:
    """The picture of a file, of which only the head has been read."""
    from PIL import Image

    if not isinstance(data, bytes):
        raise InputError(f"{where}: feature {feature!r} holds no picture")
    with _decoding(where, feature):
        return Image.open(io.BytesIO(data))


def _rgb(picture: Image, shrink: int, where: str, feature: str) -> Image:
    if picture.mode[0] in "IF":
        raise InputError(f"{where}: feature {feature!r} has more than 8 bits a pixel, which is not read")
    with _decoding(where, feature):
        if shrink > 1:
            picture.draft(None, (picture.width // shrink, picture.height // shrink))  # only a JPEG obeys
        picture.load()
        if "transparency" in picture.info:  # Pillow warns where such a palette becomes RGB at once.
            picture = picture.convert("RGBA")
        return picture.convert("RGB")


def _values(mask: Image, where: str, feature: str | None, offset: int) -> Image:
    """The numbers of a mask as a grey picture; those of a palette are the classes, not its colours."""
    from PIL import Image

    if mask.mode not in ("L", "P"):
        raise InputError(f"{where}: its mask {feature!r} is {mask.mode}, and must be one uint8 channel")
    with _decoding(where, str(feature)):
        values = np.asarray(mask)
    least = int(values.min())
    if least < offset:
        raise InputError(f"{where}: its mask {feature!r} holds {least}, which is below offset={offset}")
    return Image.fromarray(values)


@contextlib.contextmanager
def _decoding(where: str, feature: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Each of Pillow's formats raises kinds of its own.
        raise RunError(
            f"{where}: feature {feature!r} cannot be decoded ({first_line(error)}): prepare the data set "
            "again, or leave the example out with data.Subset"
        ) from error
