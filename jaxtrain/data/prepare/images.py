"""Examples of the data sets of photographs, from their original archives, one image at a time.

Image files are kept byte for byte. Where the stock TFDS builders encode a few anew (12 pets, 23 of ImageNet,
which are CMYK, PNG or GIF files named .jpg), ours are the originals, which the reader turns into RGB.
"""

from __future__ import annotations

import functools
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.data.prepare.archives import entries
from jaxtrain.data.prepare.originals import Examples

_BREED_NAMES = (
    "Abyssinian american_bulldog american_pit_bull_terrier basset_hound beagle Bengal Birman Bombay boxer "
    "British_Shorthair chihuahua Egyptian_Mau english_cocker_spaniel english_setter german_shorthaired "
    "great_pyrenees havanese japanese_chin keeshond leonberger Maine_Coon miniature_pinscher newfoundland "
    "Persian pomeranian pug Ragdoll Russian_Blue saint_bernard samoyed scottish_terrier shiba_inu Siamese "
    "Sphynx staffordshire_bull_terrier wheaten_terrier yorkshire_terrier"
)
_BREEDS = _BREED_NAMES.split()
_LISTS = {"train": "trainval.txt", "test": "test.txt"}
_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


def pets_features() -> dict[str, Any]:
    """A photograph, its breed and species, the outline and the box of the head."""
    import tensorflow_datasets as tfds

    return {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=_BREEDS),
        "species": tfds.features.ClassLabel(names=["Cat", "Dog"]),
        "file_name": tfds.features.Text(),
        "segmentation_mask": tfds.features.Image(shape=(None, None, 1), use_colormap=True),
        "head_bbox": tfds.features.BBoxFeature(),
    }


def pets(parts: Sequence[Path]) -> dict[str, Callable[[], Examples]]:
    """The photographs that the lists of the annotations name. Holds the annotations, 20 MB, in memory.

    Raises:
      InputError: a list or an outline is missing, or not as it should be.
    """
    images, annotations = parts
    files = {e.path.name: e.read() for e in entries(annotations) if e.path.suffix in (".txt", ".png", ".xml")}
    splits: dict[str, Callable[[], Examples]] = {}
    for split, name in _LISTS.items():
        if name not in files:
            raise InputError(f"{annotations}: {name} is not in it, and oxford_iiit_pet needs it")
        rows = dict(
            _pet(f"{annotations}: {name} line {number}", line.split(), files)
            for number, line in enumerate(files[name].decode("utf-8", "replace").splitlines(), 1)
            if line.strip()
        )
        splits[split] = functools.partial(_pictures, images, rows, f"{name} of {annotations}")
    return splits


def _pet(where: str, row: Sequence[str], files: Mapping[str, bytes]) -> tuple[str, dict[str, Any]]:
    """One line of a list, ``name breed species number-within-species``, as an example without its image."""
    try:
        name, label, species = row[0], int(row[1]) - 1, int(row[2]) - 1
    except (IndexError, ValueError) as error:
        raise InputError(f"{where} is not as in the original: {' '.join(row)[:80]!r}") from error
    if not (0 <= label < len(_BREEDS) and 0 <= species < 2):
        raise InputError(
            f"{where}: breed {row[1]} is not in 1..{len(_BREEDS)} or species {row[2]} not in 1..2"
        )
    if f"{name}.png" not in files:
        raise InputError(f"{where}: trimaps/{name}.png is not in the annotations")
    return f"{name}.jpg", {
        "label": label,
        "species": species,
        "file_name": f"{name}.jpg",
        "segmentation_mask": files[f"{name}.png"],
        "head_bbox": _box(f"{where}: xmls/{name}.xml", files.get(f"{name}.xml")),
    }


def _box(where: str, xml: bytes | None) -> np.ndarray:
    """``[ymin, xmin, ymax, xmax]`` as parts of height and width; zeros where nobody drew one."""
    if xml is None:  # As for all test images.
        return np.zeros(4)
    try:
        root = ET.fromstring(xml)
        height, width, *box = (
            float(root.findtext(path, ""))
            for path in (
                "size/height",
                "size/width",
                *(f"object/bndbox/{key}" for key in ("ymin", "xmin", "ymax", "xmax")),
            )
        )
    except (ET.ParseError, ValueError) as error:
        raise InputError(f"{where} holds no box of a head ({error})") from error
    top, left, bottom, right = box
    if not (0 <= top <= bottom <= height and 0 <= left <= right <= width and height * width):
        raise InputError(f"{where}: the box {box} is not inside the image")
    return np.array(box) / (height, width, height, width)


def _pictures(images: Path, rows: Mapping[str, Mapping[str, Any]], listed: str) -> Examples:
    missing = dict.fromkeys(rows)
    for entry in entries(images):
        name = entry.path.name
        if name in rows:
            missing.pop(name, None)
            yield name, {"image": entry.read(), **rows[name]}
    if missing:
        raise InputError(f"{images}: {next(iter(missing))} is not in it, and {listed} names it")


def imagenet_features() -> dict[str, Any]:
    """A photograph and its synset, one of 1,000."""
    import tensorflow_datasets as tfds

    return {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=_shipped("labels.txt")),
        "file_name": tfds.features.Text(),
    }


def imagenet(parts: Sequence[Path]) -> dict[str, Callable[[], Examples]]:
    """The training images by their synset; the validation images by their number."""
    return {
        "train": functools.partial(_by_synset, parts[0]),
        "validation": functools.partial(_by_number, parts[1]),
    }


def _shipped(name: str) -> list[str]:
    """Lines of a list that comes with TFDS: the synsets, or those of the validation images in order."""
    import tensorflow_datasets as tfds

    path = Path(tfds.core.tfds_path(f"datasets/imagenet2012/{name}"))
    return path.read_text().split()


def _by_synset(archive: Path) -> Examples:
    synsets = set(_shipped("labels.txt"))
    for entry in entries(archive):
        # A tar of one synset; or an unpacked one, a folder of that name.
        inner = entry.entries() if entry.path.suffix == ".tar" else iter((entry,))
        synset = entry.path.stem if entry.path.suffix == ".tar" else entry.path.parent.name
        for image in inner:
            if image.path.suffix != ".JPEG":
                continue
            if synset not in synsets:
                raise InputError(f"{entry.where}: {entry.path}: {synset!r} is no synset of ILSVRC2012")
            name = image.path.name
            yield name, {"image": image.read(), "label": synset, "file_name": name}


def _by_number(archive: Path) -> Examples:
    labels = _shipped("validation_labels.txt")
    for entry in entries(archive):
        match = _VALIDATION.fullmatch(entry.path.name)
        if match is None:
            continue
        number = int(match[1])
        if not 1 <= number <= len(labels):
            raise InputError(f"{entry.where}: {entry.path.name} is not among the {len(labels)} known ones")
        yield match[0], {"image": entry.read(), "label": labels[number - 1], "file_name": match[0]}
