"""jaxtrain.data.text: windows for next-byte prediction, and labelled texts as bytes or words."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures_data import check_fresh_process, real_data, write_tfds

from jaxtrain.core.errors import InputError
from jaxtrain.data import text, word_tokenizer
from jaxtrain.data.sources import Source
from jaxtrain.data.text import LabelledText, TextWindows
from jaxtrain.experiment import override

SPLITS = ("train", "validation", "test")
SHAKESPEARE = {"train": b"First Citizen:\nBefore we proceed", "test": b"any further, hear me speak."}
REVIEWS = {
    "train": [(b"good good film", 1), (b"bad film", 0), (b"", 0), (b"caf\xc3\xa9", 1)],
    "test": [(b"good bad ugly", 1)],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data_dir with two small data sets in the TFDS layout."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    names = tfds.features.ClassLabel(names=["neg", "pos"])
    reviews = {
        split: [{"text": text, "label": label} for text, label in rows] for split, rows in REVIEWS.items()
    }
    write_tfds(folder, "reviews", {"text": tfds.features.Text(), "label": names}, **reviews)
    plays = {split: [{"text": play[:20]}, {"text": play[20:]}] for split, play in SHAKESPEARE.items()}
    write_tfds(folder, "plays", {"text": tfds.features.Text()}, **plays)
    write_tfds(folder, "scores", {"text": tfds.features.Text(), "label": np.int64}, **reviews)
    return str(folder)


def everything(source: Any) -> dict[str, np.ndarray]:
    return source.gather(np.arange(len(source)))


def corpus(folder: Path, size: int = 1000) -> tuple[str, np.ndarray]:
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    (folder / "corpus").write_bytes(data.tobytes())
    return str(folder / "corpus"), data


def polarity(folder: Path, count: int = 20) -> tuple[str, str]:
    """Write two files of numbered lines, with empty lines and every kind of line ending."""
    for name in ("neg", "pos"):
        rows = [line(name, i) + (b"\r\n", b"\n", b"\n \n\n")[i % 3] for i in range(count)]
        (folder / f"{name}.txt").write_bytes(b"".join(rows).rstrip(b"\n"))
    return str(folder / "neg.txt"), str(folder / "pos.txt")


def line(name: str, i: int) -> bytes:
    return f"{name} {name}{i}{' ' * (i % 3)}".encode()


# --- both


def sources(folder: Path, root: str) -> list[Any]:
    file, files = corpus(folder)[0], polarity(folder)
    return [
        TextWindows(context=7, file=file),
        TextWindows(context=7, stride=2, split="test", file=file),
        TextWindows(context=7, name="plays", data_dir=root),
        LabelledText(length=6, files=files),
        LabelledText(length=6, split="validation", files=files, words=3),
        LabelledText(length=6, name="reviews", data_dir=root),
        LabelledText(length=6, name="reviews", words=3, data_dir=root),
    ]


def test_gather_is_a_pure_function_of_each_id(tmp_path: Path, root: str) -> None:
    for source in sources(tmp_path, root):
        full, n = everything(source), len(source)
        assert isinstance(source, Source) and n > 1
        ids = np.random.default_rng(0).integers(0, n, 3 * n)  # any order, with repeats
        for some in (ids, ids[:1], ids[:0], ids[::-1].astype(np.int32)):
            batch = source.gather(some)
            for name, array in source.example().items():
                assert batch[name].dtype == array.dtype and batch[name].shape[1:] == array.shape[1:]
                assert batch[name].flags.c_contiguous
                np.testing.assert_array_equal(batch[name], full[name][some])
            assert batch.keys() == source.example().keys()
        with pytest.raises(IndexError):
            source.gather(np.array([n]))


def test_fresh_process_reads_the_same(tmp_path: Path, root: str, python: Any) -> None:
    check_fresh_process(sources(tmp_path, root), tmp_path, python)


def test_example_reads_nothing_and_files_need_no_preparation() -> None:
    sources = [TextWindows(file="/none"), LabelledText(files=("/none", "/neither"), words=9)]
    for source in sources:
        assert source.example() and source.prepared()
    for missing in (TextWindows(data_dir="/none"), LabelledText(data_dir="/none")):
        assert missing.example() and not missing.prepared()
        with pytest.raises(
            InputError, match=f"run: python -m jaxtrain prepare {missing.name} --data-dir /none$"
        ):
            len(missing)


def test_overrides_from_the_command_line(tmp_path: Path) -> None:
    files = polarity(tmp_path)
    windows = override(TextWindows(), [f"file={files[0]}", "stride=3", "context=5"])
    assert windows == TextWindows(context=5, file=files[0], stride=3) and len(windows) > 1
    labelled = override(LabelledText(), [f"files={','.join(files)}", "words=2"])
    assert labelled == LabelledText(files=files, words=2) == LabelledText(files=list(files), words=2)  # type: ignore
    assert hash(labelled) == hash(LabelledText(files=list(files), words=2))  # type: ignore


def test_classes_have_different_names() -> None:
    named = {
        ("a/x.txt", "b/x.txt"): ("a/x.txt", "b/x.txt"),
        ("x.neg", "x.pos"): ("x.neg", "x.pos"),
        ("a/neg.txt", "b/pos.txt"): ("neg", "pos"),
    }
    for files, names in named.items():
        assert LabelledText(files=files).class_names == names


# --- windows


@pytest.mark.parametrize(
    ("context", "split"), [(1, "train"), (16, "train"), (16, "validation"), (49, "test")]
)
def test_windows_predict_every_byte_once(context: int, split: str, tmp_path: Path) -> None:
    file, data = corpus(tmp_path)
    part = {"train": data[:900], "validation": data[900:950], "test": data[950:]}[split]
    source = TextWindows(context=context, split=split, file=file)
    batch = everything(source)
    n = len(source) * context
    assert 0 <= len(part) - 1 - n < context  # bytes left over at the end
    np.testing.assert_array_equal(batch["tokens"].ravel(), part[:n])
    np.testing.assert_array_equal(batch["label"].ravel(), part[1 : n + 1])


@pytest.mark.parametrize("stride", [1, 3, 8, 20])
def test_stride(stride: int, tmp_path: Path) -> None:
    file, data = corpus(tmp_path)
    source = TextWindows(context=8, split="test", file=file, stride=stride)
    assert len(source) == (50 - 8 - 1) // stride + 1
    for i, row in enumerate(everything(source)["tokens"]):
        np.testing.assert_array_equal(row, data[950 + i * stride : 958 + i * stride])


def test_file_is_split_as_in_tfds(tmp_path: Path) -> None:
    for size in (999, 1001, 1009, 1019):
        file, data = corpus(tmp_path, size)
        Path(file).rename(tmp_path / str(size))
        parts = [text._read_split(str(tmp_path / str(size)), (), split) for split in SPLITS]
        first = int(size * 0.9)
        assert [len(p) for p in parts] == [first, (size - first) // 2, size - first - (size - first) // 2]
        np.testing.assert_array_equal(np.concatenate(parts), data)


def test_windows_of_a_data_set(root: str) -> None:
    for split, play in SHAKESPEARE.items():
        batch = everything(TextWindows(context=1, split=split, name="plays", data_dir=root))
        # TFDS orders the examples by a hash of their keys.
        read = bytes(batch["tokens"][:1].ravel()) + bytes(batch["label"].astype(np.uint8).ravel())
        assert read in (play[:20] + b"\n" + play[20:], play[20:] + b"\n" + play[:20])
    with pytest.raises(InputError, match="no split 'validation': its splits are"):
        len(TextWindows(split="validation", name="plays", data_dir=root))
    with pytest.raises(InputError, match="data set plays: its test split has 28 bytes, too few"):
        len(TextWindows(context=28, split="test", name="plays", data_dir=root))
    assert len(TextWindows(context=27, split="test", name="plays", data_dir=root)) == 1


def test_tiny_shakespeare() -> None:
    file = str(real_data("text") / "tinyshakespeare.txt")
    sizes = [len(TextWindows(split=split, file=file)) for split in SPLITS]
    assert sizes == [1003853 // 256, 55769 // 256, 55769 // 256]
    first = TextWindows(file=file).gather(np.array([0]))
    assert (
        bytes(first["tokens"][0, :14]) == b"First Citizen:"
        and bytes(first["label"][0, :3]) == b"i\0\0\0r\0\0\0s\0\0\0"
    )
    last = everything(TextWindows(context=1, split="test", file=file))["label"]
    assert last.astype(np.uint8).tobytes() == Path(file).read_bytes()[-55769:]


# --- labelled text


def lines(source: LabelledText) -> list[tuple[bytes, int]]:
    batch = everything(source)
    rows = zip(batch["tokens"], batch["length"], batch["label"], strict=True)
    return [(bytes(tokens[:length]), int(label)) for tokens, length, label in rows]


def test_lines_of_files(tmp_path: Path) -> None:
    files = polarity(tmp_path)
    parts = {split: lines(LabelledText(split=split, files=files)) for split in SPLITS}
    assert {split: len(part) for split, part in parts.items()} == {"train": 32, "validation": 4, "test": 4}
    for part in parts.values():  # stratified
        assert sum(label for _, label in part) == len(part) // 2
    every = sorted(row for part in parts.values() for row in part)
    # Complete, disjoint, and with the right label.
    assert every == sorted((line(name, i), j) for j, name in enumerate(("neg", "pos")) for i in range(20))
    for name in ("neg", "pos"):  # at random, neither the first lines nor the last
        others = {text.split()[1] for text, _ in parts["validation"] + parts["test"] if name.encode() in text}
        assert len(others) == 4
        assert all(others != {line(name, i).split()[1] for i in cut} for cut in (range(4), range(16, 20)))


def test_bytes_are_truncated_and_padded(root: str) -> None:
    source = LabelledText(length=8, name="reviews", data_dir=root)
    batch = everything(source)
    assert source.classes == 2 and source.class_names == ("neg", "pos") and source.vocabulary == 256
    by_text = {bytes(t): (int(n), int(c)) for t, n, c in zip(*batch.values(), strict=True)}
    assert by_text == {
        b"good goo": (8, 1),
        b"bad film": (8, 0),
        b"\0" * 8: (0, 0),
        b"caf\xc3\xa9\0\0\0": (5, 1),
    }


def test_words(root: str) -> None:
    # film and good occur twice, in alphabetical order; then bad before café.
    source = LabelledText(length=12, name="reviews", split="train", words=3, data_dir=root)
    film, good, bad = 256, 257, 258
    rows = {tuple(t[:n]) for t, n in zip(*list(everything(source).values())[:2], strict=True)}
    assert rows == {(good, good, film), (bad, film), (), tuple(b"caf\xc3\xa9")}
    test = dataclasses.replace(source, split="test").gather(np.array([0]))
    assert test["tokens"].dtype == np.int32 and source.vocabulary == 259
    assert test["tokens"][0].tolist() == [good, bad, *b"ugly", *[0] * 6]
    assert test["length"] == [6] and test["label"] == [1]


@pytest.mark.parametrize(
    ("written", "want"),
    [
        (b"The end", [256, *b"end"]),
        (b"one  two", [*b"one two"]),
        (b"one\tthe two", [*b"one", 256, *b"two"]),
        (b"one, two", [*b"one,two"]),
        (b"the.the", [256, *b".", 256]),
        (b"don't 7 THE'", [*b"don't 7 the'"]),
        (b"\xe9t\xe9 ;-)", [*b"\xe9t\xe9;-)"]),
        (b" \n ", []),
    ],
)
def test_word_tokens(written: bytes, want: list[int]) -> None:
    assert word_tokenizer.encode(written, {b"the": 256}, 99) == want
    for length in range(len(want)):
        assert word_tokenizer.encode(written, {b"the": 256}, length) == want[:length]


def test_vocabulary_comes_from_the_train_split(tmp_path: Path) -> None:
    files = polarity(tmp_path)
    seen = {split: lines(LabelledText(split=split, files=files)) for split in SPLITS}
    words = {split: {word for row, _ in seen[split] for word in row.split()} for split in SPLITS}
    assert words["test"] - words["train"]
    for split in SPLITS:
        source = LabelledText(split=split, files=files, words=99)
        known = text._vocabulary(source._stamped(), source._train(), 99)
        assert set(known) == words["train"] and list(known)[:2] == [b"neg", b"pos"]
        assert list(known.values()) == list(range(256, 256 + len(known)))
        first, label = source.gather(np.array([0]))["tokens"][0], seen[split][0][0].split()[1]
        assert first[0] == 256 and (first[1] >= 256) == (label in words["train"])


def test_train_text_is_counted_once(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    real = text._iterate_tfds
    monkeypatch.setattr(text, "_iterate_tfds", lambda source: reads.append(source.split) or real(source))
    for split in ("test", "train", "train[:2]", "test"):
        LabelledText(length=3, split=split, name="reviews", words=2, data_dir=root).gather(np.array([0]))
    assert reads == ["train"]


def test_rt_polarity() -> None:
    folder = real_data("text")
    files = (str(folder / "rt-polarity.neg"), str(folder / "rt-polarity.pos"))
    parts = {s: lines(LabelledText(length=400, split=s, files=files)) for s in SPLITS}
    assert [len(p) for p in parts.values()] == [8530, 1066, 1066]
    every = sorted(row for part in parts.values() for row in part)
    assert every == sorted((x, j) for j in (0, 1) for x in Path(files[j]).read_bytes().split(b"\n") if x)
    source = LabelledText(length=60, split="test", files=files, words=2000)
    assert source.class_names == ("rt-polarity.neg", "rt-polarity.pos")  # their stems are equal
    batch = everything(source)
    known = text._vocabulary(source._stamped(), source._train(), 2000)
    assert list(known)[:3] == [b"the", b"a", b"and"] and batch["tokens"].max() < source.vocabulary
    # Decoding the tokens returns the words, also those encoded as bytes.
    decode_table = {256 + i: b" " + word + b" " for i, word in enumerate(known)}
    for row, n, (line, _) in zip(batch["tokens"], batch["length"], parts["test"], strict=True):
        if n < 60:
            back = b"".join(decode_table.get(t, bytes([t % 256])) for t in row[:n].tolist())
            words = re.compile(rb"[a-z0-9'\x80-\xff]+|\S")
            assert words.findall(back) == words.findall(line.lower())


# --- errors


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda f: TextWindows(context=0), "context is 0: it must be at least 1"),
        (lambda f: TextWindows(stride=0), "stride is 0: it must be at least 1"),
        (lambda f: TextWindows(split="valid", file="x"), "train, validation, test, not 'valid'"),
        (lambda f: TextWindows(file=f"{f}/gone"), r"gone cannot be read \(No such file"),
        (lambda f: TextWindows(file=f), r"cannot be read \(Is a directory\)"),
        (lambda f: TextWindows(file=f"{f}/empty"), "empty: its train split has 0 bytes, too few"),
        (lambda f: TextWindows(context=9, file=f"{f}/ten"), "ten: its train split has 9 bytes, too few"),
        (lambda f: LabelledText(length=0), "length is 0: it must be at least 1"),
        (lambda f: LabelledText(words=-1), "words is -1: it must be at least 0"),
        (lambda f: LabelledText(files="ab"), "files is 'ab': give two or more"),
        (lambda f: LabelledText(files=("a",)), r"files is \('a',\): give two or more"),
        (lambda f: LabelledText(split="dev", files=("a", "b")), "train, validation, test, not 'dev'"),
        (lambda f: LabelledText(files=(f"{f}/lines", f"{f}/gone")), "gone cannot be read"),
        (lambda f: LabelledText(files=(f"{f}/lines", f"{f}/empty")), "empty holds no text"),
        (lambda f: LabelledText(files=(f"{f}/lines", f"{f}/ten")), "ten has 1 texts, too few for splits"),
        (lambda f: LabelledText(files=("a", "b", "a")), "each class needs its own file"),
    ],
)
def test_errors(wrong: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "ten").write_bytes(b"0123456789")
    (tmp_path / "lines").write_bytes(b"a line\n" * 10)
    with pytest.raises(InputError, match=message) as caught:
        len(wrong(str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["scores", "plays"])
def test_label_without_classes_is_refused(name: str, root: str) -> None:
    with pytest.raises(InputError, match=f"data set {name} has no class label in a feature named 'label'"):
        LabelledText(name=name, data_dir=root).gather(np.array([0]))
