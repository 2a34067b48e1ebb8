"""What a person calls an operation of a compiled program: ``fusion.12`` is the backward pass of a layer.

The trace's own reader (``jax.profiler.ProfileData``) gives an operation the name that XLA gave it. Where it
comes from stands in the programs, which the file holds too and that reader does not show, so the few fields
that are needed are read from the file's protocol buffers here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

# Field numbers of tsl's xplane.proto and of XLA's hlo.proto: a number in use never changes its meaning.
PLANES, PLANE_NAME, EVENT_METADATA, MAP_VALUE = 1, 2, 4, 2
METADATA_STATS, STAT_BYTES = 5, 6
HLO_MODULE, MODULE_NAME, COMPUTATIONS, INSTRUCTIONS = 1, 1, 3, 2
INSTRUCTION_NAME, INSTRUCTION_METADATA, OP_NAME = 1, 7, 2

WRAPPER = re.compile(r"(?:jvp|transpose|vmap|remat|checkpoint|custom_[a-z_]+|shard_map)\((.*)\)")
NOT_TOLD = re.compile(r"p?jit\(.*\)|.*<locals>.*|closed_call|body|branch_\d+_fun|[A-Za-z_]\w*\.[a-z_]\w*|")

COLLECTIVES = ("all-", "reduce-scatter", "collective-", "ragged-all")
LONGEST = 64

Message = Mapping[int, list[bytes]]


def origins(path: Path) -> dict[tuple[str, str], str]:
    """Where operations come from: ``{(program, operation): "jit(step)/jvp(MLP)/Dense_0/dot_general"}``.

    Args:
      path: an ``.xplane.pb`` file. One that is cut short, or made otherwise, gives what can be read.
    """
    found: dict[tuple[str, str], str] = {}
    for plane in _messages(path.read_bytes(), PLANES):
        if _text(plane, PLANE_NAME) != "/host:metadata":
            continue
        for entry in plane.get(EVENT_METADATA, []):
            for metadata in _messages(entry, MAP_VALUE):
                for stat in _all(metadata, METADATA_STATS):
                    for program in stat.get(STAT_BYTES, []):
                        found |= _program(program)
    return found


def readable(origin: str) -> str:
    """An origin without what only JAX needs to know; the last part is the operation.

    >>> readable("jit(step)/transpose(jvp(CNN))/Conv_0/conv_general_dilated")
    'CNN/Conv_0/conv_general_dilated (backward)'
    >>> readable("jit(step)/jit(take)/jvp(CNN)/CNN._block/Conv_0/_Conv.__call__/conv_general_dilated")
    'CNN/Conv_0/conv_general_dilated'
    >>> readable("jit(step)/make_train_step.<locals>.train_step/while/body/closed_call/add")
    'while/add'
    """
    kept: list[str] = []
    for part in origin.split("/"):
        inner = part
        while match := WRAPPER.fullmatch(inner):
            inner = match[1]
        if not NOT_TOLD.fullmatch(inner):
            kept.append(inner)
    back = " (backward)" if "transpose(" in origin else ""
    return ("/".join(kept) or origin) + back


def label(operation: str, origin: str | None) -> str:
    """What to call an operation: where it comes from, where that is known; communication also what it is.

    >>> label("fusion.3", "jit(step)/jvp(CNN)/add"), label("fusion.3", None)
    ('CNN/add', 'fusion')
    >>> label("all-reduce.1", "jit(step)/reduce_sum")
    'all-reduce of reduce_sum'
    """
    kind = unnumbered(operation)
    if origin is None:
        return kind
    text = f"{kind} of {readable(origin)}" if kind.startswith(COLLECTIVES) else readable(origin)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"  # many operations in one


def unnumbered(name: str) -> str:
    """XLA's own name without the number that tells copies apart.

    >>> unnumbered("loop_add_fusion.12"), unnumbered("wrapped_add"), unnumbered("copy_3")
    ('loop_add_fusion', 'wrapped_add', 'copy')
    """
    return re.sub(r"([._]\d+)+(\.clone)*$", "", name) or name


def as_kernel(name: str) -> str:
    """An operation's name as the kernel on a GPU bears it.

    >>> as_kernel("loop_add_fusion.12")
    'loop_add_fusion_12'
    """
    return re.sub(r"[.\-]", "_", name)


def _program(data: bytes) -> dict[tuple[str, str], str]:
    found = {}
    for module in _messages(data, HLO_MODULE):
        name = _text(module, MODULE_NAME)
        for computation in _all(module, COMPUTATIONS):
            for instruction in _all(computation, INSTRUCTIONS):
                for metadata in _all(instruction, INSTRUCTION_METADATA):
                    if origin := _text(metadata, OP_NAME):
                        found[name, _text(instruction, INSTRUCTION_NAME)] = origin
    return found


def _text(message: Message, field: int) -> str:
    return b"".join(message.get(field, [])[-1:]).decode(errors="replace")


def _all(message: Message, field: int) -> Iterator[Message]:
    return (_fields(data) for data in message.get(field, []))


def _messages(data: bytes, field: int) -> Iterator[Message]:
    return _all(_fields(data), field)


def _fields(data: bytes) -> Message:
    """The fields of a message that hold text or messages; numbers are passed over."""
    found: dict[int, list[bytes]] = {}
    at = 0
    try:
        while at < len(data):
            key, at = _varint(data, at)
            kind = key & 7
            if kind == 0:
                _, at = _varint(data, at)
            elif kind == 2:
                size, at = _varint(data, at)
                found.setdefault(key >> 3, []).append(data[at : at + size])
                at += size
            elif kind in (1, 5):
                at += 8 if kind == 1 else 4
            else:
                break  # not a message
    except IndexError:  # cut short
        pass
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
