"""Tags and a note of a run, in ``notes.json`` in its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.core import safe_names
from jaxtrain.core.errors import InputError
from jaxtrain.core.files import write_json
from jaxtrain.runs import files

FILE = "notes.json"
LONGEST = 10_000
"""Characters of a note, at most."""


@dataclasses.dataclass(frozen=True)
class Notes:
    """What a person has written about a run.

    Attributes:
      tags: sorted names.
      note: a text; "" for none.
    """

    tags: tuple[str, ...] = ()
    note: str = ""

    @classmethod
    def of(cls, content: dict[str, Any] | None) -> Notes:
        """Make them from the content of ``notes.json``; what has another type is left out."""
        tags, note = (content or {}).get("tags"), (content or {}).get("note")
        names = {tag for tag in tags if isinstance(tag, str)} if isinstance(tags, list) else set()
        return cls(tuple(sorted(names)), note if isinstance(note, str) else "")


def read(folder: Path) -> Notes:
    """Read the notes of a run; none where there is no file.

    Raises:
      InputError: the file is damaged, and would be overwritten.
    """
    path = folder / FILE
    content = files.read(path)
    parsed = None if content is None else files.parse(content.data)
    if parsed is None and os.path.lexists(path):
        raise InputError(f"{path} cannot be read as JSON: repair or delete it")
    return Notes.of(parsed)


def tag(folder: Path, tags: Sequence[str], remove: bool = False) -> Notes:
    """Add tags to a run, or remove them; returns what the run has now.

    Raises:
      InputError: a tag is not made of letters, digits, ``.``, ``_`` and ``-``; one to remove is not there; or
        the folder cannot be written.
    """
    for name in tags:
        if not safe_names.is_name(name):
            raise InputError(f"{name!r} cannot be a tag: use letters, digits, '.', '_' and '-'")
    with _locked(folder):
        before = read(folder)
        if remove and (absent := [name for name in tags if name not in before.tags]):
            raise InputError(f"{folder} has no tag {absent[0]}: it has {', '.join(before.tags) or 'none'}")
        names = set(before.tags) - set(tags) if remove else {*before.tags, *tags}
        return _write(folder, dataclasses.replace(before, tags=tuple(sorted(names))))


def write_note(folder: Path, text: str) -> Notes:
    """Replace the note of a run; returns what the run has now. Raises InputError as ``tag``."""
    if len(text) > LONGEST:
        raise InputError(f"the note has {len(text):,} characters: at most {LONGEST:,}")
    if not text.isprintable():
        raise InputError("the note has line breaks or control characters: write one line of text")
    with _locked(folder):
        return _write(folder, dataclasses.replace(read(folder), note=text))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let no other process change the notes meanwhile, where the disk has locks."""
    try:
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"{folder} cannot be opened ({error.strerror})") from error
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _write(folder: Path, notes: Notes) -> Notes:
    try:
        write_json(folder / FILE, {"tags": list(notes.tags), "note": notes.note})
    except OSError as error:
        raise InputError(f"{folder / FILE} cannot be written ({error.strerror}): make it writable") from error
    return notes
