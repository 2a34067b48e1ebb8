"""Measure throughput by number of devices: the program of a run on the first 1, 2, 4, ... of them.

Every count trains with the state, data and step of a run with ``--devices N``. Rounds of steps are
interleaved, so that a machine that slows down does so for all counts alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.core.errors import InputError
from jaxtrain.experiment import Experiment
from jaxtrain.monitor import Console
from jaxtrain.program import assemble
from jaxtrain.train.dispatch import InFlight

T = TypeVar("T")


class Layout(NamedTuple):
    """What runs on one number of devices: the experiment with its global batch, and the mesh sizes."""

    experiment: Experiment
    sizes: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Measured:
    """The measurement of one number of devices.

    Attributes:
      devices: number of devices.
      mesh: their axes, as ``--mesh`` takes them.
      batch: global batch size.
      resident: the training data was on the devices, not streamed.
      steps: updates per round.
      round_seconds: seconds of each round, in order.
    """

    devices: int
    mesh: str
    batch: int
    resident: bool
    steps: int
    round_seconds: tuple[float, ...]

    def step_ms(self) -> tuple[float, float, float]:
        """Milliseconds of a step: first quartile, median and third over the rounds.

        >>> Measured(2, "data=2", 32, True, 10, (0.125, 0.375, 0.25)).step_ms()
        (18.75, 25.0, 31.25)
        """
        low, middle, high = np.percentile(self.round_seconds, (25, 50, 75)) * 1e3 / self.steps
        return float(low), float(middle), float(high)

    def examples_per_second(self) -> float:
        """Throughput at the median step time."""
        return 1e3 * self.batch / self.step_ms()[1]


def layouts(
    experiment: Experiment, counts: Sequence[int], mesh: str = "data=*", weak: bool = False
) -> dict[int, Layout]:
    """What to run on each number of devices; starts no backend.

    Args:
      experiment: what is measured; ``eval_batch`` is ignored, because nothing is evaluated.
      counts: numbers of devices, each at least 1.
      mesh: as ``--mesh`` takes it, with a ``*`` for the size that changes with the count.
      weak: give every count n the global batch ``n * experiment.batch``, whatever the mesh, so that the
        examples for each device stay the same; else all have ``experiment.batch``.

    Raises:
      InputError: a mesh without ``*``, or one or a batch that does not divide for one of the counts.

    >>> from jaxtrain.experiment import find
    >>> digits, _ = find("digits_cnn").load()
    >>> {n: (found.experiment.batch, found.sizes["data"]) for n, found in layouts(digits, (1, 4)).items()}
    {1: (128, 1), 4: (128, 4)}
    """
    meshes = {n: _sizes(mesh, n) for n in counts}
    parts = {n: sizes["data"] * sizes["fsdp"] * experiment.accumulate for n, sizes in meshes.items()}
    batches = {n: experiment.batch * (n if weak else 1) for n in counts}
    for n in counts:
        if batches[n] % parts[n]:
            divisor = math.lcm(*(p // math.gcd(p, n if weak else 1) for n, p in parts.items()))
            low, high = experiment.batch // divisor * divisor, (experiment.batch // divisor + 1) * divisor
            how = f", accumulate={experiment.accumulate}" if experiment.accumulate > 1 else ""
            raise InputError(
                f"--scaling {n}: batch {batches[n]} does not divide into {parts[n]} parts "
                f"({sharding.mesh_text(meshes[n])}{how}): leave {n} out, or use --set batch="
                f"{f'{low} or ' if low else ''}{high}, which suits all counts"
            )
    changed = {n: dataclasses.replace(experiment, batch=batches[n], eval_batch=None) for n in counts}
    return {n: Layout(changed[n], meshes[n]) for n in counts}


def measure(by_count: Mapping[int, Layout], *, steps: int, rounds: int, console: Console) -> list[Measured]:
    """Compile and warm up every layout, then time rounds of them in turn.

    A round is ``Lane.round(steps)``, batches from the loader included; the first round of each layout warms
    up and is discarded. All layouts are in memory at once: the first device holds the data and state of each.

    Args:
      by_count: from ``layouts``.
      steps: updates of a round, at least 1.
      rounds: rounds measured for each layout, at least 1.
      console: shows what is compiled and the progress.

    Returns:
      One entry for each layout, in order.

    Raises:
      InputError: there are too few devices, or the experiment fails a check.
    """
    available = len(jax.devices())
    if max(by_count) > available:
        raise InputError(
            f"--scaling {max(by_count)}: this process has {available} device{'s' if available > 1 else ''}: "
            f"leave it out, or try it on simulated ones with --simulate-devices {max(by_count)}"
        )
    with contextlib.ExitStack() as stack:
        lanes: dict[int, Lane] = {}
        for n in by_count:
            lanes[n] = _ready(n, by_count[n], stack, console)
        times: dict[int, list[float]] = {n: [] for n in lanes}
        with console.task("rounds", len(lanes) * (rounds + 1)) as advance:
            for done, (number, n) in enumerate(interleaved(list(lanes), rounds + 1), start=1):
                seconds = lanes[n].round(steps)
                if number:
                    times[n].append(seconds)
                advance(done)
    return [
        Measured(
            devices=n,
            mesh=sharding.mesh_text(by_count[n].sizes),
            batch=by_count[n].experiment.batch,
            resident=lane.program.choices["resident"]["train"],
            steps=steps,
            round_seconds=tuple(times[n]),
        )
        for n, lane in lanes.items()
    ]


def interleaved(items: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """Yield ``(round, item)``: every item once a round, every other round in reverse.

    >>> [item for _, item in interleaved("AB", 3)]
    ['B', 'A', 'A', 'B', 'B', 'A']
    """
    for number in range(rounds):
        for item in items if number % 2 else reversed(items):
            yield number, item


def speedup(one: Measured, first: Measured) -> float:
    """Throughput relative to ``first``."""
    return one.examples_per_second() / first.examples_per_second()


def efficiency(one: Measured, first: Measured) -> float:
    """Speed-up relative to the number of devices; 1 is ideal.

    Args:
      one: the measurement.
      first: the measurement with the fewest devices.

    >>> one, two = (Measured(n, f"data={n}", 32, True, 1, (t,)) for n, t in ((1, 0.4), (2, 0.25)))
    >>> efficiency(two, one)
    0.8
    """
    return speedup(one, first) * first.devices / one.devices


class Lane:
    """The program of a run on a mesh, with a state that is trained further in every round.

    Args:
      experiment: what to run.
      mesh: the devices.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh) -> None:
        self.program = assemble(experiment, mesh)
        self.mesh = mesh
        self.state = self.program.init()
        self._at = 0

    def round(self, steps: int) -> float:
        """Seconds of ``steps`` updates, at most ``max_in_flight`` of them queued, until all are finished."""
        program, state, metrics = self.program, self.state, None
        flight = InFlight(program.experiment.max_in_flight)
        began = time.perf_counter()
        for step in range(self._at, self._at + steps):
            state, metrics = program.train_step(state, program.train.batch(step), program.key)
            flight.add(metrics)
        jax.block_until_ready((state, metrics))
        seconds = time.perf_counter() - began
        self.state, self._at = state, self._at + steps
        return seconds


