"""docs/cli.md is generated from the parsers, and every help text names its default."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from typing import Any

import pytest
from conftest import ROOT

from jaxtrain.cli import SUMMARIES


@pytest.fixture(scope="module")
def renderer() -> Any:
    spec = importlib.util.spec_from_file_location("render_cli", ROOT / "scripts" / "render_cli.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parser_of(command: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = importlib.import_module(f"jaxtrain.cli.{command}").make_parser()
    return parser


def test_the_page_is_up_to_date(renderer: Any) -> None:
    assert renderer.PAGE.read_text() == renderer.page(), (
        "docs/cli.md is out of date: run `python scripts/render_cli.py` and commit the page"
    )


def test_the_page_does_not_depend_on_the_terminal(renderer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert renderer.page() == renderer.PAGE.read_text()


@pytest.mark.parametrize("command", SUMMARIES)
def test_the_page_shows_every_flag(renderer: Any, command: str) -> None:
    section = "\n".join(renderer.section(command))
    for action in parser_of(command)._actions:
        if action.option_strings and renderer.visible(action):
            assert f"- `{action.option_strings[0]}" in section


@pytest.mark.parametrize("command", SUMMARIES)
def test_help_texts_name_their_defaults(renderer: Any, command: str) -> None:
    for action in parser_of(command)._actions:
        if renderer.visible(action) and action.default not in (None, False, [], argparse.SUPPRESS):
            assert action.help is not None and "default: " in action.help, action.option_strings


@pytest.mark.parametrize("command", SUMMARIES)
def test_flags_cannot_be_abbreviated(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parser_of(command).parse_args(["--deb"])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
