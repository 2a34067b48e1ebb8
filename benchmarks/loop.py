"""What ``jaxtrain.loop.fit`` costs a step, over a loop written by hand.

Three loops over the same model, the same resident data, the same augmentation and the same order:

  fit      the loop of ``jaxtrain.loop.fit`` as it is: JSONL and TensorBoard records every 50 steps, bounded
           queue, checkpoint polling, plain console (to /dev/null). Evaluations and saves are left out.
  no wait  the same with an unbounded queue: what does waiting for earlier steps cost?
  library  a bare ``for`` around jaxtrain's compiled step
  hand     the same, around a step written by hand with flax, optax and ``jax.jit(donate_argnums=0)``

The hand-written loop logs nothing and never waits, so all that fit does for its user counts as its cost.

  python -m benchmarks.loop [--rounds N] [--out FILE]
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common
from jaxtrain import checkpoint, data, loop, losses, models, optim, recorder, sharding
from jaxtrain.data.order import permutation
from jaxtrain.experiment import Experiment
from jaxtrain.program import Program, assemble
from jaxtrain.recorder.console import Plain
from jaxtrain.stop import Request

TOTAL = 10**6  # steps of the schedule: never reached
WINDOWS = 20  # records written for the breakdown


@dataclasses.dataclass(frozen=True)
class Case:
    """A workload: ``chunk`` steps are timed at once, a multiple of ``log_every``."""

    experiment: Experiment
    chunk: int


class Unsaved(Program):
    """A program that the loop neither saves nor evaluates."""

    def saves(self, step: int) -> bool:
        return False

    def evaluates(self, step: int) -> bool:
        return False


def cases() -> dict[str, Case]:
    """A convolutional step of several milliseconds, and a small dense one well under one."""
    images = data.Arrays(common.cifar_like(12_800))
    digits = data.Arrays({k: v[:, :8, :8, :1] if k == "image" else v for k, v in images.fields.items()})
    shared: dict[str, Any] = {
        "loss": losses.CrossEntropy(),
        "optimizer": optim.SGD(lr=0.01, momentum=0.9),
        "preprocess": (data.Normalise(),),
        "eval_every": None,
    }

    def experiment(model: Any, source: data.Arrays, batch: int, augment: tuple[Any, ...] = ()) -> Experiment:
        epochs = TOTAL * batch / len(source)
        return Experiment(
            model=model, train=source, test=source, batch=batch, epochs=epochs, augment=augment, **shared
        )

    augment = (data.Flip(), data.Crop(pad=4))
    return {
        "cnn": Case(experiment(models.CNN(widths=(16, 32), convs=1), images, 128, augment), chunk=50),
        "mlp": Case(experiment(models.MLP(widths=(64,)), digits, 32), chunk=1000),
    }


def hand_step(exp: Experiment) -> tuple[Callable[[jax.Array, Any], Any], Callable[..., Any]]:
    """``init(key, data)`` and ``step(state, data, rows, key)`` as a researcher writes them."""
    model, tx = exp.model, optax.sgd(0.01, momentum=0.9)
    prepare = data.compose(lambda batch, _: batch, *exp.augment, *exp.preprocess)

    @jax.jit
    def init(key: jax.Array, arrays: Any) -> Any:
        variables = dict(model.init(key, arrays["image"][: exp.batch] / 255.0, train=False))
        params = variables.pop("params")
        return params, variables, tx.init(params), 0

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, arrays: Any, rows: jax.Array, key: jax.Array) -> Any:
        params, statistics, opt_state, number = state
        batch = {name: array[rows] for name, array in arrays.items()}
        batch = prepare(batch, jax.random.fold_in(key, number))

        def objective(params: Any) -> Any:
            logits, updated = model.apply(
                {"params": params, **statistics}, batch["image"], train=True, mutable=list(statistics)
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
            return loss, (updated, (logits.argmax(-1) == batch["label"]).mean())

        (loss, (updated, accuracy)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, dict(updated), opt_state, number + 1), {"loss": loss, "accuracy": accuracy}

    return init, step


def rows_from(order: data.Order, start: int, count: int) -> Iterator[np.ndarray]:
    """The library's order, as a loop by hand has it: one shuffle an epoch, then slices."""
    epoch = order.n // order.batch
    for step in range(start, start + count):
        if step == start or step % epoch == 0:
            shuffled = permutation(order.seed, step // epoch, order.n).astype(np.int32)
        at = step % epoch * order.batch
        yield shuffled[at : at + order.batch]


class Loops:
    """The three loops of one case, each with a state of its own that goes on from chunk to chunk."""

    def __init__(self, case: Case, folder: Path, null: TextIO, stack: contextlib.ExitStack) -> None:
        exp, self._chunk = case.experiment, case.chunk
        program = assemble(exp, sharding.make_mesh(jax.devices()[:1]))
        fields = {field.name: getattr(program, field.name) for field in dataclasses.fields(program)}
        self.program = Unsaved(**fields)
        self.order = data.Order(exp.seed, len(exp.train), exp.batch, exp.remainder)
        self.console, self.request = Plain(), Request()
        self.saved = stack.enter_context(checkpoint.open(folder))
        self.record = stack.enter_context(
            recorder.open(folder, self.console, start=0, log_every=exp.log_every, examples=exp.batch)
        )
        self._null = null
        self._arrays = jax.device_put(dict(exp.train.fields))
        self._states = {name: program.init() for name in ("fit", "no wait", "library")}
        init, self._step = hand_step(exp)
        self._hand = init(jax.random.key(0), self._arrays)
        self._at = dict.fromkeys(("fit", "no wait", "library", "hand"), 0)

    def sides(self) -> dict[str, Callable[[], float]]:
        """For ``common.interleaved``."""
        work = {
            "fit": self.fit,
            "no wait": lambda: self.fit("no wait", TOTAL),
            "library": self.library,
            "hand": self.hand,
        }
        return {name: common.each(fn, self._chunk) for name, fn in work.items()}

    def fit(self, name: str = "fit", most: int | None = None) -> None:
        start, exp = self._take(name), self.program.experiment
        if most is not None:
            exp = dataclasses.replace(exp, max_in_flight=most)
        program = dataclasses.replace(self.program, experiment=exp, steps=start + self._chunk)
        with contextlib.redirect_stdout(self._null):
            state = loop._train(
                program, self._states[name], start, self.saved, self.record, self.console, self.request
            )
            jax.block_until_ready(state)
            self.record.flush()
        self._states[name] = state

    def library(self) -> None:
        step, key, arrays = self.program.train_step, self.program.key, self.program.train.batch(0)["data"]
        state = self._states["library"]
        for rows in rows_from(self.order, self._take("library"), self._chunk):
            state, _ = step(state, {"data": arrays, "rows": rows}, key)
        self._states["library"] = jax.block_until_ready(state)

    def hand(self) -> None:
        key = self.program.key
        for rows in rows_from(self.order, self._take("hand"), self._chunk):
            self._hand, _ = self._step(self._hand, self._arrays, rows, key)
        jax.block_until_ready(self._hand)

    def _take(self, name: str) -> int:
        start = self._at[name]
        self._at[name] += self._chunk
        return start


def breakdown(loops: Loops, repeats: int = 2000) -> dict[str, float]:
    """Microseconds a step of each thing that fit does on the host, one at a time on an idle device."""
    program, flight, record = loops.program, loop.InFlight(2), loops.record
    state, metrics = program.train_step(program.init(), program.train.batch(0), program.key)
    jax.block_until_ready(metrics)
    every = program.experiment.log_every
    copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    fresh = iter([[copied(metrics) for _ in range(every)] for _ in range(WINDOWS + 1)])

    def window() -> None:  # of arrays that were never read: the host keeps a copy of those that were
        record._window.extend(next(fresh))
        record._step += every
        with contextlib.redirect_stdout(loops._null):
            record.flush()

    parts: dict[str, tuple[Callable[[], Any], int]] = {
        "row numbers (train.batch)": (lambda: program.train.batch(7), 1),
        "row numbers, by hand": (lambda: list(rows_from(loops.order, 7, 100)), 100),
        "bounded queue, ready (InFlight.add)": (lambda: flight.add(metrics), 1),
        "take metrics (Recorder.step)": (lambda: record.step(1, metrics), 1),
        "read and write a record, by step": (window, every),
        "is it time to evaluate": (lambda: Program.evaluates(program, 7), 1),
        "is it time to save": (lambda: Program.saves(program, 7), 1),
        "checkpoint poll": (loops.saved.poll, 1),
        "console advance": (lambda: loops.console.advance(1), 1),
        **_dispatch(program, state),
    }
    found = {}
    for name, (work, units) in parts.items():
        record._window.clear()
        count = (WINDOWS if units > 1 else repeats) // 5
        work()
        laps = []
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(count):
                work()
            laps.append((time.perf_counter() - began) / count / units)
        found[name] = 1e6 * sorted(laps)[2]
    record._window.clear()
    return found


def _dispatch(program: Program, state: Any) -> dict[str, tuple[Callable[[], Any], int]]:
    """Calling a compiled function of the step's arguments and metrics that computes next to nothing."""

    def nothing(state: Any, batch: Any, key: jax.Array) -> Any:
        return state.step + 1

    whole = sharding.replicated(sharding.make_mesh(jax.devices()[:1]))
    given = sharding.compile(nothing, args=(whole, program.train.shardings, whole), out=whole)
    plain, batch = jax.jit(nothing), program.train.batch(0)
    return {
        "call of an empty step, shardings given": (lambda: given(state, batch, program.key), 1),
        "call of an empty step, plain jit": (lambda: plain(state, batch, program.key), 1),
    }


def main() -> None:
    """Both cases, one JSON object."""
    args = common.arguments(__doc__, rounds=12).parse_args()
    results, figures = [], {}
    for name, case in cases().items():
        with (
            tempfile.TemporaryDirectory() as folder,
            Path(os.devnull).open("w") as null,
            contextlib.ExitStack() as stack,
        ):
            loops = Loops(case, Path(folder), null, stack)
            times = common.interleaved(loops.sides(), args.rounds)
            figures[name] = {
                "batch": case.experiment.batch,
                "steps a round": case.chunk,
                "step_us": common.medians(times, 1e6),
                "host_us_by_part": breakdown(loops),
            }
        added = [1e6 * (a - b) for a, b in zip(times["fit"], times["hand"], strict=True)]
        goals = {"cnn": (">= 0.98", None), "mlp": (None, "< 100")}[name]
        results += [
            common.speedup(f"{name}: steps/s, fit over hand-written", times["hand"], times["fit"], goals[0]),
            common.speedup(f"{name}: steps/s, fit over a bare loop", times["library"], times["fit"]),
            common.result(f"{name}: added to a step by fit", added, "µs", goals[1]),
        ]
    common.finish(args, "loop", results, figures)


if __name__ == "__main__":
    main()
