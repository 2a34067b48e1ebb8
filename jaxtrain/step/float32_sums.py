"""Sums of half-precision numbers in float32.

JAX's rules for gradients add in the dtype of the activations. The gradient of a bias that is added to
``[batch, length, width]`` is then a sum of ``batch * length`` numbers in bfloat16, with several times the
rounding error of one in float32 (``docs/decisions/float32-sums.md``). XLA:CPU adds in float32 anyway; on an
NVIDIA GPU the compiled kernel does not.

>>> def loss(bias):
...     rows = jnp.zeros((4096, 2), jnp.bfloat16)
...     return (rows + bias.astype(jnp.bfloat16)[None]).astype(jnp.float32).sum()
>>> functions = jax.grad(loss), sum_in_float32(jax.grad(loss))
>>> ["bf16[2] = reduce_sum" in str(jax.make_jaxpr(fn)(jnp.zeros(2))) for fn in functions]
[True, False]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, jaxpr_as_fun

from jaxtrain.core import equation

HALF = (jnp.dtype("bfloat16"), jnp.dtype("float16"))
# Operations that only move a gradient on its way to its parameter, or add some: none has a dtype among its
# settings. The gradient of ``x[None]`` is a ``reduce_sum``.
MOVES = frozenset({"add_any", "concatenate", "copy", "optimization_barrier", "pad"}) | frozenset(
    {"reduce_sum", "reshape", "sharding_constraint", "slice", "squeeze", "transpose"}
)
CALLS = frozenset({"checkpoint", "jit", "remat2"})

Compute = Callable[..., Any]


def sum_in_float32(fn: Compute, gradients: Callable[[Any], Any] | None = None) -> Compute:
    """Return ``fn`` with every sum of bfloat16 or float16 numbers accumulated in float32.

    Covered are ``reduce_sum``, ``scatter-add`` (the gradient of an embedding) and the sums that the gradient
    of ``lax.scan`` carries from step to step (a recurrent network's parameters), also inside ``jit``,
    ``checkpoint``, ``scan``, ``while_loop`` and ``cond``. Products and convolutions accumulate in float32 by
    themselves. Not covered are ``shard_map``, ``lax.reduce`` with a function of one's own, ``reduce_window``,
    ``cumsum``, and what is differentiated later: apply it last, as in ``sum_in_float32(jax.grad(loss))``. A
    function without half-precision numbers is evaluated unchanged. Under ``jax.disable_jit()``, which is for
    debugging, ``fn`` is called as it is.

    Args:
      fn: a pure function of pytrees of arrays.
      gradients: takes the outputs of ``fn`` and returns a prefix tree of booleans. The float32 outputs with
        True are then not rounded to half precision on their way from the sum or matrix product that makes
        them, so devices exchange them in float32. Gradients of convolution kernels stay in half precision,
        because XLA's float32 convolutions have float32 inputs. None: no output.
    """

    @functools.wraps(fn)
    def wrapped(*args: Any) -> Any:
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return fn(*args)
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        flat = jax.tree.leaves(args)
        if _has_half(closed.jaxpr):
            flags = False if gradients is None else gradients(shapes)
            unrounded = jax.tree.leaves(jax.tree.broadcast(flags, shapes))
            results = _evaluate(closed.jaxpr, closed.consts, flat, unrounded)
        else:
            results = jaxpr_as_fun(closed)(*flat)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return wrapped


def _evaluate(
    jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], unrounded: Sequence[bool]
) -> list[Any]:
    """Evaluate ``jaxpr``; half-precision inputs may be float32, and ``unrounded`` outputs are."""
    wide = _wide(jaxpr, unrounded)
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        keep = [var in wide for var in eqn.outvars]
        results = _apply(jaxpr, eqn, [read(atom) for atom in eqn.invars], keep)
        for var, result, kept in zip(eqn.outvars, results, keep, strict=True):
            aval: Any = var.aval
            env[var] = _as(result, jnp.float32 if kept else aval.dtype) if _is_half(var) else result
    return [read(atom) for atom in jaxpr.outvars]


def _wide(jaxpr: Jaxpr, unrounded: Sequence[bool]) -> set[Any]:
    """Return the half-precision variables that only lead to ``unrounded`` outputs: they are float32."""
    leads = {x for x, flag in zip(jaxpr.outvars, unrounded, strict=True) if flag and isinstance(x, Var)}
    other = {x for x, flag in zip(jaxpr.outvars, unrounded, strict=True) if not flag and isinstance(x, Var)}
    for eqn in reversed(jaxpr.eqns):
        moves = eqn.primitive.name in MOVES or eqn.primitive.name == "convert_element_type"
        follows = moves and len(eqn.outvars) == 1 and eqn.outvars[0] in leads - other
        (leads if follows else other).update(x for x in eqn.invars if isinstance(x, Var))
    wide = {x for x in leads - other if _is_half(x)}
    for eqn in jaxpr.eqns:
        wide -= {x for i, x in enumerate(eqn.outvars) if x in wide and not _has_float32(eqn, i, wide)}
    return wide


def _has_float32(eqn: Any, output: int, wide: set[Any]) -> bool:
    """Whether a half-precision result of an operation can be had in float32, not only be converted to it.

    A conversion in front of a sharding constraint would keep XLA from scattering the sum of a convolution's
    gradient over the devices.
    """
    name = eqn.primitive.name
    if name in ("dot_general", "reduce_sum", "scatter-add", "scan"):
        return True
    if name in CALLS:
        inner = eqn.params["jaxpr"]
        inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
        return inner.outvars[output] in _wide(inner, [x in wide for x in eqn.outvars])
    return name in MOVES | {"convert_element_type"} and any(x in wide or not _is_half(x) for x in eqn.invars)


def _apply(jaxpr: Jaxpr, eqn: Any, values: list[Any], keep: list[bool]) -> Sequence[Any]:
    """Compute an operation of ``jaxpr``; results with ``keep`` may be float32 in place of half precision."""
    compute = _with_subprograms(eqn, keep) or _in_float32(eqn, keep, values)
    if compute is None:
        return equation.bind(jaxpr, eqn, values)
    with jax.named_scope(str(eqn.source_info.name_stack)):
        results = compute(*values)
    return results if eqn.primitive.multiple_results else [results]


def _in_float32(eqn: Any, keep: list[bool], values: list[Any]) -> Compute | None:
    """Return what computes a single operation in float32, or None for one that stays as it is."""
    name, params, bind = eqn.primitive.name, eqn.params, eqn.primitive.bind
    half, kept = any(map(_is_half, eqn.outvars)), len(keep) == 1 and keep[0]
    if name == "convert_element_type" and (kept or _is_widened(eqn, values)):
        return functools.partial(_as, dtype=jnp.float32 if kept else params["new_dtype"])
    if (name in MOVES and kept) or (name == "reduce_sum" and half):
        return lambda *xs: bind(*map(_widened, xs), **params)
    if name == "dot_general" and kept:
        return functools.partial(_product, bind, params)
    if name == "scatter-add" and half:
        return functools.partial(_scatter_add, params)
    return None


def _with_subprograms(eqn: Any, keep: list[bool]) -> Compute | None:
    """Return what computes an operation whose programs are rewritten, or None for one that has none."""
    name, params, bind = eqn.primitive.name, eqn.params, eqn.primitive.bind
    if not any(map(_has_half, _subprograms(params))):
        return None
    if name == "scan":
        return functools.partial(_scan, bind, params, keep)
    if name in CALLS:
        return functools.partial(bind, **{**params, "jaxpr": _rewritten(params["jaxpr"], keep)})
    if name in ("cond", "while"):
        return functools.partial(bind, **{key: _rewritten_all(value) for key, value in params.items()})
    return None


def _scan(bind: Compute, params: dict[str, Any], keep: list[bool], *values: Any) -> Sequence[Any]:
    """Compute a scan; a half-precision carry to which each step only adds is float32."""
    body, consts, carries = params["jaxpr"].jaxpr, params["num_consts"], params["num_carry"]
    adds = [
        _is_half(out) and _only_added(body, body.invars[consts + i], out)
        for i, out in enumerate(body.outvars[:carries])
    ]
    inputs = [False] * consts + adds + [False] * (len(values) - consts - carries)
    starts = (_widened(x) if wide else x for x, wide in zip(values, inputs, strict=True))
    rewritten = _rewritten(params["jaxpr"], adds + keep[carries:], inputs)
    return bind(*starts, **{**params, "jaxpr": rewritten})


def _only_added(body: Jaxpr, carry: Any, out: Any) -> bool:
    """Whether the only use of ``carry`` is a sum with something, which becomes ``out``."""
    uses = [eqn for eqn in body.eqns if carry in eqn.invars]
    return (
        len(uses) == 1
        and uses[0].primitive.name == "add_any"
        and uses[0].outvars[0] is out
        and list(uses[0].invars).count(carry) == 1
        and list(body.outvars).count(out) == 1
        and not any(out in eqn.invars for eqn in body.eqns)
    )


def _rewritten(program: Any, unrounded: Sequence[bool], inputs: Sequence[bool] | None = None) -> Any:
    """Return a ``Jaxpr`` or ``ClosedJaxpr`` with its sums in float32, and so its ``inputs`` and outputs."""
    jaxpr, consts = (program.jaxpr, program.consts) if isinstance(program, ClosedJaxpr) else (program, ())
    shapes = [
        jax.ShapeDtypeStruct(x.aval.shape, jnp.float32 if wide else x.aval.dtype, weak_type=x.aval.weak_type)
        for x, wide in zip(jaxpr.invars, inputs or [False] * len(jaxpr.invars), strict=True)
    ]

    def evaluate(*args: Any) -> list[Any]:
        return _evaluate(jaxpr, consts, args, unrounded)

    closed = jax.make_jaxpr(evaluate)(*shapes)
    return closed if isinstance(program, ClosedJaxpr) else closed.jaxpr


def _rewritten_all(value: Any) -> Any:
    """Rewrite the programs in a setting of an operation; anything else is returned as it is."""
    if isinstance(value, tuple):
        return tuple(map(_rewritten_all, value))
    if isinstance(value, ClosedJaxpr) and _has_half(value.jaxpr):
        return _rewritten(value, [False] * len(value.jaxpr.outvars))
    return value


def _product(bind: Compute, params: dict[str, Any], *values: Any) -> Any:
    """Compute a product of half-precision matrices with float32 results."""
    # XLA:CPU has no such product: it rounds the results first.
    return jax.lax.platform_dependent(
        *values,
        cpu=lambda *xs: _as(bind(*xs, **params), jnp.float32),
        default=functools.partial(bind, **{**params, "preferred_element_type": jnp.dtype("float32")}),
    )


def _scatter_add(params: dict[str, Any], operand: Any, indices: Any, updates: Any) -> Any:
    settings = {key: params[key] for key in ("indices_are_sorted", "unique_indices", "mode")}
    numbers = params["dimension_numbers"]
    return jax.lax.scatter_add(_widened(operand), indices, _widened(updates), numbers, **settings)


def _has_half(jaxpr: Jaxpr) -> bool:
    """Whether any number in the program is of half precision."""
    variables = (x for eqn in jaxpr.eqns for x in (*eqn.invars, *eqn.outvars))
    return any(map(_is_half, (*jaxpr.invars, *variables))) or any(
        map(_has_half, (inner for eqn in jaxpr.eqns for inner in _subprograms(eqn.params)))
    )


def _subprograms(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr | Jaxpr):
                yield one.jaxpr if isinstance(one, ClosedJaxpr) else one


def _is_half(atom: Any) -> bool:
    return getattr(atom.aval, "dtype", None) in HALF


def _is_widened(eqn: Any, values: Iterable[Any]) -> bool:
    """Whether an input that is half precision in the program is float32."""
    pairs = zip(eqn.invars, values, strict=True)
    return any(isinstance(x, Var) and _is_half(x) and value.dtype not in HALF for x, value in pairs)


def _widened(x: Any) -> Any:
    return _as(x, jnp.float32) if jnp.asarray(x).dtype in HALF else x


def _as(x: Any, dtype: Any) -> Any:
    return x if x.dtype == dtype else jax.lax.convert_element_type(x, dtype)
