"""Check names before they become folders: no path separators, and no links out of the parent folder."""

from __future__ import annotations

import re
from pathlib import Path

from jaxtrain.core.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9._-]+")


def is_name(text: object) -> bool:
    """Return whether ``text`` is safe as a folder name: letters, digits, ``.``, ``_``, ``-``, and not ``..``.

    >>> [is_name(text) for text in ("cifar10", "100k-ratings", "..", "a/b", "a b", "", None)]
    [True, True, False, False, False, False, False]
    """
    return isinstance(text, str) and _NAME.fullmatch(text) is not None and bool(text.strip("."))


def check(text: str, what: str, fix: str) -> str:
    """Return ``text`` if it is safe as a folder name.

    Args:
      text: the name, or a part of it.
      what: the kind of name, for the message.
      fix: what to do about it, for the message.

    Raises:
      InputError: it is not.
    """
    if not is_name(text):
        raise InputError(f"{what} {text!r} cannot name a folder (letters, digits, '.', '_' and '-'): {fix}")
    return text


def inside(root: Path, *names: str, what: str, fix: str) -> Path:
    """Return ``root/NAME/NAME...`` if it is inside ``root`` after links are resolved; ``root`` may be a link.

    >>> inside(Path("runs"), "mnist", "5c3b-seed0", what="experiment", fix="rename it").as_posix()
    'runs/mnist/5c3b-seed0'

    Raises:
      InputError: one of ``names`` is not safe, or a link leads out of ``root``.
    """
    path = root.joinpath(*(check(name, what, fix) for name in names))
    if not path.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{path} is or goes through a link that leads out of {root}: {fix}")
    return path
