"""Elementwise primitives. Their inputs broadcast, so they take values as they are stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxtrain.artifact.onnx.graph import Graph, UnsupportedError, Value, constant
from jaxtrain.artifact.onnx.operators import apply, cast

Rule = Callable[..., Value]
BOOL, INT32, INT64 = np.dtype(bool), np.dtype(np.int32), np.dtype(np.int64)


def widen(g: Graph, x: Value) -> Value:
    """Return an integer of a type without arithmetic in ONNX in a wider one; other values unchanged.

    Cast back, the result is that of the narrow type: both wrap around.
    """
    if x.dtype.kind not in "iub" or x.dtype in (INT32, INT64):
        return x
    if x.dtype.itemsize > 4:
        raise UnsupportedError(f"it computes with {x.dtype}")
    return cast(g, x, INT64 if x.dtype.itemsize == 4 else INT32)


def direct(kind: str, booleans: str | None = None) -> Rule:
    """Return the rule of a primitive that is one operator; ``booleans`` is the operator for bool inputs."""

    def rule(g: Graph, eqn: Any, *xs: Value) -> Value:
        if booleans is not None and xs[0].dtype == BOOL:
            return apply(g, booleans, *xs)
        return cast(g, apply(g, kind, *(widen(g, x) for x in xs)), eqn.outvars[0].aval.dtype)

    return rule


def composed(function: Callable[..., Value]) -> Rule:
    """Return the rule of a primitive that is a formula in ``function(g, *inputs)``."""

    def rule(g: Graph, eqn: Any, *xs: Value) -> Value:
        return cast(g, function(g, *(widen(g, x) for x in xs)), eqn.outvars[0].aval.dtype)

    return rule


def logical(kind: str) -> Rule:
    """Return the rule of a bitwise primitive, which is defined for bool only."""

    def rule(g: Graph, eqn: Any, *xs: Value) -> Value:
        if xs[0].dtype == BOOL:
            return apply(g, kind, *xs)
        mask = next((x for x in xs if x.is_constant and x.data.size == 1), None)
        if kind == "And" and mask is not None and _is_low_mask(int(mask.data.item())):
            other = widen(g, xs[0] if mask is xs[1] else xs[1])
            low = apply(g, "Mod", other, int(mask.data.item()) + 1)  # the sign is that of the divisor
            return cast(g, low, xs[0].dtype)
        raise UnsupportedError("TensorRT has no bitwise operators of integers")

    return rule


def _is_low_mask(mask: int) -> bool:
    return 0 < mask < 2**30 and mask & (mask + 1) == 0


def maximum(g: Graph, eqn: Any, *xs: Value) -> Value:
    """``Relu`` for a maximum with 0."""
    for x, other in (xs, xs[::-1]):
        if other.is_constant and not other.data.any() and x.dtype.kind == "f" and not x.is_constant:
            if len(other.shape) and other.shape != x.shape:
                continue
            return apply(g, "Relu", x)
    return direct("Max", "Or")(g, eqn, *xs)


def not_equal(g: Graph, eqn: Any, *xs: Value) -> Value:
    if xs[0].dtype == BOOL:
        return apply(g, "Xor", *xs)
    return apply(g, "Not", direct("Equal")(g, eqn, *xs))


def equal(g: Graph, eqn: Any, *xs: Value) -> Value:
    if xs[0].dtype == BOOL:
        return apply(g, "Not", apply(g, "Xor", *xs))
    return direct("Equal")(g, eqn, *xs)


def power(g: Graph, x: Value, exponent: Value) -> Value:
    return apply(g, "Pow", x, cast(g, exponent, x.dtype))


def integer_power(g: Graph, eqn: Any, x: Value) -> Value:
    """Multiply by repeated squaring: TensorRT's ``Pow`` takes no integers."""
    exponent, base, result = eqn.params["y"], widen(g, x), None
    rest = abs(exponent)
    while rest:
        if rest % 2:
            result = base if result is None else apply(g, "Mul", result, base)
        rest //= 2
        base = apply(g, "Mul", base, base) if rest else base
    if result is None:
        return apply(g, "Add", apply(g, "Mul", base, 0), 1)
    return cast(g, apply(g, "Reciprocal", result) if exponent < 0 else result, x.dtype)


def logarithm_of_one_plus(g: Graph, x: Value) -> Value:
    """Compute ``log1p`` to rounding: ``log(u) x / (u - 1)`` with ``u = 1 + x`` (Kahan)."""
    u = apply(g, "Add", x, 1)
    less = apply(g, "Sub", u, 1)
    near = apply(g, "Div", apply(g, "Mul", apply(g, "Log", u), x), less)
    near = apply(g, "Where", apply(g, "Equal", less, 0), x, near)
    return apply(g, "Where", apply(g, "Greater", x, 1), apply(g, "Log", u), near)


def exponential_minus_one(g: Graph, x: Value) -> Value:
    """Compute ``expm1`` to rounding: ``tanh(x / 2) (exp(x) + 1)``."""
    half = apply(g, "Tanh", apply(g, "Mul", x, 0.5))
    return apply(g, "Mul", half, apply(g, "Add", apply(g, "Exp", x), 1))


def round_(g: Graph, eqn: Any, x: Value) -> Value:
    if int(eqn.params["rounding_method"]) == 1:
        return apply(g, "Round", x)  # ties to even
    size = apply(g, "Abs", x)
    floor = apply(g, "Floor", size)
    up = apply(g, "GreaterOrEqual", apply(g, "Sub", size, floor), 0.5)
    return apply(g, "Mul", apply(g, "Sign", x), apply(g, "Where", up, apply(g, "Add", floor, 1), floor))


