"""``python -m jaxtrain verify --experiment NAME``: check that a killed run resumes bit-for-bit.

One process trains N steps. A second one trains the same and is killed (SIGKILL) after its checkpoint of step
N/2; a third one resumes from there. Example ids, metrics and the final states must be identical.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxtrain.cli import SUMMARIES, command_line, devices, experiments, flags
from jaxtrain.cli.verify_compare import compare
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.files import temporary_folder
from jaxtrain.sharding import multihost

TOLERANCE = 1e-5
STEPS = 20
PHASES = ("choose", "straight", "mesh", "killed", "resumed")
CHOICE = "dispatch.json"


def make_parser() -> command_line.Parser:
    """Make the parser of this command."""
    parser = command_line.Parser("jaxtrain verify", SUMMARIES["verify"])
    flags.add_experiment(parser)
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help=f"number of steps, even; default: {STEPS}, or 4 × steps_per_execution if that is more",
    )
    parser.add_argument(
        "--against-mesh",
        metavar="AXIS=N,...",
        help="instead of killing, train on this mesh too, and compare within --tolerance",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help="largest relative L2 distance of an array, with --against-mesh or --processes, which change "
        "the order of sums; default: %(default)g",
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # for the processes that it starts
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    flags.add(parser, many_processes=True, starts_processes=True)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 if the runs are the same, 3 if not."""
    return command_line.main(_run, make_parser(), argv)


def _run(args: argparse.Namespace) -> int:
    if args.steps is not None and (args.steps < 2 or args.steps % 2):
        raise InputError(f"--steps {args.steps}: give an even number, at least 2")
    if not 0 <= args.tolerance < 1:
        raise InputError(f"--tolerance {args.tolerance:g}: give a number in [0, 1)")
    if args.child is not None:
        return _train(args)
    processes = args.processes or 1
    if args.distributed or args.coordinator or args.process_id is not None:
        raise InputError("verify starts its processes itself, on this machine: give only --processes N")
    if processes > 1 and (args.simulate_devices or 0) % processes:
        raise InputError(f"--processes {processes}: --simulate-devices must be a multiple of it")
    if processes > 1 and not args.simulate_devices:
        raise InputError(f"--processes {processes} needs simulated devices: add --simulate-devices 8")
    return _verify(args, processes)


def _verify(args: argparse.Namespace, processes: int) -> int:
    """Start the runs, compare them and print the result."""
    name, _, experiment = experiments.load_experiment(args.experiment, args.set)
    from jaxtrain.monitor import make_console

    console = make_console()
    experiments.ensure_prepared(experiment, console)
    with temporary_folder("jaxtrain-verify-") as folder:
        one, other = Path(folder, "one"), Path(folder, "other")
        count = _fix_steps_per_execution(args, experiment, one)
        args.steps = args.steps or max(STEPS, 4 * count)
        if count > args.steps // 2:
            console.note(f"too few steps to test an execution of {count} updates: use --steps {4 * count}")
        console.note(f"verify {name}: training {args.steps} steps")
        _start(args, one, "straight")
        if args.against_mesh:
            console.note(f"training the same on {args.against_mesh}")
            _start(args, other, "mesh")
        else:
            console.note(f"training the same, killed after the checkpoint of step {args.steps // 2}")
            _start(args, other, "killed")
            console.note("resuming" + (f" with {processes} processes" if processes > 1 else ""))
            _start(args, other, "resumed", processes)
        exact = processes == 1 and not args.against_mesh
        compared = compare(one, other, args.steps, 0.0 if exact else args.tolerance)
    console.summary(f"verify {name}", compared)
    console.note("verified: bit-for-bit identical" if exact else f"verified: equal within {args.tolerance:g}")
    return 0


def _fix_steps_per_execution(args: argparse.Namespace, experiment: Any, folder: Path) -> int:
    """Return ``steps_per_execution`` as a run of ``experiment`` has it, and set it for all phases."""
    from jaxtrain.train.autotune import MIN_UPDATES

    count: int | Literal["auto"] = experiment.steps_per_execution
    if count == "auto" and (args.deterministic or _epoch(experiment) * experiment.epochs < MIN_UPDATES):
        count = 1
    if count == "auto":
        _start(args, folder, "choose")
        count = int(json.loads((folder / CHOICE).read_text()))
    args.set = [*args.set, f"steps_per_execution={count}"]
    return count


