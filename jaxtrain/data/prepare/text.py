"""Read tiny_shakespeare, imdb_reviews and movielens/100k-ratings from their original files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.core.errors import InputError
from jaxtrain.data.prepare.archives import entries
from jaxtrain.data.prepare.originals import Examples, Member

_SHAKESPEARE = Member("input.txt", 1_115_394, "6fb458f1232090904fb40fe944165e91")

# Genres are flags in u.item, in this order; class labels are numbered in the order of _GENRES.
_FLAG_NAMES = (
    "Unknown Action Adventure Animation Children Comedy Crime Documentary Drama Fantasy Film-Noir Horror "
    "Musical Mystery Romance Sci-Fi Thriller War Western"
)
_GENRE_FLAGS = _FLAG_NAMES.split()
_GENRES = [*sorted({*_GENRE_FLAGS, "IMAX"}), "(no genres listed)"]
# Occupations of u.user that TFDS renames, to share the names of the 1M data set.
_RENAMED = {
    "administrator": "clerical/admin",
    "doctor": "doctor/health care",
    "educator": "academic/educator",
    "engineer": "technician/engineer",
    "executive": "executive/managerial",
    "healthcare": "doctor/health care",
    "marketing": "sales/marketing",
    "none": "other/not specified",
    "other": "other/not specified",
    "salesman": "sales/marketing",
    "technician": "technician/engineer",
}
_SAME_NAME = "artist entertainment homemaker lawyer librarian programmer retired scientist student writer"
_UNUSED = ("customer service", "farmer", "self-employed", "tradesman/craftsman", "unemployed")
_OCCUPATIONS = sorted({*_RENAMED.values(), *_SAME_NAME.split(), *_UNUSED})
_AGES = (1, 18, 25, 35, 45, 50, 56)  # The lowest age of each group in TFDS.


def shakespeare_features() -> dict[str, Any]:
    """Return the features: one text."""
    import tensorflow_datasets as tfds

    return {"text": tfds.features.Text()}


def shakespeare(parts: Sequence[Path]) -> dict[str, Callable[[], Examples]]:
    """Return the splits, one example each: the first 90 % of the characters, the next 5 %, the last 5 %.

    Raises:
      InputError: it is another text.
    """
    data = parts[0].read_bytes()
    problem = _SHAKESPEARE.problem(data)
    if problem is not None:
        raise InputError(
            f"{parts[0]} is not tiny Shakespeare ({problem.split(': ', 1)[1]}): "
            f"to train on any other text, use --set train.file={parts[0]}"
        )
    text = data.decode()
    train, rest = text[: int(len(text) * 0.9)], text[int(len(text) * 0.9) :]
    half = int(len(rest) * 0.5)
    pieces = {"train": train, "validation": rest[:half], "test": rest[half:]}
    return {split: functools.partial(_one_example, split, piece) for split, piece in pieces.items()}


def _one_example(split: str, text: str) -> Examples:
    yield split, {"text": text}


def imdb_features() -> dict[str, Any]:
    """Return the features: a review and whether it is negative or positive."""
    import tensorflow_datasets as tfds

    return {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["neg", "pos"])}


def imdb(parts: Sequence[Path]) -> dict[str, Callable[[], Examples]]:
    """Return the splits: labelled reviews for training and testing, and unlabelled ones (label -1)."""
    return {
        "train": functools.partial(_reviews, parts[0], "train", ("neg", "pos")),
        "test": functools.partial(_reviews, parts[0], "test", ("neg", "pos")),
        "unsupervised": functools.partial(_reviews, parts[0], "train", ("unsup",)),
    }


def _reviews(archive: Path, split: str, kinds: tuple[str, ...]) -> Examples:
    for entry in entries(archive):
        parts = entry.path.parts[-3:]
        if len(parts) == 3 and parts[0] == split and parts[1] in kinds and entry.path.suffix == ".txt":
            label = -1 if parts[1] == "unsup" else parts[1]
            # The key is the path in the archive.
            yield "/".join(("aclImdb", *parts)), {"text": entry.read().strip(), "label": label}


def movielens_features() -> dict[str, Any]:
    """Return the features: a rating with its film and its user; ids are strings as in TFDS."""
    import numpy as np
    import tensorflow_datasets as tfds

    return {
        "movie_id": np.str_,
        "movie_title": np.str_,
        "movie_genres": tfds.features.Sequence(tfds.features.ClassLabel(names=_GENRES)),
        "user_id": np.str_,
        "user_rating": np.float32,
        "timestamp": np.int64,
        "user_gender": np.bool_,
        "bucketized_user_age": np.float32,
        "user_occupation_label": tfds.features.ClassLabel(names=_OCCUPATIONS),
        "user_occupation_text": np.str_,
        "user_zip_code": np.str_,
        "raw_user_age": np.float32,
    }


def movielens(parts: Sequence[Path]) -> dict[str, Callable[[], Examples]]:
    """Return the split: all ratings, with the film and the user of each.

    Raises:
      InputError: a file is missing. Malformed lines raise while iterating.
    """
    wanted, files = ("u.item", "u.user", "u.data"), {}
    for entry in entries(parts[0]):
        if entry.path.name in wanted:
            files[entry.path.name] = entry.read()
    missing = [name for name in wanted if name not in files]
    if missing:
        raise InputError(f"{parts[0]}: {', '.join(missing)} is missing, and movielens/100k-ratings needs it")
    return {"train": functools.partial(_ratings, parts[0], files)}


def _ratings(archive: Path, files: Mapping[str, bytes]) -> Examples:
    def item(number: str, title: str, *rest: str) -> tuple[str, dict[str, Any]]:
        genres = [name for name, flag in zip(_GENRE_FLAGS, rest[3:], strict=True) if flag == "1"]
        return number, {"movie_id": number, "movie_title": title, "movie_genres": genres}

    def user(number: str, age: str, gender: str, job: str, code: str) -> tuple[str, dict[str, Any]]:
        return number, {
            "user_id": number,
            "raw_user_age": float(age),
            "bucketized_user_age": float(max((a for a in _AGES if a <= int(age)), default=1)),
            "user_gender": gender == "M",
            "user_occupation_label": job if job in _SAME_NAME.split() else _RENAMED[job],
            "user_occupation_text": job,
            "user_zip_code": code,
        }

    items = dict(_rows(f"{archive}: u.item", files["u.item"], "|", item))
    users = dict(_rows(f"{archive}: u.user", files["u.user"], "|", user))

    def rating(by: str, of: str, value: str, when: str) -> dict[str, Any]:
        return {"user_rating": float(value), "timestamp": int(when), **users[by], **items[of]}

    # The key is the number of the line, from 0.
    yield from enumerate(_rows(f"{archive}: u.data", files["u.data"], "\t", rating))


def _rows(where: str, data: bytes, separator: str, parse: Callable[..., Any]) -> Iterator[Any]:
    for number, line in enumerate(data.splitlines(), 1):
        try:
            yield parse(*line.decode("latin-1").strip().split(separator))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{where} line {number} differs from the original ml-100k.zip ({error})"
            ) from error
