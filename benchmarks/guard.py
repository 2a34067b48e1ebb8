"""What the guard adds to a step of about 5 ms, and what the check for recompilation costs.

``guard="stop"`` against ``guard="off"``: the same model, data and order, each through ``loop._train``,
without evaluations and saves. So the cost includes both the check inside the program and the host that reads
the figures of earlier steps. ``norm`` is ``off`` with the norm of the update as one more metric, the cost of
that figure alone. ``off`` is measured twice: the difference of the two is noise.

  python -m benchmarks.guard [--rounds N] [--out FILE]
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import jax
import optax

from benchmarks import common
from benchmarks.sides import TOTAL, without_saves
from jaxtrain import checkpoint, data, losses, models, monitor, optim, sharding
from jaxtrain.core.signals import Request
from jaxtrain.core.types import Batch, Metrics, State
from jaxtrain.experiment import Experiment
from jaxtrain.metrics import Mean
from jaxtrain.monitor.console import Plain
from jaxtrain.program import Program, assemble
from jaxtrain.step import make_train_step
from jaxtrain.train import loop
from jaxtrain.train.bad_updates import BadUpdateMonitor
from jaxtrain.train.recompile import OneCompile

CHUNK = 10  # steps timed at once, with one record


def cases() -> dict[str, Experiment]:
    """A convolutional step, and a dense one with many parameters for its batch: the worst for the guard."""
    images = data.Arrays(common.cifar_like(6_400))
    shared: dict[str, Any] = {
        "train": images,
        "test": images,
        "loss": losses.CrossEntropy(),
        "preprocess": (data.Normalise(),),
        "eval_every": None,
    }

    def experiment(model: Any, batch: int, optimizer: Any) -> Experiment:
        epochs = TOTAL * batch / len(images)
        return Experiment(model=model, batch=batch, epochs=epochs, optimizer=optimizer, **shared)

    return {
        "cnn": experiment(models.CNN(widths=(16, 32), convs=1), 16, optim.SGD(lr=0.01, momentum=0.9)),
        "mlp": experiment(models.MLP(widths=(128,)), 128, optim.AdamW(lr=1e-3)),
    }


def with_norm(model: Any, loss: Any, tx: Any, prepare: Any, after: Any) -> Any:
    """A step factory: the plain step, and the norm of the update."""
    plain = make_train_step(model, loss, tx, prepare, after)

    def step(state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        new, metrics = plain(state, batch, key)
        change = jax.tree.map(jax.numpy.subtract, new.params, state.params)
        return new, {**metrics, "update_norm": Mean.of(optax.tree.norm(change))}

    return step


class Side:
    """One policy, with a state that continues from chunk to chunk."""

    def __init__(self, exp: Experiment, folder: Path, null: TextIO, stack: contextlib.ExitStack) -> None:
        folder.mkdir()
        program = assemble(exp, sharding.make_mesh(jax.devices()[:1]))
        self.program = without_saves(program)
        self._null, self._console, self._at = null, Plain(), 0
        self._saved = stack.enter_context(checkpoint.open(folder))
        self._record = stack.enter_context(
            monitor.open(folder, self._console, start=0, log_every=CHUNK, examples=exp.batch)
        )
        self._state = program.init()

    def run(self) -> None:
        """``CHUNK`` steps, until all are finished."""
        start, self._at = self._at, self._at + CHUNK
        program = self.program.with_cadence(steps=self._at)
        with contextlib.redirect_stdout(self._null):
            others = (self._saved, self._record, self._console, Request())
            self._state = jax.block_until_ready(loop._train(program, self._state, start, *others))
            self._record.flush()


def host_us(program: Program, repeats: int = 4000) -> dict[str, float]:
    """Microseconds a step of what the host does for the guard and for the recompile check, device idle."""
    watch = BadUpdateMonitor(program, None, print)
    _, found = program.train_step(program.init(), program.train.batch(0), program.key)
    (metrics,) = found.rows()

    def judge() -> None:
        watch.judge(1, dict(metrics))

    tiny = jax.jit(lambda state, batch, key: state)
    once, state = OneCompile(tiny, 0, print), jax.numpy.zeros(())
    sides = {
        "judge a step": common.each(lambda: _times(judge, repeats // 25), repeats // 25),
        "a jitted call": common.each(lambda: _times(lambda: tiny(state, state, None), 500), 500),
        "the same through OneCompile": common.each(
            lambda: _times(lambda: once(state, state, None), 2000), 2000
        ),
    }
    return common.medians(common.interleave(sides, 20), 1e6)


def _times(work: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        work()


def main() -> None:
    """Both cases, one JSON object."""
    args = common.arguments(__doc__, rounds=40).parse_args()
    results, figures = [], {}
    for case, exp in cases().items():
        with (
            tempfile.TemporaryDirectory() as folder,
            Path(os.devnull).open("w") as null,
            contextlib.ExitStack() as stack,
        ):
            off = dataclasses.replace(exp, guard="off")
            norm = dataclasses.replace(off, step_factory=with_norm)
            sides = {
                side: Side(what, Path(folder) / side, null, stack)
                for side, what in (("off", off), ("stop", exp), ("norm", norm), ("off again", off))
            }
            began = time.perf_counter()
            times = common.interleave(
                {name: common.each(side.run, CHUNK) for name, side in sides.items()}, args.rounds
            )
            figures[case] = {
                "batch": exp.batch,
                "steps a round": CHUNK,
                "step_us": common.medians(times, 1e6),
                "seconds": time.perf_counter() - began,
                "host_us_by_part": host_us(sides["stop"].program),
            }
        for side, what, goal in (
            ("stop", "guard=stop", "< 2"),
            ("norm", "the update's norm alone", None),
            ("off again", "noise", None),
        ):
            more = [100 * (a / b - 1) for a, b in zip(times[side], times["off"], strict=True)]
            results.append(common.result(f"{case}: added to a step by {what}", more, "%", goal))
    common.finish(args, "guard", results, figures)


if __name__ == "__main__":
    main()
