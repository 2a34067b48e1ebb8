"""The only ``jax.jit`` of an init, a train step or an eval step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


def compile(
    fn: Callable[..., Any],
    *,
    args: Sequence[Any],
    out: Any,
    donate: tuple[int, ...] = (),
    options: Mapping[str, str] | None = None,
) -> Callable[..., Any]:
    """``jax.jit`` with shardings; XLA inserts the collectives that they imply.

    Args:
      fn: a pure function of arrays.
      args: one sharding, or a pytree prefix of shardings, for each argument.
      out: the same, for the result.
      donate: positions of arguments whose buffers the result may reuse.
      options: of XLA's compiler, from ``sharding.compiler_options``.
    """
    return jax.jit(
        fn,
        in_shardings=tuple(args),
        out_shardings=out,
        donate_argnums=donate,
        compiler_options=dict(options) if options else None,
    )
