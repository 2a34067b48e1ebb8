"""Read oxford_iiit_pet and imagenet2012 from their original archives, one image at a time.

Image files are stored byte for byte. The stock TFDS builders re-encode a few (12 pets, 23 of ImageNet, which
are CMYK, PNG or GIF files named .jpg); here they stay the originals, which the reader converts to RGB.
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
_SPLIT_FILES = {"train": "trainval.txt", "test": "test.txt"}
_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


def pets_features() -> dict[str, Any]:
    """Return the features: a photograph, its breed and species, the segmentation and the box of the head."""
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
    """Return the splits: the photographs named in the annotations, which (20 MB) are read into memory.

    Raises:
      InputError: a list or a mask is missing or malformed.
    """
    images, annotations = parts
    files = {e.path.name: e.read() for e in entries(annotations) if e.path.suffix in (".txt", ".png", ".xml")}
    splits: dict[str, Callable[[], Examples]] = {}
    for split, name in _SPLIT_FILES.items():
        if name not in files:
            raise InputError(f"{annotations}: {name} is missing, and oxford_iiit_pet needs it")
        rows = dict(
            _parse_pet(f"{annotations}: {name} line {number}", line.split(), files)
            for number, line in enumerate(files[name].decode("utf-8", "replace").splitlines(), 1)
            if line.strip()
        )
        splits[split] = functools.partial(_image_examples, images, rows, f"{name} of {annotations}")
    return splits


def _parse_pet(where: str, row: Sequence[str], files: Mapping[str, bytes]) -> tuple[str, dict[str, Any]]:
    """Parse a line, ``name breed species number-within-species``, to an example without its image."""
    try:
        name, label, species = row[0], int(row[1]) - 1, int(row[2]) - 1
    except (IndexError, ValueError) as error:
        raise InputError(f"{where} differs from the original: {' '.join(row)[:80]!r}") from error
    if not (0 <= label < len(_BREEDS) and 0 <= species < 2):
        raise InputError(
            f"{where}: breed {row[1]} is not in 1..{len(_BREEDS)} or species {row[2]} not in 1..2"
        )
    if f"{name}.png" not in files:
        raise InputError(f"{where}: trimaps/{name}.png is missing from the annotations")
    return f"{name}.jpg", {
        "label": label,
        "species": species,
        "file_name": f"{name}.jpg",
        "segmentation_mask": files[f"{name}.png"],
        "head_bbox": _parse_head_box(f"{where}: xmls/{name}.xml", files.get(f"{name}.xml")),
    }


def _parse_head_box(where: str, xml: bytes | None) -> np.ndarray:
    """Return ``[ymin, xmin, ymax, xmax]`` relative to height and width; zeros if there is no box."""
    if xml is None:  # Test images have none.
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
        raise InputError(f"{where} has no valid head box ({error})") from error
    top, left, bottom, right = box
    if not (0 <= top <= bottom <= height and 0 <= left <= right <= width and height * width):
        raise InputError(f"{where}: the box {box} is not inside the image")
    return np.array(box) / (height, width, height, width)


def _image_examples(images: Path, rows: Mapping[str, Mapping[str, Any]], list_name: str) -> Examples:
    missing = dict.fromkeys(rows)
    for entry in entries(images):
        name = entry.path.name
        if name in rows:
            missing.pop(name, None)
            yield name, {"image": entry.read(), **rows[name]}
    if missing:
        raise InputError(f"{images}: {next(iter(missing))} is missing, and {list_name} names it")


def imagenet_features() -> dict[str, Any]:
    """Return the features: a photograph and its synset, one of 1,000."""
    import tensorflow_datasets as tfds

    return {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=_tfds_list("labels.txt")),
        "file_name": tfds.features.Text(),
    }


def imagenet(parts: Sequence[Path]) -> dict[str, Callable[[], Examples]]:
    """Return the splits: training images labelled by synset, validation images by number."""
    return {
        "train": functools.partial(_by_synset, parts[0]),
        "validation": functools.partial(_by_number, parts[1]),
    }


def _tfds_list(name: str) -> list[str]:
    """Read a list that comes with TFDS: the synsets, or the labels of the validation images in order."""
    import tensorflow_datasets as tfds

    path = Path(tfds.core.tfds_path(f"datasets/imagenet2012/{name}"))
    return path.read_text().split()


def _by_synset(archive: Path) -> Examples:
    synsets = set(_tfds_list("labels.txt"))
    for entry in entries(archive):
        # The archive holds a tar per synset, or a folder per synset if it was extracted.
        inner = entry.entries() if entry.path.suffix == ".tar" else iter((entry,))
        synset = entry.path.stem if entry.path.suffix == ".tar" else entry.path.parent.name
        for image in inner:
            if image.path.suffix != ".JPEG":
                continue
            if synset not in synsets:
                raise InputError(f"{entry.where}: {entry.path}: {synset!r} is not a synset of ILSVRC2012")
            name = image.path.name
            yield name, {"image": image.read(), "label": synset, "file_name": name}


def _by_number(archive: Path) -> Examples:
    labels = _tfds_list("validation_labels.txt")
    for entry in entries(archive):
        match = _VALIDATION.fullmatch(entry.path.name)
        if match is None:
            continue
        number = int(match[1])
        if not 1 <= number <= len(labels):
            raise InputError(
                f"{entry.where}: {entry.path.name} is not one of the {len(labels)} validation images"
            )
        yield match[0], {"image": entry.read(), "label": labels[number - 1], "file_name": match[0]}
