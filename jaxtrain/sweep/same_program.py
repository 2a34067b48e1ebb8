"""One program for settings that differ in numbers only: the numbers become its inputs.

A learning rate is a constant of the compiled step, so another one would be another program to compile. The
jaxprs of two such steps differ in nothing but literals. ``merge`` finds these and makes them arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

# Rules of functions with their own gradients: what they are was compared with the function itself.
RULES = frozenset({"bwd", "fwd", "fwd_jaxpr_thunk", "jvp_jaxpr_fun", "jvp_jaxpr_thunk"})


class Merged(NamedTuple):
    """One program for several settings.

    Attributes:
      fn: ``(numbers, *inputs) -> outputs``, flat and pure.
      numbers: for each of the settings the values of ``numbers``, scalars and arrays.
    """

    fn: Callable[..., list[Any]]
    numbers: list[list[np.ndarray]]


def merge(programs: Sequence[ClosedJaxpr]) -> Merged | None:
    """Merge programs that differ only in literals and constants; None where they differ in anything else.

    Literals inside of loops and branches must be equal.

    Args:
      programs: of the same function under several settings, from ``jax.make_jaxpr``.

    >>> programs = [jax.make_jaxpr(lambda x: rate * x + 1)(2.0) for rate in (0.5, 0.25)]
    >>> merged = merge(programs)
    >>> [[float(x) for x in numbers] for numbers in merged.numbers]
    [[0.5], [0.25]]
    >>> [float(merged.fn(numbers, 2.0)[0]) for numbers in merged.numbers]
    [2.0, 1.5]
    >>> merge([*programs, jax.make_jaxpr(lambda x: x + 1)(2.0)]) is None
    True
    """
    first = programs[0].jaxpr
    structure = _structure(first, top=True)
    if any(_structure(program.jaxpr, top=True) != structure for program in programs[1:]):
        return None
    constants = [n for n in range(len(programs[0].consts)) if not _equal(p.consts[n] for p in programs)]
    literals = [
        (n, k)
        for n, eqn in enumerate(first.eqns)
        for k, atom in enumerate(eqn.invars)
        if isinstance(atom, Literal) and not _equal(p.jaxpr.eqns[n].invars[k].val for p in programs)
    ]
    numbers = [
        [np.asarray(p.consts[n]) for n in constants]
        + [_value(p.jaxpr.eqns[n].invars[k]) for n, k in literals]
        for p in programs
    ]
    return Merged(_with_inputs(programs[0], constants, literals), numbers)


def _with_inputs(
    program: ClosedJaxpr, constants: Sequence[int], literals: Sequence[tuple[int, int]]
) -> Callable[..., list[Any]]:
    """Return the program as a function whose first argument is the values of these constants and literals."""
    jaxpr = program.jaxpr
    atoms = [jaxpr.eqns[n].invars[k] for n, k in literals]
    inputs = dict(zip(literals, _variables(atoms), strict=True))
    eqns = [
        eqn.replace(invars=[inputs.get((n, k), atom) for k, atom in enumerate(eqn.invars)])
        for n, eqn in enumerate(jaxpr.eqns)
    ]
    kept = [n for n in range(len(program.consts)) if n not in constants]
    invars = [*(jaxpr.constvars[n] for n in constants), *inputs.values(), *jaxpr.invars]
    changed = jaxpr.replace(eqns=eqns, invars=invars, constvars=[jaxpr.constvars[n] for n in kept])
    compute = jaxpr_as_fun(ClosedJaxpr(changed, [program.consts[n] for n in kept]))
    return lambda numbers, *args: list(compute(*numbers, *args))


def _variables(atoms: Sequence[Any]) -> Sequence[Any]:
    """Return a new variable for each atom, of its type."""
    shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype, weak_type=x.aval.weak_type) for x in atoms]
    return jax.make_jaxpr(lambda *xs: xs)(*shapes).jaxpr.invars


def _structure(jaxpr: Jaxpr, top: bool = False) -> list[Any]:
    """Return what two programs must have in common, to be compared with ``==``.

    Of literals at the ``top`` that is their type, elsewhere their value, too.
    """
    names: dict[Any, int] = {}

    def name(atom: Any, value: bool) -> Any:
        if isinstance(atom, Literal):
            return str(atom.aval), _comparable(atom.val) if value else None
        return names.setdefault(atom, len(names)), str(atom.aval)

    parts: list[Any] = [[name(x, True) for x in (*jaxpr.constvars, *jaxpr.invars)]]
    for eqn in jaxpr.eqns:
        settings = {key: _comparable(value) for key, value in eqn.params.items() if key not in RULES}
        inputs = [name(x, not top) for x in eqn.invars]
        parts.append([eqn.primitive.name, settings, inputs, [name(x, True) for x in eqn.outvars]])
    return [*parts, [name(x, True) for x in jaxpr.outvars]]


def _comparable(value: Any) -> Any:
    """Return something of a setting of an operation that ``==`` compares."""
    if isinstance(value, ClosedJaxpr):
        return _structure(value.jaxpr), [_comparable(x) for x in value.consts]
    if isinstance(value, Jaxpr):
        return _structure(value)
    if isinstance(value, list | tuple):
        return [_comparable(x) for x in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        return str(array.dtype), array.shape, array.tobytes()
    return value


def _equal(values: Any) -> bool:
    first, *others = map(_comparable, values)
    return all(other == first for other in others)


def _value(literal: Any) -> np.ndarray:
    return np.asarray(literal.val, literal.aval.dtype)
