"""The sections of the page as HTML. Every text of a run is escaped: a run may come from elsewhere."""

from __future__ import annotations

import html
import shlex
from collections.abc import Sequence
from typing import Any

from jaxtrain.report import compare
from jaxtrain.report.compare import Group, number_text, with_deviation
from jaxtrain.report.evaluations import Evaluation
from jaxtrain.report.runs import Run
from jaxtrain.report.sweeps import Importance, Outcome

COLUMNS = 24
"""Most runs side by side in the table of differences."""
TABLE_CLASSES = 40
"""Most classes of a confusion matrix that is also a table."""
ROWS = 500
"""Most rows of the table of a sweep."""
TEXTS = 2000
"""Characters of a setting's text, or of a mistaken text, at most."""


def escape(text: Any) -> str:
    """Return text for HTML: escaped, cut where it is very long, without what UTF-8 cannot hold."""
    plain = str(text).encode(errors="backslashreplace").decode()
    plain = plain if len(plain) <= TEXTS else f"{plain[:TEXTS]}…"
    return html.escape(plain)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, classes: str = "") -> str:
    """Return a table of HTML cells; the first of each row is its header."""
    lines = ["<tr>" + "".join(f'<th scope="col">{cell}</th>' for cell in head) + "</tr>"]
    body = [
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    ]
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{caption}"><table class="{classes}">'
        f"<caption>{caption}</caption><thead>{lines[0]}</thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def results(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    """The final table: a row for each run, and the mean and deviation of each group of several seeds."""
    found = [compare.figures(run) for run in runs]
    names = list(dict.fromkeys(name for one in found for name in one))
    rows: list[list[str]] = []
    noted: list[str] = []
    for group in groups:
        if len(group.runs) > 1:
            done = [found[number] for number in group.runs if found[number]]
            cells = [[one[name] for one in done if name in one] for name in names]
            count = len(group.runs)
            texts = [with_deviation(values, count) if values else compare.MISSING for values in cells]
            mean = f"mean ± std, n = {count}"
            rows.append(
                [f"<b>{escape(group.label)}</b>", f"<b>{mean}</b>", "", *(f"<b>{x}</b>" for x in texts)]
            )
            noted.append("")
        for number in group.runs:
            run = runs[number]
            texts = [number_text(found[number].get(name)) for name in names]
            seed = run.config.get("seed", compare.MISSING)
            rows.append([escape(run.label), escape(compare.state(run)), escape(seed), *texts])
            noted.append(_notes(run))
    head = ["run", "state", "seed", *(escape(name) for name in names)]
    if any(noted):
        head.append("notes")
        rows = [[*row, f'<span class="note">{note}</span>'] for row, note in zip(rows, noted, strict=True)]
    repeated = any(len(group.runs) > 1 for group in groups)
    about = "std: sample standard deviation (n − 1) over runs that differ in the seed only."
    return f'{table(head, rows, "Results", "numbers")}<p class="soft">{about if repeated else ""}</p>'


def _notes(run: Run) -> str:
    """The tags and the note of a run."""
    parts = [*(f"[{tag}]" for tag in run.notes.tags), *([run.notes.note] if run.notes.note else [])]
    return escape(" ".join(parts))


def differences(runs: Sequence[Run]) -> str:
    """What differs between the settings and the conditions of the runs; all settings of a single one."""
    if len(runs) == 1:
        rows = [[escape(path), escape(text)] for path, text in compare.conditions(runs[0]).items()]
        body = table(["setting", "value"], rows, "Settings and conditions", "texts")
        return f"<details><summary>{len(rows)} settings and conditions</summary>{body}</details>"
    shown = runs[:COLUMNS]
    found = compare.differences([compare.conditions(run) for run in runs])
    if not found:
        return "<p>The settings and the conditions of these runs are the same.</p>"
    cells = [[escape(path), *(escape(text) for text in texts[:COLUMNS])] for path, texts in found]
    more = f"<p>{len(runs) - COLUMNS} more runs are not shown.</p>" if len(runs) > COLUMNS else ""
    return table(["setting", *(escape(run.label) for run in shown)], cells, "What differs", "texts") + more


def evaluations(runs: Sequence[Run]) -> str:
    """Mistakes and the confusion matrices as tables; the charts of these are drawn by the script."""
    blocks, number = [], 0
    for run in runs:
        for one in run.evaluations:
            blocks.append(_evaluation(run, one, number))
            number += 1
    if blocks:
        return "".join(blocks)
    command = shlex.join(
        ["python", "-m", "jaxtrain", "evaluate", "--workdir", str(runs[0].folder), "--mistakes"]
    )
    return (
        "<p>No evaluation is in the folders of these runs. The confusion matrix and the worst mistakes of a "
        f"classifier are here after</p>{_code([command])}"
    )


def _evaluation(run: Run, one: Evaluation, number: int) -> str:
    title = f"{escape(run.label)}, step {one.step:,}, {escape(one.split)}, {one.examples:,} examples"
    parts = [f"<h3>{title}</h3>"]
    matrix = one.confusion
    if matrix is not None:
        parts.append(f'<div class="chart matrix" data-matrix="{number}"></div>')
        if len(matrix) <= TABLE_CLASSES:
            names = class_names(one, len(matrix))
            rows = [[name, *(f"{x:,}" for x in row)] for name, row in zip(names, matrix, strict=True)]
            body = table(["true \\ predicted", *names], rows, "Confusion matrix", "numbers")
            parts.append(f"<details><summary>Confusion matrix as a table</summary>{body}</details>")
    url = one.picture_url()
    if url is not None:
        parts.append(
            '<div class="wide" tabindex="0" role="region" aria-label="Mistakes">'
            f'<img class="sheet" src="{url}" '
            f'alt="The most confident mistakes of {title}: pictures with true and predicted class"></div>'
        )
    if one.mistakes:
        parts.append(_mistakes(one))
    elif url is None:
        command = ["python", "-m", "jaxtrain", "evaluate", "--workdir", str(run.folder), "--mistakes"]
        parts.append(f"<p>The worst mistakes are here after</p>{_code([shlex.join(command)])}")
    return f'<div class="evaluation">{"".join(parts)}</div>'


def class_names(one: Evaluation, count: int) -> list[str]:
    """Return the names of the classes, escaped; their numbers without names."""
    names = one.class_names or []
    return [escape(names[number]) if number < len(names) else str(number) for number in range(count)]


def _mistakes(one: Evaluation) -> str:
    text = any("text" in mistake for mistake in one.mistakes)
    rows = [
        [
            str(mistake["id"]),
            escape(mistake["label"]),
            escape(mistake["prediction"]),
            f"{100 * mistake['probability']:.1f} %",
            *([f'<span class="text">{escape(mistake.get("text", ""))}</span>'] if text else []),
        ]
        for mistake in one.mistakes
    ]
    head = ["example", "true", "predicted", "probability", *(["text"] if text else [])]
    body = table(head, rows, "The most confident mistakes", "texts")
    opened = " open" if text else ""
    return f"<details{opened}><summary>{len(rows)} mistakes as a table</summary>{body}</details>"


def sweep(found: Outcome, matters: Importance, number: int) -> str:
    """The table of a sweep's settings, and places for its charts."""
    rows = []
    for one in found.settings[:ROWS]:
        texts = [escape(one.values.get(name, compare.MISSING)) for name in found.names]
        score = with_deviation(one.scores) if found.repeats else number_text(one.mean)
        rows.append([score, *texts])
    better = "higher" if found.higher else "lower"
    head = [f"{escape(found.metric)} ({better} is better)", *(escape(name) for name in found.names)]
    parts = []
    if found.waiting:
        parts.append(f"<p>{found.waiting:,} members have no result yet and are left out.</p>")
    if not rows:
        return "".join(parts) + "<p>No member of this sweep has a result yet.</p>"
    parts.append(f'<div class="chart parallel" data-parallel="{number}"></div>')
    parts.append(_importance(matters, number))
    parts.append(table(head, rows, "Settings, the best first", "texts"))
    if len(found.settings) > ROWS:
        parts.append(f"<p>{len(found.settings) - ROWS:,} more settings are not shown.</p>")
    return "".join(parts)


