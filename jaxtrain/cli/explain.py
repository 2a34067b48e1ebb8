"""``python -m jaxtrain explain --workdir RUN INPUT...``: what predictions depend on, as a page."""

from __future__ import annotations

import argparse
import io
import itertools
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxtrain.cli import SUMMARIES, command_line, experiments
from jaxtrain.core.errors import InputError
from jaxtrain.core.files import to_json, user_path

if TYPE_CHECKING:
    from jaxtrain.artifact.examples import Example
    from jaxtrain.explain.forward import Forward

METHODS = ("integrated_gradients", "smoothgrad", "grad_cam", "rollout")
COUNT = 16
"""Most examples on a page."""


def make_parser() -> command_line.Parser:
    """Make the parser of this command."""
    parser = command_line.Parser("jaxtrain explain", SUMMARIES["explain"])
    parser.add_argument("--workdir", metavar="RUN", help="the folder of a run")
    parser.add_argument("--model", help=argparse.SUPPRESS)  # of predict
    command_line.add_weights(parser)
    command_line.add_inputs(parser)
    parser.add_argument(
        "--split", choices=("test", "valid", "train"), help="explain examples of the run's data instead"
    )
    parser.add_argument(
        "--count", type=int, default=COUNT, metavar="N", help="at most N examples; default: %(default)s"
    )
    parser.add_argument(
        "--resize",
        action="store_true",
        help="crop images of another size at the centre and resize them (bilinear)",
    )
    parser.add_argument(
        "--method",
        action="append",
        choices=METHODS,
        help="may be repeated; default: integrated_gradients, smoothgrad unless the input is text, and "
        "rollout for models with attention or grad_cam for others with feature maps",
    )
    parser.add_argument(
        "--target", metavar="CLASS", help="the class to explain, a name or number; default: the predicted one"
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="points of integrated_gradients; default: 128, or 512 for text",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=64,
        metavar="N",
        help="noisy copies of smoothgrad; default: %(default)s",
    )
    parser.add_argument(
        "--layer",
        metavar="PATH",
        help="of grad_cam, a layer with feature maps; default: the last one, which is the last convolution "
        "or the normalisation or block after it",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where index.html and the PNGs are written; default: RUN/explain/STEP"
    )
    parser.add_argument(
        "--strict", action="store_true", help="fail if the code has changed since the run started"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return command_line.main(_run, make_parser(), argv)


def _run(args: argparse.Namespace) -> int:
    import jax
    import numpy as np

    from jaxtrain import sharding
    from jaxtrain.data.checked import CheckedSource
    from jaxtrain.explain import page
    from jaxtrain.explain.explainer import Explainer, Settings
    from jaxtrain.explain.forward import Forward
    from jaxtrain.monitor import make_console
    from jaxtrain.program import abstract_state

    _check(args)
    run = experiments.open_run(args)
    console = make_console()
    experiments.ensure_prepared(run.experiment, console, command_line.warn if args.json else None)
    run.check_code(args.strict)
    shapes = CheckedSource("test", run.experiment.test).gather(np.arange(1))
    mesh = sharding.make_mesh(jax.local_devices()[:1])
    chosen, state = run.restore(args.weights, abstract_state(run.experiment, mesh, shapes))
    about = {"name": run.name, "step": chosen.step, "metrics": {}, "config": run.record["config"]}
    forward = Forward(run.experiment, state, shapes, about)
    settings = Settings(
        tuple(dict.fromkeys(args.method or ())), args.target, args.steps, args.samples, args.layer
    )
    explainer = Explainer(forward, settings)
    examples, labels = _from_split(args, run, forward) if args.split else _from_files(args, forward)
    explanations = [explainer.explain(example) for example in examples]
    folder = user_path(args.out or run.folder / "explain" / f"{chosen.step:06d}")
    title = f"{run.name}, step {chosen.step:,}: what its predictions depend on"
    path, records = page.write(folder, title, explainer, explanations, labels)
    if args.json:
        body = {"name": run.name, "step": chosen.step, "methods": explainer.methods, "layer": explainer.layer}
        console.note(to_json({**body, "page": str(path), "examples": records}))
    else:
        console.note(f"{path}: {len(records)} predictions, {', '.join(explainer.methods)}")
    _warn_incomplete(records, explainer.steps)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Check the flags before anything is loaded."""
    if args.model is not None:
        raise InputError(
            "--model: an exported model has no layers or gradients to look into; give --workdir RUN, the run "
            "that it was exported from"
        )
    if args.workdir is None:
        raise InputError("give --workdir RUN, the folder of a run")
    if args.split is None and not args.inputs:
        raise InputError("give at least one INPUT (an image, a folder, ...), or --split test")
    if args.split is not None and args.inputs:
        raise InputError(f"--split {args.split}: leave out {args.inputs[0]}, or leave out --split")
    if args.split is not None and args.resize:
        raise InputError("--resize is for image files: leave it out with --split")
    if args.count < 1:
        raise InputError(f"--count {args.count}: give at least 1")
    if args.out is not None and (not args.out or os.path.isfile(user_path(args.out))):  # noqa: PTH113
        raise InputError(f"--out {args.out} is {'a file' if args.out else 'empty'}: give a folder")
    if "-" in args.inputs and sys.stdin is None:
        raise InputError("-: stdin is closed, and there is no text to read")


def _from_files(args: argparse.Namespace, forward: Forward) -> tuple[list[Example], list[None]]:
    """Read the examples of files, at most ``--count``."""
    from jaxtrain.artifact.examples import Reader

    reader = Reader(forward.manifest, forward.words, args.resize)
    found = reader.read(args.inputs, sys.stdin.buffer if "-" in args.inputs else io.BytesIO())
    examples = list(itertools.islice(found, args.count))
    if not examples:
        raise InputError(f"{', '.join(args.inputs)}: there is no example in it")
    if next(found, None) is not None:
        command_line.warn(f"only the first {args.count} inputs are explained: more with --count N")
    if reader.skipped:
        command_line.warn(f"{reader.skipped} files in folders are no images and no .npy arrays: skipped")
    return examples, [None] * len(examples)


def _from_split(
    args: argparse.Namespace, run: experiments.RecordedRun, forward: Forward
) -> tuple[list[Example], list[Any]]:
    """Take examples of the run's data, evenly spaced, with their labels where they are classes."""
    import numpy as np

    from jaxtrain.artifact.examples import Example
    from jaxtrain.data.checked import CheckedSource
    from jaxtrain.evaluation import splits

    experiment, name = splits.evaluation_split(run.experiment, args.split)
    held_out = args.split == "valid" and run.experiment.valid is None
    own = "train" if held_out else args.split
    run.check_data({own: getattr(run.experiment, own)}, args.split, accept=False)
    source = CheckedSource(args.split, splits.split_source(experiment, name))
    count = min(args.count, len(source))
    ids = np.arange(count) * len(source) // count
    fields = source.gather(ids)
    label = np.asarray(fields.get("label", np.empty(0)))
    classes = forward.task in ("classification", "binary") and label.shape in ((count,), (count, 1))
    labels = [int(x) for x in label.reshape(-1)] if classes else [None] * count
    examples = []
    for row, number in enumerate(ids):
        inputs = {field: np.asarray(fields[field][row]) for field in forward.manifest.inputs}
        tokens = None if forward.kind != "tokens" else len(inputs[forward.field])
        tokens = min(tokens, int(inputs["length"])) if tokens is not None and "length" in inputs else tokens
        examples.append(Example(f"{args.split} {number}", inputs, tokens))
    return examples, labels


def _warn_incomplete(records: Sequence[dict[str, Any]], steps: int) -> None:
    """Print a line where attributions do not add up to within 1 %."""
    errors = {one["id"]: one.get("completeness_error", 0.0) for one in records}
    off = [id for id, error in errors.items() if not error <= 0.01]
    if off:
        worst = max(off, key=errors.__getitem__)
        command_line.warn(
            f"integrated_gradients: {len(off)} of {len(errors)} predictions are more than 1 % from complete, "
            f"{worst} by {100 * errors[worst]:.3g} %: try --steps {4 * steps}"
        )
