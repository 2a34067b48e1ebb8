"""The only ``jax.jit`` of an init, a train step or an eval step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax


def compile(
    fn: Callable[..., Any], *, args: Sequence[Any], out: Any, donate: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """``jax.jit`` with shardings; XLA puts in the communication that they imply.

    Args:
      fn: a pure function of arrays.
      args: one sharding, or a pytree prefix of shardings, for each argument.
      out: the same for the result.
      donate: positions of arguments whose buffers the result may reuse.
    """
    return jax.jit(fn, in_shardings=tuple(args), out_shardings=out, donate_argnums=donate)
