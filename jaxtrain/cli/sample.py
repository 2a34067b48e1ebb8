"""``python -m jaxtrain sample --workdir RUN``: generate text with a trained language model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import numpy as np

from jaxtrain.cli import SUMMARIES, command_line, experiments
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Batch
from jaxtrain.experiment import Experiment


def make_parser() -> command_line.Parser:
    """Make the parser of this command."""
    parser = command_line.Parser("jaxtrain sample", SUMMARIES["sample"])
    parser.add_argument("--workdir", required=True, metavar="RUN", help="the folder of a run")
    command_line.add_weights(parser)
    parser.add_argument(
        "--prompt", default="\n", metavar="TEXT", help="start of the text; default: a line break"
    )
    parser.add_argument(
        "--bytes", type=int, default=500, metavar="N", help="length of the new text; default: %(default)s"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="sampling temperature; 0 always takes the most likely byte; default: %(default)g",
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="sample from the K most likely bytes; default: all"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the sampling; default: %(default)s"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return command_line.main(_run, make_parser(), argv)


def _run(args: argparse.Namespace) -> int:
    import jax

    from jaxtrain import sharding
    from jaxtrain.compress.fake_quantize import compressed
    from jaxtrain.models import as_model, generate
    from jaxtrain.monitor import make_console
    from jaxtrain.program import abstract_state
    from jaxtrain.step.factories import eval_state

    run = experiments.open_run(args)
    experiment = run.experiment
    run.check_code()
    example = _example(run.name, experiment)
    context = int(getattr(experiment.model, "context", example["tokens"].shape[1]))
    _check(args)
    prompt = np.frombuffer(os.fsencode(args.prompt), np.uint8)[None, :]
    console = make_console()
    mesh = sharding.make_mesh(jax.local_devices()[:1])  # a single text cannot be sharded
    _, state = run.restore(args.weights, abstract_state(experiment, mesh, example))
    params, extra = eval_state(state)
    text = generate(
        compressed(as_model(experiment.model), experiment.compress),
        params,
        extra,
        prompt,
        args.bytes,
        jax.random.key(args.seed),
        context=context,
        temperature=args.temperature,
        top_k=args.top_k,
    )
    console.note(np.asarray(text[0]).astype(np.uint8).tobytes().decode(errors="replace"))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Check the values; ``generate`` would refuse them too, but without naming the flags."""
    if not args.prompt:
        raise InputError("--prompt is empty: give at least one character")
    if args.bytes < 1:
        raise InputError(f"--bytes {args.bytes}: give at least 1")
    if not args.temperature >= 0:
        raise InputError(f"--temperature {args.temperature}: give 0 (always the most likely byte) or more")
    if args.top_k is not None and args.top_k < 1:
        raise InputError(f"--top-k {args.top_k}: give at least 1, or leave it out to sample from all")
    if not 0 <= args.seed < 2**31:
        raise InputError(f"--seed {args.seed}: it must be in [0, 2**31)")


def _example(name: str, experiment: Experiment) -> Batch:
    """Return the shapes of one example; raises InputError unless the model predicts the next byte."""
    example: Batch = (experiment.train.example() if hasattr(experiment.train, "example") else None) or {}
    tokens, label = example.get("tokens"), example.get("label")
    if tokens is None or label is None or tokens.shape != label.shape or tokens.dtype != np.uint8:
        raise InputError(
            f"{name} is not a language model over bytes: sample needs a run on data.TextWindows, "
            "such as shakespeare_gpt"
        )
    return example
