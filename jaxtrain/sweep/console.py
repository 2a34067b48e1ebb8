"""What a sweep shows of its members: their notes, each text once, and progress."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxtrain.monitor import Console, format_metrics


class MemberConsole:
    """The console of one member: notes begin with its label.

    Args:
      console: of the sweep.
      label: of the member.
      shown: texts that another member has shown; they are not shown again.
    """

    def __init__(self, console: Console, label: str, shown: set[str]) -> None:
        self._console, self._label, self._shown = console, label, shown

    def note(self, text: str) -> None:
        """Print a line, unless a member has printed the same."""
        if text not in self._shown:
            self._shown.add(text)
            self._console.note(f"{self._label}: {text}")

    def begin(self, start: int, steps: int) -> None:
        """Start the progress bar."""
        self._console.begin(start, steps)

    def train(self, step: int, values: Mapping[str, float], speed: float | None) -> None:
        """Show nothing: with many members the lines would not be read. The records are in their folders."""

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._console.advance(step)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Any]:
        """Show nothing."""
        yield lambda done: None

    def summary(self, title: str, rows: Mapping[str, str]) -> None:
        """Show nothing: the sweep has a table of all."""

    def end(self) -> None:
        """End the progress bar."""
        self._console.end()

    def result(self, found: Mapping[str, Any]) -> None:
        """Show the result of the member on one line."""
        best = "" if "best" not in found else f"  best {format_metrics(found['best']['test'], None)}"
        self._console.note(f"{self._label}: test {format_metrics(found['test'], None)}{best}")
