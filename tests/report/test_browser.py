"""The page in Chromium: it renders, values on hover, what the controls switch, by keyboard, on a phone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from conftest import ROOT
from report_cases import NASTY, curve, result_of, write_evaluation, write_run, write_seeds, write_sweep
from test_server import serving

from jaxtrain.report import page, plot
from jaxtrain.report.runs import Reader

WITNESS = "tests/report/test_page.py"
READY = "document.documentElement.dataset.ready === 'yes'"
LOSS = "document.querySelector('[data-name=loss] .plot')"
LINES = f"{LOSS}.data.filter((one) => !one.meta.edge)"

pytestmark = [
    pytest.mark.full(WITNESS),
    pytest.mark.skipif(
        browser.find_chromium() is None,
        reason="there is no Chromium on PATH: apt-get install chromium, or set CHROMIUM",
    ),
]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three seeds, a run with another learning rate and hostile texts, an evaluation."""
    record = {"git": NASTY, "overrides": [NASTY], "versions": {NASTY: NASTY}}
    rows = [*curve(40), {"step": 40, f"train/{NASTY}": 1.0}]
    nasty = write_run(tmp_path / NASTY.replace("/", ""), rows, result_of(0.5), NASTY, record)
    seeds = write_seeds(tmp_path / "seeds")
    write_evaluation(nasty, [[5, 1, 0], [0, 4, 0], [1, 0, 7]], (NASTY, "b", "c"))
    return [*seeds, nasty]


@pytest.fixture
def opened(request: pytest.FixtureRequest, tmp_path: Path, runs: list[Path]) -> Iterator[browser.Page]:
    """The page of these runs and a sweep, in a window of the width and the scheme of the parameter."""
    width, dark = getattr(request, "param", (1200, False))
    lrs = ("0.001", "0.003", "0.01", "0.03", "0.1")
    scores = {(lr, model): 0.1 * lrs.index(lr) for lr in lrs for model in ("'a'", NASTY)}
    sweep = write_sweep(tmp_path / "sweep", scores)
    path = tmp_path / "report.html"
    path.write_text(page.render(page.make_content(Reader([*runs, sweep]).read())))
    window = browser.Page(tmp_path, width=width, dark=dark)
    try:
        window.open(path.as_uri())
        window.wait(READY)
        yield window
    finally:
        window.close()


def names(window: browser.Page) -> list[str]:
    return json.loads(window.run(f"JSON.stringify({LINES}.map((one) => one.name))"))


@pytest.mark.parametrize("opened", [(1200, False), (1200, True), (390, True)], indirect=True)
def test_the_page_renders_without_errors_and_requests(opened, runs) -> None:
    assert opened.problems() == []
    assert (
        opened.run("document.title") != "run" and opened.run("document.querySelectorAll('svg').length") > 10
    )
    sent = [one for one in opened.requests() if not one.startswith(("data:", "blob:", "about:"))]
    assert len(sent) == 1 and sent[0].startswith("file:")
    assert opened.run("document.documentElement.scrollWidth <= innerWidth")
    assert opened.run("document.querySelectorAll('main img').length") == 1  # the contact sheet
    drawn = f"[...{LOSS}.querySelectorAll('.scatterlayer path.js-line')].length"
    assert opened.run(drawn) >= len(names(opened)) > 0
    for chart in ("matrix", "parallel", "importance"):
        assert opened.run(f"document.querySelector('[data-{chart}] .main-svg') !== null")
    texts = (
        "[...document.querySelectorAll('[data-matrix] .heatmaplayer text, [data-matrix] .hm text')].length"
    )
    assert opened.run("document.querySelector('[data-matrix] .plot').data[0].customdata[2][0]") == 1
    assert opened.run(texts) is not None
    ink, paper = (
        opened.run(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
    )
    assert contrast(ink, paper) > 7
    soft = opened.run("getComputedStyle(document.querySelector('.soft')).color")
    assert contrast(soft, paper) > 4.5


def contrast(*colours: str) -> float:
    """The contrast ratio of two colours: WCAG 2.2, section 1.4.3."""

    def luminance(text: str) -> float:
        parts = [float(x) / 255 for x in text[text.index("(") + 1 : -1].split(",")[:3]]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted(map(luminance, colours))
    return (light + 0.05) / (dark + 0.05)


def test_hovering_shows_values(opened, runs) -> None:
    opened.run("document.getElementById('none').click(); document.querySelector('#names input').click()")
    opened.wait(f"{LINES}.length === 2")  # of three seeds: train and test
    opened.run(f"{LOSS}.scrollIntoView({{block: 'center'}})")
    box = f"{LOSS}.querySelector('.nsewdrag').getBoundingClientRect()"
    x, y = (opened.run(f"{box}.{side}") for side in ("x + 200", "y + 100"))
    for shift in (0, 2, 4):
        opened.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + shift, y=y)
    opened.wait(f"{LOSS}.querySelector('.hoverlayer').textContent.includes('±')")
    text = opened.run(f"{LOSS}.querySelector('.hoverlayer').textContent")
    assert "train digits" in text and "test digits" in text


