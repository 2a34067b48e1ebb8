"""Arithmetic of one update: matrix products and convolutions, counted in the program before XLA sees it."""

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
    """Floating-point operations of an update, of all devices together; an addition and a product are two.

    They are those of the products and convolutions in the model, its gradient and the optimizer, once: what
    ``remat`` computes again does not count, nor do microbatches (``accumulate``) change anything. What is
    done element by element is left out, as it is in what devices are said to be able to do. A loop whose
    length is unknown counts once.
    """
    exp = program.experiment
    if exp.remat != "none":
        program = assemble(dataclasses.replace(exp, remat="none"), mesh_of(program))
    try:
        # The first call of the step finds this trace, and takes as much less.
        traced = program.train_step.trace(*abstract_args(program))  # type: ignore[attr-defined]
        return flops_of(traced)
    finally:
        if program.experiment is not exp:
            program.close()


def flops_of(traced: Any) -> float:
    """Of a function ``jax.jit(f).trace(...)``, before it is split over devices.

    >>> import jax
    >>> powers = jax.jit(lambda x: jax.lax.scan(lambda y, _: (y @ x, None), x, length=5)[0])
    >>> round(flops_of(powers.trace(jax.numpy.ones((100, 100)))) / 1e6)
    10
    """
    return _counted(traced.jaxpr.jaxpr)


def _counted(jaxpr: Jaxpr, used: Sequence[bool] | None = None) -> float:
    """Of what leads to the results, of which ``used`` are wanted: XLA leaves out the rest."""
    wanted = {
        id(x) for x, want in zip(jaxpr.outvars, used or [True] * len(jaxpr.outvars), strict=True) if want
    }
    total = 0.0
    for eqn in reversed(jaxpr.eqns):
        found = [id(x) in wanted for x in eqn.outvars]
        if any(found) or eqn.effects:
            wanted.update(map(id, eqn.invars))
            total += _operations(eqn, found)
    return total


def _operations(eqn: Any, used: Sequence[bool]) -> float:
    name, params = eqn.primitive.name, eqn.params
    counted = {"dot_general": _product, "conv_general_dilated": _convolution}.get(name)
    if counted is not None:
        return counted(eqn)
    if name.startswith("dot_product_attention"):
        return _attention(eqn)
    if name == "scan":
        return float(params["length"]) * _counted(params["jaxpr"].jaxpr)
    if name == "cond":
        return max(_counted(branch.jaxpr, used) for branch in params["branches"])
    inside = list(_inside(params))
    plain = getattr(eqn.primitive, "plain", None)
    if plain is not None:  # a primitive of our own (``models.conv``)
        made = jax.make_jaxpr(functools.partial(plain, **params))(*(x.aval for x in eqn.invars))
        inside = [made.jaxpr]
    whole = len(inside) == 1 and len(inside[0].outvars) == len(used)  # as in ``jit`` and ``remat``
    return sum(_counted(one, used if whole and name != "while" else None) for one in inside)


def _product(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(eqn: Any) -> float:
    """Only where the kernel meets the image: neither padding nor the holes of a dilated one count."""
    params = eqn.params
    numbers = params["dimension_numbers"]
    image, kernel = (x.aval.shape for x in eqn.invars[:2])
    out = eqn.outvars[0].aval.shape
    _, _, *places = numbers.out_spec
    total = 2.0 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    for axis, place in enumerate(places):
        size, width = image[numbers.lhs_spec[2 + axis]], kernel[numbers.rhs_spec[2 + axis]]
        hole, spread = params["lhs_dilation"][axis], params["rhs_dilation"][axis]
        first, step = -params["padding"][axis][0], params["window_strides"][axis]
        met = 0
        for tap in range(width):
            starts = range(first + tap * spread, first + tap * spread + out[place] * step, step)
            met += sum(0 <= at <= (size - 1) * hole and at % hole == 0 for at in starts)
        total *= met
    return total


def _attention(eqn: Any) -> float:
    """cuDNN's, of which no product is seen: two forward, four backward, a causal one half of each."""
    batch, length, heads, size = eqn.invars[0].aval.shape
    others = eqn.invars[1].aval.shape[1]
    causal = "CAUSAL" in str(eqn.params.get("mask_type", ""))
    pairs = length * (length + 1) / 2 if causal else length * others
    return (8.0 if "bwd" in eqn.primitive.name else 4.0) * batch * heads * size * pairs


def _inside(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The programs that an operation such as ``jit`` or ``remat`` holds."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one
