"""Record which kernel computes each attention of a model, and why, while the model is traced."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class AttentionChoice:
    """The kernel of one attention layer.

    Attributes:
      layer: its module, such as ``block0``; empty in a model without modules.
      shape: of the queries, ``(batch, length, heads, size)``, all devices together.
      dtype: of the queries, such as ``bfloat16``.
      kernel: ``cudnn`` or ``xla``.
      reason: why it is XLA's; empty for cuDNN's.
    """

    layer: str
    shape: tuple[int, ...]
    dtype: str
    kernel: str
    reason: str


_record: contextvars.ContextVar[list[AttentionChoice] | None] = contextvars.ContextVar(
    "attention_choices", default=None
)


@contextlib.contextmanager
def record_attention() -> Iterator[list[AttentionChoice]]:
    """Collect the choices of what this thread traces, each once, in the order of the layers.

    Open it around everything that may trace the model, such as ``program.assemble`` and the compilation: what
    has been traced is not traced again. Layers with ``attention="xla"`` are not collected: initialisation,
    and models whose user chose it.

    >>> from jaxtrain.models.attention import attend
    >>> q = jnp.ones((1, 4, 2, 8))
    >>> with record_attention() as choices:
    ...     _ = attend(q, q, q, causal=True)
    >>> choices[0].kernel, choices[0].reason
    ('xla', 'it takes float16 and bfloat16, and this is float32')
    """
    choices: list[AttentionChoice] = []
    token = _record.set(choices)
    try:
        yield choices
    finally:
        _record.reset(token)


def add_choice(shape: tuple[int, ...], dtype: Any, kernel: str, reason: str) -> None:
    """Add the choice of the layer that is being traced; without ``record_attention`` do nothing."""
    choices = _record.get()
    if choices is None:
        return
    choice = AttentionChoice(_layer(), tuple(shape), jnp.dtype(dtype).name, kernel, reason)
    if choice not in choices:  # gradients and rematerialisation may trace a layer again
        choices.append(choice)


def _layer() -> str:
    """Return the path of the module that is being traced.

    It is ``block0`` for ``jvp(GPT)/block0/block0._attend``, ``GPT/block0/block0._attend`` and, with
    rematerialisation, ``block0/block0._attend``.
    """
    from jax.extend import source_info_util  # only where someone records

    parts = str(source_info_util.current_name_stack()).split("/")
    if re.fullmatch(r"[A-Z][A-Za-z]*", parts[0]):  # the class of the model; Flax names its parts Block_0
        del parts[0]
    return "/".join(part for part in parts if part and not {*"(."} & {*part})