def arc_tangent_2(g: Graph, y: Value, x: Value) -> Value:
    """Compute ``atan2``; the signs of zeros are not regarded."""
    angle = apply(g, "Atan", apply(g, "Div", y, x))
    turn = apply(g, "Where", apply(g, "Less", y, 0), *_scalars(y, -math.pi, math.pi))
    left = apply(g, "Where", apply(g, "Less", x, 0), apply(g, "Add", angle, turn), angle)
    zero = apply(g, "And", apply(g, "Equal", x, 0), apply(g, "Equal", y, 0))
    return apply(g, "Where", zero, *_scalars(y, 0.0), left)


def _scalars(like: Value, *numbers: float) -> list[Value]:
    return [constant(np.array(number, like.dtype)) for number in numbers]


def clamp(g: Graph, eqn: Any, low: Value, x: Value, high: Value) -> Value:
    low, x, high = (widen(g, value) for value in (low, x, high))
    scalars = low.is_constant and high.is_constant and low.data.size == high.data.size == 1
    if scalars and x.dtype.kind == "f":
        bounds = (np.reshape(value.data, ()) for value in (low, high))
        return Value(x.shape, x.dtype, x.stored, g.node("Clip", g.stored(x), *bounds))
    return cast(g, apply(g, "Min", apply(g, "Max", x, low), high), eqn.outvars[0].aval.dtype)


def select(g: Graph, eqn: Any, which: Value, *cases: Value) -> Value:
    """``cases[which]``; a constant ``which`` selects while exporting."""
    if which.is_constant and (which.data == which.data.flat[0]).all():
        return cases[int(which.data.flat[0])]
    wide = [widen(g, case) if case.dtype != BOOL else case for case in cases]
    result = wide[-1]
    for number in range(len(cases) - 1, 0, -1):
        here = which if which.dtype == BOOL else apply(g, "GreaterOrEqual", widen(g, which), number)
        result = _where(g, here, result, wide[number - 1])
    return cast(g, result, cases[0].dtype)


def _where(g: Graph, condition: Value, yes: Value, no: Value) -> Value:
    if yes.dtype != BOOL or all(x.is_constant for x in (condition, yes, no)):
        return apply(g, "Where", condition, yes, no)
    # ONNX Runtime has no Where of booleans.
    other = apply(g, "And", apply(g, "Not", condition), no)
    return apply(g, "Or", apply(g, "And", condition, yes), other)


def is_finite(g: Graph, x: Value) -> Value:
    return apply(g, "Not", apply(g, "Or", apply(g, "IsNaN", x), apply(g, "IsInf", x)))


def shift(g: Graph, eqn: Any, x: Value, bits: Value) -> Value:
    """Shift by a constant, as a product or quotient."""
    name = eqn.primitive.name
    if not bits.is_constant or (name == "shift_right_logical" and x.dtype.kind != "u"):
        raise UnsupportedError("TensorRT has no shifts of integers by a tensor, or of negative ones")
    wide = widen(g, x)
    factor = Value(bits.shape, wide.dtype, bits.stored, None, np.left_shift(1, bits.data).astype(wide.dtype))
    if name != "shift_left":
        wide = apply(g, "Sub", wide, apply(g, "Mod", wide, factor))  # Div rounds to zero
    return cast(g, apply(g, "Mul" if name == "shift_left" else "Div", wide, factor), x.dtype)


def convert(g: Graph, eqn: Any, x: Value) -> Value:
    return cast(g, x, eqn.params["new_dtype"])


UNARY = {
    **{
        name: name.capitalize() for name in ("abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil")
    },
    **{
        name: name.capitalize()
        for name in ("cos", "cosh", "erf", "exp", "floor", "log", "neg", "sign", "sin")
    },
    **{name: name.capitalize() for name in ("sinh", "sqrt", "tan", "tanh")},
    "logistic": "Sigmoid",
}

ELEMENTWISE: dict[str, Rule] = {
    **{name: direct(kind) for name, kind in UNARY.items()},
    "add": direct("Add", "Or"),
    "add_any": direct("Add", "Or"),
    "and": logical("And"),
    "atan2": composed(arc_tangent_2),
    "cbrt": composed(
        lambda g, x: apply(g, "Mul", apply(g, "Sign", x), apply(g, "Pow", apply(g, "Abs", x), 1 / 3))
    ),
    "clamp": clamp,
    "convert_element_type": convert,
    "div": direct("Div"),
    "eq": equal,
    "erfc": composed(lambda g, x: apply(g, "Add", apply(g, "Neg", apply(g, "Erf", x)), 1)),
    "exp2": composed(lambda g, x: apply(g, "Pow", 2, x)),
    "expm1": composed(exponential_minus_one),
    "ge": direct("GreaterOrEqual"),
    "gt": direct("Greater"),
    "integer_pow": integer_power,
    "is_finite": composed(is_finite),
    "le": direct("LessOrEqual"),
    "log1p": composed(logarithm_of_one_plus),
    "lt": direct("Less"),
    "max": maximum,
    "min": direct("Min", "And"),
    "mul": direct("Mul", "And"),
    "ne": not_equal,
    "not": logical("Not"),
    "or": logical("Or"),
    "pow": composed(power),
    "rem": composed(lambda g, x, y: apply(g, "Mod", x, y, fmod=1)),
    "round": round_,
    "rsqrt": composed(lambda g, x: apply(g, "Reciprocal", apply(g, "Sqrt", x))),
    "select_n": select,
    "shift_left": shift,
    "shift_right_arithmetic": shift,
    "shift_right_logical": shift,
    "square": composed(lambda g, x: apply(g, "Mul", x, x)),
    "sub": direct("Sub"),
    "xor": logical("Xor"),
}
"""Rules ``(graph, equation, *values) -> value``."""
