"""Training loops that the benchmarks time: jaxtrain's own, and one written by hand around the same model.

Each has its own state and continues with it from one chunk of steps to the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common
from jaxtrain import checkpoint, data, losses, models, monitor, optim, sharding
from jaxtrain.core.signals import Request
from jaxtrain.data.order import permutation
from jaxtrain.experiment import Experiment
from jaxtrain.monitor.console import Plain
from jaxtrain.program import Cadence, Program, assemble
from jaxtrain.train import loop

TOTAL = 10**6  # steps of the schedule: never reached


@dataclasses.dataclass(frozen=True)
class Case:
    """A workload: ``chunk`` steps are timed at once; ``tx`` is what ``experiment.optimizer`` builds."""

    experiment: Experiment
    chunk: int
    tx: optax.GradientTransformation = dataclasses.field(
        default_factory=lambda: optax.sgd(0.01, momentum=0.9)
    )


class NoSaves(Cadence):
    """Neither saves nor evaluates, not even after the last update."""

    def saves_after(self, step: int) -> bool:
        return False

    def evaluates_after(self, step: int) -> bool:
        return False


def without_saves(program: Program) -> Program:
    """``program``, for which the loop neither saves nor evaluates."""
    return dataclasses.replace(program, cadence=NoSaves(**vars(program.cadence)))


def experiment(model: Any, source: data.Arrays, batch: int, **settings: Any) -> Experiment:
    """An endless run of ``model`` by SGD with momentum, unless ``settings`` say otherwise."""
    epochs = TOTAL * batch / len(source)
    usual = {"optimizer": optim.SGD(lr=0.01, momentum=0.9), "eval_every": None, "save_every": epochs}
    settings = {**usual, "loss": losses.CrossEntropy(), **settings}
    return Experiment(model=model, train=source, test=source, batch=batch, epochs=epochs, **settings)


def cases() -> dict[str, Case]:
    """A convolutional step of tens of milliseconds, one of about 5 ms, and a dense one well under 1 ms."""
    images = data.Arrays(common.cifar_like(12_800))
    digits = data.Arrays({k: v[:, :8, :8, :1] if k == "image" else v for k, v in images.fields.items()})
    plain = {"preprocess": (data.Normalise(),)}
    augmented = plain | {"augment": (data.Flip(), data.Crop(pad=4))}
    cnn, mlp = models.CNN(widths=(16, 32), convs=1), models.MLP(widths=(64,))
    return {
        "cnn": Case(experiment(cnn, images, 128, **augmented), chunk=50),
        "lenet": Case(experiment(lenet(), images, 32, **augmented), chunk=50),
        "mlp": Case(experiment(mlp, digits, 32, **plain), chunk=1024),
    }


def lenet() -> models.ConvNet:
    """The network of ``experiments/cifar_lenet.py``."""
    return models.ConvNet(widths=(6, 16), kernel=5, padding="VALID", hidden=(120, 84), classes=10)


def short(updates: int, **settings: Any) -> Program:
    """The case ``cnn``, with other ``settings``, as a run of ``updates`` updates on the first device."""
    base = cases()["cnn"].experiment
    few = data.Arrays({name: array[: base.batch] for name, array in base.train.fields.items()})
    fields = {**vars(base), "test": few, "epochs": updates * base.batch / len(base.train)}
    exp = Experiment(**{**fields, "steps_per_execution": 1, **settings})
    return assemble(exp, sharding.make_mesh(jax.devices()[:1]))


def assemble_without_saves(exp: Experiment) -> Program:
    """``exp`` on the first device; the loop neither saves nor evaluates."""
    return without_saves(assemble(exp, sharding.make_mesh(jax.devices()[:1])))


class Fit:
    """What ``jaxtrain.train.loop.fit`` does between its beginning and its end, with all its records.

    Args:
      program: from ``assemble_without_saves``; its compiled functions may be shared with other sides.
      stack: closes the files.
      together: updates that are dispatched at once.
      settings: fields of the experiment that change no compiled function.
    """

    def __init__(
        self, program: Program, stack: contextlib.ExitStack, together: int = 1, **settings: Any
    ) -> None:
        exp = dataclasses.replace(program.experiment, **settings)
        self.program = dataclasses.replace(program, experiment=exp).with_cadence(steps_per_execution=together)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.null = stack.enter_context(Path(os.devnull).open("w"))  # noqa: SIM115 - the stack closes it
        self.console, self._request = Plain(), Request()
        self.saved = stack.enter_context(checkpoint.open(folder))
        opened = monitor.open(
            folder,
            self.console,
            start=0,
            log_every=exp.log_every,
            examples=exp.batch,
            position=program.position,
        )
        self.record = stack.enter_context(opened)
        self._state, self._at = program.init(), 0

    def steps(self, count: int) -> None:
        """``count`` updates, finished and recorded."""
        start, self._at = self._at, self._at + count
        program = self.program.with_cadence(steps=self._at)
        with contextlib.redirect_stdout(self.null):
            self._state = loop._train(
                program, self._state, start, self.saved, self.record, self.console, self._request
            )
            jax.block_until_ready(self._state)
            self.record.flush()

    def losses(self, count: int) -> list[float]:
        """Of ``count`` updates from the first state, all on the first examples of the set."""
        program, state = self.program, self.program.init()
        first = np.arange(program.experiment.batch, dtype=np.int32)
        batch = program.train.batch(0) | {"rows": np.stack([first, 0 * first], axis=1)}
        found = []
        for _ in range(count):
            state, metrics = program.train_step(state, batch, program.key)
            found.append(metrics["loss"].compute())
        return found


class Library:
    """A bare ``for`` around jaxtrain's compiled step."""

    def __init__(self, program: Program) -> None:
        self._program, self._state, self._at = program, program.init(), 0
        self._data = program.train.batch(0)["data"]

    def steps(self, count: int) -> None:
        """``count`` updates, finished."""
        step, key = self._program.train_step, self._program.key
        for rows in rows_from(self._program.order, self._at, count):
            placed = np.stack([rows, np.zeros_like(rows)], axis=1)  # as epochs of their first
            self._state, _ = step(self._state, {"data": self._data, "rows": placed}, key)
        self._at += count
        jax.block_until_ready(self._state)


