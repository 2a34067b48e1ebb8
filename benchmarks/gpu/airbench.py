"""``cifar_airbench94`` over several seeds in one process, timed as its recipe counts.

The time has whitening, training and the evaluation with its averaged views in it, and leaves out loading,
compiling and evaluations on the way; a short run first warms up, as the published recipe does. Everything is
compiled once: another seed is another key, another order of the examples and another state.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import common
from benchmarks.gpu import workloads
from benchmarks.gpu.measure import left
from jaxtrain import sharding
from jaxtrain.core.types import State
from jaxtrain.data import compose
from jaxtrain.experiment import Experiment
from jaxtrain.monitor.console import Plain
from jaxtrain.program import Program, assemble, splits, update
from jaxtrain.program.loader import Resident
from jaxtrain.step import make_init
from jaxtrain.train import autotune, dispatch, loop

SEEDS = 5
PUBLISHED = {
    "accuracy": 0.9401,
    "n": 1000,
    "seconds_eager": 3.83,
    "seconds_compiled": 3.09,
    "device": "one A100",
    "source": "Jordan 2024, arXiv:2404.00498",
}


class Recipe:
    """A program whose seed can be changed without compiling anything again.

    Args:
      exp: the experiment; its data stay on the device.
    """

    def __init__(self, exp: Experiment) -> None:
        self._mesh = sharding.make_mesh(jax.devices()[:1])
        self.program = assemble(exp, self._mesh)
        steps = self.program.steps
        start = make_init(
            exp.model, exp.optimizer.build(steps), compose(*exp.preprocess), exp.data_init,
            update.build_post_update(exp, steps), **update.loss_scaling(exp),
        )  # fmt: skip
        self._init = jax.jit(
            start, out_shardings=jax.tree.map(lambda x: x.sharding, self.program.abstract_state)
        )
        self._sample = jax.device_put(splits.first_examples(exp, exp.train), sharding.replicated(self._mesh))

    def with_seed(self, seed: int) -> tuple[Program, Callable[[], State]]:
        """The program of that seed, and what makes its first state; data are sent before it returns."""
        keys = jax.device_put(jax.random.split(jax.random.key(seed)), sharding.replicated(self._mesh))
        order = dataclasses.replace(self.program.order, seed=seed)
        train = Resident(self.program.experiment.train, order, self._mesh)
        jax.block_until_ready(train.batch(0)["data"])
        key = jax.block_until_ready(keys[1])
        return dataclasses.replace(self.program, key=key, train=train), lambda: self._init(
            keys[0], self._sample
        )

    def run(self, seed: int, count: int, most: int | None = None) -> dict[str, float]:
        """Accuracy on the test set and seconds of seed ``seed``, ``count`` updates at once.

        ``most`` cuts the training short, for warming up; the full evaluation follows.
        """
        program, init = self.with_seed(seed)
        program = program.with_cadence(steps_per_execution=count)
        go = dispatch.Dispatch(program, lambda line: None)
        flight = dispatch.InFlight(program.experiment.max_in_flight)
        clock = [time.perf_counter()]
        state, step = init(), 0
        jax.block_until_ready(state)
        clock.append(time.perf_counter())
        end = program.steps if most is None else min(most, program.steps)
        while step < end:
            now = program.cadence.updates_per_call(step)
            state, metrics = go(state, step, now)
            step += now
            flight.add(metrics)
        jax.block_until_ready(state)
        clock.append(time.perf_counter())
        values = loop.evaluate(program, state, "test", Quiet())
        clock.append(time.perf_counter())
        whiten, train, evaluate = (b - a for a, b in itertools.pairwise(clock))
        return {
            "seed": seed,
            "accuracy": values["accuracy"],
            "seconds": clock[-1] - clock[0],
            "whiten_seconds": whiten,
            "train_seconds": train,
            "evaluate_seconds": evaluate,
        }


class Quiet(Plain):
    """A console that shows nothing."""

    def note(self, line: str) -> None:
        pass


def airbench(folder: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Both precisions, one update at a time and several; all that there is after every seed."""
    sets = list(workloads.cifar10(Path(folder)))
    if tiny:
        sets = [{k: v[:512] for k, v in fields.items()} for fields in sets]
    exp = workloads.airbench(*sets, tiny)
    recipes = {
        precision: Recipe(dataclasses.replace(exp, precision=precision))
        for precision in ("bfloat16", "float32")
    }
    program = recipes["float32"].program
    chosen = autotune.decide(program, None, deterministic=False)
    figures: dict[str, Any] = {
        "steps": program.steps,
        "batch": exp.batch,
        "as_a_run_would": {"precision": exp.precision, **chosen.record()},
        "published": PUBLISHED,
    }
    runs: dict[str, list[dict[str, float]]] = {}
    for count in (1, 4 if tiny else workloads.AT_ONCE):
        for precision, recipe in recipes.items():
            name = f"{precision}, {'one update' if count == 1 else f'{count} updates'} at a time"
            if runs and left() < (5 if tiny else 45):  # it must compile, too
                figures.setdefault("skipped", {})[name] = "no time left"
                continue
            began = time.perf_counter()
            recipe.run(0, count, most=2 * count)
            figures.setdefault("warm_up_seconds", {})[name] = time.perf_counter() - began
            for seed in range(2 if tiny else SEEDS):
                if seed > 1 and left() < 1.5 * runs[name][-1]["seconds"]:
                    break
                runs.setdefault(name, []).append(recipe.run(seed, count))
                yield report(runs, figures)


def report(runs: Mapping[str, list[dict[str, float]]], figures: Mapping[str, Any]) -> dict[str, Any]:
    """The table's lines: accuracy and seconds of every variant."""
    results = []
    for name, each in runs.items():
        results += lines(name, each)
    return {"results": results, "figures": {**figures, "runs": runs}}


def lines(name: str, runs: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Accuracy, whose mean must reach 94 %, and seconds."""
    accuracy, seconds = ([run[key] for run in runs] for key in ("accuracy", "seconds"))
    mean, std = float(np.mean(accuracy)), float(np.std(accuracy, ddof=1)) if len(accuracy) > 1 else None
    goal = {"mean": mean, "std": std, "goal": "mean >= 0.94", "met": mean >= 0.94}
    spread = {
        "mean": statistics.mean(seconds),
        "std": statistics.stdev(seconds) if len(seconds) > 1 else None,
    }
    return [
        common.result(f"{name}: test accuracy", accuracy, "") | goal,
        common.result(f"{name}: whitening, training and evaluation", seconds, "s") | spread,
    ]
