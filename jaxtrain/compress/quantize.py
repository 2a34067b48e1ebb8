"""Post-training quantization of an inference function to 8-bit integers.

Weights have a scale per output channel, activations one per tensor; both are symmetric around zero (Jacob et
al. 2018, https://arxiv.org/abs/1712.05877; Krishnamoorthi 2018, https://arxiv.org/abs/1806.08342). Dense
layers and convolutions are quantized. Products of activations with each other (attention), recurrent layers
and lookups in tables are not.

>>> def apply(weights, inputs):
...     return {"y": inputs["x"] @ weights["kernel"]}
>>> rng = np.random.default_rng(0)
>>> weights = {"kernel": rng.normal(size=(64, 8)).astype(np.float32)}
>>> batch = {"x": rng.normal(size=(100, 64)).astype(np.float32)}
>>> model = quantize(apply, weights, [batch])
>>> {name: array.dtype.name for name, array in model.weights.items()}
{'int8/0000/input_scale': 'float32', 'int8/0000/kernel': 'int8', 'int8/0000/scale': 'float32'}
>>> y, exact = model.apply(model.weights, batch)["y"], apply(weights, batch)["y"]
>>> bool(np.abs(y - exact).max() < 0.02 * np.abs(exact).max())
True
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtrain.compress import deferred
from jaxtrain.compress.deferred import Apply, Deferred, Equation
from jaxtrain.core.errors import InputError

HIGHEST = 127  # of a symmetric 8-bit integer
INT8, FLOAT = "int8/", "float/"  # prefixes of the names of weights
CONVOLUTION = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "feature_group_count")
SMALLEST = 1e-30  # range of what is all zero; a subnormal step would be flushed to 0, and 0 / 0 is NaN


class Layer(NamedTuple):
    """A product of the model with its weight in 8 bits.

    Attributes:
      input_scale: float32 scalar: the step of the quantized activations.
      kernel: int8, in the shape of the operand of the product.
      scale: float32, by output channel: ``kernel * scale`` is the weight.
    """

    input_scale: Any
    kernel: Any
    scale: Any


class Quantized(NamedTuple):
    """A quantized inference function.

    Attributes:
      apply: ``(weights, inputs) -> outputs``; products are of int8 numbers, added up in int32.
      weights: ``int8/NUMBER LAYER/kernel``, ``…/scale`` and ``…/input_scale`` of each ``Layer``, and
        ``float/PATH`` of the arrays of the model that are used elsewhere.
    """

    apply: Apply
    weights: dict[str, Any]


def quantize(
    apply: Apply, weights: Any, batches: Iterable[Any], ranges: Mapping[str, float] | None = None
) -> Quantized:
    """Quantize ``apply`` to int8 with activation ranges measured on ``batches``.

    Args:
      apply: a pure function ``(weights, inputs) -> outputs``.
      weights: a pytree of arrays.
      batches: inputs to measure on, at least one batch; a few hundred examples are enough. The range of an
        activation is the largest magnitude that occurs.
      ranges: those of a model trained with ``fake_quantize``, by the path of the layer's weight. They are
        used in place of measured ones, and one batch is enough. Only their layers are quantized, without
        those of range 0, which had no input but zeros.

    Raises:
      InputError: no batch, a range that is not finite, or no product that can be quantized.
    """
    leaves, treedef = jax.tree.flatten(weights)
    select = _Select(None if ranges is None else frozenset(name for name, x in ranges.items() if x > 0))
    found: list[dict[str, Any]] = []
    observe = jax.jit(functools.partial(_observe, apply, treedef, select))
    for batch in batches:
        last = batch
        found.append({} if ranges is not None else jax.device_get(observe(leaves, batch)))
        if ranges is not None:
            break
    if not found:
        raise InputError("quantization needs examples to measure the activations on, and there are none")
    measured = {name: np.max([one[name] for one in found]) for name in found[0]}
    highest = {name: np.float32(x) for name, x in (measured if ranges is None else ranges).items()}
    if not highest:
        raise InputError("this model has no dense layer or convolution, so nothing can be quantized to int8")
    if not np.isfinite(list(highest.values())).all():
        raise InputError("an activation of the examples is not finite, so it has no int8 range")
    if ranges is not None and not any(highest.values()):
        raise InputError("the ranges of the activations are all 0: train at least one update first")
    layers = _quantize_kernels(apply, leaves, treedef, last, select, highest)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(jnp.asarray, leaves)]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(weights)]
    run = functools.partial(_apply, apply, treedef, dict(zip(paths, shapes, strict=True)), select)
    needed: set[str] = set()
    floats = {FLOAT + path: leaf for path, leaf in zip(paths, leaves, strict=True)}
    jax.eval_shape(functools.partial(run, needed=needed), layers | floats, last)
    kept = {path: leaf for path, leaf in floats.items() if path in needed}
    return Quantized(run, layers | kept)


class _Select(NamedTuple):
    """Which products are quantized.

    Attributes:
      names: those of the layers; None for all that can be.
    """

    names: frozenset[str] | None

    def __call__(self, equation: Equation, kernel: Deferred, used: Counter[str]) -> str | None:
        """Return the name of the layer; None for a product that stays as it is. See ``layer_name``."""
        if not can_quantize(equation.eqn):
            return None
        name = layer_name(kernel, used)
        return name if self.names is None or name in self.names else None


def _observe(apply: Apply, treedef: Any, select: _Select, leaves: list[Any], batch: Any) -> dict[str, Any]:
    """Return the largest magnitude of the input of each layer, float32 scalars by name."""
    highest: dict[str, Any] = {}
    used: Counter[str] = Counter()

    def product(equation: Equation, x: Any, kernel: Deferred) -> Any:
        name = select(equation, kernel, used)
        if name is not None:
            highest[name] = jnp.max(jnp.abs(x.astype(jnp.float32)), initial=0.0)
        return equation.bind(x, kernel.get())

    deferred.evaluate(apply, deferred.leaves(leaves, treedef), treedef, batch, product)
    return highest


def _quantize_kernels(
    apply: Apply, leaves: list[Any], treedef: Any, batch: Any, select: _Select, highest: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arrays of each product's ``Layer``, in the order of the program."""
    over: list[tuple[int, ...]] = []  # axes that the product adds over, noted while the program is traced
    names: list[str] = []
    steps: list[np.float32] = []

    def kernels(leaves: list[Any], batch: Any) -> list[Any]:
        found: list[Any] = []
        used: Counter[str] = Counter()

        def product(equation: Equation, x: Any, kernel: Deferred) -> Any:
            layer = select(equation, kernel, used)
            if layer is not None:
                over.append(summed_axes(equation.eqn))
                names.append(equation.scope)
                steps.append(np.maximum(highest[layer], np.float32(SMALLEST)) / np.float32(HIGHEST))
                found.append(kernel.get().astype(jnp.float32))
            return equation.bind(x, kernel.get())

        deferred.evaluate(apply, deferred.leaves(leaves, treedef), treedef, batch, product)
        return found

    layers: dict[str, Any] = {}
    arrays = map(np.asarray, jax.jit(kernels)(leaves, batch))
    for number, (array, axes, name, step) in enumerate(zip(arrays, over, names, steps, strict=True)):
        scale = np.maximum(np.abs(array).max(axes, keepdims=True), SMALLEST) / np.float32(HIGHEST)
        kernel = np.clip(np.rint(array / scale), -HIGHEST, HIGHEST).astype(np.int8)
        layer = Layer(np.float32(step), kernel, scale.squeeze(axes).astype(np.float32))
        # The number keeps the order of the program: JAX sorts the keys of a dict.
        prefix = f"{INT8}{number:04d} {name}".strip()
        layers |= {f"{prefix}/{field}": array for field, array in layer._asdict().items()}
    return layers


