"""What ``bench --deterministic`` does: the same steps in two fresh processes, with the flag and without.

XLA reads its flags once in a process, so it takes two. Both stay, and take their rounds in turn, so that a
machine that slows down does so for both alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from jaxtrain.cli import devices, experiments
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.monitor import Console
from jaxtrain.train import environment

WAYS = ("off", "on")
LAST = 10.0  # seconds for a process to end by itself


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Start both processes and time rounds of them in turn; the first round of each warms up.

    Args:
      args: of ``bench``.
      console: told of what happens.

    Returns:
      The figures for ``rows``, ``told`` and JSON: ``step_ms`` by way, as quartiles; ``cost``, the quartiles
      of what a round with the flag took more than the one without it, as a part of that; every round.

    Raises:
      InputError, RunError: as the processes do; or ``XLA_FLAGS`` itself asks for deterministic operations.
    """
    from jaxtrain.experiment import config_hash
    from jaxtrain.train import scaling

    if devices.deterministic_requested():
        raise InputError(
            f"XLA_FLAGS has {environment.DETERMINISTIC_FLAG} already: unset it, so that there is something "
            "to compare"
        )
    name, _, experiment = experiments.load_experiment(args.experiment, args.set)
    experiments.ensure_prepared(experiment, console)
    with contextlib.ExitStack() as stack:
        console.note(f"{name}: starting two processes, with --deterministic and without")
        both = {way: stack.enter_context(contextlib.closing(_Child(args, way))) for way in WAYS}
        ready = {way: child.read() for way, child in both.items()}
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        with console.task("rounds", len(WAYS) * (args.rounds + 1)) as advance:
            for done, (number, way) in enumerate(scaling.interleaved(WAYS, args.rounds + 1), start=1):
                took = both[way].round(args.steps)
                if number:
                    seconds[way].append(took)
                advance(done)
    off, on = (np.array(seconds[way]) for way in WAYS)
    return {
        **ready["on"],
        "experiment": name,
        "hash": config_hash(experiment),
        "steps": args.steps,
        "rounds": args.rounds,
        "xla_flags": {way: ready[way]["xla_flags"] for way in WAYS},
        "step_ms": {way: _quartiles(1e3 * np.array(seconds[way]) / args.steps) for way in WAYS},
        "cost": _quartiles(on / off - 1),
        "round_seconds": seconds,
    }


def rows(about: dict[str, Any]) -> dict[str, str]:
    """The table: a line for each way."""

    def line(way: str) -> str:
        time, flags = about["step_ms"][way], about["xla_flags"][way]
        step = f"{time['median']:.2f} ({time['q1']:.2f}–{time['q3']:.2f}) ms a step"
        return f"{step}, {f'XLA_FLAGS={flags}' if flags else 'no XLA_FLAGS'}"

    return {way: line(way) for way in WAYS}


def told(about: dict[str, Any]) -> str:
    """The cost in one line.

    >>> cost = {"median": 0.031, "q1": -0.002, "q3": 0.04}
    >>> about = {"cost": cost, "rounds": 10, "steps": 20, "count": 1, "platform": "gpu", "device": "H9"}
    >>> told({**about, "date": "2026-11-22"})
    'deterministic costs +3.1 % a step (-0.2 to +4.0 %, n = 10 rounds of 20 steps, 1 × H9, 2026-11-22)'
    """
    cost = {name: f"{100 * value:+.1f}" for name, value in about["cost"].items()}
    where, noise = f"{about['count']} × {about['device']}", ""
    if about["platform"] == "cpu":
        where += f", {about['cores']} cores"
        noise = "; a CPU needs nothing set for it, so that is what this measurement is off by"
    return (
        f"deterministic costs {cost['median']} % a step ({cost['q1']} to {cost['q3']} %, n = "
        f"{about['rounds']} rounds of {about['steps']} steps, {where}, {about['date']}){noise}"
    )


def serve(args: argparse.Namespace, environment: Callable[[], dict[str, Any]]) -> None:
    """One of the two processes: a line of JSON when ready, then a round for every line that comes.

    Args:
      args: of ``bench``, with ``child`` for the way.
      environment: what the figures are of, asked when the devices are there.
    """
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what an experiment prints must not come between
        devices.simulate_devices(args.simulate_devices)
        if args.child == "on":
            devices.set_deterministic()
        import jax

        from jaxtrain import sharding
        from jaxtrain.train import scaling

        _, _, experiment = experiments.load_experiment(args.experiment, args.set)
        everything = jax.devices()
        mesh = sharding.make_mesh(everything, sharding.parse_mesh(args.mesh, len(everything)))
        lane = scaling.Lane(experiment, mesh)
        try:
            lane.round(1)  # compiles
            flags = os.environ.get("XLA_FLAGS", "")
            _say(out, {**environment(), "count": mesh.size, "mesh": dict(mesh.shape), "xla_flags": flags})
            for line in sys.stdin:
                _say(out, lane.round(int(line)))
        finally:
            lane.program.close()


class _Child:
    """A process that ``serve``s, from the start to ``close``."""

    def __init__(self, args: argparse.Namespace, way: str) -> None:
        words = [sys.executable, "-m", "jaxtrain", "bench", "--deterministic", "--child", way]
        words += ["--experiment", args.experiment, "--mesh", args.mesh]
        words += [word for setting in args.set for word in ("--set", setting)]
        if args.simulate_devices is not None:
            words += ["--simulate-devices", str(args.simulate_devices)]
        words += ["--debug"] if args.debug else []
        self._debug = args.debug
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads would fill
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # Two processes share a GPU here, and each would take three quarters of its memory.
            env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ},
        )

    def read(self) -> Any:
        """What it says next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        error = self._errors.read().strip() or f"a process ended with exit code {code}"
        error = error if self._debug else error.splitlines()[-1].removeprefix("jaxtrain bench: ")
        raise (InputError if code == 2 else RunError)(error)

    def round(self, steps: int) -> float:
        """Seconds of ``steps`` updates."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: read says how
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        return float(self.read())

    def close(self) -> None:
        """End it: it does so itself when nothing more can come."""
        try:
            self._process.communicate(timeout=LAST)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._errors.close()


def _say(out: IO[str], what: Any) -> None:
    out.write(json.dumps(what) + "\n")
    out.flush()


def _quartiles(values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.percentile(values, (25, 50, 75))
    return {"median": float(middle), "q1": float(low), "q3": float(high)}
