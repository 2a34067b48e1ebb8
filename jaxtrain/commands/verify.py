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
from typing import Any

import numpy as np

from jaxtrain import cli, devices
from jaxtrain.errors import InputError, RunError
from jaxtrain.sharding import processes

SUMMARY = "proves that a run which is killed goes on exactly, or that two meshes train alike"
TOLERANCE = 1e-5
PHASES = ("straight", "mesh", "killed", "resumed")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 the same, 3 not."""
    parser = argparse.ArgumentParser(prog="jaxtrain verify", description=SUMMARY)
    parser.add_argument(
        "--experiment", required=True, metavar="NAME", help="a name from run --list, or a path to a .py"
    )
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a setting")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="even; default: 20")
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
    devices.add_flags(parser, many_processes=True)
    return cli.main(_run, parser, argv)


def _run(args: argparse.Namespace) -> int:
    if args.steps < 2 or args.steps % 2:
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
    name, _, experiment = cli.load(args.experiment, args.set)
    from jaxtrain.recorder import make_console

    console = make_console()
    cli.ensure_prepared(experiment, console)
    with tempfile.TemporaryDirectory(prefix="jaxtrain-verify-") as folder:
        one, other = Path(folder, "one"), Path(folder, "other")
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
        compared = _compare(args, one, other, 0.0 if exact else args.tolerance)
    console.summary(f"verify {name}", compared)
    what = "bit for bit" if exact else f"within {args.tolerance:g}"
    console.note(f"verified: the same {what}")
    return 0


def _start(args: argparse.Namespace, folder: Path, phase: str, count: int = 1) -> None:
    """Train in fresh processes, ``count`` of them as one, and wait for their end."""
    words = [sys.executable, "-m", "jaxtrain", "verify", "--child", str(folder), "--phase", phase]
    words += ["--experiment", args.experiment, "--steps", str(args.steps)]
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
    from jaxtrain.loop import fit
    from jaxtrain.program import assemble
    from jaxtrain.recorder import make_console

    name, _, experiment = cli.load(args.experiment, args.set)
    mesh = devices.make(args, cli.warn)
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
    from jaxtrain.data import holdout

    n = len(experiment.train)
    if experiment.holdout:
        n = len(holdout(n, experiment.holdout)[0])
    epoch = n // experiment.batch if experiment.remainder == "drop" else n / experiment.batch
    if not epoch:
        raise InputError(f"remainder=drop leaves no batch of {experiment.batch} in {n} examples")
    return dataclasses.replace(
        experiment,
        epochs=(steps - 0.5) / epoch,  # a begun batch counts whole
        save_every=(1 - 1e-9) * steps / 2 / epoch,
        eval_every=None,
        log_every=1,
        keep=2,
    )


class _Noted:
    """A loader that writes down the example ids of every batch, and may kill its process after a save."""

    def __init__(self, loader: Any, folder: Path, phase: str, half: int) -> None:
        self._loader, self.shardings = loader, loader.shardings
        self._file = (folder / f"{phase}-{processes.index()}.jsonl").open("w")
        self._last = half if phase == "killed" else None
        self._saved = folder / "checkpoints" / f"{half:06d}" / "manifest.json"

    def batch(self, step: int) -> Any:
        if step == self._last:  # its first half is done
            while not self._saved.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        batch = self._loader.batch(step)
        rows = batch["rows"] if "rows" in batch else batch["example_id"]
        if hasattr(rows, "addressable_shards"):  # this process's part; replicas hold the same
            parts = {str(shard.index): np.asarray(shard.data) for shard in rows.addressable_shards}
            rows = np.concatenate(list(parts.values()))
        ids = np.asarray(rows).reshape(len(rows), -1)[:, 0]
        self._file.write(json.dumps({"step": step + 1, "ids": ids.tolist()}) + "\n")
        self._file.flush()
        return batch

    def fetch(self, batch: Any) -> Any:
        return self._loader.fetch(batch)

    def close(self) -> None:
        self._file.close()
        self._loader.close()


def _compare(args: argparse.Namespace, one: Path, other: Path, tolerance: float) -> dict[str, str]:
    """What was the same, a line each.

    Raises:
      RunError: the first difference.
    """
    found = {"example ids": _same_ids(one, other, args.steps)}
    ours, theirs = (_arrays(args, folder) for folder in (one, other))
    for part in ("params", "opt_state", "extra"):
        paths = [path for path in ours if path.split("/")[0] == part]
        if paths:
            worst = max(_distance(path, ours[path], theirs[path], tolerance) for path in paths)
            how = f", at most {worst:.1e} apart" if tolerance else ""
            found[part.replace("_", " ")] = f"the same: {len(paths)} arrays{how}"
    found["metrics"] = _same_metrics(one, other, args.steps, tolerance)
    return found


def _same_ids(one: Path, other: Path, steps: int) -> str:
    """Every step of each phase, and no other; the order within a batch too, if one process has it all."""
    straight, half = _fed(one, "straight"), steps // 2
    phases = {"mesh": (1, steps), "killed": (1, half), "resumed": (half + 1, steps)}
    for phase, (first, last) in phases.items():
        fed = _fed(other, phase)
        if fed is None:
            continue
        if sorted(fed) != [*range(first, last + 1)]:
            there = f"the steps {sorted(fed)} were fed" if fed else "no step was fed"
            raise RunError(f"NOT the same: {phase}, {there}, not {first} to {last}")
        for step, parts in fed.items():
            a, b = ([i for part in ids for i in part] for ids in ((straight or {}).get(step, []), parts))
            if a != b and (len(parts) == 1 or sorted(a) != sorted(b)):
                raise RunError(
                    f"NOT the same: step {step} was fed the examples {_some(a)}, and {phase} {_some(b)}"
                )
    return f"the same in {steps} steps"


def _fed(folder: Path, phase: str) -> dict[int, list[list[int]]] | None:
    """The example ids of each step, a list for each process; None where that phase was not."""
    files = sorted(folder.glob(f"{phase}-*.jsonl"))
    found: dict[int, list[list[int]]] = {}
    for file in files:
        for record in map(json.loads, file.read_text().splitlines()):
            found.setdefault(record["step"], []).append(record["ids"])
    return found if files else None


def _some(ids: list[int]) -> str:
    return f"{ids[:8]}{'...' if len(ids) > 8 else ''}"


def _arrays(args: argparse.Namespace, folder: Path) -> dict[str, np.ndarray]:
    """The state after the last step, by path, read by this process on one device."""
    from jaxtrain import checkpoint

    with checkpoint.open(folder) as saved:
        newest = saved.latest()
    if newest is None or newest.step != args.steps:
        raise RunError(f"{folder.name} has no checkpoint of step {args.steps}")
    return checkpoint.arrays(f"{folder}:{newest.step}")


def _distance(path: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> float:
    """Relative L2 distance of two arrays.

    Raises:
      RunError: it is above the tolerance; with 0, any bit differs.
    """
    if ours.tobytes() == theirs.tobytes():
        return 0.0
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    distance = float(np.linalg.norm(a - b) / max(np.linalg.norm(a), np.finfo(np.float32).tiny))
    if tolerance and distance <= tolerance:
        return distance
    unlike = np.argwhere(~np.isclose(a, b, rtol=0, atol=0, equal_nan=True))
    first = tuple(unlike[0].tolist()) if len(unlike) else ()
    raise RunError(
        f"NOT the same: {path}: {len(unlike):,} of {ours.size:,} elements differ (relative L2 distance "
        f"{distance:.1e}), first at {list(first)}: {ours[first]!r} and {theirs[first]!r}"
    )


def _same_metrics(one: Path, other: Path, steps: int, tolerance: float) -> str:
    """The records of training, step by step; with a tolerance those of the loss."""

    def read(folder: Path) -> dict[int, dict[str, float]]:
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return {
            record["step"]: {name: value for name, value in record.items() if name.startswith("train/")}
            for record in records
            if "train/loss" in record
        }

    ours, theirs = read(one), read(other)
    for step in range(1, steps + 1):
        a, b = ours.get(step, {}), theirs.get(step, {})
        # An accuracy moves by whole examples, so within a tolerance only the loss can be compared.
        names = ["train/loss"] if tolerance or not a else [*a, *(name for name in b if name not in a)]
        for name in names:
            x, y = a.get(name), b.get(name)
            if x is None or y is None or not (x == y or abs(x - y) <= tolerance * abs(x)):
                raise RunError(f"NOT the same: {name} of step {step} is {x}, and then {y}")
    return f"the same in {steps} records"
