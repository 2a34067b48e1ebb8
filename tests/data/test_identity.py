"""What is compared of the data: everything that is small, blocks and rows of what is large."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from fixtures_data import write_tfds

from jaxtrain import data
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.data import identity, paths
from jaxtrain.data.identity import UNSTABLE, differences, digest_array, digest_files, identify


class Own:
    """A source of the user's own."""

    def __init__(self, n: int = 100, changed: int | None = None) -> None:
        self.x = np.arange(4.0 * n, dtype=np.float32).reshape(n, 4)
        if changed is not None:
            self.x[changed] += 1

    def __len__(self) -> int:
        return len(self.x)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"x": self.x[indices]}


class Joined:
    """Two sources, one after the other."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        whole = np.concatenate([part.gather(np.arange(len(part)))["x"] for part in self.parts])
        return {"x": whole[indices]}


def changed(before: Any, now: Any, *opened: Any) -> list[str]:
    one, other = (identify("s", source, *opened) for source in (before, now))
    return differences({"s": one}, {"s": other})


def in_memory(source: Any) -> Any:
    return data.in_memory(source, 2**20)


def test_every_element_of_arrays_counts() -> None:
    x = np.arange(5000, dtype=np.int32).reshape(1000, 5)
    other = x.copy()
    other[501, 3] = -1
    assert changed(data.Arrays({"x": x}), data.Arrays({"x": x.copy()})) == []
    assert changed(data.Arrays({"x": x}), data.Arrays({"x": other})) == [
        "s: field x (int32[1000, 5]) has other contents"
    ]
    assert changed(data.Arrays({"x": x}), data.Arrays({"x": x[:-1]})) == [
        "s: length was 1000 and is 999",
        "s: field x was int32[1000, 5] and is int32[999, 5]",
    ]
    assert changed(data.Arrays({"x": x}), data.Arrays({"y": x})) == [
        "s: field y was absent and is int32[1000, 5]",
        "s: field x was int32[1000, 5] and is absent",
    ]


def test_a_subset_is_its_source_and_its_indices() -> None:
    arrays = data.Arrays({"x": np.arange(10)})
    rows = np.arange(4)
    assert changed(data.Subset(arrays, rows), data.Subset(arrays, rows)) == []
    assert changed(data.Subset(arrays, rows), data.Subset(arrays, rows + 1)) == [
        "s: indices (int64[4]) has other contents"
    ]
    assert changed(data.Subset(arrays, rows), data.Subset(data.Arrays({"x": np.arange(1, 11)}), rows))
    assert changed(data.Subset(Own(), rows), data.Subset(Own(changed=3), rows))


def test_in_memory_every_row_of_the_users_own_source_counts() -> None:
    one, other = (identify("s", source, in_memory(source)) for source in (Own(), Own(changed=50)))
    assert differences({"s": one}, {"s": other}) == ["s: field x (float32[100, 4]) has other contents"]
    streamed = identify("s", Own(changed=50))  # row 50 is not among those that are compared
    assert differences({"s": one}, {"s": streamed}) == []
    assert changed(Own(), Own(changed=99)) == ["s: field x (float32[32, 4]) has other contents"]


def test_inside_a_source_of_the_users_own_arrays_are_compared_in_full() -> None:
    def joined(value: int) -> Joined:
        x = np.zeros(500, np.int64)
        x[77] = value
        return Joined(Own(), data.Arrays({"x": np.zeros((1, 4))}), data.Arrays({"x": x.reshape(125, 4)}))

    found = changed(joined(0), joined(1))
    assert "s: parts[2] field x (int64[125, 4]) has other contents" in found


def test_a_source_may_name_its_own_fingerprint() -> None:
    class Named(Own):
        def __init__(self, name: Any) -> None:
            super().__init__()
            self.name = name

        def fingerprint(self) -> Any:
            return self.name

    assert changed(Named("v1"), Named("v1")) == []
    assert changed(Named("v1"), Named("v2")) == ["s: fingerprint was v1 and is v2"]
    assert len(identify("s", Named("long" * 99))["fingerprint"]) == 64
    with pytest.raises(InputError, match=r"Named.fingerprint\(\) returned int: it must return a str"):
        identify("s", Named(3))
    assert data.in_memory(Named("../v1"), 2**20) is not None  # names no file of the cache


def test_random_rows_are_no_changed_data() -> None:
    class Noisy(Own):
        def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
            return {"x": np.random.rand(len(indices)), "y": indices}

    assert identify("s", Noisy())["field x"] == UNSTABLE != identify("s", Noisy())["field y"]
    assert changed(Noisy(), Noisy()) == []


def test_a_source_that_fails() -> None:
    class Broken(Own):
        def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
            raise OSError("no such\nfile")

    assert identify("s", Broken()) == {"length": "100", "examples": "cannot be read"}  # the run says why
    assert changed(Broken(), Broken()) == [] == changed(Broken(), Own())

    class Worse(Own):
        def fingerprint(self) -> str:
            raise OSError("no such\nfile")

    with pytest.raises(RunError, match=r"^s: Worse cannot be identified: OSError: no such \(--debug"):
        identify("s", Worse())


def test_files_are_their_sizes_and_contents(tmp_path: Path) -> None:
    one, other = tmp_path / "a" / "x.txt", tmp_path / "b" / "x.txt"
    for path in (one, other):
        path.parent.mkdir()
        path.write_bytes(b"text" * 100)
    assert digest_files([one]) == digest_files([other])  # a copy elsewhere
    assert list(digest_files([one, other])) == ["file x.txt", "file x.txt (2)"]
    before = digest_files([one])
    paths.forget()
    one.write_bytes(b"text" * 50 + b"test" + b"text" * 49)
    after = digest_files([one])
    assert differences({"s": before}, {"s": after}) == ["s: file x.txt (400 bytes) has other contents"]
    many = [tmp_path / f"{n}.bin" for n in range(20)]
    for path in many:
        path.write_bytes(path.name.encode())
    assert list(digest_files(many)) == ["20 files"]


def test_a_data_set_of_tfds_is_its_files(tmp_path: Path) -> None:
    features = {"x": tfds.features.Tensor(shape=(2,), dtype=np.float32)}
    rows = [{"x": np.full(2, k, np.float32)} for k in range(20)]
    for folder in ("one", "other"):
        write_tfds(tmp_path / folder, "small", features, train=rows, test=rows)
        rows[7]["x"] = np.full(2, 7.5, np.float32)
    one, other = (
        {"s": identify("s", data.TFDS("small", "train", str(tmp_path / f)))} for f in ("one", "other")
    )
    name = "small-train.array_record-00000-of-00001"
    assert list(one["s"]) == ["length", f"file {name}", "file features.json"]
    (difference,) = differences(one, other)
    assert difference.startswith(f"s: file {name} (") and difference.endswith("has other contents")
    images = data.Images(data.TFDS("small", "train", str(tmp_path / "one")), size=8)
    assert identify("s", images) == one["s"]  # its settings are in the config


def test_sources_name_the_files_that_they_read(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for source, names in (
        (data.Series(file=files[0]), files[:1]),
        (data.Ratings(file=files[0]), files[:1]),
        (data.TextWindows(file=files[0]), files[:1]),
        (data.LabelledText(files=tuple(files)), files),
        (data.Subset(data.Series(file=files[1]), np.arange(2)), files[1:]),
        (data.Digits(), []),
    ):
        assert identity.files_of(source) == names


def test_of_large_files_and_arrays_a_sample_is_read(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(identity, "FULL", 1000)
    monkeypatch.setattr(identity, "SAMPLE", 500)
    monkeypatch.setattr(identity, "BLOCK", 50)
    monkeypatch.setattr(identity, "ROWS", 4)
    content = np.random.default_rng(0).integers(0, 256, 2000, np.uint8)
    found = set()
    for position in (None, *range(0, 2000, 25)):
        file = tmp_path / str(position) / "x.bin"
        file.parent.mkdir()
        now = content.copy()
        now[position] += position is not None
        file.write_bytes(now.tobytes())
        digests = (digest_files([file])["file x.bin"], digest_array(now.reshape(-1, 10)))
        found.add((position, *digests))
    unchanged = next(digests for position, *digests in found if position is None)
    noticed = [[digests[kind] != unchanged[kind] for _, *digests in found] for kind in (0, 1)]
    assert 15 <= sum(noticed[0]) <= 25 and 15 <= sum(noticed[1]) <= 25  # a quarter of 80


def test_a_table_that_changed_on_disk_is_read_again_in_the_next_run(tmp_path: Path) -> None:
    file = tmp_path / "u.data"
    file.write_text("1\t1\t3\t0\n" * 20)
    source = data.Ratings("train", file=str(file))
    paths.forget()
    assert len(source) == 18
    file.write_text("1\t1\t3\t0\n" * 40)
    assert len(source) == 18  # not in the middle of a run
    paths.forget()
    assert len(source) == 36


def test_relative_paths_are_looked_up_in_the_base_folders(tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("exp", "start", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    try:
        paths.set_base_folders(tmp_path / "exp", tmp_path / "start")
        assert paths.resolve("t.csv") == tmp_path / "start" / "t.csv"  # nowhere: where the run was started
        for name in ("here", "start", "exp"):
            paths.forget()
            (tmp_path / name / "t.csv").write_text(name)
            assert paths.resolve("t.csv").read_text() == name
        assert paths.notes() == [
            f"t.csv is {tmp_path}/exp/t.csv, and not {tmp_path}/here/t.csv: give the full path if that is "
            "not intended"
        ]
        folders = pickle.dumps(paths.BaseFolders())
        paths.set_base_folders()
        assert paths.resolve("t.csv").read_text() == "here" and paths.notes() == []
        pickle.loads(folders)  # as in a worker process
        assert paths.resolve("t.csv").read_text() == "exp"
    finally:
        paths.set_base_folders()
