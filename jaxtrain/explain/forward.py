"""A trained model as pure functions of one example, in evaluation and float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.artifact.manifest import Manifest
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Batch, Model, State, split_extra
from jaxtrain.data import compose
from jaxtrain.experiment import Experiment
from jaxtrain.export import describe
from jaxtrain.export.serving import OTHER, name_outputs, task_of
from jaxtrain.export.trained import Trained
from jaxtrain.models import as_model
from jaxtrain.models.attention import collect_attention_weights
from jaxtrain.models.layer_outputs import Layer, edit_layers, list_layers
from jaxtrain.program import check_fields
from jaxtrain.program.loader import EXAMPLE_ID
from jaxtrain.step.factories import eval_state

Kind = Literal["image", "tokens", "array"]
Weights = tuple[Any, Any]
"""Parameters and statistics."""

LENGTH = "length"
"""The field with the number of tokens of a text."""


class Forward:
    """The predictions of a trained model, and what they can be explained by.

    What is explained is the array that the model gets after ``preprocess``, or for tokens the vectors of its
    first ``flax.linen.Embed``: the ``point``. The ``baseline`` is what raw zeros become there (a black
    image), or zero vectors. Functions take the batch of one example, from ``prepare``, and ``last``, the
    position of its last token. All is float32, without the rounding of ``compress``, whose gradient is 0.

    Args:
      experiment: what was trained.
      state: of a checkpoint; the average of the weights is used if it has one.
      examples: raw fields of some examples, with a leading axis, for shapes.
      about: ``name``, ``step``, ``metrics`` and ``config`` of the manifest.

    Attributes:
      manifest: the inputs and the task, as in an exported file.
      words: the vocabulary of a text of words.
      weights: parameters and statistics.
      field: the input that is explained.
      kind: ``image`` (1 or 3 channels), ``tokens`` or ``array``.
      layers: of the model, in the order in which they return.
      attention: shapes of the attention weights ``(1, heads, length, length)`` of each layer.
      outputs: how many numbers can be explained: classes, labels, tokens or outputs.

    Raises:
      InputError: the model has several inputs, or several predictions for an example.
    """

    def __init__(
        self, experiment: Experiment, state: State, examples: Batch, about: Mapping[str, Any]
    ) -> None:
        trained = Trained.of(experiment, state, examples, about)
        self.manifest: Manifest = describe.describe_fixed(trained, ("cpu",))
        self.words = describe.vocabulary(experiment)
        self._experiment, self._report = experiment, check_fields.find_report(experiment)
        self.task = task_of(self._report)
        self._model: Model = as_model(experiment.model)
        params, extra = eval_state(state)
        self.weights: Weights = (params, split_extra(extra)[0])
        self._fields = {
            name: jax.ShapeDtypeStruct((1, *np.shape(x)[1:]), np.asarray(x).dtype)
            for name, x in examples.items()
        }
        self.field = self._input_field()
        self._trace(trained)

    def _trace(self, trained: Trained) -> None:
        """Trace the model once, for its layers and shapes."""
        inputs = {
            name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in trained.serving.inputs.items()
        }
        found: dict[str, Any] = {}

        def forward(weights: Weights, inputs: Batch) -> None:
            batch = self.prepare(inputs)
            with collect_attention_weights() as attention:
                values = self.values(weights, batch, 0)
            found.update(input=batch.get(self.field), attention=attention, outputs=values.shape[0])

        self.layers: list[Layer] = list_layers(forward, self.weights, inputs)
        self.attention = [tuple(x.shape) for x in found["attention"]]
        self.outputs: int = found["outputs"]
        self.kind, self._embedding = self._input_kind(found["input"])

    @property
    def has_classes(self) -> bool:
        """Whether it predicts one of several classes, labels or tokens."""
        return self.task not in ("regression", OTHER)

    def feature_maps(self) -> list[str]:
        """Return the paths of the layers with feature maps ``[1, height, width, channel]``, in order."""
        shapes = {x.path: x.shape for x in self.layers}
        return [path for path, shape in shapes.items() if len(shape) == 4 and min(shape[1:3]) > 1 == shape[0]]

    def prepare(self, inputs: Batch) -> Batch:
        """Return the batch that the model gets, from the raw inputs of one example, ``[1, ...]``."""
        zeros = {
            name: jnp.zeros(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))
            for name, x in self._fields.items()
            if name not in inputs
        }
        raw = {**zeros, **inputs, EXAMPLE_ID: jnp.zeros((1,), jnp.int32)}
        return compose(*self._experiment.preprocess)(raw, None)

    def values(self, weights: Weights, batch: Batch, last: Any) -> jax.Array:
        """Return the numbers that can be explained, ``float32 [outputs]``: logits, or a regression's outputs.

        Those of a binary classifier are the logit of 1, and for 0 the same with the other sign.
        """
        params, extra = weights
        outputs, _ = self._model.apply(params, extra, batch, train=False, key=None)
        named = name_outputs(self.task, self._report, outputs)
        if self.task == OTHER and len(named) > 1:
            raise InputError(
                f"the model has {len(named)} outputs and no report names one: add report= to the experiment"
            )
        values = named.get("logits", next(iter(named.values()))).astype(jnp.float32)[0]
        values = values[last] if self.task == "language_model" else values
        if values.ndim > 1 or (self.task == "binary" and values.size > 1):
            raise InputError(
                f"the model has predictions of shape {list(values.shape)} for an example, and explain takes "
                "models with one"
            )
        values = values.reshape(-1)
        return jnp.concatenate([-values, values]) if self.task == "binary" else values

    def probabilities(self, values: jax.Array) -> jax.Array:
        """Return the probabilities of logits."""
        if self.task in ("binary", "multi_label"):
            return jax.nn.sigmoid(values)
        return jax.nn.softmax(values)

    def values_at(self, weights: Weights, batch: Batch, last: Any, point: jax.Array) -> jax.Array:
        """Return ``values`` with ``point`` in place of what is explained."""
        if self._embedding is not None:
            return self.values_with(weights, batch, last, self._embedding, point)
        return self.values(weights, {**batch, self.field: point[None]}, last)

    def values_with(
        self, weights: Weights, batch: Batch, last: Any, layer: str, output: jax.Array
    ) -> jax.Array:
        """Return ``values`` with the output of a layer, of one example, replaced."""
        with edit_layers({layer: lambda x: output[None].astype(x.dtype)}):
            return self.values(weights, batch, last)

    def output_of(self, weights: Weights, batch: Batch, layer: str) -> jax.Array:
        """Return the output of a layer for one example, float32."""
        found: list[jax.Array] = []

        def take(output: jax.Array) -> jax.Array:
            found.append(output)
            return output

        with edit_layers({layer: take}):
            self.values(weights, batch, 0)
        return found[0][0].astype(jnp.float32)

    def attention_weights(self, weights: Weights, batch: Batch) -> list[jax.Array]:
        """Return the attention weights ``[heads, length, length]`` of each layer."""
        with collect_attention_weights() as attention:
            self.values(weights, batch, 0)
        return [x[0] for x in attention]

    def point(self, weights: Weights, batch: Batch) -> jax.Array:
        """Return what is explained, float32."""
        if self._embedding is not None:
            return self.output_of(weights, batch, self._embedding)
        return batch[self.field][0].astype(jnp.float32)

    def baseline(self, inputs: Batch, point: jax.Array) -> jax.Array:
        """Return the point without information."""
        if self._embedding is not None:
            return jnp.zeros_like(point)
        black = self.prepare({**inputs, self.field: jnp.zeros_like(inputs[self.field])})
        return black[self.field][0].astype(jnp.float32)

    def _input_field(self) -> str:
        names = [name for name in self.manifest.inputs if name != LENGTH]
        if len(names) != 1:
            raise InputError(
                f"the model reads {', '.join(names)}, and explain takes models with one input (and {LENGTH})"
            )
        return names[0]

    def _input_kind(self, prepared: Any) -> tuple[Kind, str | None]:
        """Return the kind of the input, and the path of the embedding that is explained in its place."""
        if prepared is None:
            raise InputError(
                f"preprocess renames the field {self.field}: explain needs the model's input under this name"
            )
        shape = prepared.shape
        if jnp.issubdtype(prepared.dtype, jnp.integer) and len(shape) == 2:
            for layer in self.layers:
                if layer.kind == "embedding" and layer.shape[:2] == shape:
                    return "tokens", layer.path
            raise InputError(
                f"{self.field} holds {shape[1]} integers and the model has no flax.linen.Embed: there is no "
                "gradient"
            )
        if not 2 <= len(shape) <= 4:
            raise InputError(f"{self.field} has shape {list(shape[1:])}: explain shows one to three axes")
        return ("image" if len(shape) == 4 and shape[3] in (1, 3) else "array"), None
