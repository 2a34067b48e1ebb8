"""A run as the training loop sees it: compiled functions, batches by step, and when to evaluate and save."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxtrain.core.types import TEACHER, State
from jaxtrain.data import Order, holdout
from jaxtrain.data.checked import CheckedSource
from jaxtrain.experiment import Experiment
from jaxtrain.models.attention_choices import AttentionChoice
from jaxtrain.program.cadence import Cadence
from jaxtrain.program.loader import EPOCH, EXAMPLE_ID, Loader
from jaxtrain.program.teacher import Teacher
from jaxtrain.step.packing import PackedMetrics


@dataclasses.dataclass(frozen=True)
class Split:
    """An evaluation split: ``batches`` padded batches that cover ``examples`` examples once each."""

    loader: Loader
    batches: int
    examples: int
    step: Callable[[State, Any], PackedMetrics]


@dataclasses.dataclass(frozen=True)
class Program:
    """An assembled experiment: compiled functions, loaders and schedule, made by ``assemble``.

    Attributes:
      experiment: the experiment that it runs.
      cadence: the number of updates, and after which of them the run evaluates and saves.
      key: the run's random key; each step folds its number into it.
      init: makes the state of step 0, sharded.
      init_with: makes it from the key of the initialisation.
      make_keys: ``seed -> (key of the initialisation, key of the run)``.
      abstract_state: shapes, dtypes and shardings of that state.
      train_step: compiled ``(state, batch, key) -> (state, metrics)``; the state is donated.
      train_steps: compiled ``(state, batches, key, shared) -> (state, metrics)`` for several updates at once
        (``step.scan_steps``); the state is donated.
      pure_step: the same as ``train_step``, not compiled: pure, and without its shardings.
      train: loads the training batches.
      order: which examples make up each of them.
      evals: ``"valid"`` (where there is one) and ``"test"``.
      choices: settings that were chosen by measurement or size, for the run's record.
      notes: warnings printed before training, one per line.
      learning_rates: of every update, float [steps]; None when the optimizer has no ``lr``.
      abstract_outputs: shapes of the model's outputs for a training batch.
      attention: the kernel of each attention layer in the train step, and why.
      teacher: of a loss ``compress.Distil``; None without one.
    """

    experiment: Experiment
    cadence: Cadence
    key: jax.Array
    init: Callable[[], State]
    init_with: Callable[[jax.Array], State]
    make_keys: Callable[[int], tuple[jax.Array, jax.Array]]
    abstract_state: State
    train_step: Callable[[State, Any, jax.Array], tuple[State, PackedMetrics]]
    train_steps: Callable[[State, Any, jax.Array, Any], tuple[State, PackedMetrics]]
    pure_step: Callable[[State, Any, jax.Array], tuple[State, PackedMetrics]]
    train: Loader
    order: Order
    evals: dict[str, Split]
    choices: dict[str, Any]
    notes: tuple[str, ...]
    learning_rates: np.ndarray | None
    abstract_outputs: Any
    attention: tuple[AttentionChoice, ...] = ()
    teacher: Teacher | None = None

    @property
    def steps(self) -> int:
        """Updates in the run."""
        return self.cadence.steps

    def with_cadence(self, **changes: Any) -> Program:
        """Return a copy with some fields of ``cadence`` changed."""
        return dataclasses.replace(self, cadence=dataclasses.replace(self.cadence, **changes))

    def with_seed(self, seed: int) -> Program:
        """Return the program of another seed. It shares the compiled functions, so it compiles nothing."""
        init_key, key = self.make_keys(seed)
        order = dataclasses.replace(self.order, seed=seed)
        return dataclasses.replace(
            self,
            experiment=dataclasses.replace(self.experiment, seed=seed),
            key=key,
            init=functools.partial(self.init_with, init_key),
            train=self.train.with_order(order),
            order=order,
        )

    def complete(self, state: State, other: State | None = None) -> State:
        """Return a state from a checkpoint with what no checkpoint holds: the teacher.

        Args:
          state: the state.
          other: a state to take it from; None reads it from the teacher's run.
        """
        if self.teacher is None or TEACHER in state.extra:
            return state
        return self.teacher.add_to(state, self.teacher.load() if other is None else other.extra[TEACHER])

    def example_ids(self, step: int) -> np.ndarray:
        """Return the positions of update ``step``'s examples in ``experiment.train``: int64 ``[batch]``."""
        ids = self.order.indices(step - 1)
        if self.experiment.holdout:  # the order is over what was not held out
            ids = holdout(len(self.experiment.train), self.experiment.holdout)[0][ids]
        return ids

    def raw_batch(self, step: int) -> dict[str, Any]:
        """Return the raw examples of update ``step``, with the fields that a loader adds."""
        ids, epochs = self.order.ids_and_epochs(step - 1)
        source = CheckedSource("train", self.experiment.train)
        draw, rows = getattr(source, "draw", None), self.example_ids(step)
        fields = source.gather(rows) if draw is None else draw(rows, epochs, self.order.seed)
        return {**fields, EXAMPLE_ID: ids.astype(np.int32), EPOCH: epochs.astype(np.int32)}

    def position(self, step: int) -> dict[str, float]:
        """Return epoch and learning rate of update ``step``, counted from 1, for the records."""
        rates = self.learning_rates
        rate = {} if rates is None else {"learning_rate": float(rates[step - 1])}
        return {"epoch": self.cadence.epoch(step), **rate}

    def score(self, values: dict[str, Any]) -> float | None:
        """Return the score that selects the best checkpoint, higher is better; None when it is not finite."""
        name = self.experiment.select
        score: float = -values[name[1:]] if name.startswith("-") else values[name]
        return score if math.isfinite(score) else None

    def close(self) -> None:
        """Stop the threads and processes that read the data."""
        for loader in (self.train, *(split.loader for split in self.evals.values())):
            loader.close()
