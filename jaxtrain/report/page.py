"""The page of a report: one HTML file with its script, its style and its data, without a network."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from jaxtrain.core.errors import InputError
from jaxtrain.report import sections, sweeps
from jaxtrain.report.compare import group_runs
from jaxtrain.report.curves import make_curves
from jaxtrain.report.runs import Runs

GENERATOR = '<meta name="generator" content="jaxtrain report">'
HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Content:
    """What a page shows: HTML by section, and the data of the charts as JSON.

    Attributes:
      title: of the page.
      parts: HTML by section.
      data: of the charts.
    """

    title: str
    parts: dict[str, str]
    data: dict[str, Any]


def make_content(found: Runs) -> Content:
    """Return what a page about these runs shows."""
    runs, groups = found.runs, group_runs(found.runs)
    curves = make_curves(runs, groups)
    outcomes = [sweeps.outcome(one, runs) for one in found.sweeps]
    matters = [sweeps.importance(one) for one in outcomes]
    names = list(dict.fromkeys(run.name for run in runs))
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    title = f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}: {title}"
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    finished = sum(run.result is not None for run in runs)
    about = f"{finished} of {len(runs)} finished · made {now} by python -m jaxtrain report"
    parts = {
        "about": f'<p class="soft">{sections.escape(about)}</p>',
        "results": sections.results(runs, groups),
        "notes": sections.notes(curves.notes),
        "sweeps": "".join(
            f"<h3>{sections.escape(one.folder)}</h3>{sections.sweep(of, matter, number)}"
            for number, (one, of, matter) in enumerate(zip(found.sweeps, outcomes, matters, strict=True))
        ),
        "evaluations": sections.evaluations(runs),
        "differences": sections.differences(runs),
        "commands": sections.commands(runs),
    }
    data = {
        **curves.body,
        "labels": [run.label for run in runs],
        "group_labels": [group.label for group in groups],
        "group_runs": [group.runs for group in groups],
        "matrices": [
            {"matrix": one.confusion, "names": one.class_names} for run in runs for one in run.evaluations
        ],
        "sweeps": [sweeps.coordinates(one) if one.settings else None for one in outcomes],
        "importance": [one.loss for one in matters],
    }
    return Content(title, parts, data)


SECTIONS = {
    "sweeps": "Sweep",
    "results": "Results",
    "curves": "Curves",
    "resources": "Throughput, memory, energy",
    "evaluations": "Confusion matrix and worst mistakes",
    "differences": "Settings",
    "commands": "Commands to reproduce",
}


def render(content: Content, live: tuple[str, float] | None = None) -> str:
    """Return the page.

    Args:
      content: what it shows.
      live: the version of the content, and the seconds after which the page asks the server that it came from
        for another; None: never.
    """
    scripts = [plotly_script(), _file("page.js")]
    digests = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts]
    hashes, connect = " ".join(f"'sha256-{one}'" for one in digests), "'self'" if live else "'none'"
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"base-uri 'none'; form-action 'none'; connect-src {connect}"
    )
    data = {"data": content.data, "live": None if live is None else {"version": live[0], "every": live[1]}}
    body = [
        f'<section id="{name}"{_hidden(name, content)}><h2>{title}</h2>{_inside(name, content)}</section>'
        for name, title in SECTIONS.items()
    ]
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        GENERATOR,
        f"<title>{sections.escape(content.title)}</title>",
        '<link rel="icon" href="data:,">',
        f"<style>{_file('page.css')}</style></head><body>",
        '<a class="skip" href="#results">Skip to the results</a>',
        f"<main><header><h1>{sections.escape(content.title)}</h1>",
        f'<div data-part="about">{content.parts["about"]}</div>',
        f'<p id="live" class="soft" role="status" hidden></p></header>{"".join(body)}</main>',
        f'<script type="application/json" id="data">{script_json(data)}</script>',
        *(f"<script>{one}</script>" for one in scripts),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _hidden(name: str, content: Content) -> str:
    return " hidden" if name == "sweeps" and not content.parts["sweeps"] else ""


def _inside(name: str, content: Content) -> str:
    if name == "curves":
        notes = f'<div class="soft" data-part="notes">{content.parts["notes"]}</div>'
        return f'{_file("controls.html")}<div class="charts" data-charts="curves"></div>{notes}'
    if name == "resources":
        return '<p class="soft" id="unrecorded"></p><div class="charts" data-charts="resources"></div>'
    return f'<div data-part="{name}">{content.parts[name]}</div>'


def script_json(data: Any) -> str:
    """Return JSON that cannot end the script element that it stands in.

    >>> script_json({"name": "</script><!--"})
    '{"name": "\\\\u003c/script\\\\u003e\\\\u003c!--"}'
    """
    text = json.dumps(data, allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


@functools.cache
def plotly_script() -> str:
    """Return the script of Plotly, as its package has it.

    Raises:
      InputError: the package is missing.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'jaxtrain[report]'") from error
    text: str = get_plotlyjs()
    return text.replace("</script", "<\\/script").replace("<!--", "\\x3C!--")


@functools.cache
def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
