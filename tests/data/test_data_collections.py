"""Data sets streamed from archives: synthetic archives in the original layouts, and two real files."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures_data import real_data
from PIL import Image

from jaxtrain.core.errors import InputError
from jaxtrain.data.prepare import prepare, tables, writer
from jaxtrain.data.prepare.catalog import COLLECTIONS
from jaxtrain.data.prepare.tables import table_file
from jaxtrain.data.tfds import TFDS

# Three real synsets: the 1st, the 2nd and the 1,000th label.
SYNSETS = ("n01440764", "n01443537", "n15075141")


def tar(files: Mapping[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def picture(i: int, mode: str = "RGB", form: str = "JPEG") -> bytes:
    """Encode a random image whose size depends on ``i``."""
    shape = (12 + i, 20 + 2 * i, *{"RGB": (3,), "CMYK": (4,), "L": ()}[mode])
    pixels = np.random.default_rng(i).integers(0, 256, shape, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode=None if mode != "CMYK" else "CMYK").save(buffer, form)
    return buffer.getvalue()


def imdb_files() -> dict[str, bytes]:
    files = {
        f"aclImdb/{split}/{kind}/{i}_{rating}.txt": f"  {split} {kind} {i}<br />d\u00e9j\u00e0 vu \n".encode()
        for split in ("test", "train")
        for kind, rating in (("neg", 2), ("pos", 9))
        for i in range(5)
    }
    files |= {f"aclImdb/train/unsup/{i}_0.txt": b"unlabelled %d" % i for i in range(3)}
    files["aclImdb/train/pos/._0_9.txt"] = b"what a Mac leaves"
    return files | {"aclImdb/train/urls_pos.txt": b"http", "aclImdb/README": b"x", "aclImdb/imdb.vocab": b"x"}


def movielens_files() -> dict[str, bytes]:
    items = (
        "1|Toy Story (1995)|01-Jan-1995||http://a|0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0",
        "2|Caf\u00e9 (1994)|01-Jan-1994||http://b|0|1|0|0|0|0|0|0|0|0|1|0|0|0|0|1|1|0|1",
        "3|unknown||||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0",
    )
    users = (
        "1|24|M|technician|85711",
        "2|0|F|none|T8H1N",
        "3|56|F|writer|94043",
        "4|49|M|administrator|9",
    )
    data = ("1\t2\t3\t881250949", "3\t1\t5\t891717742", "2\t3\t1\t878887116", "4\t1\t4\t874965758")
    return {
        "ml-100k/u.data": "\n".join(data).encode() + b"\n",
        "ml-100k/u.item": "\n".join(items).encode("latin-1") + b"\n",
        "ml-100k/u.user": "\n".join(users).encode() + b"\n",
        "ml-100k/README": b"x",
        "ml-100k/ua.base": b"x",
    }


PETS = {"Abyssinian_1": (1, 1), "beagle_12": (5, 2), "yorkshire_terrier_3": (37, 2), "Bombay_7": (8, 1)}


def pets_files() -> tuple[dict[str, bytes], dict[str, bytes]]:
    names = list(PETS)
    forms = (("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"))  # Some .jpg are PNG.
    images = {f"images/{n}.jpg": picture(i, *forms[i]) for i, n in enumerate(names)}
    images |= {"images/Abyssinian_100.mat": b"junk", "images/not_listed_1.jpg": b"junk"}
    lines = [f"{n} {label} {species} 1" for n, (label, species) in PETS.items()]
    notes = {
        "annotations/README": b"x",
        "annotations/list.txt": b"#Image CLASS-ID SPECIES BREED ID\n",
        "annotations/trainval.txt": ("\n".join(lines[:2]) + "\n").encode(),
        "annotations/test.txt": ("\n".join(lines[2:]) + "\n").encode(),
    }
    for i, name in enumerate(names):
        notes[f"annotations/trimaps/._{name}.png"] = b"what a Mac leaves"
        notes[f"annotations/trimaps/{name}.png"] = picture(i, "L", "PNG")
    notes["annotations/xmls/Abyssinian_1.xml"] = (
        b"<annotation><size><width>20</width><height>10</height></size><object><name>cat</name><bndbox>"
        b"<xmin>5</xmin><ymin>1</ymin><xmax>15</xmax><ymax>9</ymax></bndbox></object></annotation>"
    )
    return images, notes


def imagenet_files() -> tuple[dict[str, dict[str, bytes]], dict[str, bytes]]:
    modes = ("RGB", "L", "CMYK")
    train = {
        synset: {f"{synset}_{10 * k + i}.JPEG": picture(3 * i + k, modes[k]) for i in range(3)}
        for k, synset in enumerate(SYNSETS)
    }
    valid = {f"ILSVRC2012_val_{i:08d}.JPEG": picture(i % 7) for i in (1, 2, 50_000)}
    return train, valid


def originals(name: str, folder: Path) -> Path:
    """Write synthetic original archives of data set ``name``."""
    if name == "imdb_reviews/plain_text":
        return write(folder, {"aclImdb_v1.tar.gz": tar(imdb_files(), "w:gz")})
    if name == "movielens/100k-ratings":
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / "ml-100k.zip", "w") as archive:
            for path, data in movielens_files().items():
                archive.writestr(path, data)
        return folder
    if name == "oxford_iiit_pet":
        images, notes = pets_files()
        # The first is not gzipped, whatever its name says.
        return write(folder, {"images.tar.gz": tar(images), "annotations.tar.gz": tar(notes, "w:gz")})
    if name == "imagenet2012":
        train, valid = imagenet_files()
        train_tar = tar({f"{synset}.tar": tar(files) for synset, files in train.items()})
        return write(folder, {"ILSVRC2012_img_train.tar": train_tar, "ILSVRC2012_img_val.tar": tar(valid)})
    return write(folder, {"input.txt": (real_data("text") / "tinyshakespeare.txt").read_bytes()})


MADE = [name for name in COLLECTIONS if name != "tiny_shakespeare"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``prepared(name)``: the folder of a data set, prepared once from synthetic archives."""
    root = tmp_path_factory.mktemp("prepared")

    def make(name: str) -> Path:
        if not TFDS(name, data_dir=str(root)).prepared():
            prepare(name, data_dir=root, source=originals(name, root / "in" / name))
        return prepare(name, data_dir=root)

    return make


