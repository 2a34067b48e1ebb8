"""How members train: one after the other, batched on one device, or one on each device; by measurement."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line
from jaxtrain.program import Program
from jaxtrain.sharding import multihost
from jaxtrain.sweep.programs import Setting
from jaxtrain.sweep.stacked import OnePerDevice, Stacked, Vmapped
from jaxtrain.train.dispatch import InFlight

STRATEGIES = ("auto", "sequential", "vmap", "devices")
MIN_SPEEDUP = 1.2  # times as fast as one after the other, whose members are bitwise those of runs alone
ROUNDS = 5
UPDATES = 3  # of every member in a round, after one that compiles


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A strategy, and why.

    Attributes:
      strategy: not ``"auto"``.
      why: the reason, for the record.
      seconds: median seconds per update of one member, by strategy, where they were measured.
    """

    strategy: str
    why: str
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def check(strategy: str, mesh: Mesh, members: int) -> None:
    """Raise InputError unless a strategy that was asked for exists and can be used on this mesh."""
    if strategy not in STRATEGIES:
        raise InputError(f"strategy is {strategy!r}: it must be one of {', '.join(STRATEGIES)}")
    if strategy in ("auto", "sequential"):
        return
    if (why := why_not(strategy, mesh, members)) is not None:
        raise InputError(f"--strategy {strategy}: {why}; use --strategy sequential")


def why_not(strategy: str, mesh: Mesh, members: int) -> str | None:
    """Return why members cannot train together on ``mesh``; None if they can."""
    if multihost.process_count() > 1:
        return "there are several processes"
    if any(mesh.shape.get(axis, 1) > 1 for axis in ("fsdp", "model")):
        return f"the mesh {sharding.describe_mesh(mesh)} divides the parameters of one run"
    if members < 2:
        return "there is one member"
    if strategy == "devices" and mesh.size < 2:
        return "there is one device"
    return None


def choose(
    settings: Sequence[Setting], alone: Callable[[], Sequence[Setting]], seeds: Sequence[int], mesh: Mesh
) -> Chosen:
    """Measure a few updates with each strategy that is possible, and choose.

    Training together must be ``MIN_SPEEDUP`` times as fast as one after the other.

    Args:
      settings: on ``mesh``.
      alone: returns the same settings on one of its devices.
      seeds: of each setting.
      mesh: the devices.
    """
    members = len(settings) * len(seeds)
    possible = [name for name in ("vmap", "devices") if why_not(name, mesh, members) is None]
    if settings[0].program.teacher is not None or not possible:
        return Chosen("sequential", "nothing else is possible here")
    numbers = [setting.family for setting in alone()]
    largest = max(numbers, key=numbers.count)
    family = [setting for setting in alone() if setting.family == largest]
    together = [(setting, seed) for setting in family for seed in seeds]
    rounds: dict[str, Callable[[], float]] = {"sequential": _Alone(settings[0].program).seconds}
    notes = []
    for name in possible:
        if len(together) < 2:
            continue
        try:
            trial = _Together(make(name, together, alone_mesh(mesh), mesh), together)
            trial.seconds()  # compiles
            rounds[name] = trial.seconds
        except Exception as error:  # such as an operation that cannot be batched, or too little memory
            notes.append(f"{name} is not possible ({first_line(error)[:100]})")
    rounds["sequential"]()
    times: dict[str, list[float]] = {name: [] for name in rounds}
    for _ in range(ROUNDS):
        for name, measure in rounds.items():
            times[name].append(measure())
    medians = {name: statistics.median(found) for name, found in times.items()}
    best = min(medians, key=medians.__getitem__)
    if medians["sequential"] < MIN_SPEEDUP * medians[best]:
        best = "sequential"
    text = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in medians.items())
    return Chosen(best, "; ".join([f"per update of a member: {text}", *notes]), medians)


def alone_mesh(mesh: Mesh) -> Mesh:
    """Return the mesh of one member that trains together with others: the first device."""
    return mesh if mesh.size == 1 else sharding.make_mesh([mesh.devices.flat[0]], {"data": 1})


def make(strategy: str, members: Sequence[tuple[Setting, int]], alone: Mesh, mesh: Mesh) -> Stacked:
    """Make the step of members of one family; with ``devices`` at most one for each device.

    Args:
      strategy: ``"vmap"`` or ``"devices"``.
      members: settings, assembled on ``alone``, and seeds.
      alone: the mesh of one member.
      mesh: all devices.
    """
    devices = list(mesh.devices.flat)
    members = members[: len(devices)] if strategy == "devices" else members
    programs = [setting.program.with_seed(seed) for setting, seed in members]
    step, numbers = members[0][0].step, [setting.numbers for setting, _ in members]
    if strategy == "vmap":
        return Vmapped(alone, programs, step, numbers)
    return OnePerDevice(devices[: len(members)], alone, programs, step, numbers)


class _Alone:
    """Times the updates of one program on throw-away states."""

    def __init__(self, program: Program) -> None:
        self._program, self._state = program, program.init()
        self._batch = program.train.batch(0)

    def seconds(self) -> float:
        """Seconds per update."""
        in_flight, began = InFlight(self._program.experiment.max_in_flight), time.perf_counter()
        for _ in range(UPDATES):
            self._state, metrics = self._program.train_step(self._state, self._batch, self._program.key)
            in_flight.add(metrics)
        jax.block_until_ready(self._state)
        return (time.perf_counter() - began) / UPDATES


class _Together:
    """Times the updates of stacked members on throw-away states."""

    def __init__(self, stacked: Stacked, members: Sequence[tuple[Setting, int]]) -> None:
        self._stacked, self._count = stacked, stacked.count
        program = members[0][0].program
        self._most = program.experiment.max_in_flight
        self._states: Any = stacked.stack([program.init()] * stacked.count)

    def seconds(self) -> float:
        """Seconds per update of one member."""
        in_flight, began = InFlight(self._most), time.perf_counter()
        for step in range(UPDATES):
            self._states, metrics = self._stacked(self._states, step)
            in_flight.add(metrics)
        jax.block_until_ready(self._states)
        return (time.perf_counter() - began) / UPDATES / self._count
