"""The grammar of ``--set PATH=VALUE``: text to a value, by the type of the field (``docs/cli.md``)."""

from __future__ import annotations

import ast
import contextlib
import math
import re
import types
import typing
import warnings
from collections.abc import Iterator
from typing import Any

_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_INTEGER = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
_CLOSING = {"(": ")", "[": "]"}
_ANY_ITEM = None | bool | int | float | str  # of a tuple whose annotation does not say


def parse(text: str, hint: Any, *, nested: bool = False) -> Any:
    """Return ``text`` as a value of type ``hint``.

    Numbers, booleans and None are written as in Python, in any case. Text is taken as it is; in quotes it is
    a Python string. A tuple is items between commas, in one pair of brackets or none. In a union, text is
    what no other member accepts, and a tuple beside text or numbers needs brackets or a comma.

    Args:
      text: what the user wrote.
      hint: ``bool``, ``int``, ``float``, ``str``, ``None``, ``Literal``, ``tuple`` or ``list`` of these, or a
        union of them (``is_parsable``).
      nested: ``text`` is an item of a tuple; a tuple in it needs brackets.

    Raises:
      ValueError: ``text`` is no such value.

    >>> parse("1e3", float), parse("T (degC),p", tuple[str, ...]), parse("07", str), parse("7", int | str)
    (1000.0, ('T (degC)', 'p'), '07', 7)
    >>> parse("none", str | None), parse("'none'", str | None), parse("[64]", tuple[int, ...])
    (None, 'none', (64,))
    """
    for member in _by_precedence(text, union_members(hint)):
        try:
            if _is_sequence(member):
                return _parse_sequence(text, member, nested)
            return _parse_scalar(text, member)
        except ValueError:
            continue
    raise ValueError(f"{text!r} is not {hint}")


def union_members(hint: Any) -> list[Any]:
    """Return the types of a union, nested ones too; ``[hint]`` for anything else."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [inner for member in typing.get_args(hint) for inner in union_members(member)]
    return [hint]


def is_parsable(hint: Any) -> bool:
    """Return whether text can make this type, which is no union."""
    if _is_sequence(hint):
        items = [a for a in typing.get_args(hint) if a is not Ellipsis]
        return all(is_parsable(member) for item in items for member in union_members(item))
    return typing.get_origin(hint) is typing.Literal or hint in (bool, int, float, str, None, type(None))


def _by_precedence(text: str, hints: list[Any]) -> Iterator[Any]:
    """Yield the members of a union in the order in which they are tried."""
    sequences = [hint for hint in hints if _is_sequence(hint)]
    if _without_brackets(text) is not None:
        yield from sequences
    yield from (hint for hint in (None, type(None), bool, int, float) if hint in hints)
    yield from (hint for hint in hints if typing.get_origin(hint) is typing.Literal)
    yield from (hint for hint in hints if hint is str)
    yield from sequences


def _is_sequence(hint: Any) -> bool:
    return (typing.get_origin(hint) or hint) in (tuple, list)


def _parse_scalar(text: str, hint: Any) -> Any:
    """Return ``text`` as a number, a boolean, None, text or one of the values of a ``Literal``."""
    if typing.get_origin(hint) is typing.Literal:
        for choice in typing.get_args(hint):
            with contextlib.suppress(ValueError):
                if _parse_scalar(text, type(choice)) == choice:
                    return choice
    if hint is str:
        return _unquote(text)
    word = text.strip().lower()
    if hint in (None, type(None)) and word in ("none", "null"):
        return None
    if hint is bool and word in ("true", "false"):
        return word == "true"
    if hint is int and _INTEGER.fullmatch(word):
        return int(word)
    if hint is float and word.isascii():  # Python would read the digits of other scripts
        value = float(word)
        if math.isfinite(value) or word.lstrip("+-") in ("inf", "infinity"):  # not 1e400, which overflows
            return value
    raise ValueError(text)


def _parse_sequence(text: str, hint: Any, nested: bool) -> Any:
    """Return the items of a tuple or a list; ``()`` is an empty one, and a comma may follow the last item."""
    inner, kind = _without_brackets(text), typing.get_origin(hint)
    if inner is None and (nested or not text.strip()):
        raise ValueError(text)
    types_ = [a for a in typing.get_args(hint) if a is not Ellipsis] if kind else [_ANY_ITEM]
    of_tuples = any(_is_sequence(member) for item in types_ for member in union_members(item))
    items = list(split_values(text if inner is None else inner, of_tuples))
    if (len(items) > 1 and not items[-1]) or items == [""]:
        del items[-1]
    if "" in items:
        raise ValueError(text)  # an empty text is written in quotes
    if kind is not tuple or Ellipsis in typing.get_args(hint):
        types_ *= len(items)
    if len(types_) != len(items):
        raise ValueError(text)
    return (kind or hint)(parse(item, one, nested=True) for item, one in zip(items, types_, strict=True))


def _without_brackets(text: str) -> str | None:
    """Return what is in the pair of brackets around all of ``text``; None where there is no such pair."""
    text = text.strip()
    if text[:1] not in _CLOSING:
        return None
    closed = next((end for end, depth in _depths(text) if depth == 0), None)
    return text[1:closed] if closed == len(text) - 1 and text[-1] == _CLOSING[text[0]] else None


def split_values(text: str, brackets: bool = True) -> Iterator[str]:
    """Yield what is between the commas of ``text``, outside of quotes and, with ``brackets``, of brackets.

    >>> list(split_values("(32,64), (64,), '1,2'"))
    ['(32,64)', '(64,)', "'1,2'"]
    """
    start = 0
    for end, depth in _depths(text):
        if text[end] == "," and not (brackets and depth):
            yield text[start:end].strip()
            start = end + 1
    yield text[start:].strip()


def _depths(text: str) -> Iterator[tuple[int, int]]:
    """Yield the position of each character outside of quotes, and how many brackets are open after it."""
    position = depth = 0
    item_begins = True  # a quote inside of an item is an apostrophe
    while position < len(text):
        quoted = _QUOTED.match(text, position) if item_begins else None
        if quoted is not None:
            position, item_begins = quoted.end(), False
            continue
        character = text[position]
        depth += (character in "([") - (character in ")]")
        item_begins = character in "([," or (item_begins and character.isspace())
        yield position, depth
        position += 1


def _unquote(text: str) -> str:
    """Return the Python string that ``text`` is, or ``text`` where it is not in quotes."""
    if not _QUOTED.fullmatch(text.strip()):
        return text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an unknown escape, such as \\d, which stays as it is
        try:
            return str(ast.literal_eval(text.strip()))
        except (SyntaxError, MemoryError) as error:
            raise ValueError(text) from error