def examples(folder: Path, split: str) -> list[dict[str, Any]]:
    """Read a split with TFDS itself, with images as the stored bytes."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder, file_format="array_record")
    skip = {
        key: tfds.decode.SkipDecoding()
        for key, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    return list(builder.as_data_source(split, decoders=skip))


def stock_builder(name: str) -> Any:
    import tensorflow_datasets as tfds

    if name == "movielens":  # TFDS 4.9.10 does not list it.
        from tensorflow_datasets.structured.movielens import Movielens

        return Movielens
    return tfds.builder_cls(name)


def stock_order(split: str, keys: list[Any]) -> list[Any]:
    from tensorflow_datasets.core import hashing

    return sorted(keys, key=hashing.Hasher(split).hash_key)


def error_message(name: str, **arguments: object) -> str:
    """Return the message of the InputError that ``prepare`` must raise: always one line."""
    with pytest.raises(InputError) as caught:
        prepare(name, **arguments)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


# Written files.


@pytest.mark.parametrize("name", COLLECTIONS)
def test_stock_builder_accepts_our_files(name: str, prepared: Callable[[str], Path]) -> None:
    import tensorflow_datasets as tfds

    folder = prepared(name)
    about = COLLECTIONS[name]
    root = folder.parents[1 if about.config is None else 2]
    assert folder == root / name / about.version
    builder = tfds.builder(name, data_dir=root)
    assert builder.is_prepared() and type(builder).__module__.startswith("tensorflow_datasets.")
    assert str(builder.version) == about.version and builder.info.supervised_keys == about.supervised
    stock = stock_builder(about.name)(data_dir=root / "elsewhere", config=about.config).info.features
    written = tfds.builder_from_directory(folder).info.features
    assert {k: repr(f) for k, f in written.items()} == {k: repr(f) for k, f in stock.items()}
    for key, feature in stock.items():
        label = feature.feature if isinstance(feature, tfds.features.Sequence) else feature
        if isinstance(label, tfds.features.ClassLabel):
            ours = written[key].feature if label is not feature else written[key]
            assert ours.names == label.names
    assert "tensorflow" not in sys.modules


def test_tiny_shakespeare(prepared: Callable[[str], Path], tmp_path: Path) -> None:
    folder = prepared("tiny_shakespeare")
    texts = {s: examples(folder, s) for s in ("train", "validation", "test")}
    assert {s: len(t) for s, t in texts.items()} == {"train": 1, "validation": 1, "test": 1}
    text = (real_data("text") / "tinyshakespeare.txt").read_bytes()
    # 90 % of 1,115,394 and half of the rest, rounded down.
    assert texts["train"][0]["text"] == text[:1_003_854]
    assert texts["validation"][0]["text"] == text[1_003_854 : 1_003_854 + 55_770]
    assert texts["test"][0]["text"] == text[1_003_854 + 55_770 :]
    for source in (real_data("text"), real_data("text") / "tinyshakespeare.txt"):
        root = tmp_path / source.name
        assert examples(prepare("tiny_shakespeare", data_dir=root, source=source), "test") == texts["test"]


def test_imdb(prepared: Callable[[str], Path]) -> None:
    folder, files = prepared("imdb_reviews/plain_text"), imdb_files()
    for split, parent, kinds in (
        ("train", "train", ("neg", "pos")),
        ("test", "test", ("neg", "pos")),
        ("unsupervised", "train", ("unsup",)),
    ):
        keys = [k for k in files if k.split("/")[1] == parent and k.split("/")[2] in kinds and "._" not in k]
        got = examples(folder, split)
        assert [e["text"] for e in got] == [files[k].strip() for k in stock_order(split, keys)]
        labels = [("neg", "pos", "unsup").index(k.split("/")[2]) for k in stock_order(split, keys)]
        assert [e["label"] for e in got] == ([-1] * 3 if split == "unsupervised" else labels)
    # The name without a config means this config.
    source = TFDS("imdb_reviews", "train", data_dir=str(folder.parents[2]))
    assert len(source) == 10 and source.class_names == ("neg", "pos")


def test_movielens(prepared: Callable[[str], Path]) -> None:
    folder = prepared("movielens/100k-ratings")
    got = examples(folder, "train")
    order = stock_order("train", list(range(4)))  # The key is the number of the line.
    assert [e["user_id"] for e in got] == [(b"1", b"3", b"2", b"4")[i] for i in order]
    by_user = {e["user_id"]: e for e in got}
    genres = by_user[b"1"].pop("movie_genres")
    assert list(genres) == [0, 9, 15, 16, 19]  # Action, Film-Noir, Sci-Fi, Thriller, Western.
    assert by_user[b"1"] == {
        "movie_id": b"2",
        "movie_title": "Caf\u00e9 (1994)".encode(),
        "user_id": b"1",
        "user_rating": 3.0,
        "timestamp": 881_250_949,
        "user_gender": True,
        "bucketized_user_age": 18.0,
        "raw_user_age": 24.0,
        "user_occupation_label": 18,  # technician/engineer
        "user_occupation_text": b"technician",
        "user_zip_code": b"85711",
    }
    assert list(by_user[b"3"]["movie_genres"]) == [2, 3, 4]  # Animation, Children, Comedy.
    assert list(by_user[b"2"]["movie_genres"]) == [17]  # Unknown, the first flag.
    ages = {u: (e["raw_user_age"], e["bucketized_user_age"]) for u, e in by_user.items()}
    assert ages == {b"1": (24, 18), b"2": (0, 1), b"3": (56, 56), b"4": (49, 45)}
    assert [by_user[u]["user_occupation_label"] for u in (b"2", b"3", b"4")] == [11, 21, 2]
    assert not by_user[b"2"]["user_gender"] and by_user[b"2"]["user_zip_code"] == b"T8H1N"
    # In TFDS the name without a config means another one.
    assert not TFDS("movielens", data_dir=str(folder.parents[2])).prepared()


def test_pets(prepared: Callable[[str], Path]) -> None:
    folder, (images, notes) = prepared("oxford_iiit_pet"), pets_files()
    names = list(PETS)
    for split, listed in (("train", names[:2]), ("test", names[2:])):
        got = examples(folder, split)
        assert [e["file_name"].decode() for e in got] == stock_order(split, [f"{n}.jpg" for n in listed])
        for e in got:
            name = e["file_name"].decode().removesuffix(".jpg")
            assert e["image"] == images[f"images/{name}.jpg"]  # Byte for byte, whatever it is.
            assert e["segmentation_mask"] == notes[f"annotations/trimaps/{name}.png"]
            assert (e["label"] + 1, e["species"] + 1) == PETS[name]
            box = [0.1, 0.25, 0.9, 0.75] if name == "Abyssinian_1" else [0] * 4
            np.testing.assert_allclose(e["head_bbox"], box, rtol=1e-6)
            assert e["head_bbox"].dtype == np.float32


def test_imagenet(prepared: Callable[[str], Path]) -> None:
    import tensorflow_datasets as tfds

    folder, (train, valid) = prepared("imagenet2012"), imagenet_files()
    files = {name: data for group in train.values() for name, data in group.items()}
    got = examples(folder, "train")
    assert [e["file_name"].decode() for e in got] == stock_order("train", list(files))
    label = dict(zip(SYNSETS, (0, 1, 999), strict=True))
    for e in got:
        assert e["image"] == files[e["file_name"].decode()]
        assert e["label"] == label[e["file_name"].decode().split("_")[0]]
    # A subset is labelled by the numbers of its images, from the list of TFDS.
    shipped = Path(tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")).read_text().split()
    names = Path(tfds.core.tfds_path("datasets/imagenet2012/labels.txt")).read_text().split()
    got = examples(folder, "validation")
    assert [e["file_name"].decode() for e in got] == stock_order("validation", list(valid))
    for e in got:
        assert e["image"] == valid[e["file_name"].decode()]
        assert names[e["label"]] == shipped[int(e["file_name"][15:23]) - 1]
    source = TFDS("imagenet2012", "train", data_dir=str(folder.parents[1]))
    assert source.classes == 1000 and source.gather(np.array([0]))["image"].shape[-1] == 3


@pytest.mark.parametrize("name", MADE)
def test_extracted_and_repacked_archives(name: str, prepared: Callable[[str], Path], tmp_path: Path) -> None:
    """Extracted archives in a folder are the same data set."""
    first = prepared(name)
    for archive in originals(name, tmp_path / "archives").iterdir():
        shutil.unpack_archive(archive, tmp_path / "in", *(() if archive.suffix == ".zip" else ("tar",)))
    if name == "imagenet2012":
        for split, key in (("train", "n*.tar"), ("val", "*.JPEG")):
            (tmp_path / "in" / split).mkdir()
            for path in (tmp_path / "in").glob(key):
                path.rename(tmp_path / "in" / split / path.name)
        inner = tmp_path / "in" / "train" / f"{SYNSETS[0]}.tar"
        shutil.unpack_archive(inner, inner.with_suffix(""))
        inner.unlink()
    folders = list((tmp_path / "in").iterdir())
    source = folders[0] if len(folders) == 1 else tmp_path / "in"
    second = prepare(name, data_dir=tmp_path / "out", source=source)
    for split in COLLECTIONS[name].layout:
        assert repr(examples(first, split)) == repr(examples(second, split))


def test_large_splits_are_sorted_on_disk(
    prepared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorflow_datasets.core import shuffle

    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 2000)  # Instead of 1 GB; images have 1 kB.
    limits, lazy = resource.getrlimit(resource.RLIMIT_NOFILE), shuffle.tf
    source = originals("imagenet2012", tmp_path / "in")
    folder = prepare("imagenet2012", data_dir=tmp_path / "out", source=source)
    for split in ("train", "validation"):
        assert examples(folder, split) == examples(prepared("imagenet2012"), split)
    assert "tensorflow" not in sys.modules
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits and shuffle.tf is lazy
    assert not list(folder.glob("*.tmp"))


def test_images_are_streamed(tmp_path: Path) -> None:
    """The first example is returned before most of the archive is read."""
    big = {f"{s}.tar": tar({f"{s}_{i}.JPEG": bytes(100_000) for i in range(50)}) for s in SYNSETS}
    source = write(tmp_path, {"train.tar": tar(big), "val.tar": tar({})})
    splits = COLLECTIONS["imagenet2012"].splits((source / "train.tar", source / "val.tar"))
    made = splits["train"]()
    key, _ = next(made)
    assert key == "n01440764_0.JPEG"
    opened = made.gi_frame.f_locals["entry"].file
    opened = getattr(opened, "raw", opened)
    assert opened.tell() < 1_000_000  # Of 5 MB in the first synset.
    made.close()


# Tables.


def test_etth1(tmp_path: Path) -> None:
    original = real_data("series") / "ETTh1.csv"
    assert table_file("etth1", tmp_path) is None and table_file("cifar10", tmp_path) is None
    folder = prepare("etth1", data_dir=tmp_path, source=original)
    assert folder == tmp_path / "etth1" / "1.0.0"
    path = table_file("etth1", tmp_path)
    assert path == folder / "ETTh1.csv" and path.read_bytes() == original.read_bytes()
    stamp = path.stat().st_mtime_ns
    assert prepare("etth1", data_dir=tmp_path, source=tmp_path / "gone") == folder
    assert path.stat().st_mtime_ns == stamp and [p.name for p in folder.parent.iterdir()] == ["1.0.0"]
    assert table_file("etth1:1.0.0", tmp_path) == path and table_file("etth1:2.0.0", tmp_path) is None
    # A folder that holds it, and a copy with one digit changed.
    assert table_file(
        "etth1", prepare("etth1", data_dir=tmp_path / "b", source=real_data("series")).parents[1]
    )
    changed = tmp_path / "ETTh1.csv"
    changed.write_bytes(original.read_bytes().replace(b"5.827", b"5.828", 1))
    message = error_message("etth1", data_dir=tmp_path / "c", source=changed)
    assert str(changed) in message and f"expected md5 {tables.TABLES['etth1'].member.digest}" in message
    assert "no such file" in error_message("etth1", data_dir=tmp_path / "c", source=tmp_path / "b" / "etth1")
    assert table_file("etth1", tmp_path / "c") is None


def test_table_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    prepare("etth1", data_dir=tmp_path / "a", source=real_data("series"))
    assert table_file("etth1", tmp_path / "a") is not None
    shutil.rmtree(tmp_path / "a")
    monkeypatch.setattr(os, "fsync", full)
    message = error_message("etth1", data_dir=tmp_path, source=real_data("series"))
    assert "No space left" in message
    assert table_file("etth1", tmp_path) is None
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_table_is_found_without_tfds(tmp_path: Path) -> None:
    code = "import sys, jaxtrain.data.prepare.tables as p; p.table_file('etth1', '/nowhere');" + (
        "assert not {'tensorflow_datasets', 'PIL', 'tensorflow'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# Errors.


def broken_movielens(name: str, line: int, text: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        files = movielens_files()
        lines = files[f"ml-100k/{name}"].decode("latin-1").splitlines()
        lines[line - 1] = text
        files[f"ml-100k/{name}"] = "\n".join(lines).encode("latin-1")
        with zipfile.ZipFile(folder / "ml-100k.zip", "w") as archive:
            for path, data in files.items():
                archive.writestr(path, data)

    return edit


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return edit


def cut_between(name: str) -> Callable[[Path], None]:
    """Cut between two files: only the end of the archive is missing."""

    def edit(folder: Path) -> None:
        with tarfile.open(folder / name) as archive:
            offset = archive.getmembers()[3].offset
        (folder / name).write_bytes((folder / name).read_bytes()[:offset])

    return edit


def pack(archive: str, make: Callable[[], Mapping[str, bytes]]) -> Callable[[Path], None]:
    return lambda folder: write(folder, {archive: tar(make())}) and None


def without(files: Mapping[str, bytes], part: str) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if part not in name}


def notes(path: str, data: bytes | None) -> Callable[[], Mapping[str, bytes]]:
    """Return the annotations with one file replaced or removed."""
    others = {name: old for name, old in pets_files()[1].items() if name != path}
    return lambda: others if data is None else others | {path: data}


def inner(synset: str, files: Mapping[str, bytes]) -> Callable[[], Mapping[str, bytes]]:
    good = {f"{s}.tar": tar(f) for s, f in imagenet_files()[0].items()}
    return lambda: good | {f"{synset}.tar": tar(files)}


IMDB, ML, PET, NET = MADE
BAD: list[tuple[str, str, Callable[[Path], Any], tuple[str, ...]]] = [
    (IMDB, "absent", lambda f: (f / "aclImdb_v1.tar.gz").unlink(), ("aclImdb_v1.tar.gz or", "is missing")),
    (IMDB, "cut", cut("aclImdb_v1.tar.gz", 0.7), ("aclImdb_v1.tar.gz: not a complete", "download it again")),
    (IMDB, "html", pack("x", dict), ()),
    (
        IMDB,
        "no unsup",
        pack("aclImdb_v1.tar.gz", lambda: without(imdb_files(), "/unsup/")),
        (
            "aclImdb_v1.tar.gz: split unsupervised of imdb_reviews/plain_text would be empty",
            "train/unsup/*.txt",
        ),
    ),
    (
        IMDB,
        "other layout",
        pack("aclImdb_v1.tar.gz", lambda: {"aclImdb/all.txt": b"good film"}),
        ("split train", "aclImdb/train/pos/*.txt"),
    ),
    (
        IMDB,
        "twice",
        pack("aclImdb_v1.tar.gz", lambda: imdb_files() | {f"./{k}": v for k, v in imdb_files().items()}),
        ("aclImdb/train/", "appears twice"),
    ),
    (ML, "cut", cut("ml-100k.zip", 0.5), ("ml-100k.zip: not a complete",)),
    (
        ML,
        "no users",
        pack("ml-100k.zip", lambda: without(movielens_files(), "u.user")),
        ("ml-100k.zip: u.user is missing",),
    ),
    (ML, "columns", broken_movielens("u.data", 3, "2\t3\t1"), ("u.data line 3 differs from the original",)),
    (ML, "number", broken_movielens("u.data", 2, "3\t1\tfive\t8"), ("u.data line 2", "five")),
    (ML, "stranger", broken_movielens("u.data", 2, "9\t1\t5\t8"), ("u.data line 2", "'9'")),
    (ML, "job", broken_movielens("u.user", 4, "4|49|M|astronaut|9"), ("u.user line 4", "astronaut")),
    (ML, "genres", broken_movielens("u.item", 1, "1|Toy Story|||u|0|1"), ("u.item line 1",)),
    (PET, "absent", lambda f: (f / "annotations.tar.gz").unlink(), ("annotations.tar.gz or", "is missing")),
    (PET, "cut", cut("images.tar.gz", 0.3), ("images.tar.gz: not a complete",)),
    (
        PET,
        "no list",
        pack("annotations.tar.gz", notes("annotations/test.txt", None)),
        ("test.txt is missing",),
    ),
    (
        PET,
        "no outline",
        pack("annotations.tar.gz", notes("annotations/trimaps/beagle_12.png", None)),
        ("trainval.txt line 2: trimaps/beagle_12.png is missing",),
    ),
    (
        PET,
        "no image",
        pack("images.tar.gz", lambda: without(pets_files()[0], "beagle")),
        ("images.tar.gz: beagle_12.jpg is missing, and trainval.txt",),
    ),
    (
        PET,
        "breed",
        pack("annotations.tar.gz", notes("annotations/test.txt", b"Bombay_7 38 1 1\n")),
        ("test.txt line 1: breed 38 is not in 1..37",),
    ),
    (
        PET,
        "line",
        pack("annotations.tar.gz", notes("annotations/test.txt", b"Bombay_7 8 1 1\nBombay_8\n")),
        ("test.txt line 2 differs from the original: 'Bombay_8'",),
    ),
    (
        PET,
        "empty list",
        pack("annotations.tar.gz", notes("annotations/test.txt", b"\n")),
        ("split test of oxford_iiit_pet would be empty", "annotations/test.txt names"),
    ),
    (
        PET,
        "no box",
        pack("annotations.tar.gz", notes("annotations/xmls/Abyssinian_1.xml", b"<annotation/>")),
        ("xmls/Abyssinian_1.xml has no valid head box",),
    ),
    (
        PET,
        "box outside",
        pack(
            "annotations.tar.gz",
            notes(
                "annotations/xmls/Abyssinian_1.xml",
                pets_files()[1]["annotations/xmls/Abyssinian_1.xml"].replace(b"<height>10", b"<height>0"),
            ),
        ),
        ("xmls/Abyssinian_1.xml: the box", "not inside"),
    ),
    (
        NET,
        "no val",
        lambda f: (f / "ILSVRC2012_img_val.tar").unlink(),
        ("ILSVRC2012_img_val.tar or", "register"),
    ),
    (NET, "cut", cut("ILSVRC2012_img_train.tar", 0.6), ("ILSVRC2012_img_train.tar", "not a complete")),
    (
        NET,
        "inner cut",
        pack(
            "ILSVRC2012_img_train.tar",
            lambda: {f"{SYNSETS[0]}.tar": tar(imagenet_files()[0][SYNSETS[0]])[:2500]},
        ),
        ("ILSVRC2012_img_train.tar", "not a complete"),
    ),
    (
        NET,
        "synset",
        pack("ILSVRC2012_img_train.tar", inner("n99999999", {"n99999999_1.JPEG": b"x"})),
        ("'n99999999' is not a synset of ILSVRC2012",),
    ),
    (
        NET,
        "swapped",
        pack("ILSVRC2012_img_train.tar", lambda: {"readme": b"x", "a.txt": b""}),
        ("split train of imagenet2012 would be empty", "n01440764.tar"),
    ),
    (
        NET,
        "number",
        pack("ILSVRC2012_img_val.tar", lambda: {"ILSVRC2012_val_00050001.JPEG": picture(1)}),
        ("ILSVRC2012_val_00050001.JPEG is not one of the 50000",),
    ),
]
BAD = [case for case in BAD if case[3]]


@pytest.mark.parametrize(("name", "what", "edit", "words"), BAD, ids=[f"{b[0]}: {b[1]}" for b in BAD])
def test_refusals(
    name: str, what: str, edit: Callable[[Path], Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    source = originals(name, tmp_path / "in")
    edit(source)
    message = error_message(name, data_dir=tmp_path / "out", source=source)
    for word in words:
        assert word in message, message
    assert str(source) in message or "twice" in message
    assert not TFDS(name, data_dir=str(tmp_path / "out")).prepared()
    # No partial result: only empty folders and the name of the default config are left.
    assert {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()} <= {"metadata.json"}
    # The next try succeeds.
    prepare(name, data_dir=tmp_path / "out", source=originals(name, tmp_path / "again"))


def test_other_text_is_refused_with_advice(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_bytes(b"To be, or not to be")
    message = error_message("tiny_shakespeare", data_dir=tmp_path, source=mine)
    assert "not tiny Shakespeare" in message and f"--set train.file={mine}" in message
    original = real_data("text") / "tinyshakespeare.txt"
    mine.write_bytes(original.read_bytes()[:-1] + b"!")
    message = error_message("tiny_shakespeare", data_dir=tmp_path, source=mine)
    assert "expected md5 6fb458f1232090904fb40fe944165e91" in message
    (tmp_path / "empty").mkdir()
    message = error_message("tiny_shakespeare", data_dir=tmp_path, source=tmp_path / "empty")
    assert "input.txt or tinyshakespeare.txt is missing" in message
    assert "no such file" in error_message("tiny_shakespeare", data_dir=tmp_path, source=tmp_path / "gone")


def test_imagenet_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", None)
    message = error_message("imagenet2012", data_dir=tmp_path)
    assert "https://image-net.org/download-images to get ILSVRC2012_img_train.tar and ILSVRC2012_" in message
    assert f"python -m jaxtrain prepare imagenet2012 --data-dir {tmp_path} --from DIR" in message


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert "did you mean tiny_shakespeare?" in error_message("tiny_shakespear", data_dir=tmp_path)
    assert "did you mean etth1?" in error_message("etth2", data_dir=tmp_path)
    assert "only movielens/100k-ratings:0.1.1" in error_message(
        "movielens/100k-ratings:1.0.0", data_dir=tmp_path
    )
    assert "only etth1:1.0.0" in error_message("etth1/x", data_dir=tmp_path)
    assert "movielens/100k-ratings" in error_message("movielens", data_dir=tmp_path)
    message = error_message("imdb_reviews/bytes", data_dir=tmp_path)
    assert "needs TensorFlow" in message and "imdb_reviews/plain_text does not" in message
    folder = tmp_path / "imdb_reviews" / "plain_text" / "1.0.0"
    folder.mkdir(parents=True)
    assert f"{folder} is in the way" in error_message("imdb_reviews", data_dir=tmp_path)


def test_progress_ends_with_the_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int]] = []
    source = originals(IMDB, tmp_path / "in")
    prepare(IMDB, data_dir=tmp_path / "a", source=source, progress=lambda *call: calls.append(call))
    assert calls == [
        ("imdb_reviews/train", 10, 10),
        ("imdb_reviews/test", 10, 10),
        ("imdb_reviews/unsupervised", 3, 3),
    ]

    def fail(label: str, done: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        prepare(IMDB, data_dir=tmp_path / "b", source=source, progress=fail)
    assert [p.name for p in (tmp_path / "b").rglob("*") if p.is_file()] == ["metadata.json"]


def test_progress_while_writing() -> None:
    def make() -> Any:
        yield from ((i, {}) for i in range(2500))

    calls: list[tuple[str, int, int]] = []
    assert len(list(writer._count_examples("a/b", make, lambda *call: calls.append(call), 0))) == 2500
    assert calls == [("a/b", 1000, 0), ("a/b", 2000, 0), ("a/b", 2500, 2500)]


def test_folder_in_use_is_not_removed(tmp_path: Path) -> None:

    folder = write(tmp_path / "base" / "config" / "incomplete.X_1.0.0", {"bucket": b"x"})
    os.utime(folder, (0, 0))
    writer._remove_stale(tmp_path / "base")
    assert folder.exists()  # Its file is new.
    os.utime(folder / "bucket", (0, 0))
    writer._remove_stale(tmp_path / "base")
    assert not folder.exists()


def test_parts_match_the_stock_checksums() -> None:
    for collection in COLLECTIONS.values():
        known = stock_builder(collection.name).url_infos
        for part in collection.parts:
            if part.url is not None:
                assert (part.size, part.sha256) == (known[part.url].size, known[part.url].checksum)
                assert part.url.endswith("/" + part.names[0])


# Downloads.


def published(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the URLs of ``name`` by those of synthetic originals."""
    source = originals(name, folder)
    collection = COLLECTIONS[name]
    paths = [source / part.names[0] for part in collection.parts]
    parts = tuple(
        dataclasses.replace(
            part,
            url=path.as_uri(),
            size=path.stat().st_size,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for part, path in zip(collection.parts, paths, strict=True)
    )
    monkeypatch.setitem(COLLECTIONS, name, dataclasses.replace(collection, parts=parts))
    return paths


def test_downloaded_archives(
    prepared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = published(PET, tmp_path / "www", monkeypatch)
    calls: list[tuple[str, int, int]] = []

    def progress(*call: Any) -> None:
        calls.append(call)
        if len(calls) == 1:  # Next to the result, where there is space.
            assert list((tmp_path / "out" / PET).glob("incomplete.fetch-*/images.tar.gz"))

    folder = prepare(PET, data_dir=tmp_path / "out", progress=progress)
    assert [(c[0], c[1]) for c in calls[:2]] == [(p.name, p.stat().st_size) for p in paths]
    for split in ("train", "test"):
        assert repr(examples(folder, split)) == repr(examples(prepared(PET), split))
    assert list(folder.parent.iterdir()) == [folder]


def test_downloaded_archives_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = published(ML, tmp_path / "www", monkeypatch)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # A bit that the format ignores.
    path.write_bytes(data)
    message = error_message(ML, data_dir=tmp_path / "out")
    assert message.startswith("downloaded ml-100k.zip is not the original: expected sha256")
    path.write_bytes(data + b"!")
    assert f"expected {len(data)} bytes, found {len(data) + 1}" in error_message(
        ML, data_dir=tmp_path / "out"
    )
    path.unlink()
    message = error_message(ML, data_dir=tmp_path / "out")
    assert "download ml-100k.zip on a machine with a network" in message
    assert f"prepare movielens/100k-ratings --data-dir {tmp_path / 'out'} --from DIR_OR_TAR" in message
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []
    (tmp_path / "file").touch()
    assert "cannot create a temporary folder" in error_message(ML, data_dir=tmp_path / "file")


def test_downloaded_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = write(tmp_path / "www", {"ETTh1.csv": (real_data("series") / "ETTh1.csv").read_bytes()})
    path = original / "ETTh1.csv"
    monkeypatch.setitem(
        tables.TABLES, "etth1", dataclasses.replace(tables.TABLES["etth1"], url=path.as_uri())
    )
    folder = prepare("etth1", data_dir=tmp_path / "out")
    assert (folder / "ETTh1.csv").read_bytes() == path.read_bytes()
    path.write_bytes(b"<html>")
    assert error_message("etth1", data_dir=tmp_path / "b").startswith(
        "downloaded ETTh1.csv: ETTh1.csv is not the orig"
    )
    path.unlink()
    assert f"prepare etth1 --data-dir {tmp_path / 'b'} --from" in error_message(
        "etth1", data_dir=tmp_path / "b"
    )
