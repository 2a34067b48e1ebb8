"""The page: complete, escaped, self-contained; the command and what it refuses."""

from __future__ import annotations

import builtins
import json
import re
import subprocess
import sys
import webbrowser
from html.parser import HTMLParser
from typing import Any

import pytest
from report_cases import NASTY, curve, result_of, write_evaluation, write_run, write_seeds, write_sweep

from jaxtrain import report
from jaxtrain.cli import report as command
from jaxtrain.report import page
from jaxtrain.report.runs import Reader
from jaxtrain.runs import notes


class Parsed(HTMLParser):
    """Elements, the texts of tables' cells, the data, and what lies outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[list[str]] = []
        self.text, self.scripts, self._open, self._in_cell = "", list[str](), "", False
        self.feed(text)
        self.close()
        self.data = json.loads(self.scripts[0])["data"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
            self._in_cell = True
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._open = ""
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] += data
        elif self._open != "style":
            self.text += data
            if self._in_cell:
                self.cells[-1][-1] += data

    def row(self, *start: str) -> list[str]:
        return next(row for row in self.cells if row[: len(start)] == list(start))


def made(*folders: Any) -> Parsed:
    return Parsed(page.render(page.make_content(Reader(folders).read())))


def test_the_page_has_results_differences_mistakes_and_commands(tmp_path) -> None:
    seeds = write_seeds(tmp_path, (0.9, 0.95, 0.97))
    other = write_run(tmp_path / "other", curve(20), optimizer__lr="0.2")
    notes.tag(other, ["paper"])
    notes.write_note(other, "see <b>this</b>")
    write_evaluation(seeds[0], [[5, 1], [0, 4]], ("cat", "dog"))
    parsed = made(*seeds, other)
    assert parsed.row("lr=0.1") == [
        "lr=0.1",
        "mean ± std, n = 3",
        "",
        "0.940 ± 0.036",
        "0.060 ± 0.036",
        "2.5 ± 0",
        "",
    ]
    assert parsed.row("seed1")[:4] == ["seed1", "finished", "1", "0.95"]
    assert parsed.row("other")[:4] == ["other", "stopped, step 20 of 40", "0", "–"]
    assert parsed.row("other")[-1] == "[paper] see <b>this</b>" and parsed.row("seed1")[-1] == ""
    assert parsed.row("optimizer.lr") == ["optimizer.lr", "0.1", "0.1", "0.1", "0.2"]
    assert parsed.row("seed") == ["seed", "0", "1", "2", "0"]
    assert parsed.row("cat") == ["cat", "5", "1"] and parsed.row("7") == ["7", "cat", "dog", "75.0 %"]
    assert "python -m jaxtrain.run --experiment digits --set seed=1" in parsed.text
    assert [chart["name"] for chart in parsed.data["charts"]][:2] == ["loss", "accuracy"]
    assert parsed.data["group_runs"] == [[0, 1, 2], [3]]
    assert parsed.data["matrices"] == [{"matrix": [[5, 1], [0, 4]], "names": ["cat", "dog"]}]
    (image,) = [attrs for tag, attrs in parsed.tags if tag == "img"]
    assert str(image["src"]).startswith("data:image/png;base64,") and "seed0" in str(image["alt"])


def test_a_confusion_matrix_among_the_tables_of_a_result_is_shown(tmp_path) -> None:
    tables = {"confusion": [[3, 1], [2, 4]]}
    best = {"step": 20, "valid": 0.5, "test": {}, "tables": {"confusion": [[1, 0], [0, 1]]}}
    last = write_run(tmp_path / "last", curve(5), result_of(0.5, tables=tables))
    chosen = write_run(tmp_path / "chosen", curve(5), result_of(0.5, tables=tables, best=best))
    matrices = [one["matrix"] for one in made(last, chosen).data["matrices"]]
    assert matrices == [[[3, 1], [2, 4]], [[1, 0], [0, 1]]]


def test_without_an_evaluation_the_page_says_how_to_get_one(tmp_path) -> None:
    run = write_run(tmp_path / "a run", curve(5), result_of(0.5))
    parsed = made(run)
    assert f"python -m jaxtrain evaluate --workdir '{run}' --mistakes" in parsed.text
    assert "6 settings" not in parsed.text and parsed.row("optimizer.lr") == ["optimizer.lr", "0.1"]


def test_nothing_in_a_run_can_break_out_of_the_page(tmp_path) -> None:
    """Names, settings, metrics, classes and git texts of a run that was copied from elsewhere."""
    rows = [{"step": 1, f"train/{NASTY}": 1.0, NASTY: 2.0}, {"step": 2, f"train/{NASTY}": None}]
    record = {"git": NASTY, "overrides": [NASTY], "versions": {NASTY: NASTY}, "origin": NASTY}
    result = result_of(0.5)
    result["test"][NASTY] = float("inf")
    folders = []
    for seed in ("0", "1"):
        folder = tmp_path / f"{seed}<script>alert(1)</script>".replace("/", "") / "run\udcff"
        folders.append(write_run(folder, rows, result, NASTY, record, seed=seed, optimizer__lr=NASTY))
    write_evaluation(folders[0], [[1, 2], [3, 4]], (NASTY, "b"))
    sweep = write_sweep(tmp_path / "sweep", {(NASTY, "'a'"): 0.5, ("1", NASTY): 0.25})
    text = page.render(page.make_content(Reader([*folders, sweep]).read()))
    clean = Parsed(text)
    assert text.encode() and text.count("</script>") == 3  # the data, Plotly and ours
    kinds = [attrs.get("type") for tag, attrs in clean.tags if tag == "script"]
    assert kinds == ["application/json", None, None]
    assert not [attrs for tag, attrs in clean.tags if any(name.startswith("on") for name in attrs)]
    assert [tag for tag, _ in clean.tags].count("img") == 1  # the contact sheet
    assert NASTY in clean.text and NASTY in [chart["name"] for chart in clean.data["charts"]]
    assert clean.data["runs"][0]["series"][f"train/{NASTY}"]["y"] == [1, None]


def test_the_page_asks_nobody_for_anything(tmp_path) -> None:
    text = page.render(page.make_content(Reader([write_run(tmp_path / "run", curve(5))]).read()))
    parsed = Parsed(text)
    addresses = [attrs[name] for _, attrs in parsed.tags for name in ("src", "href") if name in attrs]
    assert all(str(one).startswith(("data:", "#")) for one in addresses)
    policy = next(str(attrs["content"]) for _, attrs in parsed.tags if attrs.get("http-equiv"))
    assert "default-src 'none'" in policy and "connect-src 'none'" in policy and "unsafe-eval" not in policy
    assert "url(" not in text.split("<style>")[1].split("</style>")[0]


def test_a_notebook_gets_a_frame_that_cannot_reach_it(tmp_path, monkeypatch) -> None:
    run = write_run(tmp_path / "run", curve(5))
    shown = report.plot(run, height=500)
    frames: list[tuple[str, dict[str, str | None]]] = []
    parser = HTMLParser()
    monkeypatch.setattr(parser, "handle_starttag", lambda tag, attrs: frames.append((tag, dict(attrs))))
    parser.feed(shown._repr_html_())
    ((tag, attrs),) = frames
    assert tag == "iframe" and attrs["sandbox"] == "allow-scripts allow-downloads"
    assert attrs["srcdoc"] == shown.page and "500px" in str(attrs["style"]) and len(repr(shown)) < 100


def test_the_command_writes_beside_the_run_or_where_it_is_told(tmp_path, capsys, monkeypatch) -> None:
    runs = write_seeds(tmp_path, (0.5, 0.75))
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or len(opened) > 1)
    monkeypatch.chdir(tmp_path)
    assert command.main([str(runs[0]), "--open"]) == 0
    default = runs[0] / "report.html"
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"{re.escape(str(default))}: \d\.\d\d MB\n", out) and opened == [default.as_uri()]
    assert err == f"no browser was found: open {default} yourself\n"
    assert command.main(list(map(str, runs))) == 0 and (tmp_path / "report.html").is_file()
    assert command.main([*map(str, runs), "--out", "other.html"]) == 0 and (tmp_path / "other.html").is_file()
    assert command.main([str(runs[0])]) == 0  # a page of report is replaced
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["absent"], "absent does not exist: give a run's folder"),
        (["file"], "file is a file: give a run's folder"),
        (["."], "holds no run (no config.json)"),
        (["run", "absent"], "absent does not exist"),
        (["run", "--out", "file"], "file is not a page of report: choose another with --out"),
        (["run", "--out", "."], "--out . is a folder: give a file"),
        (["run", "--out", ""], "--out is empty: give a file"),
        (["run", "--port", "80"], "--port: only --serve listens on one"),
        (["run", "--serve", "--out", "x"], "--out: --serve writes no file"),
        (["run", "--serve", "--port", "70000"], "--port 70000: give 0 (a free one) to 65535"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(args, message, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", curve(5))
    (tmp_path / "file").write_text("mine")
    assert command.main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("jaxtrain report: ") and message in captured.err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_missing_package_is_one_line_with_the_command(tmp_path, capsys, monkeypatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "plotly.offline":
            raise ModuleNotFoundError("No module named 'plotly'", name="plotly")
        return real(name, *args, **kwargs)

    page.plotly_script.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    assert command.main([str(write_run(tmp_path / "run"))]) == 2
    assert "plotly is not installed: pip install 'jaxtrain[report]'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line_and_exit_code_3(tmp_path, capsys) -> None:
    run = write_run(tmp_path / "run")
    assert command.main([str(run), "--out", str(tmp_path / "absent" / "page.html")]) == 3
    assert "choose another file with --out" in capsys.readouterr().err


def test_the_command_imports_no_jax(tmp_path) -> None:
    run = write_run(tmp_path / "run", curve(5), result_of(0.5))
    script = (
        "import sys\nfrom jaxtrain import __main__ as commands\n"
        f"assert commands.main(['report', {str(run)!r}]) == 0\n"
        "heavy = {'jax', 'flax', 'tensorflow', 'sklearn', 'matplotlib', 'pandas'} & {*sys.modules}\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
