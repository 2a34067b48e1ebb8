"""Reading ``metrics.jsonl``, and thinning."""

from __future__ import annotations

import json
import math

import numpy as np
from report_cases import curve

from jaxtrain.report.metrics_file import MetricsFile, thin


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_file_that_grows_is_read_once_and_gives_what_one_reading_gives(tmp_path) -> None:
    text, path = lines(curve(30)).encode(), tmp_path / "metrics.jsonl"
    growing = MetricsFile(path)
    growing.update()
    assert growing.names == []  # there is no file yet
    for cut in (1, 700, 701, 1500, len(text)):  # in the middle of lines too
        path.write_bytes(text[:cut])
        growing.update()
    once = MetricsFile(path)
    once.update()
    assert once.names == growing.names and once.bad_lines == growing.bad_lines == 0
    for name in once.names:
        np.testing.assert_array_equal(once.series(name), growing.series(name))
    step, loss = once.series("train/loss")
    np.testing.assert_array_equal(step, np.arange(1, 31))
    np.testing.assert_array_equal(loss, [2.0 / n for n in range(1, 31)])


def test_a_last_line_that_a_kill_has_cut_off_is_left_out(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(curve(5)) + '{"step": 6, "train/lo')
    metrics = MetricsFile(path)
    metrics.update()
    assert metrics.last_step == 5 and metrics.bad_lines == 0


def test_a_file_that_a_resumed_run_has_replaced_is_read_again(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(curve(20)))
    metrics = MetricsFile(path)
    metrics.update()
    other = tmp_path / "other"
    other.write_text(lines({"step": n, "train/loss": -1.0} for n in range(1, 2000)))  # longer than before
    other.replace(path)
    metrics.update()
    assert metrics.names == ["train/loss"] and metrics.last_step == 1999
    path.write_text("")  # cut in place
    metrics.update()
    assert metrics.names == []


def test_lines_that_are_no_records_and_numbers_that_are_not_finite_are_counted(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = (
        '{"step": 1, "a": NaN, "b": 1e999, "c": null, "d": ' + "9" * 400 + ', "e": true, "f": "x", "g": 2}\n'
    )
    bad = ["{}", "[1]", "null", '{"step": "1"}', '{"step": -1}', '{"step": null}', '{"step": NaN}', "\0\xff"]
    bad += ["[" * 100_000, '{"step": ' + "9" * 5000 + "}"]
    path.write_bytes((good + "\n".join(bad) + "\n").encode("latin-1"))
    metrics = MetricsFile(path)
    metrics.update()
    assert metrics.bad_lines == len(bad)
    assert metrics.names == ["a", "b", "c", "d", "g"]  # texts and booleans are no numbers
    assert metrics.not_finite == {"a": 1, "b": 1, "c": 1, "d": 1}
    assert math.isnan(metrics.series("d")[1][0]) and metrics.last("g") == 2 and metrics.last("a") is None


def test_thinning_keeps_the_extremes_of_every_bucket_and_their_means() -> None:
    rng = np.random.default_rng(0)
    step, value = np.arange(10_000.0), rng.normal(size=10_000)
    value[1234], value[777] = 50.0, np.nan
    thinned = thin(step, value, 100)
    assert len(thinned.step) <= 202 and thinned.value.max() == 50.0
    assert thinned.step[0] == 0 and thinned.step[-1] == 9999
    finite = np.isfinite(value)
    kept = dict(zip(thinned.step, thinned.value, strict=True))
    starts = np.arange(100) * 9999 // 100
    parts = np.split(value[finite], starts[1:]), np.split(step[finite], starts[1:])
    for values, steps in zip(*parts, strict=True):
        assert kept[steps[values.argmin()]] == values.min() and kept[steps[values.argmax()]] == values.max()
    assert thinned.mean is not None
    np.testing.assert_allclose(thinned.mean[1], [part.mean() for part in parts[0]])
    np.testing.assert_allclose(thinned.mean[0], [part.mean() for part in parts[1]])
    short = thin(step[:200], value[:200], 100)
    assert short.mean is None and len(short.step) == 200
