"""The data sets whose archives are streamed, one example at a time: ``COLLECTIONS``.

Features, keys and versions are those of the stock TFDS builders, so a copy prepared here and one prepared by
TensorFlow hold the same examples in the same order.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.core.errors import InputError
from jaxtrain.data.prepare import images, text
from jaxtrain.data.prepare.originals import DataSetInfo, Examples


@dataclasses.dataclass(frozen=True)
class Part:
    """One file of an original distribution.

    Attributes:
      names: its file names, the original first; a folder of such a name is the extracted archive.
      url: where to download it; None: only by hand.
      size, sha256: of the original, checked after a download; with ``--from``, subsets and repacked archives
        are accepted.
    """

    names: tuple[str, ...]
    url: str | None = None
    size: int | None = None
    sha256: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collection(DataSetInfo):
    """A data set as published, and how its examples are read.

    Attributes:
      parts: its files.
      features: TFDS features by name.
      splits: from the paths of the parts, a function per split that returns an iterator of examples.
      layout: per split, where the original has its examples, for messages.
      by_hand: how to get files that may not be downloaded automatically.
    """

    parts: tuple[Part, ...]
    features: Callable[[], Mapping[str, Any]]
    splits: Callable[[Sequence[Path]], Mapping[str, Callable[[], Examples]]]
    layout: Mapping[str, str]
    by_hand: str = ""

    def find(self, source: Path) -> tuple[Path, ...]:
        """Return the path of each part in ``source``: a file, a folder that holds them, or an extracted one.

        Raises:
          InputError: a part is missing.
        """
        if not source.exists():
            raise InputError(f"{source}: no such file or folder")
        if len(self.parts) == 1 and source.is_file():
            return (source,)
        folder = source.parent if source.is_file() else source
        return tuple(self._find(part, folder) for part in self.parts)

    def _find(self, part: Part, folder: Path) -> Path:
        if folder.name in part.names:
            return folder
        for parent in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
            for name in part.names:
                if (parent / name).exists():
                    return parent / name
        raise InputError(
            f"{folder}: {' or '.join(part.names)} is missing, and {self.full} needs it"
            + (f": {self.by_hand}" if self.by_hand else "")
        )

    def examples(self, parts: Sequence[Path]) -> Mapping[str, Callable[[], Examples]]:
        """Return the splits, each with at least one example.

        Raises:
          InputError: a split has none.
        """
        splits = self.splits(parts)
        for split, make in splits.items():
            with contextlib.closing(make()) as examples:
                if next(examples, None) is None:
                    raise InputError(
                        f"{' and '.join(map(str, parts))}: split {split} of {self.full} would be empty: "
                        f"no {self.layout[split]} found: give the original files"
                    )
        return splits


def find_collection(base: str, config: str | None) -> Collection | None:
    """Return the collection that TFDS means by ``base/config``, or by ``base``; None if there is none.

    >>> find_collection("imdb_reviews", None).full
    'imdb_reviews/plain_text'
    >>> find_collection("movielens", None)  # TFDS means 25m-ratings.
    """
    for collection in COLLECTIONS.values():
        if collection.name == base and collection.config == (config or collection.default_config):
            return collection
    return None


_PETS = "https://thor.robots.ox.ac.uk/~vgg/data/pets/"

COLLECTIONS: dict[str, Collection] = {
    collection.full: collection
    for collection in (
        Collection(
            name="tiny_shakespeare",
            version="1.0.0",
            description="40,000 lines of Shakespeare as one text, cut in three: 90 %, 5 % and 5 %.",
            homepage="https://github.com/karpathy/char-rnn",
            citation="@misc{karpathy2015charrnn, author={Karpathy, Andrej}, title={char-rnn}, year={2015}}",
            supervised=None,
            parts=(
                Part(
                    ("input.txt", "tinyshakespeare.txt"),
                    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                    1_115_394,
                    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                ),
            ),
            features=text.shakespeare_features,
            splits=text.shakespeare,
            layout={},
        ),
        Collection(
            name="imdb_reviews",
            config="plain_text",
            default_config="plain_text",
            version="1.0.0",
            description="50,000 film reviews, half negative and half positive, and 50,000 without a label.",
            homepage="http://ai.stanford.edu/~amaas/data/sentiment/",
            citation=(
                "@inproceedings{maas2011learning, title={Learning Word Vectors for Sentiment Analysis}, "
                "author={Maas, Andrew L. and Daly, Raymond E. and Pham, Peter T. and Huang, Dan and "
                "Ng, Andrew Y. and Potts, Christopher}, booktitle={ACL-HLT}, pages={142--150}, year={2011}}"
            ),
            supervised=("text", "label"),
            parts=(
                Part(
                    ("aclImdb_v1.tar.gz", "aclImdb_v1.tar", "aclImdb"),
                    "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
                    84_125_825,
                    "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
                ),
            ),
            features=text.imdb_features,
            splits=text.imdb,
            layout={
                "train": "aclImdb/train/pos/*.txt or neg/*.txt",
                "test": "aclImdb/test/pos/*.txt or neg/*.txt",
                "unsupervised": "aclImdb/train/unsup/*.txt",
            },
        ),
        Collection(
            name="movielens",
            config="100k-ratings",
            default_config="25m-ratings",
            version="0.1.1",
            description="100,000 ratings of 1,682 films by 943 people, who rated at least 20 each.",
            homepage="https://grouplens.org/datasets/movielens/",
            citation=(
                "@article{harper2015movielens, author={Harper, F. Maxwell and Konstan, Joseph A.}, "
                "title={The MovieLens Datasets: History and Context}, journal={ACM Trans. Interact. "
                "Intell. Syst.}, volume={5}, number={4}, year={2015}}"
            ),
            supervised=None,
            parts=(
                Part(
                    ("ml-100k.zip", "ml-100k"),
                    "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
                    4_924_029,
                    "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
                ),
            ),
            features=text.movielens_features,
            splits=text.movielens,
            layout={"train": "line in u.data"},
        ),
        Collection(
            name="oxford_iiit_pet",
            version="4.0.0",
            description="7,349 photographs of cats and dogs of 37 breeds, with the outline of each animal.",
            homepage="https://www.robots.ox.ac.uk/~vgg/data/pets/",
            citation=(
                "@inproceedings{parkhi2012cats, author={Parkhi, O. M. and Vedaldi, A. and Zisserman, A. "
                "and Jawahar, C. V.}, title={Cats and Dogs}, booktitle={CVPR}, year={2012}}"
            ),
            parts=(
                Part(
                    ("images.tar.gz", "images.tar", "images"),
                    _PETS + "images.tar.gz",
                    791_918_971,
                    "67195c5e1c01f1ab5f9b6a5d22b8c27a580d896ece458917e61d459337fa318d",
                ),
                Part(
                    ("annotations.tar.gz", "annotations.tar", "annotations"),
                    _PETS + "annotations.tar.gz",
                    19_173_078,
                    "52425fb6de5c424942b7626b428656fcbd798db970a937df61750c0f1d358e91",
                ),
            ),
            features=images.pets_features,
            splits=images.pets,
            layout={
                "train": "images/*.jpg that annotations/trainval.txt names",
                "test": "images/*.jpg that annotations/test.txt names",
            },
        ),
        Collection(
            name="imagenet2012",
            version="5.1.0",
            description="1.28 million photographs of 1,000 kinds of things (ILSVRC 2012).",
            homepage="https://image-net.org/",
            citation=(
                "@article{russakovsky2015imagenet, author={Olga Russakovsky and others}, title={ImageNet "
                "Large Scale Visual Recognition Challenge}, journal={IJCV}, volume={115}, number={3}, "
                "pages={211--252}, year={2015}}"
            ),
            parts=(
                Part(("ILSVRC2012_img_train.tar", "ILSVRC2012_img_train", "train")),
                Part(("ILSVRC2012_img_val.tar", "ILSVRC2012_img_val", "val")),
            ),
            features=images.imagenet_features,
            splits=images.imagenet,
            layout={
                "train": "n01440764.tar that holds *.JPEG",
                "validation": "ILSVRC2012_val_*.JPEG",
            },
            by_hand=(
                "register at https://image-net.org/download-images to get ILSVRC2012_img_train.tar and "
                "ILSVRC2012_img_val.tar"
            ),
        ),
    )
}
