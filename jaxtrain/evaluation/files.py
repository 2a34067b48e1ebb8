"""Files of single examples: a CSV of all, and the most confident mistakes as a contact sheet or as texts."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.files import as_json, write_bytes, write_json, write_text
from jaxtrain.data import Source
from jaxtrain.evaluation import plots
from jaxtrain.evaluation.report import Report
from jaxtrain.evaluation.splits import origin
from jaxtrain.evaluation.text import confusion_of

MISTAKES = 36
"""Mistakes of a contact sheet; a page of texts has the same number."""

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body {{ font-family: sans-serif; margin: 2em; }} table {{ border-collapse: collapse; }}
th, td {{ border-bottom: 1px solid #ccc; padding: 0.4em 0.8em; text-align: left; vertical-align: top; }}
td.text {{ white-space: pre-wrap; max-width: 60em; }}</style>
<h1>{title}</h1>
<table><tr><th>example</th><th>true</th><th>predicted</th><th>probability</th><th>text</th></tr>
{rows}
</table></html>
"""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which files are written.

    Attributes:
      csv: ``examples.csv``, a row for each example.
      png: ``confusion.png`` and ``reliability.png``.
      mistakes: ``mistakes.png``, or ``mistakes.html`` for texts.
    """

    csv: bool = False
    png: bool = False
    mistakes: bool = False

    def flags(self) -> list[str]:
        """Return the flags that ask for them."""
        return [f"--{name}" for name, value in dataclasses.asdict(self).items() if value]


def check_wanted(wanted: Wanted, report: Any, source: Source) -> None:
    """Raise InputError if a file cannot be written for this report and these examples, before the evaluation.

    Args:
      wanted: the files.
      report: the task report.
      source: of the examples.
    """
    if wanted.png or (wanted.mistakes and text_field(source) is None):
        plots.check_matplotlib("--png" if wanted.png else "--mistakes")
    if wanted.png and "confusion" not in plots.pictures_of(report):
        raise InputError(
            f"--png: a {type(report).__name__} report has no classes to draw a confusion matrix of: use --csv"
        )
    if not wanted.mistakes:
        return
    if "mistakes" not in plots.pictures_of(report):
        raise InputError(
            f"--mistakes: a {type(report).__name__} report has no wrong class of an example: --csv has the "
            "figures of each"
        )
    if plots.image_field(source) is None and text_field(source) is None:
        fields = ", ".join(f"{k} {list(v.shape[1:])}" for k, v in _one(source).items())
        raise InputError(
            f"--mistakes: the examples have no image or text to show (their fields: {fields}): --csv lists "
            "every prediction"
        )


def write_files(
    wanted: Wanted,
    report: Report,
    source: Source,
    folder: Path,
    title: str,
    names: Sequence[str] | None,
    about: Mapping[str, Any],
) -> list[str]:
    """Write the files; returns their paths, and a line where there was nothing to draw.

    Beside them ``figures.json`` has all figures and the shown mistakes, for ``python -m jaxtrain report``.

    Args:
      wanted: the files.
      report: what they show.
      source: of the evaluated examples, by their position.
      folder: where they are written; made if it is missing.
      title: of the pictures.
      names: of the classes.
      about: ``step``, ``split`` and ``examples`` of the evaluation.

    Raises:
      RunError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written, body = [], {**about, "class_names": names, "figures": report.as_json()}
        if wanted.csv:
            write_text(folder / "examples.csv", examples_csv(report, source, names))
            written.append(str(folder / "examples.csv"))
        if wanted.png:
            matrix = confusion_of(report.figures)
            if matrix is None:
                written.append("no confusion matrix: the model has too many classes for one")
            else:
                write_bytes(folder / "confusion.png", plots.confusion(matrix, names, title))
                written.append(str(folder / "confusion.png"))
            if report.reliability is not None:
                write_bytes(folder / "reliability.png", plots.reliability(report.reliability, title))
                written.append(str(folder / "reliability.png"))
        if wanted.mistakes:
            line, body["mistakes"] = _write_mistakes(report, source, folder, title, names)
            written.append(line)
        write_json(folder / "figures.json", as_json(body))
        return written
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written ({error.strerror}): choose another folder with --out"
        ) from error


