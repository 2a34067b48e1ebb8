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
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxtrain.core import equation

PRODUCTS = ("dot_general", "conv_general_dilated")
REMAT = {"checkpoint": "jaxpr", "remat2": "jaxpr"}
CUSTOM = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "custom_lin": "call_jaxpr"}
CALLS = {"jit": "jaxpr", "closed_call": "call_jaxpr", **REMAT, **CUSTOM}
PLAIN = "plain"  # attribute of this package's own primitives: the same computation in those of JAX

Apply = Callable[[Any, Any], Any]


class Deferred:
    """An array that is computed when it is first needed.

    Args:
      compute: returns the array.
      shape: its shape and dtype, known for the leaves of the weights.
      sources: the paths of the weights that it is computed from.
    """

    def __init__(
        self,
        compute: Callable[[], Any],
        shape: jax.ShapeDtypeStruct | None = None,
        sources: frozenset[str] = frozenset(),
    ) -> None:
        self._compute, self.shape, self.sources, self.needed = compute, shape, sources, False

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

Recompute = Callable[[Any, Callable[..., Any], Sequence[Any]], Any]
"""``(equation, run, arrays) -> run(*arrays)`` under the equation's ``jax.checkpoint``."""


def evaluate(
    apply: Apply,
    weights: Sequence[Deferred],
    treedef: Any,
    inputs: Any,
    product: Product,
    recompute: Recompute | None = None,
) -> Any:
    """Compute ``apply(weights, inputs)`` with ``product`` in place of products with weights.

    What has no such product is computed as it is, with its own rule for gradients.

    Args:
      apply: a pure function.
      weights: the leaves of its weights (``weight``).
      treedef: the tree of the weights.
      inputs: a pytree of arrays.
      product: called for each product, in the order of the program.
      recompute: for a result that is differentiated: it keeps ``jax.checkpoint``, and products inside
        functions with their own rule for gradients stay as they are. None: only the values matter.

    Returns:
      What ``apply`` returns.
    """
    flat, in_tree = jax.tree.flatten(inputs)
    abstract = [jax.eval_shape(jnp.asarray, x) for x in flat]

    def run(leaves: Any, arrays: Any) -> Any:
        return apply(jax.tree.unflatten(treedef, leaves), jax.tree.unflatten(in_tree, arrays))

    closed, out = jax.make_jaxpr(run, return_shape=True)([x.shape for x in weights], abstract)
    interpreter = _Interpreter(product, recompute)
    results = interpreter.run(closed.jaxpr, closed.consts, [*weights, *flat], "")
    return jax.tree.unflatten(jax.tree.structure(out), [force(x) for x in results])


def leaves(arrays: Sequence[Any], treedef: Any, shapes: Sequence[Any] | None = None) -> list[Deferred]:
    """Return the leaves of a pytree of weights, named by their paths.

    Args:
      arrays: their values, None for one that is not needed.
      treedef: the structure of the tree.
      shapes: of all, where values are None.
    """
    numbered = jax.tree.unflatten(treedef, range(len(arrays)))
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(numbered)
    ]
    shapes = shapes or [None] * len(arrays)
    return [weight(*one) for one in zip(arrays, shapes, names, strict=True)]


def weight(array: Any, shape: jax.ShapeDtypeStruct | None = None, source: str = "") -> Deferred:
    """Return a leaf of the weights.

    Args:
      array: its value; None for one that is not needed.
      shape: its shape and dtype, where there is no value.
      source: its path.
    """
    sources = frozenset({source})
    if array is not None:
        shape = jax.ShapeDtypeStruct(jnp.shape(array), array.dtype)
        return Deferred(lambda: array, shape, sources)

    def missing() -> Any:
        raise ValueError(f"a weight of shape {shape} is needed, and its value was left out")

    return Deferred(missing, shape, sources)


def constant(value: Any) -> Deferred:
    """Return a ``Deferred`` of a value that is there."""
    return Deferred(lambda: value)


def _item(results: Deferred, number: int) -> Any:
    return results.get()[number]