def _start(args: argparse.Namespace, folder: Path, phase: str, count: int = 1) -> None:
    """Train in ``count`` new processes that share the mesh, and wait until they exit.

    Raises:
      InputError, RunError: a process failed; the message is the last line of its error.
    """
    words = [sys.executable, "-m", "jaxtrain", "verify", "--child", str(folder), "--phase", phase]
    words += ["--experiment", args.experiment, "--steps", str(args.steps or STEPS)]
    mesh = args.against_mesh if phase == "mesh" else args.mesh
    for setting in args.set:
        words += ["--set", setting]
    for flag, value in (("devices", args.devices), ("mesh", mesh)):
        words += [] if value is None else [f"--{flag}", str(value)]
    if args.simulate_devices:
        words += ["--simulate-devices", str(args.simulate_devices // count)]
    words += [f"--{flag}" for flag in ("deterministic", "debug") if getattr(args, flag)]
    if count > 1:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        words += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count)]
    folder.mkdir(exist_ok=True)
    running = []
    for index in range(count):
        extra = ["--process-id", str(index)] if count > 1 else []
        running.append(
            subprocess.Popen([*words, *extra], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
    errors = [process.communicate()[1] for process in running]
    expected = -signal.SIGKILL if phase == "killed" else 0
    for process, error in zip(running, errors, strict=True):
        if process.returncode != expected:
            text = error.strip().removeprefix("jaxtrain verify: ") or f"exit code {process.returncode}"
            raise (InputError if process.returncode == 2 else RunError)(
                text if args.debug else text.splitlines()[-1]
            )


def _train(args: argparse.Namespace) -> int:
    """Run one phase in a process started by ``_start``; records the example ids of every batch."""
    from jaxtrain.monitor import make_console
    from jaxtrain.program import assemble
    from jaxtrain.train.autotune import decide
    from jaxtrain.train.loop import fit

    name, _, experiment = experiments.load_experiment(args.experiment, args.set)
    mesh = devices.make_mesh(args, command_line.warn)
    if args.phase == "choose":
        choice = decide(assemble(experiment, mesh), None, args.deterministic)
        (args.child / CHOICE).write_text(json.dumps(choice.count))
        return 0
    program = assemble(_shorten(experiment, args.steps), mesh)
    if program.steps != args.steps:
        raise RunError(f"{name} would train {program.steps} steps, not {args.steps}: please report this bug")
    loader = RecordingLoader(program.train, args.child, args.phase, args.steps // 2)
    program = dataclasses.replace(program, train=loader)
    try:
        fit(program, args.child, make_console(quiet=True), name)
    finally:
        program.close()
    return 0


def _shorten(experiment: Any, steps: int) -> Any:
    """Return ``experiment`` with ``steps`` steps, saved halfway and at the end, logged at every step."""
    epoch = _epoch(experiment)
    return dataclasses.replace(
        experiment,
        epochs=(steps - 0.5) / epoch,  # steps are rounded up
        save_every=(1 - 1e-9) * steps / 2 / epoch,
        eval_every=None,
        log_every=1,
        max_to_keep=2,
    )


def _epoch(experiment: Any) -> float:
    """Return the number of batches per epoch."""
    from jaxtrain.data import holdout

    n = len(experiment.train)
    if experiment.holdout:
        n = len(holdout(n, experiment.holdout)[0])
    epoch: float = n // experiment.batch if experiment.drop_remainder else n / experiment.batch
    if not epoch:
        raise InputError(f"drop_remainder=True leaves no batch of {experiment.batch} in {n} examples")
    return epoch


class RecordingLoader:
    """A loader that records the example ids of every batch; in phase "killed" it kills its process.

    It writes a line of JSON per batch to ``PHASE-PROCESS.jsonl`` in ``folder``.

    Args:
      loader: of the program.
      folder: of the run.
      phase: one of ``PHASES``.
      half: the step whose checkpoint must be complete before the process is killed.
    """

    def __init__(self, loader: Any, folder: Path, phase: str, half: int) -> None:
        self._loader, self.shardings = loader, loader.shardings
        self.stacked_shardings = loader.stacked_shardings
        self._file = (folder / f"{phase}-{multihost.process_index()}.jsonl").open("w")
        self._kill_step = half if phase == "killed" else None
        self._manifest = folder / "checkpoints" / f"{half:06d}" / "manifest.json"

    def batch(self, step: int) -> Any:
        self._maybe_kill(step)
        batch = self._loader.batch(step)
        self._record(step, _ids(batch, 0))
        return batch

    def batches(self, step: int, count: int) -> tuple[Any, Any]:
        self._maybe_kill(step)
        batches, shared = self._loader.batches(step, count)
        for k, ids in enumerate(np.moveaxis(_ids(batches, 1), 1, 0)):
            self._record(step + k, ids)
        return batches, shared

    def _maybe_kill(self, step: int) -> None:
        if step == self._kill_step:
            while not self._manifest.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    def _record(self, step: int, ids: np.ndarray) -> None:
        self._file.write(json.dumps({"step": step + 1, "ids": ids.tolist()}) + "\n")
        self._file.flush()

    def host_batch(self, step: int) -> Any:
        return self._loader.host_batch(step)

    def with_order(self, order: Any) -> Any:
        return self._loader.with_order(order)

    def abstract_batch(self) -> Any:
        return self._loader.abstract_batch()

    def fetch(self, batch: Any) -> Any:
        return self._loader.fetch(batch)

    def close(self) -> None:
        self._file.close()
        self._loader.close()


def _ids(batch: Any, axis: int) -> np.ndarray:
    """Return the example ids of this process's rows: int [rows, ...].

    Args:
      batch: from the loader.
      axis: the axis of the rows in its arrays.
    """
    rows = batch.get("rows", batch.get("example_id"))
    if hasattr(rows, "addressable_shards"):  # this process's shards; replicas have the same index
        parts = {str(shard.index): np.asarray(shard.data) for shard in rows.addressable_shards}
        rows = np.concatenate(list(parts.values()), axis)
    rows = np.moveaxis(np.asarray(rows), axis, 0)
    return rows[..., 0] if "rows" in batch else rows