def _importance(matters: Importance, number: int) -> str:
    if matters.why is not None:
        return f'<p class="soft">Importance of the parameters: not shown, {escape(matters.why)}.</p>'
    share = f"{100 * (matters.r2 or 0):.0f} %"
    return (
        f'<div class="chart bars" data-importance="{number}"></div>'
        '<p class="soft">Permutation importance: how much worse a random forest predicts settings that it '
        "has not seen, once the values of one parameter are shuffled. Here it explains "
        f"{share} of the variance between settings (five-fold cross-validation). It says nothing about "
        "values that were not tried, and with few settings it is a rough guide.</p>"
    )


def commands(runs: Sequence[Run]) -> str:
    """How to train each run again."""
    lines = []
    for run in runs:
        git = run.record.get("git")
        of = f"code: git {git}" if isinstance(git, str) else "code: the commit is not recorded"
        lines += [f"# {run.label} ({of})", compare.command(run)]
    paths = [shlex.quote(str(run.folder)) for run in runs[:COLUMNS]]
    again = " ".join(["python -m jaxtrain report", *paths])
    return f"{_code(lines)}<p>This page again, from the folders of the runs:</p>{_code([again])}"


def _code(lines: Sequence[str]) -> str:
    return f'<pre tabindex="0"><code>{chr(10).join(escape(line) for line in lines)}</code></pre>'


def notes(lines: Sequence[str]) -> str:
    """Lines about the data, as a list."""
    shown = [f"<li>{escape(line)}</li>" for line in lines[:30]]
    if len(lines) > 30:
        shown.append(f"<li>and {len(lines) - 30} more such lines</li>")
    return f"<ul>{''.join(shown)}</ul>" if shown else ""