class Hand:
    """The loop and the step as a researcher writes them with flax, optax and ``jax.jit``.

    The data lie on the device and the step gathers its batch, as jaxtrain's does.
    """

    def __init__(self, case: Case, program: Program) -> None:
        self._exp, self._tx, self._order, self._key = case.experiment, case.tx, program.order, program.key
        self._arrays = jax.device_put(dict(case.experiment.train.fields))
        self._step, self._at = hand_step(case), 0
        self._first, self._state = program.init, self._begin(program.init())

    def _begin(self, state: Any) -> Any:
        return state.params, state.extra, self._tx.init(state.params), jnp.zeros((), jnp.int32)

    def steps(self, count: int) -> None:
        """``count`` updates, finished."""
        for rows in rows_from(self._order, self._at, count):
            self._state, _ = self._step(self._state, self._arrays, rows, self._key)
        self._at += count
        jax.block_until_ready(self._state)

    def losses(self, count: int) -> list[float]:
        """Of ``count`` updates from the first state, all on the first examples of the set."""
        state, found = self._begin(self._first()), []
        for _ in range(count):
            rows = np.arange(self._exp.batch, dtype=np.int32)
            state, metrics = self._step(state, self._arrays, rows, self._key)
            found.append(float(metrics["loss"]))
        return found


def hand_step(case: Case) -> Callable[..., Any]:
    """``(state, arrays, rows, key) -> (state, metrics)``, compiled; the state is donated."""
    exp, tx, model = case.experiment, case.tx, case.experiment.model
    prepare = data.compose(lambda batch, _: batch, *exp.augment, *exp.preprocess)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, arrays: Any, rows: jax.Array, key: jax.Array) -> Any:
        params, statistics, opt_state, number = state
        batch = {name: array[rows] for name, array in arrays.items()}
        batch = prepare(batch, jax.random.fold_in(key, number))

        def objective(params: Any) -> Any:
            inputs = batch["tokens" if "tokens" in batch else "image"]
            logits, updated = model.apply(
                {"params": params, **statistics}, inputs, train=True, mutable=list(statistics)
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
            return loss, (updated, (logits.argmax(-1) == batch["label"]).mean())

        (loss, (updated, accuracy)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, dict(updated), opt_state, number + 1), {"loss": loss, "accuracy": accuracy}

    return step


def rows_from(order: data.Order, start: int, count: int) -> Iterator[np.ndarray]:
    """The library's order, as a loop by hand has it: one shuffle an epoch, then slices."""
    epoch = order.n // order.batch
    for step in range(start, start + count):
        if step == start or step % epoch == 0:
            shuffled = permutation(order.seed, step // epoch, order.n).astype(np.int32)
        at = step % epoch * order.batch
        yield shuffled[at : at + order.batch]
