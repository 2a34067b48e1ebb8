"""Quantization-aware training: a model whose products are computed with numbers rounded to 8 bits.

Weights and activations of dense layers and convolutions are rounded as ``quantize`` rounds them and stay
floats (fake quantization, Jacob et al. 2018, https://arxiv.org/abs/1712.05877, section 3). The gradient
passes the rounding unchanged (straight-through estimator, Bengio et al. 2013,
https://arxiv.org/abs/1308.3432); that of an activation outside of its range is 0.
"""

from __future__ import annotations

import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxtrain.compress import deferred
from jaxtrain.compress.deferred import Deferred, Equation
from jaxtrain.compress.quantize import HIGHEST, SMALLEST, can_quantize, layer_name, round_to, summed_axes
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import RANGES, Batch, Model
from jaxtrain.models import as_model

DECAY = 0.99
"""Of the moving average of an activation's range: about the last 100 updates."""

Compression = Literal["int8"]
"""Names for ``Experiment.compress``."""


def check_compression(name: Any) -> None:
    """Raise InputError unless ``name`` is one in ``Compression``, or None."""
    names = typing.get_args(Compression)
    if name is not None and name not in names:
        raise InputError(f"compress is {name!r}: it must be {' or '.join(names)}, or None")


def compressed(model: Model, name: Compression | None) -> Model:
    """Return ``model`` as ``Experiment.compress`` says: for ``"int8"``, ``fake_quantize``."""
    return model if name is None else METHODS[name](model)


def fake_quantize(model: Any) -> Model:
    """Return ``model`` with the inputs of its dense layers and convolutions rounded to 8 bits.

    An evaluation then computes what ``quantize`` makes of the model with the ranges in its statistics. In
    training a range is the moving average of the largest magnitude in a batch (the first batch sets it); in
    evaluation it is used as it is. They are ``extra["int8_ranges"]``: float32 scalars by the path of the
    layer's weight, 0 before the first update, when the activation is not rounded. Weights have a scale per
    output channel, from their own values at each step.

    Rounded are the products that ``quantize`` would quantize, except those inside of a function with its own
    rule for gradients (``jax.custom_vjp``).

    Args:
      model: a Linen module or an ``(init, apply)`` pair.

    >>> from jaxtrain.models import MLP
    >>> model, batch = fake_quantize(MLP(widths=(8,), classes=3)), {"image": jnp.ones((2, 4))}
    >>> params, extra = model.init(jax.random.key(0), batch)
    >>> outputs, extra = model.apply(params, extra, batch, train=True, key=jax.random.key(1))
    >>> {name: float(x) for name, x in extra["int8_ranges"].items() if "dense0" in name}
    {'params/dense0/kernel': 1.0}
    """
    pair = as_model(model)

    def init(key: jax.Array, batch: Batch) -> tuple[Any, dict[str, Any]]:
        params, extra = pair.init(key, batch)
        if RANGES in extra:
            raise InputError(f"the model's collection {RANGES!r} has a name that compress uses: rename it")
        names = [_find_layers(pair, params, extra, batch, key, train) for train in (False, True)]
        both = [name for name in names[0] if name in set(names[1])]
        if not both:
            raise InputError("compress: this model has no dense layer or convolution, so nothing is rounded")
        return params, {**extra, RANGES: {name: jnp.zeros((), jnp.float32) for name in both}}

    def apply(
        params: Any, extra: dict[str, Any], batch: Batch, *, train: bool, key: jax.Array | None
    ) -> tuple[Any, dict[str, Any]]:
        statistics = {name: tree for name, tree in extra.items() if name != RANGES}
        rounding = _Rounding(extra[RANGES], train)
        outputs, updated = _evaluate(pair, params, statistics, batch, key, train, rounding)
        return outputs, {**updated, RANGES: {**extra[RANGES], **rounding.ranges}}

    return pair._replace(init=init, apply=apply)


METHODS: dict[str, Callable[[Any], Model]] = {"int8": fake_quantize}


def _evaluate(
    model: Model, params: Any, statistics: Any, batch: Batch, key: Any, train: bool, rounding: _Rounding
) -> Any:
    arrays, treedef = jax.tree.flatten({"params": params, "statistics": statistics})
    weights = deferred.leaves(arrays, treedef)

    def forward(weights: Any, inputs: tuple[Batch, Any]) -> Any:
        batch, key = inputs
        return model.apply(weights["params"], weights["statistics"], batch, train=train, key=key)

    return deferred.evaluate(
        forward, weights, treedef, (dict(batch), key), rounding.product, rounding.recompute
    )


