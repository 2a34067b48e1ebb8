"""jaxtrain.data.series and jaxtrain.data.ratings: windows of a csv file, and ratings of items."""

from __future__ import annotations

import concurrent.futures
import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures_data import check_fresh_process, real_data

from jaxtrain.core.errors import InputError
from jaxtrain.data.ratings import Ratings
from jaxtrain.data.series import Series
from jaxtrain.data.sources import Source
from jaxtrain.experiment import override

SPLITS = ("train", "validation", "test")
RATED = [(1, 10, 4.0), (2, 7, 1.0), (3, 1, 3.5), (2, 10, 5.0), (9, 2, 2.0), (1, 1, 3.0)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data_dir with a small MovieLens in the TFDS layout, ids as text as in the stock one."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    names = ("100k-ratings", "bad-ratings")
    configs = [tfds.core.BuilderConfig(name=name, version="0.1.1") for name in names]

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore
        name = "movielens"
        VERSION = tfds.core.Version("0.1.1")
        BUILDER_CONFIGS = configs

        def _info(self) -> Any:
            text, number = tfds.features.Text(), np.float32
            features = {"movie_title": text, "user_id": text, "movie_id": text, "user_rating": number}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> Any:
            wrong = {"movie_id": "ten"} if self.builder_config.name == "bad-ratings" else {}
            return {
                "train": (
                    (
                        i,
                        {
                            "movie_title": "?",
                            "user_id": f"{u}",
                            "movie_id": f"{m}",
                            "user_rating": r,
                            **wrong,
                        },
                    )
                    for i, (u, m, r) in enumerate(RATED)
                )
            }

        def _generate_examples(self) -> Any:
            raise NotImplementedError

    tfds.disable_progress_bar()
    for config in names:
        Builder(data_dir=folder, file_format="array_record", config=config).download_and_prepare()
    return str(folder)


def everything(source: Any) -> dict[str, np.ndarray]:
    return source.gather(np.arange(len(source)))


def table(folder: Path, rows: int = 12, name: str = "table.csv") -> str:
    """Write a csv file whose column b is 10, 20, 30 ... and whose column c is 0, 1, 4, 9 ..."""
    lines = [f"2016-07-{i + 1:02d},{10 * (i + 1)},{i * i}" for i in range(rows)]
    (folder / name).write_text("\n".join(["date,b,c", *lines]) + "\n", "utf-8-sig")
    return str(folder / name)


def rated(folder: Path, rows: int = 200) -> str:
    """Write ``rows`` different ratings, users up to 17 and items up to 23."""
    lines = [f"{i % 17 + 1}\t{i % 23 + 1}\t{i % 5 + 1}\t{i}" for i in range(rows)]
    (folder / "u.data").write_text("\n".join(lines) + "\n")
    return str(folder / "u.data")


# --- both


def sources(folder: Path, root: str) -> list[Any]:
    file, ratings = table(folder, 60), rated(folder)
    return [
        Series(window=5, horizon=2, file=file),
        Series(window=5, horizon=2, split="validation", file=file),
        Series(window=3, horizon=1, split="test", file=file, columns=("c",), rows=50),
        Ratings(file=ratings),
        Ratings("test", file=ratings, part=0.3),
        Ratings(data_dir=root, part=0.4),
    ]


def test_gather_is_a_pure_function_of_each_id(tmp_path: Path, root: str) -> None:
    for source in sources(tmp_path, root):
        full, n = everything(source), len(source)
        assert isinstance(source, Source) and n > 1
        ids = np.random.default_rng(0).integers(0, n, 3 * n)  # any order, with repeats
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            requests = [ids, ids[:1], ids[:0], ids[::-1].astype(np.int32)]
            batches = list(pool.map(source.gather, requests))
        for some, batch in zip(requests, batches, strict=True):
            assert batch.keys() == full.keys()
            for name, array in batch.items():
                assert array.flags.c_contiguous and array.flags.writeable
                assert array.dtype == full[name].dtype
                np.testing.assert_array_equal(array, full[name][some])
        for name, array in (source.example() or {}).items():
            assert full[name].dtype == array.dtype and full[name].shape[1:] == array.shape[1:]
        with pytest.raises(IndexError):
            source.gather(np.array([n]))


def test_fresh_process_reads_the_same(tmp_path: Path, root: str, python: Any) -> None:
    check_fresh_process(sources(tmp_path, root), tmp_path, python)


def test_example_reads_nothing_and_files_need_no_preparation() -> None:
    for source in (Series(file="/none", columns=("a", "b")), Ratings(file="/none")):
        assert source.example() and source.prepared()
    assert Series(file="/none").example() is None  # the file, which is not read, has the columns
    for missing in (Series(data_dir="/none"), Ratings(data_dir="/none")):
        assert missing.example() and not missing.prepared()
        command = f"jaxtrain prepare {missing.name} --data-dir /none"
        with pytest.raises(InputError, match=f"not prepared in /none: .*{command}$"):
            len(missing)


def test_overrides_from_the_command_line(tmp_path: Path) -> None:
    file = table(tmp_path)
    series = override(Series(), [f"file={file}", "columns=c,b", "window=2", "horizon=1", "rows=10"])
    assert series == Series(window=2, horizon=1, file=file, columns=("c", "b"), rows=10) and len(series) == 4
    assert hash(Series(columns=["c"])) == hash(Series(columns=("c",)))  # type: ignore
    assert override(Ratings(), ["part=0.25", "split=test"]) == Ratings("test", part=0.25)


# --- series


def test_series_by_hand(tmp_path: Path) -> None:
    # 12 rows: 7 for training, 2 for validation (7, 8) and 3 for testing (9, 10, 11). b is 10 ... 70 in
    # training: mean 40 and variance 400, whose root is 20. So standardised row i is (i - 3) / 2.
    def of(split: str) -> Series:
        return Series(window=3, horizon=2, split=split, file=table(tmp_path), columns=("b",))

    train = everything(of("train"))
    assert of("train").mean == [40] and of("train").std == [20] and of("test").std == [20]
    assert train["series"][..., 0].tolist() == [[-1.5, -1, -0.5], [-1, -0.5, 0], [-0.5, 0, 0.5]]
    assert train["target"][..., 0].tolist() == [[0, 0.5], [0.5, 1], [1, 1.5]]
    validation = everything(of("validation"))
    assert validation["series"][..., 0].tolist() == [[0.5, 1, 1.5]]  # rows 4, 5, 6
    assert validation["target"][..., 0].tolist() == [[2, 2.5]]  # rows 7, 8
    test = everything(of("test"))
    assert test["series"][..., 0].tolist() == [[1.5, 2, 2.5], [2, 2.5, 3]]  # from rows 6 and 7
    assert test["target"][..., 0].tolist() == [[3, 3.5], [3.5, 4]]  # rows 9, 10 and 10, 11
    assert train["series"].dtype == train["target"].dtype == np.float32


def test_columns(tmp_path: Path) -> None:
    file = table(tmp_path)
    both = Series(window=2, horizon=1, file=file)
    assert both.variables == ("b", "c")  # without the dates, and without the byte order mark
    swapped = Series(window=2, horizon=1, file=file, columns=("c", "b"))
    assert swapped.variables == ("c", "b")
    np.testing.assert_array_equal(everything(swapped)["series"], everything(both)["series"][..., ::-1])
    np.testing.assert_array_equal(swapped.mean, both.mean[::-1])
    np.testing.assert_allclose(both.std, [20, np.std(np.arange(7.0) ** 2)])
    numbers = tmp_path / "numbers.csv"
    numbers.write_text("a, b\r\n1,2\r\n\r\n3,4\r\n5,1e1\r\n7,8\r\n9,9\r\n")
    assert Series(window=1, horizon=1, file=str(numbers)).variables == ("a", "b")
    assert Series(window=1, horizon=1, file=str(numbers)).mean.tolist() == [3, 16 / 3]


@pytest.mark.parametrize("rows", [40, 41, 44, 59])
def test_every_row_is_a_target_of_one_split(rows: int, tmp_path: Path) -> None:
    file = table(tmp_path, 60)
    found = {}
    for split in SPLITS:
        source = Series(window=6, horizon=3, split=split, file=file, columns=("b",), rows=rows)
        batch = everything(source)
        original = {name: batch[name][..., 0] * source.std + source.mean for name in batch}
        series, target = (np.rint(original[name] / 10 - 1).astype(int) for name in ("series", "target"))
        window = np.concatenate([series, target], axis=1)  # window i is 9 consecutive rows
        np.testing.assert_array_equal(window - window[:1, :1], np.arange(len(window))[:, None] + np.arange(9))
        found[split] = set(target.ravel().tolist())
    ends = [rows * 6 // 10, rows * 8 // 10, rows]
    assert found["train"] == set(range(6, ends[0]))
    assert found["validation"] == set(range(ends[0], ends[1]))
    assert found["test"] == set(range(ends[1], ends[2]))


def test_scale_depends_only_on_training_rows(tmp_path: Path) -> None:
    lines = Path(table(tmp_path)).read_text("utf-8-sig").splitlines()
    for i in range(8, 13):
        lines[i] = f"x,{i * 1000},-5"
    (tmp_path / "wild.csv").write_text("\n".join(lines))
    tame, wild = (Series(window=2, horizon=1, file=str(tmp_path / f)) for f in ("table.csv", "wild.csv"))
    assert tame.mean.tolist() == wild.mean.tolist() and tame.std.tolist() == wild.std.tolist()
    np.testing.assert_array_equal(everything(tame)["series"], everything(wild)["series"])


def test_etth1(tmp_path: Path) -> None:
    file = real_data("series") / "ETTh1.csv"
    # The numbers of windows in the literature for window=96 and horizon=24.
    by_split = {s: Series(split=s, file=str(file), rows=14400) for s in SPLITS}
    assert [len(source) for source in by_split.values()] == [8521, 2857, 2857]
    with file.open() as lines:
        raw = np.array([row[1:] for row in list(csv.reader(lines))[1:14401]], float)
    std = (raw - raw[:8640].mean(0)) / raw[:8640].std(0)
    last = by_split["test"].gather(np.array([2856]))
    np.testing.assert_allclose(last["series"][0], std[-120:-24], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(last["target"][0], std[-24:], rtol=1e-5, atol=1e-6)
    first = by_split["validation"].gather(np.array([0]))
    np.testing.assert_allclose(first["target"][0], std[8640:8664], rtol=1e-5, atol=1e-6)
    # By name, once it is in data_dir.
    (tmp_path / "etth1" / "1.0.0").mkdir(parents=True)
    shutil.copy(file, tmp_path / "etth1" / "1.0.0" / "ETTh1.csv")
    named = Series(rows=14400, data_dir=str(tmp_path))
    assert named.prepared() and len(named) == 8521 and named.variables[-1] == "OT"
    example = named.example()
    assert example is not None and example["series"].shape == named.gather(np.array([0]))["series"].shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({5: "d,,16"}, r"bad.csv, row 5, column 'b': an empty cell is not a finite number"),
        ({5: "d,nan,16"}, r"bad.csv, row 5, column 'b': 'nan' is not a"),
        ({7: "d,1,-inf"}, r"bad.csv, row 7, column 'c': '-inf' is not a"),
        ({13: "d,1,x1"}, r"bad.csv, row 13, column 'c': 'x1' is not a"),
        ({13: "d,1,1_0"}, r"bad.csv, row 13, column 'c': '1_0' is not a"),
        ({2: ",1,"}, r"bad.csv, row 2, column 'date': an empty cell"),
        ({4: "d,1"}, r"bad.csv, row 4: 2 cells for 3 columns: it ends before column 'c'"),
        ({4: "d,1,2,3"}, r"bad.csv, row 4: 4 cells for 3 columns: it continues after column 'c'"),
        ({4: "", 6: "d,1"}, r"bad.csv, row 6: 2 cells"),
        ({4: 'd,"1,2'}, "bad.csv is not a csv file in UTF-8"),
        ({4: "d,\xff,2"}, "bad.csv is not a csv file in UTF-8"),
        (dict.fromkeys(range(2, 9), "d,0.1,1"), "bad.csv, column 'b': all 7 training rows are 0.1"),
        (dict.fromkeys(range(2, 14)), "bad.csv has no rows"),
        (dict.fromkeys(range(1, 14)), "bad.csv has no rows"),
        (dict.fromkeys(range(3, 14)), "bad.csv: 1 rows are too few to split"),
        (dict.fromkeys(range(6, 14)), "bad.csv: 4 rows are too few for one train window of window=2 and hor"),
        ({1: "date", **dict.fromkeys(range(2, 14), "d")}, "its only column 'date' is not numeric"),
    ],
)
def test_errors_of_a_csv_file(change: dict[int, str | None], message: str, tmp_path: Path) -> None:
    lines = Path(table(tmp_path)).read_text("utf-8-sig").splitlines()
    changed = [change.get(i, old) for i, old in enumerate(lines, 1)]
    (tmp_path / "bad.csv").write_text("\n".join(new for new in changed if new is not None), "latin-1")
    with pytest.raises(InputError, match=message) as caught:
        len(Series(window=2, horizon=1, file=str(tmp_path / "bad.csv")))
    assert "\n" not in str(caught.value)


def test_errors_of_series_settings(tmp_path: Path) -> None:
    file = table(tmp_path)
    (tmp_path / "twice.csv").write_text("a,b,a\n1,2,3\n")
    (tmp_path / "headless.csv").write_text("1,2,3\n4,5,6\n")
    for settings, message in [
        ({"window": 0}, "window is 0: it must be at least 1"),
        ({"horizon": 0}, "horizon is 0: it must be at least 1"),
        ({"rows": 0}, "rows is 0: it must be at least 1"),
        ({"rows": 13}, "has 12 rows, fewer than rows=13"),
        ({"split": "valid"}, "train, validation, test, not 'valid'"),
        ({"columns": "b"}, "columns is 'b': give a tuple"),
        ({"columns": ("b", "d")}, "row 1: column 'd' is missing; there are date, b, c"),
        ({"columns": ("date",)}, "row 2, column 'date': '2016-07-01' is not a finite number"),
        ({"columns": ("a",), "file": str(tmp_path / "twice.csv")}, "column 'a' appears twice"),
        ({"file": str(tmp_path / "twice.csv")}, "row 1: column 'a' appears twice"),
        ({"file": str(tmp_path / "headless.csv")}, "headless.csv, row 1 holds numbers only"),
        ({"file": str(tmp_path / "gone.csv")}, r"gone.csv cannot be read \(No such file"),
        ({"window": 8, "horizon": 1, "split": "validation"}, "too few for one validation window"),
        ({"window": 2, "horizon": 3, "split": "validation"}, "too few for one validation window"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            len(Series(**{"window": 2, "horizon": 1, "file": file, **settings}))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    assert len(Series(window=7, horizon=2, split="validation", file=file)) == 1
    assert len(Series(window=2, horizon=1, file=file, rows=12)) == 5
    (tmp_path / "later.csv").write_text(Path(file).read_text("utf-8-sig") + "x,nan,\n")
    assert (
        len(Series(window=2, horizon=1, file=str(tmp_path / "later.csv"), rows=12)) == 5
    )  # beyond rows=12, not read


# --- ratings


def rows(source: Ratings) -> list[tuple[int, int, float]]:
    batch = everything(source)
    assert [a.dtype for a in batch.values()] == [np.int32, np.int32, np.float32]
    return list(zip(*(batch[name].tolist() for name in ("user", "item", "target")), strict=True))


@pytest.mark.parametrize("part", [0.1, 0.25, 0.9])
def test_ratings_of_a_file(part: float, tmp_path: Path) -> None:
    file = rated(tmp_path)
    train, test = (rows(Ratings(split, file=file, part=part)) for split in ("train", "test"))
    assert len(test) == round(200 * part) and len(train) + len(test) == 200
    want = [(i % 17, i % 23, i % 5 + 1.0) for i in range(200)]
    assert sorted(train + test) == sorted(want)  # complete, disjoint, ids from 0
    assert test not in (want[: len(test)], want[-len(test) :])  # at random, not the first or last
    for split in ("train", "test"):
        assert Ratings(split, file=file, part=part).users == 17
        assert Ratings(split, file=file, part=part).items == 23


def test_ratings_of_a_data_set(root: str) -> None:
    train, test = (Ratings(split, data_dir=root, part=0.34) for split in ("train", "test"))
    assert (len(train), len(test)) == (4, 2)
    assert sorted(rows(train) + rows(test)) == sorted((u - 1, m - 1, r) for u, m, r in RATED)
    assert train.prepared() and train.users == test.users == 9 and train.items == test.items == 10
    bad = Ratings(name="movielens/bad-ratings", data_dir=root)
    with pytest.raises(
        InputError, match=r"data set movielens/bad-ratings, example 0: .*'ten'.* not two integer"
    ):
        len(bad)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1\t2\t3", "u.data, line 3: 3 cells where user, item, rating and time"),
        ("1 2 3 4", "u.data, line 3: 1 cells"),
        ("1::2::3::4", "u.data, line 3: 1 cells"),
        ("1\t2.5\t3\t4", "u.data, line 3: .* are not two integer ids"),
        ("one\t2\t3\t4", "u.data, line 3: 'one'.* are not two integer ids"),
        ("1\t2\tgood\t4", "u.data, line 3: .*'good' are not"),
        ("0\t2\t3\t4", "u.data, line 3: ids 0 and 2 must be in 1.."),
        ("1\t-2\t3\t4", "u.data, line 3: ids 1 and -2 must"),
        ("1\t4000000000\t3\t4", "u.data, line 3: ids 1 and 4000000000 must be in 1..2147483647"),
        ("1\t2\tnan\t4", "u.data, line 3: rating nan is not finite"),
        ("1\t2\tinf\t4", "u.data, line 3: rating inf is not finite"),
    ],
)
def test_errors_of_a_ratings_file(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text(f"1\t1\t1\t1\n\n{line}\n2\t2\t2\t2\n")
    with pytest.raises(InputError, match=message) as caught:
        len(Ratings(file=str(tmp_path / "u.data")))
    assert "\n" not in str(caught.value)


def test_errors_of_ratings_settings(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for part in (0, 1, -0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match=r"part is .*: it must be in \(0, 1\)"):
            Ratings(part=part)
    for settings, message in [
        ({"split": "validation"}, "has the splits train, test, not 'validation'"),
        ({"file": str(tmp_path / "gone")}, r"gone cannot be read \(No such file"),
        ({"file": str(tmp_path / "empty")}, "empty holds no ratings"),
        ({"file": rated(tmp_path, 4)}, "part=0.1 of 4 ratings leaves a split empty"),
        ({"file": rated(tmp_path, 4), "part": 0.9}, "part=0.9 of 4 ratings leaves a split empty"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            len(Ratings(**settings))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
