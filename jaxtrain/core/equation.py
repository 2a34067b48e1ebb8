"""One operation of a program, computed as the program says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Var, jaxpr_as_fun


def bind(jaxpr: Jaxpr, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Compute an equation of ``jaxpr``, in the scope of its line of source code.

    Args:
      jaxpr: the program.
      eqn: one of its equations.
      values: of the equation's ``invars``.

    Returns:
      The values of its ``outvars``.

    >>> import jax
    >>> jaxpr = jax.make_jaxpr(lambda x: x * 2 + 1)(3.0).jaxpr
    >>> [float(x) for x in bind(jaxpr, jaxpr.eqns[0], [5.0, 2.0])]
    [10.0]
    """
    env = {x: value for x, value in zip(eqn.invars, values, strict=True) if isinstance(x, Var)}
    parts = {"invars": list(env), "outvars": eqn.outvars, "eqns": [eqn], "effects": eqn.effects}
    return list(jaxpr_as_fun(ClosedJaxpr(jaxpr.replace(constvars=(), **parts), ()))(*env.values()))