def _ready(n: int, layout: Layout, stack: contextlib.ExitStack, console: Console) -> Lane:
    """Make a lane that has taken its first step; ``stack`` closes it."""
    began = time.perf_counter()
    lane = Lane(layout.experiment, sharding.make_mesh(jax.devices()[:n], layout.sizes))
    stack.callback(lane.program.close)
    lane.round(1)
    where = f"{n} device{'s' if n > 1 else ''} ({sharding.mesh_text(layout.sizes)})"
    console.note(f"{where}: ready after {time.perf_counter() - began:.1f} s, compilation included")
    for note in lane.program.notes:
        console.note(f"{where}: {note}")
    return lane


def _sizes(text: str, n: int) -> dict[str, int]:
    """The sizes of the mesh's axes on ``n`` devices."""
    if "*" not in text:
        raise InputError(f"--mesh {text}: put * for the size that grows with --scaling, such as data=*")
    known = math.prod(int(size) for size in re.findall(r"=\s*(\d+)", text))
    sharding.parse_mesh(text, known)  # raises if anything else is wrong
    if n % known:
        raise InputError(
            f"--scaling {n}: --mesh {text} needs a multiple of {known} devices: leave {n} out, or use "
            "other sizes"
        )
    return sharding.parse_mesh(text, n)


def record(found: Sequence[Measured]) -> dict[str, Any]:
    """The figures and every round's raw time as JSON.

    Args:
      found: from ``measure``; ratios are relative to the fewest devices.
    """
    first = min(found, key=lambda one: one.devices)
    points = []
    for one in found:
        low, middle, high = one.step_ms()
        figures = {
            "step_ms": {"median": middle, "q1": low, "q3": high},
            "examples_per_second": one.examples_per_second(),
            "speedup": speedup(one, first),
            "efficiency": efficiency(one, first),
        }
        points.append({**dataclasses.asdict(one), **figures})
    return {"points": points}
