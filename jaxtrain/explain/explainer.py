"""Explain single predictions of a trained model, by the methods that fit it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.artifact.examples import Example
from jaxtrain.core.errors import InputError
from jaxtrain.core.text import did_you_mean
from jaxtrain.core.types import Batch
from jaxtrain.explain.attribution import (
    attention_rollout,
    completeness_error,
    grad_cam,
    integrated_gradients,
    smoothgrad,
)
from jaxtrain.explain.forward import Forward, Weights

MOST = 100_000
"""Largest ``steps`` and ``samples``: more change no digit of a float32."""
METHODS = ("integrated_gradients", "smoothgrad", "grad_cam", "rollout")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How predictions are explained.

    Attributes:
      methods: some of ``METHODS``; empty: those that fit the model.
      target: name or number of the class; None is the predicted one, or output 0 of a regression.
      steps: of ``integrated_gradients``; None is 128, and 512 for tokens.
      samples: of ``smoothgrad``.
      layer: of ``grad_cam``; None is the last one with feature maps.
    """

    methods: tuple[str, ...] = ()
    target: str | None = None
    steps: int | None = None
    samples: int = 64
    layer: str | None = None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What one prediction depends on.

    Attributes:
      example: what was predicted.
      prediction: the predicted class; None where the task has no classes.
      probability: of the predicted class; None where the task has no classes.
      target: the class or output that is explained.
      value: its logit, or the output.
      baseline: the same for the baseline of ``integrated_gradients``.
      maps: by method, float ``[height, width]`` of an image or array, or ``[tokens]`` of a text.
      error: the relative completeness error of ``integrated_gradients``; None without it.
    """

    example: Example
    prediction: int | None
    probability: float | None
    target: int
    value: float
    baseline: float
    maps: dict[str, np.ndarray]
    error: float | None


class Explainer:
    """Explains predictions one by one; compiled once.

    Args:
      forward: the trained model.
      settings: what to compute.

    Attributes:
      methods: the methods that are used.
      layer: that of ``grad_cam``; None without it.
      steps: of ``integrated_gradients``.

    Raises:
      InputError: a method does not fit the model, or there is no such class or layer.
    """

    def __init__(self, forward: Forward, settings: Settings) -> None:
        text = forward.kind == "tokens"
        self.steps = (512 if text else 128) if settings.steps is None else settings.steps
        if not (1 <= self.steps <= MOST and 1 <= settings.samples <= MOST):
            raise InputError(f"--steps {self.steps} --samples {settings.samples}: give 1 to {MOST:,}")
        # The baseline of an embedding is 0, where a transformer's LayerNorm changes fast.
        self._power = 3.0 if text else 1.0
        self.forward, self._settings = forward, settings
        self.methods = settings.methods or default_methods(forward)
        self._target = _class_number(forward, settings.target)
        self.layer = None
        if "grad_cam" in self.methods:
            self.layer = _grad_cam_layer(forward, settings.layer)
        elif settings.layer is not None:
            raise InputError(f"--layer {settings.layer}: it is for --method grad_cam")
        if "rollout" in self.methods:
            _check_rollout(forward)
        self._run = jax.jit(self._attributions)

    def explain(self, example: Example) -> Explanation:
        """Explain one prediction; the same example gives the same result."""
        inputs = {name: jnp.asarray(x)[None] for name, x in example.inputs.items()}
        with jax.default_matmul_precision("highest"):  # a GPU's TF32 would show in the completeness
            found = jax.device_get(
                self._run(self.forward.weights, inputs, self._target, (example.tokens or 1) - 1)
            )
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(found)):
            raise InputError(
                f"{example.id}: the input, the outputs or their gradients are not finite: nothing to explain"
            )
        maps, size = found["maps"], max(abs(found["value"]), abs(found["baseline"]))
        ours = maps.get("integrated_gradients")
        if ours is not None and np.abs(ours).max() < 1e-6 * size:  # rounding: the input is the baseline
            maps["integrated_gradients"] = np.zeros_like(ours)
        classes, error = self.forward.has_classes, found.get("error")
        return Explanation(
            example=example,
            prediction=int(found["prediction"]) if classes else None,
            probability=float(found["probability"]) if classes else None,
            target=int(found["target"]),
            value=float(found["value"]),
            baseline=float(found["baseline"]),
            maps={name: self._as_map(name, found["maps"][name], example) for name in self.methods},
            error=None if error is None else float(error),
        )

    def _attributions(self, weights: Weights, inputs: Batch, target: Any, last: Any) -> dict[str, Any]:
        """Compute everything about one example; ``target`` -1 is the predicted class."""
        forward, settings = self.forward, self._settings
        batch = forward.prepare(inputs)
        values = forward.values(weights, batch, last)
        prediction = values.argmax()
        target = jnp.where(target < 0, prediction, target)

        def value(point: jax.Array) -> jax.Array:
            return forward.values_at(weights, batch, last, point)[target]

        def head(activations: jax.Array) -> jax.Array:
            return forward.values_with(weights, batch, last, str(self.layer), activations)[target]

        point = forward.point(weights, batch)
        baseline = forward.baseline(inputs, point)
        compute: dict[str, Callable[[], jax.Array]] = {
            "integrated_gradients": lambda: integrated_gradients(
                value, point, baseline, self.steps, self._power
            ),
            "smoothgrad": lambda: smoothgrad(value, point, jax.random.key(0), settings.samples),
            "grad_cam": lambda: grad_cam(head, forward.output_of(weights, batch, str(self.layer))),
            "rollout": lambda: self._rollout(weights, batch, last),
        }
        maps = {method: compute[method]() for method in self.methods}
        result = {
            "maps": maps,
            "target": target,
            "value": values[target],
            "baseline": value(baseline),
            "prediction": prediction,
            "probability": forward.probabilities(values)[prediction],
        }
        if "integrated_gradients" in maps:
            result["error"] = completeness_error(value, point, baseline, maps["integrated_gradients"])
        return result

    def _rollout(self, weights: Weights, batch: Batch, last: Any) -> jax.Array:
        """Return the rollout of the position that predicts, or the mean over those that are averaged."""
        rollout = attention_rollout(self.forward.attention_weights(weights, batch))
        if self.forward.task == "language_model":
            return rollout[last]
        if self.forward.kind != "tokens" and _grid(self.forward, len(rollout)) is None:
            return rollout[0, 1:]  # a class token comes first, and predicts
        return rollout.mean(0)

    def _as_map(self, method: str, array: np.ndarray, example: Example) -> np.ndarray:
        """Return an attribution as ``[height, width]``, or ``[tokens]``, with the channels added."""
        if self.forward.kind == "tokens":
            if array.ndim == 2:  # a vector for each token
                array = np.linalg.norm(array, axis=-1) if method == "smoothgrad" else array.sum(-1)
            return array[: example.tokens]
        if method == "rollout":
            return array.reshape(_grid(self.forward, len(array)) or (1, -1))
        if method == "grad_cam":
            return array
        array = np.abs(array) if method == "smoothgrad" else array
        return array.sum(-1) if array.ndim == 3 else np.atleast_2d(array)


def is_signed(method: str) -> bool:
    """Whether a method says what speaks against the class, too."""
    return method == "integrated_gradients"


def default_methods(forward: Forward) -> tuple[str, ...]:
    """Return the methods that fit a model and its input."""
    methods = ["integrated_gradients"]
    if forward.kind != "tokens":
        methods.append("smoothgrad")
    if forward.attention:
        methods.append("rollout")
    elif forward.kind == "image" and forward.feature_maps():
        methods.append("grad_cam")
    return tuple(methods)


def _class_number(forward: Forward, text: str | None) -> int:
    """Return the number of the class that ``--target`` names; -1 is the predicted one."""
    if text is None:
        return -1 if forward.has_classes else 0
    labels = forward.manifest.labels
    if labels is not None and text in labels[: forward.outputs]:
        return labels.index(text)
    if text.isascii() and text.isdecimal() and int(text) < forward.outputs:
        return int(text)
    names = "" if labels is None else f", or its name ({did_you_mean(text, labels[:20])})"
    raise InputError(f"--target {text}: give a number from 0 to {forward.outputs - 1}{names}")


def _grad_cam_layer(forward: Forward, layer: str | None) -> str:
    found = [] if forward.kind == "tokens" else forward.feature_maps()
    if not found:
        raise InputError(
            "--method grad_cam: the model has no Flax layer with feature maps [height, width, channel]: use "
            f"{', '.join(default_methods(forward))}"
        )
    if layer is not None and layer not in found:
        raise InputError(f"--layer {layer} has no feature maps: {did_you_mean(layer, found)}")
    return layer or found[-1]


def _check_rollout(forward: Forward) -> None:
    lengths = {shape[2:] for shape in forward.attention}
    if not lengths:
        raise InputError(
            "--method rollout: the model does not use jaxtrain.models.attention.attend (ViT and GPT do): use "
            f"{', '.join(default_methods(forward))}"
        )
    if len(lengths) > 1 or len(set(*lengths)) > 1:
        raise InputError("--method rollout: the layers attend to sequences of different lengths")
    length = next(iter(lengths))[0]
    if forward.kind != "tokens" and not (_grid(forward, length) or _grid(forward, length - 1)):
        raise InputError(f"--method rollout: its {length} tokens are no grid of square patches of the input")


def _grid(forward: Forward, tokens: int) -> tuple[int, int] | None:
    """Return rows and columns of ``tokens`` square patches of the image; None if they are no grid."""
    if forward.kind != "image" or tokens < 1:
        return None
    height, width = (int(n) for n in forward.manifest.inputs[forward.field].shape[1:3])
    rows = round((tokens * height / width) ** 0.5)
    return (rows, tokens // rows) if rows and rows * width * rows == tokens * height else None
