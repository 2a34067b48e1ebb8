"""Throughput by number of devices: the program of a run on the first 1, 2, 4, ... of them.

Every count has the same state, data and step as a run with ``--devices N`` would have, and rounds of steps
are taken in turn, so that a machine that slows down does so for all counts alike.
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
    """What runs on one number of devices: the experiment with its global batch, and the mesh's sizes."""

    experiment: Experiment
    sizes: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One number of devices.

    Attributes:
      devices: how many.
      mesh: their axes, as ``--mesh`` takes them.
      batch: examples of a step, over all devices.
      resident: the training data was held on the devices, not streamed.
      steps: updates of a round.
      round_seconds: of each round, in order.
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
        """At the median time of a step."""
        return 1e3 * self.batch / self.step_ms()[1]


def layouts(
    experiment: Experiment, counts: Sequence[int], mesh: str = "data=*", weak: bool = False
) -> dict[int, Layout]:
    """What to run on each number of devices; starts no backend.

    Args:
      experiment: what is measured; ``eval_batch`` is ignored, because nothing is evaluated.
      counts: numbers of devices, each at least 1.
      mesh: as ``--mesh`` takes it, with a ``*`` for what changes with the count.
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
            whole = math.lcm(*(p // math.gcd(p, n if weak else 1) for n, p in parts.items()))
            low, high = experiment.batch // whole * whole, (experiment.batch // whole + 1) * whole
            how = f", accumulate={experiment.accumulate}" if experiment.accumulate > 1 else ""
            raise InputError(
                f"--scaling {n}: batch {batches[n]} does not divide into {parts[n]} parts "
                f"({sharding.mesh_text(meshes[n])}{how}): leave {n} out, or use --set batch="
                f"{f'{low} or ' if low else ''}{high}, which suits all counts"
            )
    changed = {n: dataclasses.replace(experiment, batch=batches[n], eval_batch=None) for n in counts}
    return {n: Layout(changed[n], meshes[n]) for n in counts}


def measure(given: Mapping[int, Layout], *, steps: int, rounds: int, console: Console) -> list[Measured]:
    """Compile and warm up every layout, then time rounds of them in turn.

    A round is ``Lane.round(steps)``, batches from the loader included; the first of each warms up and is
    thrown away. All layouts are held at once: the first device has the data and the state of every one.

    Args:
      given: from ``layouts``.
      steps: updates of a round, at least 1.
      rounds: how many are kept of each layout, at least 1.
      console: told of what is compiled and how far it is.

    Returns:
      One entry for each layout, in order.

    Raises:
      InputError: there are fewer devices, or whatever the preflight finds.
    """
    there = len(jax.devices())
    if max(given) > there:
        raise InputError(
            f"--scaling {max(given)}: this process has {there} device{'s' if there > 1 else ''}: leave it "
            f"out, or try it on simulated ones with --simulate-devices {max(given)}"
        )
    with contextlib.ExitStack() as stack:
        lanes: dict[int, Lane] = {}
        for n in given:
            lanes[n] = _ready(n, given[n], stack, console)
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
            mesh=sharding.mesh_text(given[n].sizes),
            batch=given[n].experiment.batch,
            resident=lane.program.choices["resident"]["train"],
            steps=steps,
            round_seconds=tuple(times[n]),
        )
        for n, lane in lanes.items()
    ]


def interleaved(items: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """``(round, item)``: every item once a round, every other round backwards.

    >>> [item for _, item in interleaved("AB", 3)]
    ['B', 'A', 'A', 'B', 'B', 'A']
    """
    for number in range(rounds):
        for item in items if number % 2 else reversed(items):
            yield number, item


def speedup(one: Measured, first: Measured) -> float:
    """Examples a second over those of ``first``."""
    return one.examples_per_second() / first.examples_per_second()


def efficiency(one: Measured, first: Measured) -> float:
    """The speed-up over the one that the number of devices promises: 1 is ideal.

    Args:
      one: what is judged.
      first: that of the fewest devices.

    >>> one, two = (Measured(n, f"data={n}", 32, True, 1, (t,)) for n, t in ((1, 0.4), (2, 0.25)))
    >>> efficiency(two, one)
    0.8
    """
    return speedup(one, first) * first.devices / one.devices


class Lane:
    """The program of a run on a mesh, with a state that goes on from round to round.

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
    """A lane that has taken its first step, and is closed with ``stack``."""
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
    sharding.parse_mesh(text, known)  # whatever else is wrong with it
    if n % known:
        raise InputError(
            f"--scaling {n}: --mesh {text} needs a multiple of {known} devices: leave {n} out, or use "
            "other sizes"
        )
    return sharding.parse_mesh(text, n)


def record(found: Sequence[Measured]) -> dict[str, Any]:
    """The figures and every round's raw time, for JSON.

    Args:
      found: from ``measure``; ratios are to the one of the fewest devices.
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
