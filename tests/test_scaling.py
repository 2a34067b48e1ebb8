"""``bench --scaling``: the core on 1, 2 and 4 of eight devices, what the command writes, what it refuses."""

from __future__ import annotations

import builtins
import importlib.util
import json
import re
import shlex
import types
from pathlib import Path

import jax
import pytest
from tiny import EXPERIMENT

from jaxtrain import __main__ as verbs
from jaxtrain import scaling
from jaxtrain.errors import InputError, RunError
from jaxtrain.recorder import Console, make_console
from jaxtrain.scaling import Lane, Measured, efficiency, layouts, measure, record, speedup, turns

TINY = str(Path(__file__).parent / "tiny.py")
FEW = ("--experiment", TINY, "--steps", "2", "--rounds", "3")


@pytest.fixture
def console() -> Console:
    return make_console()


@pytest.fixture
def rounds(monkeypatch) -> list[tuple[str, int]]:
    """Every round that is run, as (mesh, steps)."""
    seen = []
    real = Lane.round

    def spied(self, steps):
        seen.append((self.mesh.size, steps))
        return real(self, steps)

    monkeypatch.setattr(Lane, "round", spied)
    return seen


@pytest.fixture
def unmeasured(monkeypatch):
    """Whatever is refused is refused before anything is compiled."""

    def never(*args, **kwargs):
        raise AssertionError("measured all the same")

    monkeypatch.setattr(scaling, "assemble", never)


@pytest.fixture
def instant(monkeypatch):
    """Figures without computing: a count n takes 1 / sqrt(n) seconds for its steps, the rounds differ."""

    def made_up(given, *, steps, rounds, console):
        return [
            Measured(n, f"data={n}", layout.experiment.batch, True, steps, (n**-0.5, 2 * n**-0.5, n**-0.5))
            for n, layout in given.items()
        ]

    monkeypatch.setattr(scaling, "measure", made_up)


def bench(*args) -> int:
    return verbs.main(["bench", *map(str, args)])


def refused(capsys, *args) -> str:
    """The one line of an error, of exit code 2; nothing was written."""
    code = bench(*args)
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


def test_the_core_measures_the_program_of_a_run_in_interleaved_rounds(console, rounds):
    found = measure(layouts(EXPERIMENT, (1, 2, 4)), steps=2, rounds=3, console=console)
    assert [(one.devices, one.mesh, one.batch) for one in found] == [
        (1, "data=1", 16),
        (2, "data=2", 16),
        (4, "data=4", 16),
    ]
    assert all(one.steps == 2 and one.resident and len(one.round_seconds) == 3 for one in found)
    assert all(seconds > 0 for one in found for seconds in one.round_seconds)
    first, later = rounds[:3], rounds[3:]
    assert first == [(1, 1), (2, 1), (4, 1)]  # compile, one after another
    there, back = [(1, 2), (2, 2), (4, 2)], [(4, 2), (2, 2), (1, 2)]
    assert later == [*back, *there, *back, *there]  # the first of them is thrown away


def test_a_lane_trains_as_the_run_does_and_compiles_once(mesh8):
    lane = Lane(EXPERIMENT, mesh8)
    state = lane.program.init()
    for step in range(5):
        state, _ = lane.program.train_step(state, lane.program.train.batch(step), lane.program.key)
    lane.round(2)
    lane.round(3)
    assert lane.program.train_step._cache_size() == 1
    assert int(lane._state.step) == 5
    jax.tree.map(lambda a, b: pytest.approx(a) == b, jax.device_get(state), jax.device_get(lane._state))


def test_a_round_bounds_its_queue_and_waits_at_its_end(mesh1, monkeypatch):
    lane, waited = Lane(EXPERIMENT, mesh1), []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waited.append(x))
    lane.round(5)
    assert len(waited) == 5 - EXPERIMENT.max_in_flight + 1
    assert waited[-1][0] is lane._state
