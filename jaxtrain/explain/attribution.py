"""Attribution methods as pure functions of any differentiable JAX function: what its value depends on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.core.errors import InputError

Scalar = Callable[[jax.Array], jax.Array]
"""A function of one array that returns a scalar, such as the logit of a class."""

CHUNK = 16
"""Gradients that are computed at a time."""


def integrated_gradients(
    function: Scalar, inputs: jax.Array, baseline: jax.Array, steps: int = 128, power: float = 1.0
) -> jax.Array:
    """Return the part of each input in ``function(inputs) - function(baseline)``.

    ``(inputs - baseline)`` times the mean gradient on the straight line between the two, by the midpoint
    rule (Sundararajan, Taly & Yan 2017, "Axiomatic Attribution for Deep Networks", arXiv:1703.01365). The
    sum of the result is the difference of the function's values, up to the error of the integral
    (``completeness_error``), which falls with ``steps``.

    Args:
      function: of one example, to a scalar.
      inputs: float array, the example.
      baseline: of the same shape, an input without information, such as a black image.
      steps: points on the line, at least 1: the middles of intervals that end at ``(i / steps) ** power``.
      power: above 1, more of the points are near the baseline, where a function changes fast whose first
        layer is a normalisation and whose baseline is 0; at least 1.

    Returns:
      Attributions of the shape of ``inputs``, in units of the function's value.

    Raises:
      InputError: ``steps`` or ``power`` is below 1, the shapes differ, or the inputs are no floats.

    >>> w, x = jnp.array([1.0, -2.0]), jnp.array([3.0, 1.0])
    >>> integrated_gradients(lambda x: x @ w, x, jnp.zeros(2)).tolist()
    [3.0, -2.0]
    """
    if steps < 1 or not power >= 1:
        raise InputError(f"steps is {steps} and power {power}: give at least 1 of each")
    _check_float(inputs)
    if jnp.shape(inputs) != jnp.shape(baseline):
        raise InputError(f"baseline has shape {jnp.shape(baseline)} and the inputs {jnp.shape(inputs)}")
    difference = inputs - baseline
    ends = (jnp.arange(steps + 1, dtype=inputs.dtype) / steps) ** power
    middles, widths = (ends[1:] + ends[:-1]) / 2, jnp.diff(ends)
    return difference * _mean_gradient(function, lambda alpha: baseline + alpha * difference, middles, widths)


def completeness_error(
    function: Scalar, inputs: jax.Array, baseline: jax.Array, attributions: jax.Array
) -> jax.Array:
    """Return how far attributions are from complete, relative: ``|sum / (f(inputs) - f(baseline)) - 1|``.

    Sundararajan et al. 2017 call completeness the axiom that the attributions sum to the difference of the
    function's values. 0 where all of it is within the rounding of the values.

    Args:
      function, inputs, baseline: as for ``integrated_gradients``.
      attributions: what it returned.

    >>> x = jnp.array([3.0, 1.0])
    >>> float(completeness_error(jnp.sum, x, jnp.zeros(2), jnp.array([2.0, 1.0])))
    0.25
    """
    value, start = function(inputs), function(baseline)
    difference = value - start
    off = jnp.abs(attributions.sum() - difference)
    rounding = 10 * jnp.finfo(difference.dtype).eps * jnp.maximum(jnp.abs(value), jnp.abs(start))
    return jnp.where(off <= rounding, 0, off / jnp.abs(difference))


def smoothgrad(
    function: Scalar, inputs: jax.Array, key: jax.Array, samples: int = 64, noise: float = 0.15
) -> jax.Array:
    """Return the mean gradient at copies of ``inputs`` with Gaussian noise.

    The noise averages out the fluctuations of the gradient between neighbouring inputs (Smilkov et al. 2017,
    "SmoothGrad: removing noise by adding noise", arXiv:1706.03825).

    Args:
      function: of one example, to a scalar.
      inputs: float array, the example.
      key: of the noise; the same key gives the same result.
      samples: noisy copies, at least 1.
      noise: standard deviation, as a part of the range of the inputs; 0.1 to 0.2 in the paper.

    Returns:
      Gradients of the shape of ``inputs``: value per unit of the input.

    Raises:
      InputError: ``samples`` is below 1, ``noise`` below 0, or the inputs are no floats.

    >>> x = jnp.array([3.0, 1.0])
    >>> smoothgrad(lambda x: (x * x).sum(), x, jax.random.key(0), noise=0).tolist()
    [6.0, 2.0]
    """
    if samples < 1 or not noise >= 0:
        raise InputError(f"samples is {samples} and noise {noise}: give at least 1, and at least 0")
    _check_float(inputs)
    scale = noise * (inputs.max() - inputs.min())

    def noisy(number: jax.Array) -> jax.Array:
        draw = jax.random.normal(jax.random.fold_in(key, number), inputs.shape, inputs.dtype)
        return inputs + scale * draw

    return _mean_gradient(function, noisy, jnp.arange(samples), jnp.full(samples, 1 / samples, inputs.dtype))


def grad_cam(function: Scalar, activations: jax.Array) -> jax.Array:
    """Return where the feature maps of a layer speak for the value: ``float [height, width]``, at least 0.

    The maps are added with weights, the mean gradient of each, and negative sums become 0 (Selvaraju et al.
    2017, "Grad-CAM", arXiv:1610.02391, equations 1 and 2).

    Args:
      function: the rest of the network, from these feature maps to a scalar.
      activations: float ``[height, width, channel]``, of one example.

    Raises:
      InputError: the activations have another number of axes, or are no floats.

    >>> maps = jnp.stack([jnp.eye(2), 1 - jnp.eye(2)], -1)
    >>> grad_cam(lambda a: 8 * a[..., 0].mean() - a[..., 1].mean(), maps).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    if activations.ndim != 3:
        raise InputError(f"activations have shape {activations.shape}: give [height, width, channel]")
    _check_float(activations)
    weights = jax.grad(function)(activations).mean((0, 1))
    return jax.nn.relu(jnp.tensordot(activations, weights, 1))