def test_controls_switch_runs_seeds_smoothing_and_axes(opened, runs) -> None:
    before = names(opened)
    assert any("digits" in one for one in before)
    mean = opened.run(f"{LINES}.find((one) => one.text !== undefined).y")
    box = "document.querySelector('#names input')"
    opened.run(f"{box}.click()")
    opened.wait(f"{LINES}.length < {len(before)}")
    opened.run(f"{box}.click()")
    opened.wait(f"{LINES}.length === {len(before)}")
    opened.run("document.getElementById('none').click()")
    opened.wait(f"{LINES}.length === 0")
    opened.run("document.getElementById('all').click()")
    opened.wait(f"{LINES}.length === {len(before)}")

    def change(id: str, value: str) -> None:
        event = "input" if id == "smoothing" else "change"
        opened.run(f"document.getElementById('{id}').value = '{value}'")
        opened.run(f"document.getElementById('{id}').dispatchEvent(new Event('{event}', {{bubbles: true}}))")

    change("smoothing", "0.9")
    opened.wait("document.getElementById('smoothing-value').textContent === '0.9'")
    smooth = opened.run(f"{LINES}.find((one) => one.text !== undefined).y")
    expected, total, norm = [], 0.0, 0.0
    for value in mean:
        total, norm = 0.9 * total + 0.1 * value, 0.9 * norm + 0.1
        expected.append(total / norm)
    assert smooth == pytest.approx(expected)
    change("smoothing", "0")
    change("seeds", "each")
    opened.wait(f"{LINES}.some((one) => one.name.startsWith('seed2'))")
    change("x", "epoch")
    opened.wait(f"Math.max(...{LINES}[0].x) === 4")
    change("x", "seconds")
    opened.wait(f"Math.max(...{LINES}[0].x) === 2")
    opened.run("document.getElementById('log-y').click(); document.getElementById('log-x').click()")
    opened.wait(f"{LOSS}._fullLayout.yaxis.type === 'log' && {LOSS}._fullLayout.xaxis.type === 'log'")
    assert opened.problems() == []


def test_everything_is_reached_by_keyboard(opened, runs) -> None:
    opened.run("document.body.focus()")
    reached = []
    for _ in range(60):
        opened.key("Tab")
        reached.append(opened.run("document.activeElement.id || document.activeElement.className"))
        assert opened.run("getComputedStyle(document.activeElement).outlineStyle") == "solid", reached
        if reached[-1] == "log-y":
            break
    assert {"skip", "wide", "all", "none", "seeds", "smoothing", "x", "log-x", "log-y"} <= {*reached}
    opened.key(" ", " ")
    opened.wait(f"{LOSS}._fullLayout.yaxis.type === 'log'")
    opened.key("Tab")
    assert opened.run("document.activeElement.closest('figure').dataset.name") == "loss"
    opened.key("ArrowRight")
    opened.wait(
        "document.activeElement.parentElement.querySelector('.values').textContent.startsWith('step 1: ')"
    )
    opened.key("End")
    values = "document.activeElement.parentElement.querySelector('.values').textContent"
    opened.wait(f"{values}.startsWith('step 40: ') && {values}.includes('train: ')")


def test_tables_have_captions_and_headers(opened, runs) -> None:
    assert opened.run("[...document.querySelectorAll('table')].every((one) => one.caption && one.tHead)")
    assert opened.run(
        "[...document.querySelectorAll('th')].every((one) => ['row', 'col'].includes(one.scope))"
    )
    labels = "[...document.querySelectorAll('.plot')].every((one) => one.getAttribute('aria-label'))"
    assert opened.run(labels)
    fields = "[...document.querySelectorAll('input, select')].every((one) => one.labels.length === 1)"
    assert opened.run(fields)


def test_a_served_page_follows_a_run(tmp_path) -> None:
    run = write_run(tmp_path / "run", curve(5))
    window = browser.Page(tmp_path)
    try:
        with serving(run) as server:
            window.open(server.address)
            window.wait(READY)
            window.run(f"{LOSS}.marked = true")
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"step": 100, "train/loss": 0.125, "valid/loss": 0.25}\n')
            (run / "result.json").write_text(json.dumps(result_of(0.625)))
            window.wait(f"{LINES}.length === 2 && {LINES}[0].y.at(-1) === 0.125")
            window.wait("document.querySelector('[data-part=results]').textContent.includes('0.625')")
            assert window.run(f"{LOSS}.marked") and window.problems() == []
        window.wait("document.getElementById('live').textContent.startsWith('Not refreshed')")
    finally:
        window.close()


def test_a_notebook_frame_draws(tmp_path, runs) -> None:
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><title>notebook</title>{plot(*runs)._repr_html_()}")
    window = browser.Page(tmp_path)
    try:
        window.open(path.as_uri())
        window.wait("document.querySelector('iframe').contentDocument === null")  # another origin
        targets = window.call("Target.getTargets")["targetInfos"]
        frame = next(one["targetId"] for one in targets if one["type"] == "iframe")
        window.attach(frame)
        window.wait(f"{READY} && {LINES}.length")
        assert window.problems() == [] and window.run("origin") == "null"
    finally:
        window.close()


def test_the_browser_is_installed_by_the_script_of_ci() -> None:
    assert "chromium" in (ROOT / ".ci" / "run").read_text()
