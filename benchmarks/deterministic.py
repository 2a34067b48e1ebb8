"""What ``run --deterministic`` costs: the same steps in two processes, with XLA's deterministic operations
and without.

XLA reads its flags once per process, so each side has its own. Both processes stay alive and take rounds of
steps in turn (A B B A), so that a machine that slows down does so for both. On a CPU the flag changes
nothing, and the figure shows the error of such a measurement.

  python -m benchmarks.deterministic [--experiment NAME] [--set PATH=VALUE] [--mesh AXIS=N,...] [--steps N]
    [--rounds N] [--simulate-devices N] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from benchmarks import common
from jaxtrain.cli import devices, experiments
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.train import environment

SIDES = ("off", "on")
TIMEOUT = 10.0  # seconds for a process to exit by itself


def make_parser() -> argparse.ArgumentParser:
    """The flags of a benchmark, and those of the program that is measured."""
    parser = common.arguments(__doc__ or "", rounds=10)
    parser.add_argument("--experiment", default="digits_cnn", metavar="NAME")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a setting")
    parser.add_argument("--mesh", default="data=*", metavar="AXIS=N,...")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="training steps per round")
    parser.add_argument("--simulate-devices", type=int, metavar="N")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)  # one of the two processes
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Both processes, and the JSON; returns the exit code."""
    args = make_parser().parse_args(argv)
    try:
        if args.serve is not None:
            serve(args)
            return 0
        results, figures = measure(args)
    except (InputError, RunError) as error:
        print(f"benchmarks.deterministic: {error}", file=sys.stderr)
        return error.exit_code
    common.finish(args, "deterministic", results, figures)
    return 0


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Start both processes and time their rounds in turn.

    Returns:
      The results: what a step with the flag takes, over one without. The figures: ``step_ms`` of each side
      and ``cost``, the part that the flag adds, as quartiles; ``xla_flags``; the seconds of every round.

    Raises:
      InputError, RunError: a process failed, or ``XLA_FLAGS`` already asks for deterministic operations.
    """
    if devices.deterministic_requested():
        raise InputError(
            f"XLA_FLAGS has {environment.DETERMINISTIC_FLAG}: unset it, to have a side without it"
        )
    if args.steps < 1:
        raise InputError(f"--steps {args.steps}: give at least 1")
    with contextlib.ExitStack() as stack:
        processes = {side: stack.enter_context(contextlib.closing(Process(args, side))) for side in SIDES}
        facts = {side: process.read() for side, process in processes.items()}
        rounds = {side: lambda side=side: processes[side].round(args.steps) for side in SIDES}
        seconds = common.interleave(rounds, args.rounds)
    off, on = (np.array(seconds[side]) for side in SIDES)
    name = f"{facts['on']['experiment']}: time of a step with --deterministic over one without"
    figures = {
        **facts["on"],
        "steps": args.steps,
        "rounds": args.rounds,
        "xla_flags": {side: facts[side]["xla_flags"] for side in SIDES},
        "step_ms": {side: quartiles(1e3 * np.array(seconds[side]) / args.steps) for side in SIDES},
        "cost": quartiles(on / off - 1),
        "round_seconds": seconds,
    }
    return [common.result(name, (on / off).tolist(), "×")], figures


def serve(args: argparse.Namespace) -> None:
    """One of the two processes: print a line of JSON when ready, then time a round per line of stdin."""
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what an experiment prints must not mix with the JSON
        devices.simulate_devices(args.simulate_devices)
        if args.serve == "on":
            devices.set_deterministic()
        import jax

        from jaxtrain import sharding
        from jaxtrain.experiment import config_hash
        from jaxtrain.monitor import make_console
        from jaxtrain.train import scaling

        name, _, experiment = experiments.load_experiment(args.experiment, args.set)
        experiments.ensure_prepared(experiment, make_console())
        mesh = sharding.make_mesh(jax.devices(), sharding.parse_mesh(args.mesh, jax.device_count()))
        lane = scaling.Lane(experiment, mesh)
        try:
            lane.round(1)  # compiles
            facts = {"experiment": name, "hash": config_hash(experiment), "mesh": dict(mesh.shape)}
            _send(out, {**facts, "xla_flags": os.environ.get("XLA_FLAGS", "")})
            for line in sys.stdin:
                _send(out, lane.round(int(line)))
        finally:
            lane.program.close()


class Process:
    """A process that runs ``serve``, until ``close``."""

    def __init__(self, args: argparse.Namespace, side: str) -> None:
        words = [sys.executable, "-m", "benchmarks.deterministic", "--serve", side]
        words += ["--experiment", args.experiment, "--mesh", args.mesh]
        words += [word for setting in args.set for word in ("--set", setting)]
        if args.simulate_devices is not None:
            words += ["--simulate-devices", str(args.simulate_devices)]
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # The two share a GPU, and each would otherwise take three quarters of its memory.
            env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ},
        )

    def read(self) -> Any:
        """Its next line, parsed.

        Raises:
          InputError, RunError: it has ended; its error is on stderr.
        """
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        code = self._process.wait()
        raise (InputError if code == 2 else RunError)(f"a process ended with exit code {code}: see above")

    def round(self, steps: int) -> float:
        """Seconds of a round of ``steps`` updates."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: read reports it
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        return float(self.read())

    def close(self) -> None:
        """End the process, which exits at the end of its stdin."""
        try:
            self._process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def _send(out: IO[str], value: Any) -> None:
    out.write(json.dumps(value) + "\n")
    out.flush()


def quartiles(values: np.ndarray) -> dict[str, float]:
    """Median and quartiles.

    >>> quartiles(np.array([1.0, 2.0, 3.0]))
    {'median': 2.0, 'q1': 1.5, 'q3': 2.5}
    """
    low, middle, high = np.percentile(values, (25, 50, 75))
    return {"median": float(middle), "q1": float(low), "q3": float(high)}


if __name__ == "__main__":
    sys.exit(main())