def attention_rollout(weights: Sequence[jax.Array], residual: float = 0.5) -> jax.Array:
    """Return how much each position depends on each input token: ``[length, length]``, rows sum to 1.

    The product, from the last layer to the first, of the attention of each: averaged over heads, and mixed
    with the identity for the residual connection (Abnar & Zuidema 2020, "Quantifying Attention Flow in
    Transformers", arXiv:2005.00928, equation 1). It says nothing about a single class.

    Args:
      weights: of each layer, the first one first, softmax weights ``[heads, query, key]`` of one example.
      residual: part of the identity, in [0, 1].

    Raises:
      InputError: there is no layer, the lengths differ, or ``residual`` is out of range.

    >>> attention_rollout([jnp.array([[[1.0, 0.0], [0.5, 0.5]]])]).tolist()
    [[1.0, 0.0], [0.25, 0.75]]
    """
    if not weights or any(w.ndim != 3 or w.shape[1:] != (weights[0].shape[1],) * 2 for w in weights):
        shapes = ", ".join(str(tuple(w.shape)) for w in weights)
        raise InputError(f"weights ({shapes or 'none'}): give [heads, length, length] of each layer")
    if not 0 <= residual <= 1:
        raise InputError(f"residual is {residual}: give a number in [0, 1]")
    identity = jnp.eye(weights[0].shape[1], dtype=weights[0].dtype)
    rollout = identity
    for layer in weights:
        rollout = (residual * identity + (1 - residual) * layer.mean(0)) @ rollout
    return rollout


def _mean_gradient(
    function: Scalar, point: Callable[[Any], jax.Array], numbers: jax.Array, weights: jax.Array
) -> jax.Array:
    """Return the weighted sum of the gradients of ``function`` at ``point(number)`` for each number."""

    def gradient(number: Any) -> jax.Array:
        return jax.grad(function)(point(number))

    gradients = jax.lax.map(gradient, numbers, batch_size=min(CHUNK, len(numbers)))
    return jnp.tensordot(weights, gradients, 1)


def _check_float(inputs: jax.Array) -> None:
    if not jnp.issubdtype(jnp.asarray(inputs).dtype, jnp.floating):
        raise InputError(f"the inputs are {inputs.dtype}: cast them to a float dtype first")
