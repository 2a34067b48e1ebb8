"""``python -m jaxtrain predict --model FILE INPUT...``: predictions of an exported model."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jaxtrain.cli import SUMMARIES, command_line
from jaxtrain.core.errors import InputError
from jaxtrain.core.files import user_path

if TYPE_CHECKING:
    from jaxtrain.artifact.engines import Engine, Prediction

ENGINES = ("jax", "onnxruntime")
FORMATS = ("jsonl", "csv")


def make_parser() -> command_line.Parser:
    """Make the parser of this command."""
    parser = command_line.Parser("jaxtrain predict", SUMMARIES["predict"])
    parser.add_argument("--model", required=True, metavar="FILE", help="what python -m jaxtrain export wrote")
    command_line.add_inputs(parser)
    parser.add_argument(
        "--batch", type=int, default=32, metavar="N", help="examples in a batch; default: %(default)s"
    )
    parser.add_argument(
        "--format", default="jsonl", choices=FORMATS, help="JSON lines or csv on stdout; default: %(default)s"
    )
    parser.add_argument("--raw", action="store_true", help="write all outputs, such as logits")
    parser.add_argument(
        "--resize",
        action="store_true",
        help="crop images of another size at the centre and resize them (bilinear)",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="what runs the model; default: onnxruntime for .onnx files, else jax",
    )
    parser.add_argument(
        "--bench", action="store_true", help="measure latency and throughput for batches of 1 to 256 instead"
    )
    parser.add_argument("--json", action="store_true", help="print the figures of --bench as one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return command_line.main(
        _run, make_parser(), argv, needs_jax=lambda args: not args.model.endswith(".onnx")
    )


def _run(args: argparse.Namespace) -> int:
    from jaxtrain.artifact import engines, lines
    from jaxtrain.artifact.examples import Reader

    _check(args)
    model = engines.open_model(user_path(args.model), args.engine)
    if args.bench:
        return _bench(args, model)
    reader = Reader(model.manifest, model.words, args.resize)
    put = lines.make_writer(args.format, sys.stdout.write)
    describe = lines.raw if args.raw else lines.summarize
    examples = reader.read(args.inputs, sys.stdin.buffer if "-" in args.inputs else io.BytesIO())
    unusual: dict[str, list[Any]] = {"examples": [], "predictions": []}
    try:
        for prediction in _with_progress(engines.predict(model, examples, args.batch)):
            put(row := describe(model.manifest, prediction))
            _note_not_finite(unusual, prediction, row)
    finally:
        for what, ids in unusual.items():
            if ids:
                command_line.warn(f"{len(ids):,} {what} hold NaN or infinity, the first {ids[0]}")
    if reader.skipped:
        command_line.warn(f"{reader.skipped} files in folders are no images and no .npy arrays: skipped")
    return 0


def _note_not_finite(unusual: dict[str, list[Any]], prediction: Prediction, row: dict[str, Any]) -> None:
    """Collect the ids of examples and predictions with NaN or infinity."""
    from jaxtrain.core.files import not_finite

    if not_finite(prediction.example.inputs):
        unusual["examples"].append(prediction.example.id)
    if not_finite(row):
        unusual["predictions"].append(prediction.example.id)


def _bench(args: argparse.Namespace, model: Engine) -> int:
    from jaxtrain.artifact import bench
    from jaxtrain.core.files import to_json

    onnx = args.model.endswith(".onnx")
    if onnx:
        device = "cpu"
    else:
        import jax

        device = jax.devices()[0].device_kind
    about = {"model": model.manifest.name, "engine": "onnxruntime" if onnx else "jax", "device": device}
    rows = []
    if not args.json:
        _print(f"{about['model']}, {about['engine']} on {device}")
        _print(f"{'batch':>5}  {'p50 ms':>9}  {'p99 ms':>9}  {'examples/s':>12}  {'calls':>6}")
    for row in bench.measure(model, model.manifest):
        rows.append(row)
        if not args.json:
            _print(
                f"{row['batch']:>5}  {row['p50_ms']:>9.3f}  {row['p99_ms']:>9.3f}  "
                f"{row['examples_per_second']:>12,.0f}  {row['calls']:>6}"
            )
    if args.json:
        _print(to_json({**about, "batches": rows}))
    return 0


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _check(args: argparse.Namespace) -> None:
    if args.batch < 1:
        raise InputError(f"--batch {args.batch}: give at least 1")
    if args.bench and args.inputs:
        raise InputError("--bench makes its own inputs: leave out INPUT")
    if args.json and not args.bench:
        raise InputError("--json is for --bench: predictions are JSON lines by default")
    if "-" in args.inputs and sys.stdin is None:
        raise InputError("-: stdin is closed, and there is no text to read")
    if not args.bench and not args.inputs:
        raise InputError(
            "give at least one INPUT: an image, a folder, a .npy or .csv file, or - for text on stdin"
        )


def _with_progress(rows: Iterator[Any]) -> Iterator[Any]:
    """Show the number of predictions on a terminal, if they go elsewhere."""
    if not sys.stderr.isatty() or sys.stdout.isatty():
        yield from rows
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("predict"), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(rows, total=None)