def _layers(weights: dict[str, Any]) -> list[Layer]:
    """Return the layers in the order of the program."""
    groups: dict[str, dict[str, Any]] = {}
    for name in sorted(name for name in weights if name.startswith(INT8)):
        prefix, _, field = name.rpartition("/")
        groups.setdefault(prefix, {})[field] = weights[name]
    return [Layer(**group) for group in groups.values()]


def _apply(
    apply: Apply,
    treedef: Any,
    shapes: dict[str, jax.ShapeDtypeStruct],
    select: _Select,
    weights: dict[str, Any],
    inputs: Any,
    needed: set[str] | None = None,
) -> Any:
    """Compute ``apply`` with its products in integers."""
    layers, used = iter(_layers(weights)), Counter[str]()
    values = [weights.get(FLOAT + path) for path in shapes]
    leaves = deferred.leaves(values, treedef, list(shapes.values()))

    def product(equation: Equation, x: Any, kernel: Deferred) -> Any:
        if select(equation, kernel, used) is not None:
            return _multiply(equation.eqn, x, next(layers))
        return equation.bind(x, kernel.get())

    outputs = deferred.evaluate(apply, leaves, treedef, inputs, product)
    if needed is not None:
        needed.update(FLOAT + path for path, leaf in zip(shapes, leaves, strict=True) if leaf.needed)
    return outputs


