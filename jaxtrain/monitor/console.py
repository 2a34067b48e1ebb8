"""Console output of a run: a progress bar on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import html
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table


class Console(Protocol):
    """Console output of a run."""

    def note(self, text: str) -> None:
        """Print a line."""

    def begin(self, start: int, steps: int) -> None:
        """Start the training display; ``start`` of ``steps`` updates are done."""

    def train(self, step: int, values: Mapping[str, float], speed: float | None) -> None:
        """Show the metrics of ``step``; ``speed`` in examples per second."""

    def advance(self, step: int) -> None:
        """Move the bar to ``step``, which was dispatched; cheap enough to call at every step."""

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Any]:
        """Show the progress of a task; yields a function to call with the amount done.

        ``total`` is 0 where it is unknown.
        """

    def summary(self, title: str, rows: Mapping[str, str]) -> None:
        """Print a table."""

    def end(self) -> None:
        """Stop the training display."""


def make_console(quiet: bool = False) -> Console:
    """Make the console that suits a terminal, a notebook or a file; ``quiet`` prints nothing."""
    if quiet:
        return Quiet()
    if "ipykernel" in sys.modules:
        return Notebook()
    return Rich() if sys.stdout.isatty() else Plain()


def format_metrics(values: Mapping[str, float | None], speed: float | None) -> str:
    """Format metrics and speed on one line, the loss first; tables are left out.

    >>> format_metrics({"loss": 0.5, "accuracy": 0.25, "grad_norm": 1.0}, 1234.5)
    'loss 0.5000  accuracy 25.00 %  1,234 examples/s'
    """
    parts = []
    for name, value in sorted(values.items(), key=lambda item: item[0] != "loss"):
        if not isinstance(value, int | float | None) or name == "grad_norm":
            continue
        number = float("nan") if value is None else value  # null in a result that was read
        share = name == "accuracy" or (name.startswith("top") and name[3:].isdigit())
        parts.append(f"{name} {100 * number:.2f} %" if share else f"{name} {number:.4f}")
    return "  ".join([*parts, *([f"{speed:,.0f} examples/s"] if speed else [])])


def format_seconds(seconds: float) -> str:
    """Format a duration as hours, minutes and seconds.

    >>> format_seconds(59.6), format_seconds(100_000)
    ('00:01:00', '27:46:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}"


class Plain:
    """Prints lines without control characters, for logs and pipes."""

    def __init__(self) -> None:
        self._steps, self._start, self._began = 0, 0, 0.0
        self._compiling = True

    def note(self, text: str) -> None:
        print(text, flush=True)

    def begin(self, start: int, steps: int) -> None:
        self._start, self._steps, self._began = start, steps, time.perf_counter()
        self._compiling = True

    def train(self, step: int, values: Mapping[str, float], speed: float | None) -> None:
        now = time.perf_counter()
        left = (now - self._began) / max(1, step - self._start) * (self._steps - step)
        self.note(f"step {step}/{self._steps}  {format_metrics(values, speed)}  eta {format_seconds(left)}")
        if self._compiling:  # the time to the first record includes compilation: count from here
            self._start, self._began, self._compiling = step, now, False

    def advance(self, step: int) -> None:
        pass

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Any]:
        yield lambda done: None

    def summary(self, title: str, rows: Mapping[str, str]) -> None:
        width = max(map(len, rows))
        self.note("\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows.items())]))

    def end(self) -> None:
        pass


class Quiet(Plain):
    """Prints nothing: process 0 of the run does."""

    def note(self, text: str) -> None:
        pass


class Notebook(Plain):
    """Shows a bar in the output of a notebook cell, and prints notes below it.

    Args:
      display: ``IPython.display.display``, or a function with its arguments.
    """

    def __init__(self, display: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self._display = display or importlib.import_module("IPython.display").display
        self._bar: Any = None
        self._metrics, self._updated = "", 0.0

    def begin(self, start: int, steps: int) -> None:
        super().begin(start, steps)
        self._bar = self._display(self._render(start), raw=True, display_id=True)

    def train(self, step: int, values: Mapping[str, float], speed: float | None) -> None:
        self._metrics = format_metrics(values, speed)
        self._update(step)

    def advance(self, step: int) -> None:
        if step == self._steps or time.perf_counter() - self._updated > 0.2:
            self._update(step)

    def end(self) -> None:
        self._bar = None

    def _update(self, step: int) -> None:
        if self._bar is not None:
            self._updated = time.perf_counter()
            self._bar.update(self._render(step), raw=True)

    def _render(self, step: int) -> dict[str, str]:
        text = f"step {step}/{self._steps}  {self._metrics}"
        bar = f'<progress value="{step}" max="{self._steps}" aria-label="training steps"></progress>'
        return {"text/plain": text, "text/html": f"{bar} {html.escape(text)}"}


class Rich:
    """Shows a live progress bar, and a table at the end."""

    def __init__(self, console: RichConsole | None = None) -> None:
        self._console = console or RichConsole(file=sys.stdout, highlight=False, markup=False, emoji=False)
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=self._console,
            refresh_per_second=5,
            speed_estimate_period=60,
        )
        self._train: TaskID | None = None
        self._updated = 0.0

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, soft_wrap=True)

    def begin(self, start: int, steps: int) -> None:
        self._progress.start()
        self._train = self._progress.add_task("train", total=steps, completed=start, values="")

    def train(self, step: int, values: Mapping[str, float], speed: float | None) -> None:
        if self._train is not None:
            self._progress.update(self._train, completed=step, values=format_metrics(values, speed))

    def advance(self, step: int) -> None:
        now = time.perf_counter()
        if self._train is not None and now - self._updated > 0.1:
            self._updated = now
            self._progress.update(self._train, completed=step)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Any]:
        self._progress.start()
        bar = self._progress.add_task(label, total=total or None, values="")
        try:
            yield lambda done: self._progress.update(bar, completed=done)
        finally:
            self._progress.remove_task(bar)
            if self._train is None:
                self._progress.stop()

    def summary(self, title: str, rows: Mapping[str, str]) -> None:
        table = Table(title=title, show_header=False, title_justify="left")
        for name, text in rows.items():
            table.add_row(name, text)
        self._console.print(table)

    def end(self) -> None:
        self._progress.stop()
        if self._train is not None:  # otherwise the next display would show this bar again
            self._progress.remove_task(self._train)
            self._train = None
