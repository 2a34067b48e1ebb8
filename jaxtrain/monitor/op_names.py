"""Readable names for the operations of a compiled program.

A trace names an operation as XLA does: ``fusion.12``. The text of the compiled program maps that name to
JAX's ``op_name``, ``jit(step)/transpose(jvp(CNN))/Conv_0/dot_general``: the backward pass of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from jax.extend import backend

PROGRAM = re.compile(r"HloModule ([\w.-]+)")
INSTRUCTION = re.compile(
    r"^ +(?:ROOT )?%?([\w.-]+) = .*metadata=\{[^}]*?op_name=\"((?:[^\"\\]|\\.)*)\"", re.M
)

WRAPPER = re.compile(r"(?:jvp|transpose|vmap|remat|checkpoint|custom_[a-z_]+|shard_map)\((.*)\)")
INTERNAL = re.compile(r"p?jit\(.*\)|.*<locals>.*|closed_call|body|branch_\d+_fun|[A-Za-z_]\w*\.[a-z_]\w*|")

COLLECTIVES = ("all-", "reduce-scatter", "collective-", "ragged-all")
LONGEST = 64  # characters of a label


def op_names(texts: Iterable[str]) -> dict[tuple[str, str], str]:
    """Map operations to their ``op_name``: ``{(program, operation): "jit(step)/jvp(MLP)/dot_general"}``.

    Args:
      texts: ``compiled.as_text()`` of each program. Of two with one name the later counts.

    >>> text = '''HloModule jit_step, is_scheduled=true
    ... ENTRY %main (x: f32[8]) -> f32[8] {
    ...   ROOT %sin.1 = f32[8] sine(%x), metadata={op_name="jit(step)/sin" stack_frame_id=3}
    ... }'''
    >>> op_names([text])
    {('jit_step', 'sin.1'): 'jit(step)/sin'}
    """
    found = {}
    for text in texts:
        if program := PROGRAM.match(text):
            for operation, op_name in INSTRUCTION.findall(text):
                found[program[1], operation] = op_name.replace("\\", "")
    return found


def loaded_programs() -> list[str]:
    """Return the text of every compiled program of this process, the newest last."""
    programs = backend.get_backend().live_executables()  # newest first
    return [module.to_string() for program in reversed(programs) for module in program.hlo_modules()]


def readable(op_name: str) -> str:
    """Drop from an ``op_name`` what only JAX needs; the last part is the operation.

    >>> readable("jit(step)/transpose(jvp(CNN))/Conv_0/conv_general_dilated")
    'CNN/Conv_0/conv_general_dilated (backward)'
    >>> readable("jit(step)/jit(take)/jvp(CNN)/CNN._block/Conv_0/_Conv.__call__/conv_general_dilated")
    'CNN/Conv_0/conv_general_dilated'
    >>> readable("jit(step)/make_train_step.<locals>.train_step/while/body/closed_call/add")
    'while/add'
    """
    parts: list[str] = []
    for part in op_name.split("/"):
        inner = part
        while match := WRAPPER.fullmatch(inner):
            inner = match[1]
        if not INTERNAL.fullmatch(inner):
            parts.append(inner)
    back = " (backward)" if "transpose(" in op_name else ""
    return ("/".join(parts) or op_name) + back


def label(operation: str, op_name: str | None) -> str:
    """Name an operation: by its ``op_name`` where that is known; a collective also by its kind.

    >>> label("fusion.3", "jit(step)/jvp(CNN)/add"), label("fusion.3", None)
    ('CNN/add', 'fusion')
    >>> label("all-reduce.1", "jit(step)/reduce_sum")
    'all-reduce of reduce_sum'
    """
    kind = unnumbered(operation)
    if op_name is None:
        return kind
    text = f"{kind} of {readable(op_name)}" if kind.startswith(COLLECTIVES) else readable(op_name)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"  # a fusion of many operations


def unnumbered(name: str) -> str:
    """Drop the number by which XLA distinguishes copies of an operation.

    >>> unnumbered("loop_add_fusion.12"), unnumbered("wrapped_add"), unnumbered("copy_3")
    ('loop_add_fusion', 'wrapped_add', 'copy')
    """
    return re.sub(r"([._]\d+)+(\.clone)*$", "", name) or name


def kernel_name(operation: str) -> str:
    """Return the name of an operation's kernel on a GPU.

    >>> kernel_name("loop_add_fusion.12")
    'loop_add_fusion_12'
    """
    return re.sub(r"[.\-]", "_", operation)
