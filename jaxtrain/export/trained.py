"""A trained model as it is exported, and the check that a file computes the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxtrain.core.chunked_logits import full_logits
from jaxtrain.core.errors import RunError
from jaxtrain.core.types import State
from jaxtrain.data import compose
from jaxtrain.experiment import Experiment
from jaxtrain.export.serving import Serving, make_serving, name_outputs, task_of
from jaxtrain.program import check_fields
from jaxtrain.program.compute_model import eval_model
from jaxtrain.program.loader import EXAMPLE_ID
from jaxtrain.step import make_eval_step

TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2, "int8": 0.1}
"""Largest difference from the model's outputs, relative to the largest of them, by ``Experiment.precision``.
On the same device they are equal, or differ by rounding; a GPU may choose other algorithms, with TF32. In
int8, a number between two steps may be rounded to the other one."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What is exported.

    Attributes:
      experiment: what was trained.
      state: of the checkpoint.
      examples: real examples to compare outputs on, raw fields with a leading axis.
      about: ``name``, ``step``, ``metrics`` and ``config`` of the manifest.
      serving: of the experiment and the state.
      quantized: the model is in int8.
    """

    experiment: Experiment
    state: State
    examples: Mapping[str, np.ndarray]
    about: Mapping[str, Any]
    serving: Serving
    quantized: bool = False

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        state: State,
        examples: Mapping[str, np.ndarray],
        about: Mapping[str, Any],
        quantized: bool = False,
    ) -> Trained:
        """Make it, with the function to export. Raises as ``make_serving``."""
        return cls(experiment, state, examples, about, make_serving(experiment, state, examples), quantized)


@dataclasses.dataclass(frozen=True)
class Checked:
    """What the check of an exported file found.

    Attributes:
      examples: how many real examples were compared.
      difference: the largest absolute difference between outputs.
      largest: the largest absolute output.
    """

    examples: int
    difference: float
    largest: float

    @property
    def text(self) -> str:
        """One line for the user."""
        return (
            f"checked on {self.examples} test examples: largest difference {self.difference:.2g} "
            f"(outputs up to {self.largest:.3g})"
        )


def model_outputs(trained: Trained) -> dict[str, np.ndarray]:
    """Return the outputs of the model by name, computed as ``evaluate`` does."""
    experiment, examples = trained.experiment, trained.examples
    model = eval_model(experiment)
    report = check_fields.find_report(experiment)

    def capture(outputs: Any, batch: Any) -> dict[str, Any]:
        return {"outputs": name_outputs(task_of(report), report, full_logits(outputs))}

    step = make_eval_step(model, experiment.loss, compose(*experiment.preprocess), capture)
    rows = len(next(iter(examples.values())))
    batch = {**examples, EXAMPLE_ID: np.zeros(rows, np.int32), "mask": np.ones(rows, bool)}
    outputs = jax.jit(lambda state, batch: step(state, batch)["outputs"])(trained.state, batch)
    return {name: np.asarray(array) for name, array in outputs.items()}


def compare(run: Callable[[dict[str, Any]], Mapping[str, Any]], trained: Trained) -> Checked:
    """Compare the outputs of an exported model with those of the model itself, on real examples.

    All examples are one batch, and the first is another, since the batch size is free.

    Args:
      run: the exported model, ``inputs -> outputs`` by name.
      trained: the model.

    Raises:
      RunError: an output is missing, has another shape, or differs by more than ``TOLERANCE``.
    """
    expected = model_outputs(trained)
    inputs = {
        name: np.asarray(trained.examples[name]).astype(spec.dtype)
        for name, spec in trained.serving.inputs.items()
    }
    tolerance = TOLERANCE["int8" if trained.quantized else trained.experiment.precision]
    difference = largest = 0.0
    for rows in dict.fromkeys((len(next(iter(inputs.values()))), 1)):
        found = {
            name: np.asarray(array) for name, array in run({k: x[:rows] for k, x in inputs.items()}).items()
        }
        for name, full in expected.items():
            array, reference = found.get(name), full[:rows]
            if array is None or array.shape != reference.shape:
                shown = "nothing" if array is None else str(list(array.shape))
                raise RunError(
                    f"the exported model returns {shown} for {name}, the model {list(reference.shape)}"
                )
            if name == "label":
                continue  # follows from the probability; where two are equal, rounding decides
            if np.isnan(np.asarray(reference, np.float64)).any():
                raise RunError(
                    f"the checkpoint's output {name} is NaN on test examples: export another with --weights"
                )
            scale, off = _scale_and_difference(reference, array)
            if not off <= tolerance * max(scale, 1e-3):
                raise RunError(
                    f"the exported model gives other outputs than the model: {name} differs by {off:.3g}, "
                    f"where the largest is {scale:.3g}; no file was written (--debug, and please report it)"
                )
            difference, largest = max(difference, off), max(largest, scale)
    return Checked(len(next(iter(inputs.values()))), difference, largest)


def _scale_and_difference(expected: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Return the largest finite absolute value, and the largest difference.

    Infinite elements must be the same ones; otherwise the difference is inf.

    >>> _scale_and_difference(np.array([2, -np.inf]), np.array([2.5, -np.inf]))
    (2.0, 0.5)
    >>> _scale_and_difference(np.array([2, -np.inf]), np.array([2, np.inf]))
    (2.0, inf)
    """
    a, b = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    finite = np.isfinite(a)
    scale = float(np.abs(a[finite]).max(initial=0))
    if not np.array_equal(a[~finite], b[~finite]):
        return scale, float("inf")
    return scale, float(np.abs(b[finite] - a[finite]).max(initial=0))
