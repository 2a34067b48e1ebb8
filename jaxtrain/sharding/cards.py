"""Published figures of GPUs, for programs that are compiled where no such GPU is."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from importlib import resources
from typing import Any

from jaxtrain.core.errors import InputError
from jaxtrain.core.files import user_path
from jaxtrain.core.text import did_you_mean, first_line

PEAKS = ("bfloat16", "float16", "tf32", "float32")
NAME = re.compile(r"[\w .-]{1,100}", re.ASCII)  # of a device: it is part of the target's text, and is printed


@dataclasses.dataclass(frozen=True)
class Card:
    """The figures of a GPU, all above 0 but ``nvlinks``.

    Attributes:
      name: short, such as ``h100``.
      device_kind: what JAX calls the device, such as ``NVIDIA H100 80GB HBM3``.
      memory: bytes of device memory.
      bandwidth: of device memory, bytes per second.
      capability: CUDA compute capability, ``(major, minor)``.
      link: bytes per second that one GPU sends to the others of its host, by NVLink or PCIe.
      network: bytes per second that one GPU sends to those of other hosts.
      peak: FLOP/s of dense matrix products by ``PEAKS``; ``float32`` is without tensor cores.
      sources: where the figures come from.
      cores: streaming multiprocessors.
      fpus_per_core: float32 units of each.
      clock: boost clock in GHz.
      l2_cache: bytes.
      shared_memory_per_block: bytes that a block may ask for (``opt-in``).
      shared_memory_per_core: bytes of a multiprocessor.
      nvlinks: links to the other GPUs of a host; 0 without NVLink.
    """

    name: str
    device_kind: str
    memory: int
    bandwidth: int
    capability: tuple[int, int]
    link: int
    network: int
    peak: dict[str, float] = dataclasses.field(hash=False)
    sources: tuple[str, ...]
    cores: int
    fpus_per_core: int
    clock: float
    l2_cache: int
    shared_memory_per_block: int
    shared_memory_per_core: int
    nvlinks: int


def card_names() -> tuple[str, ...]:
    """Return the names of the cards that ``load_card`` knows.

    >>> card_names()
    ('a100', 'h100', 'h200', 'b200', 'l40s', 'rtx4090')
    """
    return tuple(_shipped())


def find_card(device_kind: str) -> Card | None:
    """Return the card with a name that JAX calls ``device_kind``; None if there is none, as for a MIG slice.

    >>> find_card("NVIDIA H200").name
    'h200'
    >>> find_card("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    True
    """
    named = (load_card(name) for name in card_names())
    return next((card for card in named if card.device_kind == device_kind), None)


def load_card(name_or_path: str) -> Card:
    """Return the card of this name, or that a TOML file describes: the fields of ``Card`` without ``name``.

    Args:
      name_or_path: one of ``card_names()``, or a path that ends with ``.toml``; the name is then the file's.

    Raises:
      InputError: there is no such card or file, or a field is missing, unknown or of another type.

    >>> load_card("h100").capability
    (9, 0)
    """
    shipped = _shipped()
    if name_or_path in shipped:
        return _card(name_or_path, shipped[name_or_path], f"card {name_or_path}")
    path = user_path(name_or_path)
    if path.suffix.lower() != ".toml":
        raise InputError(
            f"--for {name_or_path}: no card has this name: give the figures of another card as a file, --for "
            f"CARD.toml; {did_you_mean(name_or_path.lower(), shipped)}"
        )
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"--for {name_or_path}: the file cannot be read: {error.strerror}; the cards with a name are "
            f"{', '.join(shipped)}"
        ) from error
    except (ValueError, RecursionError) as error:  # of TOML, or of UTF-8
        raise InputError(f"--for {name_or_path} is not a TOML file: {first_line(error)}") from error
    return _card(path.stem, fields, f"--for {name_or_path}")


def _shipped() -> dict[str, dict[str, Any]]:
    text = resources.files("jaxtrain.sharding").joinpath("cards.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _card(name: str, fields: dict[str, Any], where: str) -> Card:
    """Check the fields of a card, and convert lists to tuples."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(Card) if field.name != "name"}
    for field in fields:
        if field not in kinds:
            raise InputError(f"{where}: no field is called {field}: {did_you_mean(field, kinds)}")
    missing = [field for field in kinds if field not in fields]
    if missing:
        raise InputError(f"{where}: {', '.join(missing)} missing: give every figure that cards.toml has")
    checked = {field: _value(kind, fields[field], f"{where}: {field}") for field, kind in kinds.items()}
    return Card(name=name, **checked)


def _value(kind: str, value: Any, where: str) -> Any:
    """Return ``value`` as a field of this type; raise InputError where it is something else."""
    if kind == "str" and isinstance(value, str) and NAME.fullmatch(value):
        return value
    if kind == "int" and (_is_number(value, int) or (where.endswith("nvlinks") and value == 0)):
        return value
    if kind == "float" and _is_number(value, int | float):
        return float(value)
    if kind == "tuple[str, ...]" and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return tuple(value)
    if (
        kind == "tuple[int, int]"
        and isinstance(value, list)
        and [type(one) for one in value] == [int, int]
        and value[0] > 0 <= value[1] <= 9
    ):
        return tuple(value)
    if (
        kind == "dict[str, float]"
        and isinstance(value, dict)
        and set(value) == set(PEAKS)
        and all(_is_number(one, int | float) for one in value.values())
    ):
        return {name: float(value[name]) for name in PEAKS}
    raise InputError(f"{where} is {value!r}: give {_WANTED[kind]}")


_WANTED = {
    "str": "a name of at most 100 letters, digits, spaces and . _ -",
    "int": "a whole number above 0",
    "float": "a finite number above 0",
    "tuple[str, ...]": "a list of texts",
    "tuple[int, int]": "the major and the minor number, such as [9, 0]",
    "dict[str, float]": f"FLOP/s above 0 for each of {', '.join(PEAKS)}",
}


def _is_number(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < float("inf")