def _find_layers(model: Model, params: Any, extra: Any, batch: Batch, key: Any, train: bool) -> list[str]:
    """Return the names of the layers that can be rounded, in the order of the program."""
    names: list[str] = []

    def trace(params: Any, extra: Any, batch: Batch, key: Any) -> None:
        rounding = _Rounding(None, train)
        _evaluate(model, params, extra, batch, key if train else None, train, rounding)
        names.extend(rounding.ranges)

    jax.eval_shape(trace, params, extra, batch, key)
    return names


class _Rounding:
    """Round the operands of products, and note their ranges.

    Args:
      ranges: of the activations by layer; layers that are not among them stay as they are. None: note the
        layers only.
      train: update the ranges.
    """

    def __init__(self, ranges: Mapping[str, Any] | None, train: bool) -> None:
        self._known, self._train = ranges, train
        self._used: Counter[str] = Counter()
        self.ranges: dict[str, Any] = {}

    def product(self, equation: Equation, x: Any, kernel: Deferred) -> Any:
        """Compute a product with rounded operands."""
        if not can_quantize(equation.eqn):
            return equation.bind(x, kernel.get())
        name = layer_name(kernel, self._used)
        if self._known is None:
            self.ranges[name] = jnp.zeros(())
        elif name in self._known:
            self.ranges[name] = highest = self._range(self._known[name], x)
            weight = round_weight(kernel.get(), summed_axes(equation.eqn))
            return equation.bind(round_activation(x, highest), weight)
        return equation.bind(x, kernel.get())

    def _range(self, highest: Any, x: Any) -> Any:
        if not self._train:
            return highest
        found = jax.lax.stop_gradient(jnp.max(jnp.abs(x.astype(jnp.float32)), initial=0.0))
        return jnp.where(highest == 0, found, DECAY * highest + (1 - DECAY) * found)

    def recompute(self, eqn: Any, run: Callable[..., Any], arrays: Sequence[Any]) -> Any:
        """Compute what is inside of ``jax.checkpoint``; the ranges found there are among its outputs."""
        outside = self.ranges

        def inside(*arrays: Any) -> tuple[Any, dict[str, Any]]:
            self.ranges = {}
            return run(*arrays), self.ranges

        settings = {name: eqn.params[name] for name in ("policy", "prevent_cse")}
        results, found = jax.checkpoint(inside, **settings)(*arrays)
        self.ranges = {**outside, **found}
        return results


@jax.custom_jvp
def round_activation(x: jax.Array, highest: jax.Array) -> jax.Array:
    """Round to the numbers that int8 has for the range ``highest``; unchanged where that is 0.

    Args:
      x: float, any shape.
      highest: float32 ``[]``, the magnitude that becomes 127. Larger ones are cut off.

    >>> round_activation(jnp.array([0.004, 0.5, -3.0]), jnp.float32(1.27)).tolist()
    [0.0, 0.5, -1.2799999713897705]
    """
    scale = jnp.maximum(highest, SMALLEST) / HIGHEST
    rounded = (round_to(x.astype(jnp.float32), scale) * scale).astype(x.dtype)
    return jnp.where(highest > 0, rounded, x)


@round_activation.defjvp
def _(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    x, highest = primals
    tangent, _ = tangents
    outside = (jnp.abs(x.astype(jnp.float32)) > highest) & (highest > 0)
    return round_activation(x, highest), jnp.where(outside, jnp.zeros_like(tangent), tangent)


@jax.custom_jvp
def _round_channels(weight: jax.Array, scale: jax.Array) -> jax.Array:
    return (round_to(weight.astype(jnp.float32), scale) * scale).astype(weight.dtype)


@_round_channels.defjvp
def _(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    return _round_channels(*primals), tangents[0]


def round_weight(weight: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Round to the numbers that int8 has for the largest magnitude of each output channel.

    Args:
      weight: float.
      axes: those that the product adds over; all others are output channels.

    >>> round_weight(jnp.array([[127.0], [0.4], [0.6]]), (0,)).round().tolist()
    [[127.0], [0.0], [1.0]]
    """
    largest = jnp.abs(jax.lax.stop_gradient(weight).astype(jnp.float32)).max(axes, keepdims=True)
    return _round_channels(weight, jnp.maximum(largest, SMALLEST) / HIGHEST)
