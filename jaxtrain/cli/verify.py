"""``python -m jaxtrain verify --experiment NAME``: proves that a run which is killed goes on exactly.

One process trains N steps. Another trains the same, and is killed (SIGKILL) after its checkpoint of step N/2;
a third goes on from there. What they were fed, what they recorded and what they ended with must be the same.
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
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxtrain.cli import SUMMARIES, command_line, devices, experiments, flags
from jaxtrain.cli.verify_compare import compare
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.sharding import multihost

TOLERANCE = 1e-5
STEPS = 20
PHASES = ("choose", "straight", "mesh", "killed", "resumed")
CHOICE = "dispatch.json"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 the same, 3 not."""
    parser = argparse.ArgumentParser(prog="jaxtrain verify", description=SUMMARIES["verify"])
    parser.add_argument(
        "--experiment", required=True, metavar="NAME", help="a name from run --list, or a path to a .py"
    )
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a setting")
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help=f"even; default: {STEPS}, or four dispatches of as many updates as a run of it makes at once",
    )
    parser.add_argument(
        "--against-mesh",
        metavar="AXIS=N,...",
        help="instead of killing: train on this mesh too, and compare within --tolerance",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help="relative L2 distance of an array that is allowed where bits cannot be the same: "
        "--against-mesh, --processes; default: %(default)g",
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # what this command starts itself
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    flags.add(parser, many_processes=True)
    return command_line.main(_run, parser, argv)


def _run(args: argparse.Namespace) -> int:
    if args.steps is not None and (args.steps < 2 or args.steps % 2):
        raise InputError(f"--steps {args.steps}: give an even number, at least 2")
    if not 0 <= args.tolerance < 1:
        raise InputError(f"--tolerance {args.tolerance:g}: give a number in [0, 1)")
    if args.child is not None:
        return _train(args)
    several = args.processes or 1
    if args.distributed or args.coordinator or args.process_id is not None:
        raise InputError("verify starts its processes itself, on this machine: give --processes N alone")
    if several > 1 and (args.simulate_devices or 0) % several:
        raise InputError(f"--processes {several}: --simulate-devices must be a multiple of it")
    if several > 1 and not args.simulate_devices:
        raise InputError(f"--processes {several} works on simulated devices: add --simulate-devices 8")
    name, _, experiment = experiments.load_experiment(args.experiment, args.set)
    from jaxtrain.monitor import make_console

    console = make_console()
    experiments.ensure_prepared(experiment, console)
    with tempfile.TemporaryDirectory(prefix="jaxtrain-verify-") as folder:
        one, other = Path(folder, "one"), Path(folder, "other")
        count = _per_dispatch(args, experiment, one)
        args.steps = args.steps or max(STEPS, 4 * count)
        if count > args.steps // 2:
            console.note(f"there is no dispatch of {count} updates in so few: --steps {4 * count} has some")
        console.note(f"verify {name}: {args.steps} steps straight")
        _start(args, one, "straight")
        if args.against_mesh:
            console.note(f"the same on {args.against_mesh}")
            _start(args, other, "mesh")
        else:
            console.note(f"the same, killed after the checkpoint of step {args.steps // 2}")
            _start(args, other, "killed")
            console.note("going on from there" + (f" as {several} processes" if several > 1 else ""))
            _start(args, other, "resumed", several)
        exact = several == 1 and not args.against_mesh
        compared = compare(one, other, args.steps, 0.0 if exact else args.tolerance)
    console.summary(f"verify {name}", compared)
    what = "bit for bit" if exact else f"within {args.tolerance:g}"
    console.note(f"verified: the same {what}")
    return 0


def _per_dispatch(args: argparse.Namespace, experiment: Any, folder: Path) -> int:
    """Updates a dispatch, as a run of ``experiment`` has them; from here on all phases have as many."""
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
    """Train in fresh processes, ``count`` of them as one, and wait for their end."""
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
    for number in range(count):
        own = ["--process-id", str(number)] if count > 1 else []
        running.append(
            subprocess.Popen([*words, *own], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
    errors = [process.communicate()[1] for process in running]
    wanted = -signal.SIGKILL if phase == "killed" else 0
    for process, error in zip(running, errors, strict=True):
        if process.returncode != wanted:
            told = error.strip().removeprefix("jaxtrain verify: ") or f"exit code {process.returncode}"
            raise (InputError if process.returncode == 2 else RunError)(
                told if args.debug else told.splitlines()[-1]
            )


def _train(args: argparse.Namespace) -> int:
    """What ``_start`` starts: the run itself, which writes down what it is fed."""
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
    program = assemble(_shortened(experiment, args.steps), mesh)
    if program.steps != args.steps:
        raise RunError(f"{name} would train {program.steps} steps, not {args.steps}: report this")
    noted = _Noted(program.train, args.child, args.phase, args.steps // 2)
    program = dataclasses.replace(program, train=noted)
    try:
        fit(program, args.child, make_console(quiet=True), name)
    finally:
        program.close()
    return 0


def _shortened(experiment: Any, steps: int) -> Any:
    """``experiment`` with that many steps, saved half-way and at the end, recorded at each."""
    epoch = _epoch(experiment)
    return dataclasses.replace(
        experiment,
        epochs=(steps - 0.5) / epoch,  # a begun batch counts whole
        save_every=(1 - 1e-9) * steps / 2 / epoch,
        eval_every=None,
        log_every=1,
        max_to_keep=2,
    )


def _epoch(experiment: Any) -> float:
    """Batches in a pass over the training examples."""
    from jaxtrain.data import holdout

    n = len(experiment.train)
    if experiment.holdout:
        n = len(holdout(n, experiment.holdout)[0])
    epoch: float = n // experiment.batch if experiment.drop_remainder else n / experiment.batch
    if not epoch:
        raise InputError(f"drop_remainder=True leaves no batch of {experiment.batch} in {n} examples")
    return epoch


class _Noted:
    """A loader that writes down the example ids of every batch, and may kill its process after a save."""

    def __init__(self, loader: Any, folder: Path, phase: str, half: int) -> None:
        self._loader, self.shardings = loader, loader.shardings
        self.stacked_shardings = loader.stacked_shardings
        self._file = (folder / f"{phase}-{multihost.process_index()}.jsonl").open("w")
        self._last = half if phase == "killed" else None
        self._saved = folder / "checkpoints" / f"{half:06d}" / "manifest.json"

    def batch(self, step: int) -> Any:
        self._kill(step)
        batch = self._loader.batch(step)
        self._note(step, _ids(batch, 0))
        return batch

    def batches(self, step: int, count: int) -> tuple[Any, Any]:
        self._kill(step)
        batches, shared = self._loader.batches(step, count)
        for k, ids in enumerate(np.moveaxis(_ids(batches, 1), 1, 0)):
            self._note(step + k, ids)
        return batches, shared

    def _kill(self, step: int) -> None:
        if step == self._last:  # its first half is done
            while not self._saved.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    def _note(self, step: int, ids: np.ndarray) -> None:
        self._file.write(json.dumps({"step": step + 1, "ids": ids.tolist()}) + "\n")
        self._file.flush()

    def abstract_batch(self) -> Any:
        return self._loader.abstract_batch()

    def fetch(self, batch: Any) -> Any:
        return self._loader.fetch(batch)

    def close(self) -> None:
        self._file.close()
        self._loader.close()


def _ids(batch: Any, axis: int) -> np.ndarray:
    """Example ids of this process's rows, which are the ``axis`` of the arrays: int [rows, ...]."""
    rows = batch.get("rows", batch.get("example_id"))
    if hasattr(rows, "addressable_shards"):  # this process's part; replicas hold the same
        parts = {str(shard.index): np.asarray(shard.data) for shard in rows.addressable_shards}
        rows = np.concatenate(list(parts.values()), axis)
    rows = np.moveaxis(np.asarray(rows), axis, 0)
    return rows[..., 0] if "rows" in batch else rows
