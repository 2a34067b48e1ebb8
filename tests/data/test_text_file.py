"""Text files and ratings as they are found: read right, or refused in one line."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtrain.core.errors import InputError
from jaxtrain.data import LabelledText, Ratings, TextWindows

TEXT = "Höre, sprach der Rabe.\n" * 60

REFUSED: dict[str, tuple[bytes, str]] = {
    "UTF-16": (TEXT.encode("utf-16"), "looks like UTF-16, and bytes of UTF-8 are read: convert it"),
    "UTF-16 without a mark": (TEXT.encode("utf-16-le"), "looks like UTF-16"),
    "UTF-32": (TEXT.encode("utf-32"), "looks like UTF-16"),
    "gzip": (gzip.compress(TEXT.encode()), "is compressed with gzip: unpack it"),
    "bzip2": (bz2.compress(TEXT.encode()), "is compressed with bzip2: unpack it"),
    "xz": (lzma.compress(TEXT.encode()), "is compressed with xz: unpack it"),
    "zip": (b"PK\x03\x04" + bytes(40), "is compressed with zip: unpack it"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("kind", ["windows", "labelled", "ratings"])
def test_what_is_no_text_is_refused(case: str, kind: str, tmp_path: Path) -> None:
    data, message = REFUSED[case]
    path, good = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_bytes(data)
    good.write_text(TEXT)
    source: Any = {
        "windows": TextWindows(context=4, file=str(path)),
        "labelled": LabelledText(length=4, files=(str(good), str(path))),
        "ratings": Ratings(file=str(path)),
    }[kind]
    with pytest.raises(InputError, match=f"^{path} {message}") as raised:
        len(source)
    assert "\n" not in str(raised.value)


def test_folders_and_empty_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for file, message in (
        ("empty", "its train split has 0 bytes, too few for one window"),
        (".", "Is a directory"),
    ):
        with pytest.raises(InputError, match=message):
            len(TextWindows(context=4, file=str(tmp_path / file)))


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_bytes_of_a_text_are_its_tokens(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
    source = TextWindows(context=8, file=str(tmp_path / "a.txt"))
    assert source.gather(np.array([0]))["tokens"].tobytes() == TEXT.encode(encoding)[:8]


def test_a_byte_order_mark_is_no_part_of_the_first_text(tmp_path: Path) -> None:
    lines = "".join(f"{i:02d}\r\n" for i in range(20))
    for name, encoding in (("a", "utf-8-sig"), ("b", "utf-8")):
        (tmp_path / name).write_bytes(lines.encode(encoding))
    source = LabelledText(length=4, files=(str(tmp_path / "a"), str(tmp_path / "b")))
    batch = source.gather(np.arange(len(source)))
    a, b = (batch["tokens"][batch["label"] == label] for label in (0, 1))
    assert set(map(bytes, a)) <= {f"{i:02d}\0\0".encode() for i in range(20)} and len(a) == len(b)


def test_nul_bytes_in_labelled_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(TEXT)
    (tmp_path / "b").write_text(TEXT.replace("Rabe", "Ra\0be"))
    with pytest.raises(InputError, match="b holds NUL bytes, and 0 is the token of the padding"):
        len(LabelledText(length=4, files=(str(tmp_path / "a"), str(tmp_path / "b"))))


RATED = [(1, 31, 2.5), (1, 1029, 3.0), (7, 1, 4.0), (610, 170875, 0.5), (2, 9, 5.0)]
# The first lines of ml-100k, ml-1m and ml-latest-small in form, not in content.
RATING_FILES = {
    "u.data": "\n".join(f"{u}\t{i}\t{r:g}\t881250949" for u, i, r in RATED) + "\n",
    "ratings.dat": "\n".join(f"{u}::{i}::{r:g}::978300760" for u, i, r in RATED) + "\n",
    "ratings.csv": "userId,movieId,rating,timestamp\r\n"
    + "\r\n".join(f"{u},{i},{r},1260759144" for u, i, r in RATED)
    + "\r\n",
    "other order": "rating, item_id, user_id\n" + "\n".join(f"{r},{i},{u}" for u, i, r in RATED),
    "byte order mark": "\ufeffuserId,movieId,rating,timestamp\n"
    + "\n".join(f"{u},{i},{r},0" for u, i, r in RATED),
    "quotes": "\n".join(f'"{u}","{i}","{r}","0"' for u, i, r in RATED),
    "quotes and names": "userId,movieId,rating\n" + "\n".join(f'"{u}","{i}", "{r}"' for u, i, r in RATED),
    "no names": "\n".join(f"{u},{i},{r},0" for u, i, r in RATED),
    "old line ends": "\r".join(f"{u}\t{i}\t{r}\t0" for u, i, r in RATED),
}


@pytest.mark.parametrize("name", RATING_FILES)
def test_every_form_of_movielens_gives_the_same_ratings(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(RATING_FILES[name].encode())
    sources = [Ratings(split, file=str(tmp_path / name), part=0.4) for split in ("train", "test")]
    batches = [source.gather(np.arange(len(source))) for source in sources]
    found = [
        row for b in batches for row in zip(*(b[k].tolist() for k in ("user", "item", "target")), strict=True)
    ]
    assert sorted(found) == sorted((u - 1, i - 1, r) for u, i, r in RATED)
    assert {k: v.dtype.name for k, v in batches[0].items()} == {
        "user": "int32",
        "item": "int32",
        "target": "float32",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "movieId,title,genres\n1,Toy Story,Comedy\n",
            r"line 1: .*; or name the columns .*, which are movieId, title, genres$",
        ),
        ("userId,movieId,rating\n1,2\n", r"line 2: 2 cells where .* separated by commas, are expected"),
        ("userId,movieId,rating\n1,2,3,4\n", r"line 2: 4 cells"),
        ("userId,movieId,rating,timestamp\n1_2,2,3,4\n", r"line 2: '1_2', '2', '3' are not two integer ids"),
        ("1::2::3::4\n1\t2\t3\t4\n", r"line 2: 1 cells where .* separated by '::'"),
        ("userId,movieId,rating\n1,2,1e300\n", r"line 2: rating 1e\+300 is too large for float32"),
        ("1,2,964982703,3\n", "line 1: rating 964982703 looks like a time: .* user,item,time,rating$"),
        ("userId,movieId,rating,timestamp\n", "holds no ratings"),
    ],
)
def test_errors_of_a_ratings_file_with_names(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(InputError, match=message) as raised:
        len(Ratings(file=str(tmp_path / "r.csv")))
    assert "\n" not in str(raised.value)