def examples_csv(report: Report, source: Source, names: Sequence[str] | None) -> str:
    """Return a CSV with a row for each example: ``id``, ``location`` where known, and what was predicted.

    ``id`` is the number of the example in its source, from 0. ``location`` is what the source's ``locate``
    returns, such as a path.
    """
    assert report.ids is not None and report.examples is not None
    base, ids = origin(source, report.ids)
    columns: dict[str, Any] = {"id": ids}
    if hasattr(base, "locate"):
        columns["location"] = [base.locate(int(index)) for index in ids]
    columns |= report.examples.columns(None if names is None else tuple(names))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(_plain(column) for column in columns.values()), strict=True))
    return out.getvalue()


def _plain(column: Any) -> list[Any]:
    """Return a column as Python values, floats with nine digits: enough for float32."""
    values = column.tolist() if hasattr(column, "tolist") else column
    return [f"{x:.9g}" if isinstance(x, float) else x for x in values]


def _write_mistakes(
    report: Report, source: Source, folder: Path, title: str, names: Sequence[str] | None
) -> tuple[str, list[dict[str, Any]]]:
    """Write the most confident mistakes; returns the file, or why there is none, and the mistakes."""
    assert report.ids is not None and report.examples is not None
    wrong = report.examples.mistakes()
    for name in ("mistakes.png", "mistakes.html"):
        (folder / name).unlink(missing_ok=True)  # of an earlier evaluation
    if wrong is None:
        return "no mistakes to show: an example has several labels", []
    if not len(wrong):
        return "no mistakes to show: every prediction is right", []
    shown = wrong[:MISTAKES]
    columns = report.examples.columns(None)
    label, prediction, probability = (
        [columns[name][place] for place in shown] for name in ("label", "prediction", "probability")
    )
    # a binary prediction of 0 has the probability that is left
    binary = "label_0" not in columns and report.figures.get("true_positives") is not None
    certain = [
        1 - p if binary and not int(guess) else p for p, guess in zip(probability, prediction, strict=True)
    ]
    base, numbers = origin(source, report.ids[shown])
    mistakes = [
        plots.Mistake(int(i), _name(int(a), names), _name(int(b), names), float(p))
        for i, a, b, p in zip(numbers, label, prediction, certain, strict=True)
    ]
    which = (
        f"the {len(shown)} most confident of {len(wrong):,}"
        if len(shown) < len(wrong)
        else f"all {len(wrong)}"
    )
    heading = f"{title}: {which} mistakes"
    field = plots.image_field(source)
    if field is not None:
        images = base.gather(numbers)[field]
        write_bytes(folder / "mistakes.png", plots.contact_sheet(images, mistakes, heading))
        return str(folder / "mistakes.png"), [dataclasses.asdict(one) for one in mistakes]
    read = texts(base, numbers)
    write_text(folder / "mistakes.html", _page(heading, mistakes, read))
    shown_texts = [
        {**dataclasses.asdict(one), "text": text} for one, text in zip(mistakes, read, strict=True)
    ]
    return str(folder / "mistakes.html"), shown_texts


def _page(heading: str, mistakes: Sequence[plots.Mistake], shown: Sequence[str]) -> str:
    rows = [
        f"<tr><td>{one.id}</td><td>{html.escape(one.label)}</td><td>{html.escape(one.prediction)}</td>"
        f'<td>{100 * one.probability:.1f} %</td><td class="text">{html.escape(text)}</td></tr>'
        for one, text in zip(mistakes, shown, strict=True)
    ]
    return PAGE.format(title=html.escape(heading), rows="\n".join(rows))


def text_field(source: Source) -> str | None:
    """Return how the texts of examples are read: ``text``, a method of the source, or a field of bytes."""
    base, _ = origin(source, np.zeros(1, np.int64))
    if callable(getattr(base, "text", None)):
        return "text"
    tokens = _one(source).get("tokens")
    return "tokens" if tokens is not None and tokens.dtype == np.uint8 and tokens.ndim == 2 else None


def texts(source: Source, ids: np.ndarray) -> list[str]:
    """Return the texts of examples."""
    if text_field(source) == "text":
        found: list[str] = source.text(ids)  # type: ignore[attr-defined]
        return found
    rows = source.gather(ids)["tokens"]
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]


def _name(number: int, names: Sequence[str] | None) -> str:
    return names[number] if names and 0 <= number < len(names) else str(number)


def _one(source: Source) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in source.gather(np.zeros(1, np.int64)).items()}
