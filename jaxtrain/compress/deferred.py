"""Evaluate an inference function and compute what depends on its weights alone only where it is needed.

``jax.make_jaxpr`` gives the operations of ``apply(weights, inputs)``. Those whose operands come from the
weights alone (a transposed, reshaped or rounded kernel) are deferred. A product of something else with a
deferred operand is one of the model's layers, and ``product`` decides how it is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, jaxpr_as_fun

CALLS = {"jit": "jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr", "closed_call": "call_jaxpr"}
CALLS |= {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "custom_lin": "call_jaxpr"}
PLAIN = "plain"  # attribute of this package's own primitives: the same computation in those of JAX

Apply = Callable[[Any, Any], Any]


class Deferred:
    """An array that is computed when it is first needed.

    Args:
      compute: returns the array.
      shape: its shape and dtype, known for the leaves of the weights.
    """

    def __init__(self, compute: Callable[[], Any], shape: jax.ShapeDtypeStruct | None = None) -> None:
        self._compute, self.shape, self.needed = compute, shape, False

    def get(self) -> Any:
        """Return the array."""
        if not self.needed:
            self._value = self._compute()
            self.needed = True
        return self._value


class Equation(NamedTuple):
    """A product, ``dot_general`` or ``conv_general_dilated``.

    Attributes:
      eqn: the equation of the program.
      scope: the names of the layers around it, such as ``"block0/conv1"``.
      bind: ``bind(x, w)`` computes it as it is.
    """

    eqn: Any
    scope: str
    bind: Callable[..., Any]


Product = Callable[[Equation, Any, Deferred], Any]
"""``(equation, x, weight) -> y``."""


def evaluate(apply: Apply, weights: Sequence[Deferred], treedef: Any, inputs: Any, product: Product) -> Any:
    """Compute ``apply(weights, inputs)`` with ``product`` in place of products with weights.

    Args:
      apply: a pure function.
      weights: the leaves of its weights (``weight``).
      treedef: the tree of the weights.
      inputs: a pytree of arrays.
      product: called for each product, in the order of the program.

    Returns:
      What ``apply`` returns.
    """
    flat, in_tree = jax.tree.flatten(inputs)
    abstract = [jax.ShapeDtypeStruct(jnp.shape(x), jax.dtypes.canonicalize_dtype(x.dtype)) for x in flat]

    def run(leaves: Any, arrays: Any) -> Any:
        return apply(jax.tree.unflatten(treedef, leaves), jax.tree.unflatten(in_tree, arrays))

    closed, out = jax.make_jaxpr(run, return_shape=True)([x.shape for x in weights], abstract)
    results = _evaluate(closed.jaxpr, closed.consts, [*weights, *flat], product, "")
    return jax.tree.unflatten(jax.tree.structure(out), [force(x) for x in results])


def weight(array: Any, shape: jax.ShapeDtypeStruct | None = None) -> Deferred:
    """Return a leaf of the weights.

    Args:
      array: its value; None for one that is not needed.
      shape: its shape and dtype, where there is no value.
    """
    if array is not None:
        shape = jax.ShapeDtypeStruct(jnp.shape(array), array.dtype)
        return Deferred(lambda: array, shape)

    def missing() -> Any:
        raise ValueError(f"a weight of shape {shape} is needed, and its value was left out")

    return Deferred(missing, shape)


def constant(value: Any) -> Deferred:
    """Return a ``Deferred`` of a value that is there."""
    return Deferred(lambda: value)


def _item(results: Deferred, number: int) -> Any:
    return results.get()[number]


def force(x: Any) -> Any:
    """Return the array of a ``Deferred``, and anything else as it is."""
    return x.get() if isinstance(x, Deferred) else x


def _evaluate(
    jaxpr: Jaxpr, consts: Iterable[Any], args: Iterable[Any], product: Product, scope: str
) -> list[Any]:
    env: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))
    env.update(zip(jaxpr.constvars, map(constant, consts), strict=True))

    def read(atom: Any) -> Any:
        return constant(atom.val) if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        results = _equation(jaxpr, eqn, values, product, scope)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(jaxpr: Jaxpr, eqn: Any, values: list[Any], product: Product, scope: str) -> list[Any]:
    name = eqn.primitive.name
    scope = "/".join(filter(None, (scope, str(eqn.source_info.name_stack))))
    bind = functools.partial(_bind, jaxpr, eqn)
    if all(isinstance(x, Deferred) for x in values):
        done = Deferred(lambda: bind(*map(force, values)))
        return [Deferred(functools.partial(_item, done, i)) for i in range(len(eqn.outvars))]
    inner = _inner(eqn)
    if inner is not None:
        return _evaluate(inner.jaxpr, inner.consts, values, product, scope)
    if name in ("dot_general", "conv_general_dilated") and isinstance(values[1], Deferred):
        return [product(Equation(eqn, scope, lambda *xs: bind(*xs)[0]), values[0], values[1])]
    return bind(*map(force, values))


def _inner(eqn: Any) -> ClosedJaxpr | None:
    """Return the program that a call contains, or the plain one of a primitive of this package."""
    plain = getattr(eqn.primitive, PLAIN, None)
    if plain is not None:
        shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in eqn.invars]
        return jax.make_jaxpr(functools.partial(plain, **eqn.params))(*shapes)
    program = eqn.params.get(CALLS.get(eqn.primitive.name, ""))
    return ClosedJaxpr(program, ()) if isinstance(program, Jaxpr) else program


def _bind(jaxpr: Jaxpr, eqn: Any, *values: Any) -> list[Any]:
    """Compute one operation, in the scope of its line of source code."""
    env = {x: value for x, value in zip(eqn.invars, values, strict=True) if isinstance(x, Var)}
    parts = {"invars": list(env), "outvars": eqn.outvars, "eqns": [eqn], "effects": eqn.effects}
    return list(jaxpr_as_fun(ClosedJaxpr(jaxpr.replace(constvars=(), **parts), ()))(*env.values()))
