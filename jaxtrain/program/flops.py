"""Model FLOPs of one update: matrix products and convolutions, counted in the jaxpr of the train step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxtrain.program import Program, assemble
from jaxtrain.program.memory import abstract_args, mesh_of


def model_flops(program: Program) -> float:
    """Count the floating-point operations of an update, summed over devices; a multiply-add is two.

    Products and convolutions of the model, its gradient and the optimizer count once: recomputation by
    ``remat`` is left out, and microbatches (``accumulate``) change nothing. Elementwise operations are left
    out, as in the datasheet peaks of devices. A loop of unknown length counts as one iteration.
    """
    exp = program.experiment
    if exp.remat != "none":
        program = assemble(dataclasses.replace(exp, remat="none"), mesh_of(program))
    try:
        # The first call of the step reuses this trace.
        traced = program.train_step.trace(*abstract_args(program))  # type: ignore[attr-defined]
        return flops_of(traced)
    finally:
        if program.experiment is not exp:
            program.close()


def flops_of(traced: Any) -> float:
    """Count the operations of a traced function, ``jax.jit(f).trace(...)``, summed over devices.

    >>> import jax
    >>> powers = jax.jit(lambda x: jax.lax.scan(lambda y, _: (y @ x, None), x, length=5)[0])
    >>> round(flops_of(powers.trace(jax.numpy.ones((100, 100)))) / 1e6)
    10
    """
    return _count(traced.jaxpr.jaxpr)


def _count(jaxpr: Jaxpr, used: Sequence[bool] | None = None) -> float:
    """Count the operations that the outputs with ``used`` depend on: XLA removes the others as dead code."""
    live = {id(x) for x, use in zip(jaxpr.outvars, used or [True] * len(jaxpr.outvars), strict=True) if use}
    total = 0.0
    for eqn in reversed(jaxpr.eqns):
        used_outputs = [id(x) in live for x in eqn.outvars]
        if any(used_outputs) or eqn.effects:
            live.update(map(id, eqn.invars))
            total += _operations(eqn, used_outputs)
    return total


def _operations(eqn: Any, used: Sequence[bool]) -> float:
    name, params = eqn.primitive.name, eqn.params
    formula = {"dot_general": _product, "conv_general_dilated": _convolution}.get(name)
    if formula is not None:
        return formula(eqn)
    if name.startswith("dot_product_attention"):
        return _attention(eqn)
    if name == "scan":
        return float(params["length"]) * _count(params["jaxpr"].jaxpr)
    if name == "cond":
        return max(_count(branch.jaxpr, used) for branch in params["branches"])
    inner = list(_subprograms(params))
    plain = getattr(eqn.primitive, "plain", None)
    if plain is not None:  # a primitive of ``models.conv``
        inner = [jax.make_jaxpr(functools.partial(plain, **params))(*(x.aval for x in eqn.invars)).jaxpr]
    same_outputs = len(inner) == 1 and len(inner[0].outvars) == len(used)  # as in ``jit`` and ``remat``
    return sum(_count(one, used if same_outputs and name != "while" else None) for one in inner)


def _product(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(eqn: Any) -> float:
    """Count products of kernel and image only: neither padding nor the zeros of a dilated image."""
    params = eqn.params
    numbers = params["dimension_numbers"]
    image, kernel = (x.aval.shape for x in eqn.invars[:2])
    out = eqn.outvars[0].aval.shape
    _, _, *out_axes = numbers.out_spec
    total = 2.0 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    for axis, out_axis in enumerate(out_axes):
        size, width = image[numbers.lhs_spec[2 + axis]], kernel[numbers.rhs_spec[2 + axis]]
        image_dilation, kernel_dilation = params["lhs_dilation"][axis], params["rhs_dilation"][axis]
        first, stride = -params["padding"][axis][0], params["window_strides"][axis]
        hits = 0
        for tap in range(width):
            start = first + tap * kernel_dilation
            positions = range(start, start + out[out_axis] * stride, stride)
            hits += sum(
                0 <= at <= (size - 1) * image_dilation and at % image_dilation == 0 for at in positions
            )
        total *= hits
    return total


def _attention(eqn: Any) -> float:
    """cuDNN's attention, which shows no products: two forward and four backward; causal takes half."""
    batch, length, heads, size = eqn.invars[0].aval.shape
    others = eqn.invars[1].aval.shape[1]
    causal = "CAUSAL" in str(eqn.params.get("mask_type", ""))
    pairs = length * (length + 1) / 2 if causal else length * others
    return (8.0 if "bwd" in eqn.primitive.name else 4.0) * batch * heads * size * pairs


def _subprograms(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The jaxprs inside an operation such as ``jit`` or ``remat``."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one
