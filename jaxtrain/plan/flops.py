"""Arithmetic of one update, counted in the program before XLA changes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from jaxtrain.plan.memory import batch_like, mesh_of
from jaxtrain.program import Program, assemble


def model_flops(program: Program) -> float:
    """Floating-point operations of an update, of all devices together; an addition and a product are two.

    They are those of the model, its gradient and the optimizer, once: what ``remat`` computes again does not
    count, nor do microbatches (``accumulate``) change anything. A loop whose length is unknown counts once.
    """
    exp = program.experiment
    twin = dataclasses.replace(exp, accumulate=1, remat="none")
    if exp.accumulate > 1 or exp.remat != "none":
        program = assemble(twin, mesh_of(program))
    try:
        traced = program.train_step.trace(  # type: ignore[attr-defined]
            program.like, batch_like(program), program.key
        )
        return flops_of(traced)
    finally:
        if program.experiment is twin:
            program.close()


def flops_of(traced: Any) -> float:
    """Of a function ``jax.jit(f).trace(...)``, before it is split over devices.

    XLA counts the body of a loop once, whatever the loop's length; here a ``lax.scan`` counts in full.

    >>> powers = jax.jit(lambda x: jax.lax.scan(lambda y, _: (y @ x, None), x, length=5)[0])
    >>> round(flops_of(powers.trace(jax.numpy.ones((100, 100)))) / 1e6)
    10
    """
    return _counted(traced.lower()) + _repeated(traced.jaxpr.jaxpr)


def _repeated(jaxpr: Jaxpr) -> float:
    """What the loops within ``jaxpr`` do beyond what XLA counts of them."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            body, length = eqn.params["jaxpr"], eqn.params["length"]
            copies = max(1, int(eqn.params["unroll"]))
            seen = min(length, copies + length % copies)  # those of the loop and those that are left over
            inner = _repeated(body.jaxpr)
            total += length * inner
            if length > seen:
                total += (length - seen) * _lowered(body)
        elif eqn.primitive.name == "cond":
            total += max(_repeated(branch.jaxpr) for branch in eqn.params["branches"])
        else:
            total += sum(map(_repeated, _inside(eqn.params)))
    return total


def _lowered(body: ClosedJaxpr) -> float:
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in body.in_avals]
    return _counted(jax.jit(jaxpr_as_fun(body)).lower(*args))


def _counted(lowered: Any) -> float:
    return float((lowered.cost_analysis() or {}).get("flops", 0))


def _inside(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The programs that an operation such as ``jit`` or ``remat`` holds."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one
