"""Names that become names of folders: which may, and where they may lead."""

from __future__ import annotations

import re
from pathlib import Path

from jaxtrain.core.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9._-]+")


def is_name(text: object) -> bool:
    """Is it a name that cannot lead out of a folder: letters, digits, ``.``, ``_``, ``-``, and not ``..``?

    >>> [is_name(text) for text in ("cifar10", "100k-ratings", "..", "a/b", "a b", "", None)]
    [True, True, False, False, False, False, False]
    """
    return isinstance(text, str) and _NAME.fullmatch(text) is not None and bool(text.strip("."))


def check(text: str, what: str, fix: str) -> str:
    """``text``, if it is a name.

    Args:
      text: what is to become the name of a folder or a part of it.
      what: it is, for the message.
      fix: what to do about it.

    Raises:
      InputError: it is none.
    """
    if not is_name(text):
        raise InputError(f"{what} {text!r} cannot name a folder (letters, digits, '.', '_' and '-'): {fix}")
    return text


def inside(root: Path, *names: str, what: str, fix: str) -> Path:
    """The path ``root/NAME/NAME...``, which is inside ``root``, links included. What ``root`` is, is free.

    >>> inside(Path("runs"), "mnist", "5c3b-seed0", what="experiment", fix="rename it").as_posix()
    'runs/mnist/5c3b-seed0'

    Raises:
      InputError: one of ``names`` is no name, or a link there leads out of ``root``.
    """
    path = root.joinpath(*(check(name, what, fix) for name in names))
    if not path.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{path} is or goes through a link that leads out of {root}: {fix}")
    return path
