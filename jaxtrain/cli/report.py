"""``python -m jaxtrain report RUN...``: runs as one HTML page, or a page that follows them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtrain.cli import SUMMARIES, command_line
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.files import user_path, write_text
from jaxtrain.core.text import size_text

if TYPE_CHECKING:
    from jaxtrain.report.runs import Reader

PORT = 8001
NO_BROWSER = "no browser was found: open {} yourself"


def make_parser() -> command_line.Parser:
    """Make the parser of this command."""
    parser = command_line.Parser("jaxtrain report", SUMMARIES["report"])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, or of a sweep")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="where the page is written; default: RUN/report.html, or report.html in this folder for several",
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument(
        "--serve",
        action="store_true",
        help="write no file, but follow the runs on a page that this machine alone can open, until Ctrl-C",
    )
    parser.add_argument("--port", type=int, metavar="N", help=f"of --serve; 0: a free one; default: {PORT}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return command_line.main(_run, make_parser(), argv, needs_jax=lambda args: False)


def _run(args: argparse.Namespace) -> int:
    from jaxtrain.report import page
    from jaxtrain.report.runs import Reader

    if args.port is not None and not args.serve:
        raise InputError("--port: only --serve listens on one: add --serve, or leave out --port")
    if args.out is not None and args.serve:
        raise InputError("--out: --serve writes no file: leave out one of them")
    reader = Reader(args.runs)
    page.plotly_script()  # before large files are read
    if args.serve:
        return _serve(reader, PORT if args.port is None else args.port, args.open)
    path = _page_path(args.out, reader)
    text = page.render(page.make_content(reader.read()))
    try:
        write_text(path, text)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror or error}): choose another file with --out"
        ) from error
    sys.stdout.write(f"{path}: {size_text(len(text.encode()))}\n")
    if args.open:
        _open(path.as_uri(), str(path))
    return 0


def _page_path(out: str | None, reader: Reader) -> Path:
    """Return where the page goes, which is a new file or a report."""
    from jaxtrain.report.page import GENERATOR

    folders = reader.folders
    default = folders[0] / "report.html" if len(folders) == 1 else user_path("report.html")
    path = default if out is None else user_path(out)
    if out is not None and (not out or path.is_dir()):
        raise InputError(f"--out {out or 'is empty'}{' is a folder' if out else ''}: give a file")
    if path.exists():
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                ours = GENERATOR in file.read(10_000)
        except OSError as error:
            raise InputError(
                f"{path} cannot be read ({error.strerror}): choose another with --out"
            ) from error
        if not ours:
            raise InputError(f"{path} is not a page of report: choose another with --out")
    return path


def _serve(reader: Reader, port: int, open_page: bool) -> int:
    from jaxtrain.report.server import Follower, Server

    with Server(Follower(reader), port) as server:
        count = len(reader.folders)
        sys.stdout.write(f"{server.address} follows {count} folder{'s' * (count > 1)}; Ctrl-C ends it\n")
        sys.stdout.flush()
        if open_page:
            _open(server.address, server.address)
        server.serve_forever()
    return 0


def _open(address: str, name: str) -> None:
    import webbrowser

    if not webbrowser.open(address):
        command_line.warn(NO_BROWSER.format(name))
