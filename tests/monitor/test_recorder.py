"""jaxtrain.monitor: the recorder's files and the consoles."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console as RichConsole
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from jaxtrain import monitor
from jaxtrain.core.errors import RunError
from jaxtrain.metrics import Mean
from jaxtrain.monitor.console import Notebook, Plain, Rich


def metrics(loss: float, count: int = 1):
    return [{"loss": Mean(np.float64(loss * count), np.float64(count))}]


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_window_is_merged_by_weight(tmp_path):
    with monitor.open(tmp_path, Plain(), start=0, log_every=2, examples=8) as record:
        record.step(1, metrics(1.0, 3))
        assert read(tmp_path) == []
        record.step(2, metrics(5.0, 1))
        record.step(3, metrics(7.0))
        assert [(r["step"], r["train/loss"]) for r in read(tmp_path)] == [(2, 2.0)]
    assert [(r["step"], r["train/loss"]) for r in read(tmp_path)] == [(2, 2.0), (3, 7.0)]


def test_a_window_in_which_nothing_counts_is_null_and_no_error(tmp_path, capsys):
    """Every label of these updates was ignored: there is no loss, and nothing went wrong."""
    with monitor.open(tmp_path, Plain(), start=0, log_every=1, examples=8) as record:
        record.step(1, metrics(0.0, 0))
        record.step(2, metrics(0.0, 0))
        record.step(3, metrics(0.5))
    assert [(r["step"], r["train/loss"]) for r in read(tmp_path)] == [(1, None), (2, None), (3, 0.5)]
    assert capsys.readouterr().out.count("train/loss is not finite: written as null in metrics.jsonl") == 1


def test_metrics_of_numpy_and_jax_are_numbers_and_tables_are_left_out(tmp_path):
    class Figure:
        def __init__(self, value):
            self.value = value

        def merge(self, other):
            return other

        def compute(self):
            return self.value

    figures = {"np": np.float32(0.5), "jax": jnp.float32(0.25), "table": np.arange(3), "dict": {"a": 1.0}}
    with monitor.open(tmp_path, Plain(), start=0, log_every=1, examples=8) as record:
        record.step(1, [{name: Figure(value) for name, value in figures.items()}])
    (row,) = read(tmp_path)
    assert (row["train/np"], row["train/jax"]) == (0.5, 0.25)
    assert not {"train/table", "train/dict"} & row.keys()


def test_a_metric_that_raises_is_one_line(tmp_path):
    class Undefined(Mean):
        def compute(self):
            return 1 / 0

    with (
        pytest.raises(
            RunError, match=r"the metric 'own' cannot be computed: ZeroDivisionError: .* return NaN"
        ),
        monitor.open(tmp_path, Plain(), start=0, log_every=1, examples=8) as record,
    ):
        record.step(1, [{"own": Undefined(np.float64(0), np.float64(0))}])


def test_tensorboard_files_hold_the_scalars(tmp_path):
    with monitor.open(tmp_path, Plain(), start=0, log_every=1, examples=8) as record:
        record.scalars(1, {"test/accuracy": 0.5, "note": "text"})
        assert seen(tmp_path) == [(1, "test/accuracy", 0.5)]  # during the run: a kill loses nothing
        record.step(1, metrics(0.25))
        record.scalars(2, {"/a metric": 1.0})
    assert seen(tmp_path) == [(1, "test/accuracy", 0.5), (1, "train/loss", 0.25), (2, "a_metric", 1.0)]
    with monitor.open(tmp_path, Plain(), start=1, log_every=1, examples=8) as record:
        record.scalars(2, {"test/accuracy": 1.0})
    assert seen(tmp_path, ".1") == [(2, "test/accuracy", 1.0)]
    assert [e.step for e in events(tmp_path, ".1") if e.HasField("session_log")] == [
        2
    ]  # TensorBoard drops later steps


def events(folder, suffix=".0"):
    """TensorBoard's events on disk."""
    (path,) = (folder / "tensorboard").glob(f"*{suffix}")
    data, found = path.read_bytes(), []
    while data:  # length, its checksum, the event, its checksum
        length, check = struct.unpack("<QI", data[:12])
        event, rest = data[12 : 12 + length], data[12 + length :]
        assert (check, *struct.unpack("<I", rest[:4])) == (masked_crc32c(data[:8]), masked_crc32c(event))
        found.append(Event.FromString(event))
        data = rest[4:]
    return found


def seen(folder, suffix=".0"):
    found = [(e.step, v.tag, v.simple_value) for e in events(folder, suffix) for v in e.summary.value]
    return sorted(found)


