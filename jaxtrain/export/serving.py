"""A trained model as one pure function of its weights and raw inputs, with named outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.artifact.program import used_arguments
from jaxtrain.core.chunked_logits import full_logits
from jaxtrain.core.errors import InputError
from jaxtrain.core.outputs import select_output
from jaxtrain.core.types import Batch, Model, State, leaf_paths, split_extra
from jaxtrain.data import compose
from jaxtrain.experiment import Experiment
from jaxtrain.metrics import Binary, Classification, LanguageModel, MultiLabel, Regression, Segmentation
from jaxtrain.metrics.task_inputs import logit_of
from jaxtrain.models import as_model
from jaxtrain.models.plain_operators import plain_operators
from jaxtrain.program import check_fields
from jaxtrain.program.compute_model import eval_model
from jaxtrain.program.loader import EXAMPLE_ID
from jaxtrain.step.factories import eval_state

Arrays = Mapping[str, Any]
Specs = dict[str, jax.ShapeDtypeStruct]

TASKS: dict[type, str] = {  # a subclass before its base
    Segmentation: "segmentation",
    Classification: "classification",
    MultiLabel: "multi_label",
    Binary: "binary",
    Regression: "regression",
    LanguageModel: "language_model",
}
OTHER = "other"


@dataclasses.dataclass(frozen=True)
class Serving:
    """A model ready to be exported.

    Attributes:
      apply: pure ``(weights, inputs) -> outputs``, dicts of arrays by name. Inputs are raw examples with a
        leading batch axis of any size. Preprocessing is inside, dropout is off and BatchNorm uses its running
        statistics.
      weights: the parameters and statistics of evaluation, by path, such as ``params/head/kernel``.
      inputs: shape and dtype of one example of each input, without the batch axis.
      outputs: the same of each output.
      task: a value of ``TASKS``, or ``other``.
    """

    apply: Callable[[Arrays, Arrays], dict[str, jax.Array]]
    weights: dict[str, Any]
    inputs: Specs
    outputs: Specs
    task: str


def make_serving(experiment: Experiment, state: State, examples: Arrays) -> Serving:
    """Return the function that computes the outputs of a trained model from raw examples.

    The weights are those of an evaluation: the average where the run has one (``optim.EMA``). Inputs are the
    fields that the outputs depend on. The outputs are those of the task, which the report of the experiment
    or of its loss says:

    - classification, segmentation: ``logits``, ``probability`` (softmax) and ``label`` (the largest);
    - binary, multi_label: ``logits``, ``probability`` (sigmoid) and ``label`` (0 or 1, by the threshold);
    - regression: ``value``; language_model: ``logits``;
    - other: ``output``, or several by name.

    Args:
      experiment: what was trained.
      state: of a checkpoint.
      examples: raw fields with a leading axis, as its sources return them.

    Raises:
      InputError: the outputs depend on no input, or one has no row for each example.
    """
    params, extra = eval_state(state)
    statistics = split_extra(extra)[0]
    variables = {"params": params, **statistics}
    weights, structure = leaf_paths(variables), jax.tree.structure(variables)
    report = check_fields.find_report(experiment)
    task = task_of(report)
    model = eval_model(experiment)
    fields = {
        name: jax.ShapeDtypeStruct(
            np.shape(array)[1:], jax.dtypes.canonicalize_dtype(np.asarray(array).dtype)
        )
        for name, array in examples.items()
    }
    absent = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}

    def apply(weights: Arrays, inputs: Arrays) -> dict[str, jax.Array]:
        rows = next(iter(inputs.values())).shape[0]
        batch: Batch = {
            name: inputs[name] if name in inputs else jnp.zeros((rows, *spec.shape), spec.dtype)
            for name, spec in fields.items()
        }
        batch = {**batch, EXAMPLE_ID: jnp.zeros((rows,), jnp.int32)}
        leaves = [
            weights[name] if name in weights else jnp.zeros(x.shape, x.dtype) for name, x in absent.items()
        ]
        tree = dict(jax.tree.unflatten(structure, leaves))
        with plain_operators():
            outputs = _forward(model, experiment, tree.pop("params"), tree, batch)
        return name_outputs(task, report, outputs)

    used = used_arguments(apply, weights, _with_batch(fields, 2))
    weights = {name: array for name, array in weights.items() if name in used}
    inputs = {name: spec for name, spec in fields.items() if name in used}
    if not inputs:
        raise InputError("the model's outputs depend on no field of the data: there is nothing to export")
    shapes = jax.eval_shape(apply, weights, _with_batch(inputs, 2))
    for name, x in shapes.items():
        if x.shape[:1] != (2,):
            raise InputError(
                f"output {name} has shape {list(x.shape)}: it needs a row for each example, [batch, ...]"
            )
    outputs = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in shapes.items()}
    return Serving(apply, weights, inputs, outputs, task)


def _forward(model: Model, experiment: Experiment, params: Any, extra: dict[str, Any], batch: Batch) -> Any:
    prepared = compose(*experiment.preprocess)(batch, None)
    return model.apply(params, extra, prepared, train=False, key=None)[0]


def task_of(report: Any) -> str:
    """Return the task of a report.

    >>> task_of(MultiLabel()), task_of(None)
    ('multi_label', 'other')
    """
    return next((name for kind, name in TASKS.items() if isinstance(report, kind)), OTHER)


def name_outputs(task: str, report: Any, outputs: Any) -> dict[str, jax.Array]:
    """Return the outputs of a task by name, from those of the model.

    >>> named = name_outputs("binary", Binary(), jnp.array([[0.0], [2.0]]))
    >>> named["probability"].round(2).tolist()[0], named["label"].tolist()
    (0.5, [0, 1])
    """
    if task == OTHER:
        paths = leaf_paths(full_logits(outputs))
        return {
            f"output_{name}" if name.isdigit() else name or "output": leaf for name, leaf in paths.items()
        }
    chosen = full_logits(select_output(outputs, report.output, "report.output"))
    if task == "regression":
        return {"value": chosen}
    if task == "language_model":
        return {"logits": chosen}
    if task == "binary" and chosen.ndim > 1 and chosen.shape[-1] == 1:
        chosen = chosen[..., 0]
    wide = chosen.astype(jnp.promote_types(chosen.dtype, jnp.float32))
    if task in ("binary", "multi_label"):
        label = wide > logit_of(report.threshold)
        return {"logits": chosen, "probability": jax.nn.sigmoid(wide), "label": label.astype(jnp.int32)}
    label = wide.argmax(-1).astype(jnp.int32)
    return {"logits": chosen, "probability": jax.nn.softmax(wide), "label": label}


def _with_batch(specs: Specs, rows: int) -> Specs:
    return {name: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype) for name, x in specs.items()}


def value_range(experiment: Experiment, examples: Arrays, name: str) -> tuple[int, int] | None:
    """Return the smallest and largest value of an integer input that the model's own check accepts.

    None where there is no check, or it accepts every value.

    Args:
      experiment: what was trained.
      examples: raw fields, whose other values stay.
      name: of the input.
    """
    check, array = as_model(experiment.model).check, np.asarray(examples[name])
    if check is None or not np.issubdtype(array.dtype, np.integer):
        return None

    def accepts(value: int) -> bool:
        try:
            check({**examples, name: np.full_like(array, value)}, np.arange(len(array)))
        except InputError:
            return False
        return True

    low, high = 0, int(min(np.iinfo(array.dtype).max, 2**31 - 1))
    if not accepts(low) or accepts(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if accepts(middle) else (low, middle)
    return 0, low
