"""``python -m jaxtrain sample --workdir RUN``: text from a trained language model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import numpy as np

from jaxtrain.cli import SUMMARIES, command_line, experiments
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Batch
from jaxtrain.experiment import Experiment


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="jaxtrain sample", description=SUMMARIES["sample"])
    parser.add_argument("--workdir", required=True, metavar="RUN", help="the folder of a run")
    command_line.add_checkpoint(parser)
    parser.add_argument("--prompt", default="\n", metavar="TEXT", help="what the text goes on from")
    parser.add_argument(
        "--bytes", type=int, default=500, metavar="N", help="length of the new text; default 500"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="0: always the likeliest byte; default 0.8",
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="draw among the K likeliest bytes; default: all"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, another text")
    return command_line.main(_run, parser, argv)


def _run(args: argparse.Namespace) -> int:
    import jax

    from jaxtrain import checkpoint, sharding
    from jaxtrain.models import generate
    from jaxtrain.monitor import make_console
    from jaxtrain.program import abstract_state
    from jaxtrain.step.factories import eval_state
    from jaxtrain.train import run_folder

    folder = command_line.workdir_path(args.workdir)
    record = run_folder.load(folder)
    name, experiment = experiments.load_recorded(record, folder, args.experiment)
    example = _example(name, experiment)
    context = int(getattr(experiment.model, "context", example["tokens"].shape[1]))
    _check(args)
    prompt = np.frombuffer(os.fsencode(args.prompt), np.uint8)[None, :]
    console = make_console()
    one = sharding.make_mesh(jax.local_devices()[:1])  # one text at a time has nothing to split
    abstract = abstract_state(experiment, one, example)
    with checkpoint.open(
        folder, log=command_line.warn, older_hint="take an older one with --checkpoint {step}"
    ) as saved:
        state = saved.restore(command_line.choose_checkpoint(saved, args.checkpoint, folder), abstract)
    params, extra = eval_state(state)
    text = generate(
        experiment.model,
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
    """What ``generate`` would refuse too, by the names that were typed."""
    if not args.prompt:
        raise InputError("--prompt is empty: give at least one character to go on from")
    if args.bytes < 1:
        raise InputError(f"--bytes {args.bytes}: give at least 1")
    if not args.temperature >= 0:
        raise InputError(f"--temperature {args.temperature}: give 0 (always the likeliest byte) or more")
    if args.top_k is not None and args.top_k < 1:
        raise InputError(f"--top-k {args.top_k}: give at least 1, or leave it out to draw among all")
    if not 0 <= args.seed < 2**31:
        raise InputError(f"--seed {args.seed}: it must be in [0, 2**31)")


def _example(name: str, experiment: Experiment) -> Batch:
    """One example's shapes, for a model that predicts the next byte."""
    example: Batch = (experiment.train.example() if hasattr(experiment.train, "example") else None) or {}
    tokens, label = example.get("tokens"), example.get("label")
    if tokens is None or label is None or tokens.shape != label.shape or tokens.dtype != np.uint8:
        raise InputError(
            f"{name} is no language model over bytes: sample needs a run on data.TextWindows, "
            "such as shakespeare_gpt"
        )
    return example