@pytest.mark.parametrize(("name", "mode"), [("_jsonl", ""), ("_events", "b")])
def test_full_disk_is_a_one_line_error(name, mode, tmp_path, monkeypatch):
    with (
        pytest.raises(
            RunError, match=r"records in .* cannot be written \(No space left on device\): free"
        ) as raised,
        monitor.open(tmp_path, Plain(), start=0, log_every=1, examples=8) as record,
    ):
        record.scalars(1, {"test/accuracy": 0.5})
        getattr(record._files, name).close()
        full = Path("/dev/full").open("w" + mode, buffering=1 - len(mode))  # noqa: SIM115
        monkeypatch.setattr(record._files, name, full)
        record.scalars(2, {"test/accuracy": 0.5})
    assert "\n" not in str(raised.value)
    assert seen(tmp_path) == [(1, "test/accuracy", 0.5)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_raises_with_its_step(value, tmp_path):
    with (
        pytest.raises(RunError, match=r"loss is (nan|inf) by step 1: lower the learning rate"),
        monitor.open(tmp_path, Plain(), start=0, log_every=1, examples=8) as record,
    ):
        record.step(1, metrics(value))
        record.step(2, metrics(1.0))


def test_plain_lines_have_no_control_characters(capsys):
    console = Plain()
    console.begin(0, 10)
    console.train(5, {"loss": 1.0, "accuracy": 0.5, "grad_norm": 2.0}, 1000.0)
    with console.task("evaluate", 3) as advance:
        advance(1)
    console.summary("done", {"test": "99 %", "folder": "runs/x"})
    console.end()
    out = capsys.readouterr().out
    assert out.startswith("step 5/10  loss 1.0000  accuracy 50.00 %  1,000 examples/s  eta 00:00:0")
    assert out.endswith("done\n  test    99 %\n  folder  runs/x\n") and "\x1b" not in out


def test_rich_shows_bars_values_and_a_table():
    file = io.StringIO()
    console = Rich(RichConsole(file=file, force_terminal=True, width=120, color_system=None))
    console.begin(0, 10)
    console.advance(2)
    console.train(5, {"accuracy": 0.5, "loss": 1.0}, 1000.0)
    with console.task("evaluate test", 4) as advance:
        advance(3)
        console._progress.refresh()  # otherwise done five times a second
        console.note("a note [not markup]")
    console.end()
    console.summary("result", {"test": "99 %"})
    out = file.getvalue()
    for text in ("train", "5/10", "loss 1.0000  accuracy 50.00 %  1,000 examples/s", "evaluate test", "3/4"):
        assert text in out
    assert "a note [not markup]" in out and "│ test │ 99 % │" in out


def test_task_before_training_has_its_own_display():
    file = io.StringIO()
    console = Rich(RichConsole(file=file, force_terminal=True, width=80, color_system=None))
    with console.task("cifar10/train", 0) as advance:
        advance(5)
    assert "cifar10/train" in file.getvalue() and not console._progress.live.is_started


def test_a_notebook_gets_one_bar_that_moves(capsys):
    class Handle:
        def update(self, bundle, raw):
            shown.append((bundle, raw))

    shown = []

    def display(bundle, raw, display_id):
        shown.append((bundle, raw))
        return Handle() if display_id else None

    console = Notebook(display)
    console.advance(1)  # before the display exists: nothing to move
    console.begin(0, 10)
    console.advance(5)
    console.train(10, {"loss": 0.5}, 100.0)
    console.note("a line")
    console.end()
    console.advance(10)
    texts = [bundle["text/plain"] for bundle, _ in shown]
    assert texts == ["step 0/10  ", "step 5/10  ", "step 10/10  loss 0.5000  100 examples/s"]
    assert all(raw and '<progress value="' in bundle["text/html"] for bundle, raw in shown)
    assert capsys.readouterr().out == "a line\n"


def test_the_time_left_excludes_compilation_and_does_not_wrap_after_a_day(capsys, monkeypatch):
    clock = iter([0.0, 60.0, 62.0, 64.0])
    monkeypatch.setattr("jaxtrain.monitor.console.time.perf_counter", lambda: next(clock))
    console = Plain()
    console.begin(0, 100_001)
    for step in (1, 3, 5):  # compiled in a minute, then a second a step
        console.train(step, {"loss": 1.0}, None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("eta ")[2] for line in lines] == ["1666:40:00", "27:46:38", "27:46:36"]
