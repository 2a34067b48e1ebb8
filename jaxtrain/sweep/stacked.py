"""Train steps of many members in one compiled call: batched on one device, or one member on each device."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain import sharding
from jaxtrain.core.types import State
from jaxtrain.program import Program
from jaxtrain.program.update import compiler_options
from jaxtrain.step.packing import PackedMetrics

REPLICA = "replica"

Step = Callable[[Any, State, Any, jax.Array], tuple[State, PackedMetrics]]
"""``(numbers, state, batch, key) -> (state, metrics)`` of one member, pure."""


class Stacked(abc.ABC):
    """One update of every member. States and metrics have a leading axis of members.

    Args:
      mesh: the single device that each program is assembled on.
      programs: of the members.
      step: their step; ``numbers`` are the values in which their settings differ.
      numbers: of each member.
    """

    def __init__(
        self, mesh: Mesh, programs: Sequence[Program], step: Step, numbers: Sequence[Sequence[Any]]
    ) -> None:
        self._programs, self._step, self.count = programs, step, len(programs)
        first = programs[0]
        self._alone = mesh
        self._shared: Any = None
        options = compiler_options(first.experiment, self._alone, first.abstract_state)
        self._compiled = self._compile(options)
        self._numbers = self._put(tuple(map(np.stack, zip(*numbers, strict=True))))
        self._keys = self._put(jnp.stack([program.key for program in programs]))
        where = sharding.replicated(self._alone)
        self._pick = sharding.compile(
            lambda states, n: jax.tree.map(lambda x: x[n], states), args=(where, where), out=where
        )

    def stack(self, states: Sequence[State]) -> State:
        """Return the states of all members as one."""
        return self._put(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))

    def __call__(self, states: State, step: int) -> tuple[State, PackedMetrics]:
        """Dispatch the update after update ``step``; ``states`` is donated."""
        return self._compiled(*self._arguments(states, step))

    def lower(self, states: State, step: int) -> Any:
        """Lower this update, as a function of ``jax.jit`` does."""
        return self._compiled.lower(*self._arguments(states, step))  # type: ignore[attr-defined]

    def _arguments(self, states: State, step: int) -> tuple[Any, ...]:
        batches = [program.train.host_batch(step) for program in self._programs]
        fields = {name: np.stack([own[name] for own, _ in batches]) for name in batches[0][0]}
        if self._shared is None:  # resident examples, the same for all
            self._shared = self._put_shared(batches[0][1])
        return self._numbers, states, fields, self._shared, self._keys

    @abc.abstractmethod
    def member(self, states: State, number: int) -> State:
        """Return the state of one member, placed as in a run of its own."""

    @abc.abstractmethod
    def _compile(self, options: dict[str, str]) -> Callable[..., Any]: ...

    @abc.abstractmethod
    def _put(self, tree: Any) -> Any: ...

    @abc.abstractmethod
    def _put_shared(self, tree: Any) -> Any: ...

    def _one(self, numbers: Any, state: State, fields: Any, shared: Any, key: jax.Array) -> Any:
        return self._step(numbers, state, {**fields, **shared}, key)


class Vmapped(Stacked):
    """All members on one device, as one batch of computations (``jax.vmap``)."""

    def _compile(self, options: dict[str, str]) -> Callable[..., Any]:
        where = sharding.replicated(self._alone)
        step = jax.vmap(self._one, in_axes=(0, 0, 0, None, 0))
        return sharding.compile(step, args=(where,) * 5, out=where, donate=(1,), options=options)

    def _put(self, tree: Any) -> Any:
        return jax.device_put(tree, sharding.replicated(self._alone))

    def _put_shared(self, tree: Any) -> Any:
        return tree

    def member(self, states: State, number: int) -> State:
        return self._pick(states, np.int32(number))


class OnePerDevice(Stacked):
    """Each member on a device of its own, without collectives: the mesh axis is ``replica``.

    Args:
      devices: one for each program.
      mesh, programs, step, numbers: as ``Stacked``.
    """

    def __init__(
        self,
        devices: Sequence[Any],
        mesh: Mesh,
        programs: Sequence[Program],
        step: Step,
        numbers: Sequence[Sequence[Any]],
    ) -> None:
        self._mesh = Mesh(np.array(devices), (REPLICA,))
        super().__init__(mesh, programs, step, numbers)

    def _compile(self, options: dict[str, str]) -> Callable[..., Any]:
        own, all_ = PartitionSpec(REPLICA), PartitionSpec()

        def local(*args: Any) -> Any:  # a block of one member
            numbers, state, fields, shared, key = args
            numbers, state, fields, key = jax.tree.map(lambda x: x[0], (numbers, state, fields, key))
            return jax.tree.map(lambda x: x[None], self._one(numbers, state, fields, shared, key))

        step = jax.shard_map(
            local, mesh=self._mesh, in_specs=(own, own, own, all_, own), out_specs=own, check_vma=False
        )
        split, full = (NamedSharding(self._mesh, spec) for spec in (own, all_))
        args = (split, split, split, full, split)
        return sharding.compile(step, args=args, out=split, donate=(1,), options=options)

    def _put(self, tree: Any) -> Any:
        return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec(REPLICA)))

    def _put_shared(self, tree: Any) -> Any:
        return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec()))

    def member(self, states: State, number: int) -> State:
        own = jax.tree.map(lambda x: x.addressable_data(number), states)
        return self._pick(jax.device_put(own, sharding.replicated(self._alone)), np.int32(0))
