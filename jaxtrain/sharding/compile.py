"""The only ``jax.jit`` of an init, a train step or an eval step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

KEEP_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
"""For CPUs, where XLA drops optimization barriers before it plans memory, and then finds what is to be
computed or gathered again to be there already, and keeps it."""


def compile(
    fn: Callable[..., Any],
    *,
    args: Sequence[Any],
    out: Any,
    donate: tuple[int, ...] = (),
    options: Mapping[str, str] | None = None,
) -> Callable[..., Any]:
    """``jax.jit`` with shardings; XLA puts in the communication that they imply.

    Args:
      fn: a pure function of arrays.
      args: one sharding, or a pytree prefix of shardings, for each argument.
      out: the same for the result.
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