def can_quantize(eqn: Any) -> bool:
    """Whether an operation is a product of real numbers with one weight for all examples."""
    x, kernel = (operand.aval for operand in eqn.invars)
    if not all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in (x, kernel)) or kernel.ndim < 2:
        return False
    if eqn.primitive.name == "dot_general":
        return not eqn.params["dimension_numbers"][1][1]
    return eqn.params["batch_group_count"] == 1


def summed_axes(eqn: Any) -> tuple[int, ...]:
    """Return the axes of the weight that the product adds over: all others are output channels."""
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        return tuple(numbers[0][1])
    return tuple(axis for axis in range(eqn.invars[1].aval.ndim) if axis != numbers.rhs_spec[0])


def _multiply(eqn: Any, x: Any, layer: Layer) -> Any:
    """Multiply int8 with int8, add up in int32, and scale the sums."""
    steps = round_to(x.astype(jnp.float32), layer.input_scale).astype(jnp.int8)
    numbers, out = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    after = 0  # dimensions of the result after the output channels
    if eqn.primitive.name == "dot_general":
        sums = lax.dot_general(steps, layer.kernel, numbers, preferred_element_type=jnp.int32)
    else:
        settings = {key: eqn.params[key] for key in CONVOLUTION}
        sums = lax.conv_general_dilated(
            steps, layer.kernel, **settings, dimension_numbers=numbers, preferred_element_type=jnp.int32
        )
        after = out.ndim - 1 - numbers.out_spec[1]
    scale = layer.scale * layer.input_scale
    before = out.ndim - scale.ndim - after
    scale = scale.reshape(*[1] * before, *scale.shape, *[1] * after)
    return (sums.astype(jnp.float32) * scale).astype(out.dtype)


def round_to(x: Any, scale: Any) -> Any:
    """Return ``round(x / scale)`` within [-128, 127], halves to even, as ONNX's QuantizeLinear."""
    return jnp.clip(jnp.rint(x / scale), -HIGHEST - 1, HIGHEST)


def layer_name(kernel: Deferred, used: Counter[str]) -> str:
    """Return the name of a layer: the path of its weight, with a number where that is used again.

    Args:
      kernel: the operand of the product.
      used: how often each path has been used so far; it is updated.

    >>> used = Counter()
    >>> [layer_name(deferred.weight(np.ones(2), source="head/kernel"), used) for _ in range(2)]
    ['head/kernel', 'head/kernel#2']
    """
    path = "+".join(sorted(kernel.sources)) or "constant"
    used[path] += 1
    return path if used[path] == 1 else f"{path}#{used[path]}"
