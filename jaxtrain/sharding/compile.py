"""The only ``jax.jit`` of an init, a train step or an eval step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

KEEP_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
"""Compiler options for CPUs. There XLA removes optimization barriers before it plans memory, then merges what
should be recomputed or gathered again with the first computation, and keeps that in memory."""


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
      options: of XLA's compiler, such as ``KEEP_BARRIERS``.
    """
    return jax.jit(
        fn,
        in_shardings=tuple(args),
        out_shardings=out,
        donate_argnums=donate,
        compiler_options=dict(options) if options else None,
    )
