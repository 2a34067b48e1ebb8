"""The programs of a sweep's members, which share whatever is the same."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.core.types import State
from jaxtrain.data import Source
from jaxtrain.experiment import Experiment, config_text
from jaxtrain.program import Program, assemble
from jaxtrain.program.memory import abstract_args
from jaxtrain.program.update import compiler_options
from jaxtrain.step import scan_steps
from jaxtrain.sweep.same_program import Merged, merge
from jaxtrain.sweep.stacked import Step


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of a sweep, assembled for the seed of its experiment.

    Attributes:
      program: its program, which shares functions with that of other settings.
      sources: its data, for ``assemble``'s ``inspect``.
      family: settings with the same number have one train step, ``step``.
      step: the pure train step of the family; ``numbers`` are its first argument.
      numbers: the values in which this setting differs from others of its family.
    """

    program: Program
    sources: Mapping[str, Source]
    family: int
    step: Step
    numbers: Sequence[np.ndarray]

    def assemble(
        self, experiment: Experiment, mesh: Mesh, inspect: Callable[[Mapping[str, Source]], None]
    ) -> Program:
        """Return the program of ``experiment``, which differs in its seed only; arguments as ``assemble``."""
        del mesh  # it is the program's
        inspect(self.sources)
        return self.program.with_seed(experiment.seed)


def assemble_settings(experiments: Sequence[Experiment], mesh: Mesh) -> list[Setting]:
    """Assemble the experiment of each setting, and let those that can share compiled functions.

    Settings whose train steps differ in numbers only, such as a learning rate, share one that has these
    numbers as inputs. Functions that are the same are the first one's.

    Raises:
      InputError: as ``assemble``.
    """
    families: list[list[int]] = []
    programs: list[tuple[Program, Any]] = []
    sources: list[Mapping[str, Source]] = []
    for number, experiment in enumerate(experiments):
        opened: dict[str, Source] = {}
        program = assemble(experiment, mesh, inspect=opened.update)
        programs.append((program, _trace(program)))
        sources.append(opened)
        for family in families:
            if _alike(*(programs[n] for n in (family[0], number))):
                family.append(number)
                break
        else:
            families.append([number])
    settings: dict[int, Setting] = {}
    for number, family in enumerate(families):
        members = [programs[n][0] for n in family]
        merged = merge([programs[n][1] for n in family])
        assert merged is not None  # each is like the first
        for n, setting in zip(family, _share(members, merged, number, mesh), strict=True):
            settings[n] = dataclasses.replace(setting, sources=sources[n])
    return [settings[n] for n in range(len(experiments))]


def _trace(program: Program) -> Any:
    """Return the jaxpr of the train step, without shardings."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract_args(program))
    return jax.make_jaxpr(program.pure_step)(*shapes)


def _alike(one: tuple[Program, Any], other: tuple[Program, Any]) -> bool:
    """Return whether two settings can have one train step, and train in lockstep on the same examples."""
    (first, jaxpr), (second, other_jaxpr) = one, other
    return (
        first.cadence == second.cadence
        and dataclasses.replace(first.order, seed=0) == dataclasses.replace(second.order, seed=0)
        and first.evals.keys() == second.evals.keys()
        and _train_data(first) == _train_data(second)
        and merge([jaxpr, other_jaxpr]) is not None
    )


def _train_data(program: Program) -> Any:
    """Return the settings that decide which examples a run is trained on."""
    experiment = program.experiment
    return config_text(experiment.train), experiment.holdout, experiment.placement


def _share(programs: Sequence[Program], merged: Merged, family: int, mesh: Mesh) -> list[Setting]:
    first = programs[0]
    programs = [first, *(_with_functions_of(first, program) for program in programs[1:])]
    if not merged.numbers[0]:  # the same step
        alone: Step = lambda numbers, *args: first.pure_step(*args)  # noqa: E731
        same = [
            dataclasses.replace(p, train_step=first.train_step, train_steps=first.train_steps)
            for p in programs
        ]
        return [Setting(p, {}, family, alone, ()) for p in same]
    structure = jax.tree.structure(jax.eval_shape(first.pure_step, *abstract_args(first)))

    def step(numbers: Any, *args: Any) -> Any:
        return jax.tree.unflatten(structure, merged.fn(numbers, *jax.tree.leaves(args)))

    def several(numbers: Any, *args: Any) -> Any:
        return scan_steps(functools.partial(step, numbers))(*args)

    everywhere = sharding.replicated(mesh)
    state = jax.tree.map(lambda x: x.sharding, first.abstract_state)
    batches, shared = first.train.stacked_shardings
    compile = functools.partial(
        sharding.compile,
        out=(state, everywhere),
        donate=(1,),
        options=compiler_options(first.experiment, mesh, first.abstract_state),
    )
    one = compile(step, args=(everywhere, state, first.train.shardings, everywhere))
    many = compile(several, args=(everywhere, state, batches, everywhere, shared))
    return [
        Setting(
            dataclasses.replace(p, train_step=WithNumbers(one, own), train_steps=WithNumbers(many, own)),
            {},
            family,
            step,
            own,
        )
        for p, own in zip(programs, merged.numbers, strict=True)
    ]


def _with_functions_of(first: Program, program: Program) -> Program:
    """Return ``program`` with those functions of ``first`` that are the same as its own."""
    evals = dict(program.evals)
    for name, split in evals.items():
        batch = split.loader.abstract_batch()
        steps = [first.evals[name].step, split.step]
        if _same(
            [
                functools.partial(_trace_of, s, p.abstract_state, batch)
                for s, p in zip(steps, (first, program), strict=True)
            ]
        ):
            evals[name] = dataclasses.replace(split, step=first.evals[name].step)
    init_with = program.init_with
    if program.teacher is None and _same(
        [functools.partial(_trace_of, p.init_with, p.key) for p in (first, program)]
    ):
        init_with = first.init_with
    shared = dataclasses.replace(program, evals=evals, init_with=init_with)
    return shared.with_seed(program.experiment.seed)


def _trace_of(fn: Callable[..., Any], *args: Any) -> Any:
    return jax.make_jaxpr(fn)(*args)


def _same(traces: Sequence[Callable[[], Any]]) -> bool:
    """Return whether two functions are the same program, numbers included."""
    merged = merge([trace() for trace in traces])
    return merged is not None and not merged.numbers[0]


class WithNumbers:
    """A compiled function whose first argument, the numbers of a setting, is given.

    Args:
      fn: made by ``jax.jit``.
      numbers: its first argument.
    """

    def __init__(self, fn: Any, numbers: Sequence[np.ndarray]) -> None:
        self._fn, self._numbers = fn, tuple(numbers)
        self._cache_size = fn._cache_size  # counted by train.recompile

    def __call__(self, state: State, *args: Any) -> Any:
        return self._fn(self._numbers, state, *args)

    def trace(self, *args: Any) -> Any:
        """Trace it, as a function of ``jax.jit`` does."""
        return self._fn.trace(self._numbers, *args)

    def lower(self, *args: Any) -> Any:
        """Lower it, as a function of ``jax.jit`` does."""
        return self._fn.lower(self._numbers, *args)