def force(x: Any) -> Any:
    """Return the array of a ``Deferred``, and anything else as it is."""
    return x.get() if isinstance(x, Deferred) else x


class _Interpreter:
    """Evaluate programs of which some values are deferred. Arguments as for ``evaluate``."""

    def __init__(self, product: Product, recompute: Recompute | None) -> None:
        self._product, self._recompute = product, recompute

    def run(self, jaxpr: Jaxpr, consts: Iterable[Any], args: Iterable[Any], scope: str) -> list[Any]:
        env: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))
        env.update(zip(jaxpr.constvars, map(constant, consts), strict=True))

        def read(atom: Any) -> Any:
            return constant(atom.val) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            values = [read(atom) for atom in eqn.invars]
            results = self._equation(jaxpr, eqn, values, scope)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, jaxpr: Jaxpr, eqn: Any, values: list[Any], scope: str) -> list[Any]:
        scope = "/".join(filter(None, (scope, str(eqn.source_info.name_stack))))

        def bind(*values: Any) -> list[Any]:
            return equation.bind(jaxpr, eqn, values)

        if all(isinstance(x, Deferred) for x in values):
            done = Deferred(lambda: bind(*map(force, values)))
            sources = frozenset[str]().union(*(x.sources for x in values))
            items = [functools.partial(_item, done, i) for i in range(len(eqn.outvars))]
            return [Deferred(item, None, sources) for item in items]
        layer = _product_of(eqn)
        if layer is not None and isinstance(values[1], Deferred):
            y = self._product(Equation(layer, scope, lambda *xs: bind(*xs)[0]), values[0], values[1])
            return [y]
        inner = _inner(eqn)
        if inner is None or not _has_product(inner.jaxpr):
            return bind(*map(force, values))
        return self._call(eqn, inner, values, scope, bind)

    def _call(
        self, eqn: Any, inner: ClosedJaxpr, values: list[Any], scope: str, bind: Callable[..., list[Any]]
    ) -> list[Any]:
        if self._recompute is None or eqn.primitive.name not in REMAT | CUSTOM:
            return self.run(inner.jaxpr, inner.consts, values, scope)
        if eqn.primitive.name in CUSTOM:
            return bind(*map(force, values))

        def run(*arrays: Any) -> list[Any]:
            args = [
                Deferred(functools.partial(_same, array), None, x.sources)
                if isinstance(x, Deferred)
                else array
                for x, array in zip(values, arrays, strict=True)
            ]
            return list(map(force, self.run(inner.jaxpr, inner.consts, args, scope)))

        results: list[Any] = self._recompute(eqn, run, list(map(force, values)))
        return results


def _same(x: Any) -> Any:
    return x


def _product_of(eqn: Any) -> Any:
    """Return the product that an equation is, its own or the plain one of a primitive of this package."""
    if eqn.primitive.name in PRODUCTS:
        return eqn
    plain = getattr(eqn.primitive, PLAIN, None)
    equations = [] if plain is None else _plain_program(eqn).jaxpr.eqns
    same = len(equations) == 1 and equations[0].primitive.name in PRODUCTS
    return equations[0] if same else None


def _inner(eqn: Any) -> ClosedJaxpr | None:
    """Return the program that a call contains, or the plain one of a primitive of this package."""
    if hasattr(eqn.primitive, PLAIN):
        return _plain_program(eqn)
    program = eqn.params.get(CALLS.get(eqn.primitive.name, ""))
    return ClosedJaxpr(program, ()) if isinstance(program, Jaxpr) else program


def _plain_program(eqn: Any) -> ClosedJaxpr:
    shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in eqn.invars]
    return jax.make_jaxpr(functools.partial(getattr(eqn.primitive, PLAIN), **eqn.params))(*shapes)


def _has_product(jaxpr: Jaxpr) -> bool:
    """Whether a program has a product, also inside of calls."""
    for eqn in jaxpr.eqns:
        inner = _inner(eqn)
        if _product_of(eqn) is not None or (inner is not None and _has_product(inner.jaxpr)):
            return True
    return False
