"""Short texts for messages: suggestions for a mistyped name, one line of an error, sizes in bytes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, choices: Iterable[str], *, prefix: str = "", otherwise: str | None = None) -> str:
    """Suggest the choice nearest to a mistyped name, or list all choices.

    Args:
      name: what the user wrote.
      choices: what could be meant.
      prefix: written before the suggested name, such as the path of a field.
      otherwise: returned in place of the list when no choice is near.

    >>> did_you_mean("modle", ("data", "model")), did_you_mean("x", ("data", "model"))
    ('did you mean model?', 'there are data, model')
    """
    names = list(choices)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return f"there are {', '.join(names) or 'none'}" if otherwise is None else otherwise


def first_line(error: BaseException | str) -> str:
    """Return the first line of an error that is not blank, or the name of its type where there is none.

    >>> first_line(ValueError("  bad shape\\n  in layer 3")), first_line(KeyboardInterrupt())
    ('bad shape', 'KeyboardInterrupt')
    """
    try:
        lines = (line.strip() for line in str(error).splitlines())
    except Exception:  # of the __str__ of a user's own error
        return type(error).__name__
    return next(filter(None, lines), "" if isinstance(error, str) else type(error).__name__)


def printable(text: str) -> str:
    """Return ``text`` with spaces for line breaks, control characters and marks that reorder text.

    >>> printable("a\\x1b[31m\\nb")
    'a [31m b'
    """
    return text if text.isprintable() else "".join(sign if sign.isprintable() else " " for sign in text)


def size_text(bytes: float) -> str:
    """Write a number of bytes with a decimal unit: 1 KB is 1000 bytes.

    >>> size_text(0), size_text(4_977_496), size_text(80e9)
    ('0 B', '4.98 MB', '80.00 GB')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if bytes >= 0.99995 * size:
            return f"{bytes / size:,.2f} {unit}"
    return f"{bytes:.0f} B"
