"""``python -m jaxtrain export --workdir RUN --out FILE``: a run's model as one file."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtrain.cli import SUMMARIES, command_line, experiments
from jaxtrain.core.errors import InputError
from jaxtrain.core.files import user_path
from jaxtrain.core.text import first_line, size_text

if TYPE_CHECKING:
    from jaxtrain.export.trained import Trained
    from jaxtrain.monitor import Console

FORMATS = ("jaxtrain", "onnx", "stablehlo", "safetensors")
EXAMPLES = 16
"""Test examples on which the file is compared with the model."""


def make_parser() -> command_line.Parser:
    """Make the parser of this command."""
    parser = command_line.Parser("jaxtrain export", SUMMARIES["export"])
    parser.add_argument("--workdir", required=True, metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="the file to write, such as model.jaxtrain"
    )
    parser.add_argument(
        "--format",
        default="jaxtrain",
        choices=FORMATS,
        help="jaxtrain: program, weights, labels and metrics in one file; onnx: for onnxruntime and other "
        "engines; stablehlo: the program alone, weights as arguments; safetensors: the weights alone; "
        "default: %(default)s",
    )
    command_line.add_weights(parser)
    parser.add_argument(
        "--quantize",
        choices=("int8",),
        help="dense layers and convolutions in 8-bit integers, a quarter of the bytes",
    )
    parser.add_argument(
        "--calibrate",
        type=int,
        default=512,
        metavar="N",
        help="training examples on which --quantize measures the ranges of activations; default: %(default)s",
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.add_argument(
        "--strict", action="store_true", help="fail if the code has changed since the run started"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return command_line.main(_run, make_parser(), argv)


def _run(args: argparse.Namespace) -> int:
    import jax
    import numpy as np

    from jaxtrain import sharding
    from jaxtrain.artifact.parts import check_new
    from jaxtrain.data.checked import CheckedSource
    from jaxtrain.export import trained, write
    from jaxtrain.monitor import make_console
    from jaxtrain.program import abstract_state

    if args.calibrate < 1:
        raise InputError(f"--calibrate {args.calibrate}: give at least 1")
    path = user_path(args.out)
    _check_suffix(path, args.format)
    check_new(path, args.force)  # before minutes of work
    run = experiments.open_run(args)
    console = make_console()
    experiments.ensure_prepared(run.experiment, console)
    run.check_code(args.strict)
    test = CheckedSource("test", run.experiment.test)
    count = min(EXAMPLES, len(test))
    examples = test.gather(np.arange(count) * len(test) // count)
    mesh = sharding.make_mesh(jax.local_devices()[:1])
    chosen, state = run.restore(args.weights, abstract_state(run.experiment, mesh, examples))
    about = {
        "name": run.name,
        "step": chosen.step,
        "metrics": recorded_metrics(run.folder, chosen.step),
        "config": run.record["config"],
    }
    model = trained.Trained.of(run.experiment, state, examples, about)
    calibrate = args.calibrate if args.quantize and args.format == "onnx" else 0
    if args.quantize and not calibrate:
        model = _quantize(model, args.calibrate, console)
    checked = write.write(args.format, path, model, args.force, calibrate)
    console.note(f"{path}: {run.name}, step {chosen.step:,}, {size_text(path.stat().st_size)}; {checked}")
    return 0


def _check_suffix(path: Path, format: str) -> None:
    """Raise InputError unless the name says whether it is ONNX, as ``predict`` reads it."""
    onnx = path.suffix.lower() == ".onnx"
    if format == "onnx" and not onnx:
        raise InputError(f"--out {path.name}: the name of an ONNX file ends in .onnx, which predict needs")
    if onnx and format != "onnx":
        raise InputError(f"--out {path.name}: this name is for --format onnx, and the format is {format}")


def _quantize(model: Trained, examples: int, console: Console) -> Trained:
    """Return the model in int8, and print what that changes on the test set."""
    import numpy as np

    from jaxtrain.export import quantized

    before, int8 = quantized.metrics_on_test_set(model), quantized.quantize_trained(model, examples)
    after = quantized.metrics_on_test_set(int8)
    sizes = [
        size_text(sum(np.asarray(x).nbytes for x in one.serving.weights.values())) for one in (model, int8)
    ]
    changes = ", ".join([*quantized.compare_metrics(before, after), f"weights {sizes[0]} -> {sizes[1]}"])
    examples = min(examples, len(model.experiment.train))
    ranges = (
        f"ranges of {examples:,} training examples" if model.experiment.compress is None else "as trained"
    )
    console.note(f"int8, {ranges}; test: {changes}")
    about = {**int8.about, "metrics": {"test": after}}
    return dataclasses.replace(int8, about=about)


def recorded_metrics(folder: Path, step: int) -> Mapping[str, Any]:
    """Return the test metrics that ``result.json`` has of this checkpoint; none where it has none.

    Raises:
      InputError: the file is damaged.
    """
    path = folder / "result.json"
    try:
        result = json.loads(path.read_text())
        best = result.get("best") or {}
        for entry, at in ((result, result["steps"]), (best, best.get("step"))):
            if at == step and isinstance(entry.get("test"), dict):
                return {"test": entry["test"]}
    except FileNotFoundError:  # the run has not ended
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read ({first_line(error)}): restore it, or delete it to export without metrics"
        ) from error
    return {}
