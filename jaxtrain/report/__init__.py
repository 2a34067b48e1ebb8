"""Runs as one self-contained HTML page: curves, results, settings, sweeps."""

from __future__ import annotations

import dataclasses
import html
import os

__all__ = ["Plot", "plot"]


@dataclasses.dataclass(frozen=True)
class Plot:
    """A report that a notebook draws where it is the value of a cell. Made by ``plot``.

    Attributes:
      page: the page, as ``python -m jaxtrain report`` writes it.
      height: of the frame in pixels.
    """

    page: str = dataclasses.field(repr=False)
    height: int

    def _repr_html_(self) -> str:
        """Return a frame with the page in it. Its script can reach neither the notebook nor the network."""
        return (
            '<iframe title="jaxtrain report" sandbox="allow-scripts allow-downloads" '
            f'srcdoc="{html.escape(self.page)}" '
            f'style="width: 100%; height: {self.height}px; border: 0"></iframe>'
        )


def plot(run: str | os.PathLike[str], *more: str | os.PathLike[str], height: int = 800) -> Plot:
    """Read runs, and return their report to be drawn inline in a notebook.

    Args:
      run: the folder of a run or of a sweep.
      more: others to compare it with.
      height: of the frame, in pixels.

    Raises:
      InputError: a folder holds no run, or Plotly is not installed.
      RunError: a file of a run is damaged.

    >>> plot("/runs/none")
    Traceback (most recent call last):
        ...
    jaxtrain.core.errors.InputError: /runs/none does not exist: give a run's folder, as printed at its start
    """
    from jaxtrain.report import page, runs

    return Plot(page.render(page.make_content(runs.Reader([run, *more]).read())), height)
