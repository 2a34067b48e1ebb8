"""jaxtrain.plan: the nearest change that fits and the search of all variants, on fake and real plans."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from jaxtrain import __main__ as commands
from jaxtrain import plan
from jaxtrain.core.text import size_text
from jaxtrain.plan import report
from jaxtrain.plan.variants import Variant
from jaxtrain.program import device_limits, memory_text

GIVEN = Variant((8, 1, 1), 64, 1, "none")
KEEPS = {"none": 1.0, "dots_saveable": 0.8, "dots_with_no_batch_dims_saveable": 0.7, "nothing_saveable": 0.4}

FILE = """
from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment

TRAIN = data.Synthetic(n=600, shape=(4, 4, 1), classes=4)
EXPERIMENT = Experiment(
    model=models.MLP(widths={widths}, classes=4), train=TRAIN, test=TRAIN, loss=losses.CrossEntropy(),
    optimizer=optim.Adam(lr=1e-3), preprocess=(data.Normalise(),), batch={batch}, epochs=1,
)
"""


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def mlp(tmp_path):
    """Write an experiment of an MLP; returns its path."""

    def write(widths, batch=8) -> str:
        (tmp_path / "mlp.py").write_text(FILE.format(widths=widths, batch=batch))
        return str(tmp_path / "mlp.py")

    return write


def fake_trial(state: int, activations: int, refuse=lambda variant: ""):
    """Fake trial with ``state`` bytes, and ``activations`` bytes per example; ``asked`` lists its calls."""
    asked = []

    def trial(variant: Variant) -> plan.Trial:
        asked.append(variant)
        if refuse(variant):
            return plan.Trial(variant, None, refuse(variant))
        rows = variant.batch / variant.parts / variant.accumulate
        sizes = dict.fromkeys(memory_text.NAMES, 0)
        sizes["params"] = state // (variant.mesh[1] * variant.mesh[2])
        sizes["temporaries"] = int(activations * rows * KEEPS[variant.remat])
        mesh = dict(zip(("data", "fsdp", "model"), variant.mesh, strict=True))
        settings = (variant.batch, variant.accumulate, variant.remat, "float32")
        found = plan.Plan(mesh, "cpu", *settings, (), 1, sizes, None, (), (), ())
        return plan.Trial(variant, found)

    trial.asked = asked
    return trial


def nearest(limit: int, trial, given: Variant = GIVEN) -> plan.Nearest:
    first = trial(given).plan
    assert first.total > limit
    del trial.asked[:]
    return plan.find_nearest(given, first, limit, trial)


def flags(tried: plan.Trial | None, given: Variant = GIVEN) -> str | None:
    return tried and " ".join(tried.variant.flags(given))


@pytest.mark.parametrize(
    ("state", "activations", "limit", "expected", "tries"),
    [
        (10, 100, 500, "--set accumulate=2", 1),
        (10, 100, 300, "--set accumulate=4", 2),
        (800, 10, 200, "--mesh fsdp=8", 1),  # microbatches do not help where the state alone is too large
        (100, 100, 150, "--mesh fsdp=8 --set accumulate=8", None),
        (100, 100, 60, "--mesh fsdp=8 --set accumulate=8 --set remat=nothing_saveable", None),
    ],
)
def test_least_intrusive_change_comes_first(state, activations, limit, expected, tries):
    trial = fake_trial(state, activations)
    found = nearest(limit, trial)
    assert flags(found.fits) == expected and found.fits.plan.total <= limit
    assert found.tried[-1] is found.fits and [one.variant for one in found.tried] == trial.asked
    assert tries is None or len(found.tried) == tries
    assert all(one.plan.total > limit for one in found.tried[:-1])
    assert len({*trial.asked}) == len(trial.asked)  # nothing is compiled twice


def test_on_one_device_recomputation_comes_after_microbatches():
    one = Variant((1, 1, 1), 2, 1, "none")
    found = nearest(95, fake_trial(10, 100), one)
    assert [flags(tried, one) for tried in found.tried] == [
        "--set accumulate=2",
        "--set remat=dots_saveable",
        "--set remat=dots_with_no_batch_dims_saveable",
        "--set remat=nothing_saveable",
    ]
    both = nearest(60, fake_trial(10, 100), one)
    assert flags(both.fits, one) == "--set accumulate=2 --set remat=nothing_saveable"
    assert len(both.tried) == len({tried.variant for tried in both.tried}) == 5


def test_odd_batch_is_divided_by_its_divisors():
    found = nearest(30, fake_trial(0, 10), Variant((1, 1, 1), 15, 1, "none"))
    assert [one.variant.accumulate for one in found.tried] == [3, 15]
    tripled = nearest(15, fake_trial(0, 10), Variant((1, 1, 1), 12, 3, "none"))
    assert [one.variant.accumulate for one in tripled.tried] == [6, 12]


def test_batch_is_halved_last():
    batch_only = fake_trial(
        10, 100, lambda variant: "no" if variant.accumulate > 1 or variant.mesh[1] > 1 else ""
    )
    found = nearest(150, batch_only)
    assert flags(found.fits) == "--set batch=8"
    assert [one.variant.batch for one in found.tried][-3:] == [32, 16, 8]
    assert found.tried[0].reason == "no"


def test_nothing_fits_reports_the_smallest(monkeypatch):
    trial = fake_trial(800, 100)
    found = nearest(50, trial)
    assert found.fits is None and flags(found.smallest) == "--mesh fsdp=8"
    assert len(found.tried) == 1  # the sharded state alone exceeds the limit
    several = nearest(105, fake_trial(100, 10), Variant((1, 1, 1), 8, 1, "none"))
    totals = [one.plan.total for one in several.tried]
    assert several.fits is not None and several.smallest.plan.total == min(totals) < max(totals)
    text = report.nearest_text(found, GIVEN)
    assert "no change that was tried fits; least memory with --mesh fsdp=8: 900 B" in text
    assert report.nearest_json(found, GIVEN)["change"] is None
    monkeypatch.setattr("jaxtrain.plan.nearest.MOST", 5)
    assert len(nearest(1, fake_trial(0, 10**6)).tried) == 5
    impossible = plan.Nearest(None, ())
    assert "nothing else was tried: " in report.nearest_text(impossible, GIVEN)


def test_useless_change_is_not_taken_further():
    """A compiler may save nothing by microbatches or a smaller batch: the second trial shows it."""
    trial = fake_trial(10, 100)

    def stubborn(variant: Variant) -> plan.Trial:
        return dataclasses.replace(
            trial(dataclasses.replace(variant, batch=64, accumulate=1)), variant=variant
        )

    stubborn.asked = trial.asked
    tried = nearest(150, stubborn).tried
    assert {one.variant.accumulate for one in tried} == {1, 2, 4}
    assert {one.variant.batch for one in tried} == {64, 32, 16}


def test_every_mesh_is_searched_and_impossible_ones_are_listed_once():
    def refuse(variant: Variant) -> str:
        if variant.mesh[2] == 8:
            return "params/head/kernel [64, 4]: heads of 4 does not divide over model = 8: use another mesh"
        return "batch 32 does not divide" if variant.batch == 32 and variant.mesh[2] == 1 else ""

    trial, done = fake_trial(800, 10, refuse), []
    found = plan.search_all(GIVEN, 200, trial, done.append)
    assert plan.attempts(GIVEN) == done[-1] == 60 and found.left_out == 0
    assert sum(one.mesh[2] == 8 for one in trial.asked) == 1  # not tried with another batch
    assert (
        sum(one.batch == 32 for one in trial.asked) == 18
    )  # an impossible batch does not exclude other batches
    assert len(found.found) + len(found.impossible) == len(trial.asked) == 55
    totals = [one.plan.total for one in found.found]
    assert totals == sorted(totals) and min(totals) <= 200 < max(totals)
    assert {one.variant.batch for one in found.found} == {32, 64, 128}
    text = report.search_text(found, device_limits.Limit(200, ""))
    assert text.count("heads of 4 does not divide") == 1 and max(map(len, text.splitlines())) < 100
    assert re.search(r"^  fsdp=4,model=2 +64  nothing_saveable  yes +\d+ B +\d+ B +0 B$", text, re.M)
    body = report.search_json(found, GIVEN, device_limits.Limit(200, ""))["search"]
    assert [one["total"] for one in body["found"]] == totals and body["found"][0]["fits"] is True
    assert body["impossible"][0]["reason"].startswith(("params", "batch"))


def test_search_is_bounded():
    sixteen = dataclasses.replace(GIVEN, mesh=(16, 1, 1))
    found = plan.search_all(sixteen, None, fake_trial(800, 10))
    assert len(found.found) == plan.attempts(sixteen) == 60 and found.left_out == 90 - 60
    assert "30 more variants were not compiled" in report.search_text(found, None)
    assert found.found[0].plan.total < found.found[-1].plan.total


def command(capsys, *args) -> tuple[str, str]:
    assert commands.main(["plan", "--experiment", *args]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.mark.full("tests/plan/test_plan_search.py::test_least_intrusive_change_comes_first")
@pytest.mark.parametrize(
    ("widths", "batch", "part", "expected"),
    [
        ((64,), 512, 0.7, "--set accumulate="),
        ((128, 256), 8, 0.75, "--mesh fsdp=2"),
    ],
)
def test_suggested_change_fits_when_planned(widths, batch, part, expected, mlp, capsys):
    args = (mlp(widths, batch), "--devices", "2", "--set", "placement=stream")
    given = json.loads(command(capsys, *args, "--json")[0])
    assert given["fits"] is None
    memory = ("--device-memory", f"{part * given['bytes_per_device']['total'] / 0.75 / 1000:.3f}KB")
    out, progress = command(capsys, *args, *memory)
    assert "verdict: DOES NOT FIT" in out and "(" in out and max(map(len, out.splitlines())) < 100
    change = re.search(r"^fits with (.+): ([\d.]+ [KM]?B)$", out, re.M)
    assert change[1].startswith(expected) and progress.splitlines()[-1] == f"tried {change[1]}: {change[2]}"
    again = json.loads(command(capsys, *args, *memory, *change[1].split(), "--json")[0])
    assert again["fits"] is True and size_text(again["bytes_per_device"]["total"]) == change[2]
    assert "change" not in again


@pytest.mark.full("tests/plan/test_plan_search.py::test_least_intrusive_change_comes_first")
def test_json_of_what_does_not_fit_has_the_change(mlp, capsys):
    body = json.loads(
        command(capsys, mlp((128,), 64), "--devices", "1", "--device-memory", "1KB", "--json")[0]
    )
    assert body["fits"] is False and body["change"] is None
    assert body["smallest"] is None and body["tried"] == []  # the state alone is too large


@pytest.mark.full(
    "tests/plan/test_plan_search.py::test_every_mesh_is_searched_and_impossible_ones_are_listed_once"
)
def test_search_lists_impossible_meshes(mlp, capsys, monkeypatch):
    monkeypatch.setattr("jaxtrain.plan.search.MOST", 4)
    out, _ = command(capsys, mlp((129,), 8), "--devices", "2", "--search", "--device-memory", "1MB")
    table = out.partition("variants: memory on each device")[2]
    assert re.findall(r"^  (data=2|fsdp=2) +8  (none|nothing_saveable)  yes", table, re.M)
    assert re.search(r"^  model=2  params/dense0/\w+ \[.*129\]: mlp of 129 does not divide", table, re.M)
    assert "14 more variants were not compiled" in table and "fits with" not in out
    assert max(map(len, out.splitlines())) < 100
