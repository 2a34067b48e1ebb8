"""Gather parameters that ``fsdp`` splits, only while they are used."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.core.types import Batch, Model


def gather_params(model: Model, shardings: Any, regather: bool = False) -> Model:
    """Return ``model`` with an ``apply`` that takes parameters split over ``fsdp`` and gathers them.

    The all-gather is explicit because XLA might move activations instead, and its partitioner computes wrong
    gradients for some convolutions whose kernels are split over two axes. A gradient is reduce-scattered as
    soon as it is computed (FSDP, arXiv:2304.11277; ZeRO stage 3, arXiv:1910.02054).

    Args:
      model: takes full parameters.
      shardings: ``NamedSharding`` of each parameter; ``model`` is returned unchanged where none has ``fsdp``.
      regather: gather again in the backward pass, instead of keeping full parameters for it.
    """
    gathered = jax.tree.map(_without_fsdp, shardings)
    if gathered == shardings:
        return model

    def gather(params: Any) -> Any:
        def gather_one(param: jax.Array, split: NamedSharding, full: NamedSharding) -> jax.Array:
            if split == full:
                return param
            if full.mesh.devices.flat[0].platform != "cpu":
                param = _gradient_barrier(param)
            # The first constraint is for the gradient, which passes both in reverse.
            param = jax.lax.with_sharding_constraint(param, split)
            return jax.lax.with_sharding_constraint(param, full)

        return jax.tree.map(gather_one, params, shardings, gathered)

    def apply(
        params: Any, extra: dict[str, Any], batch: Batch, *, train: bool, key: jax.Array | None
    ) -> tuple[Any, dict[str, Any]]:
        def forward(params: Any, extra: Any, batch: Batch, key: Any) -> tuple[Any, dict[str, Any]]:
            return model.apply(gather(params), extra, batch, train=train, key=key)

        if train and regather:
            forward = jax.checkpoint(forward, policy=_save_all_but_gathered)
        return forward(params, extra, batch, key)

    return model._replace(apply=apply)


@jax.custom_vjp
def _gradient_barrier(param: jax.Array) -> jax.Array:
    """Return ``param``; in the backward pass put a barrier between its gradient and all that uses it.

    XLA for GPUs replaces an all-reduce over ``data`` and ``fsdp``, of which each device uses a slice, by a
    reduce-scatter and a smaller all-reduce only if a single operation uses the slice (jaxlib 0.10.2). The
    gradient has several uses: its norm, the optimizer.
    """
    return param


def _no_residual(param: jax.Array) -> tuple[jax.Array, None]:
    return param, None


def _barrier(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.optimization_barrier(gradient),)


_gradient_barrier.defvjp(_no_residual, _barrier)


def _save_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of ``jax.checkpoint`` that recomputes sharding constraints only."""
    return bool(primitive.name != "sharding_constraint")


def _without_fsdp(sharding: NamedSharding) -> NamedSharding:
    def drop_fsdp(entry: Any) -> Any:
        axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        return tuple(axis for axis in axes if axis != "fsdp") or None

    entries = [drop_fsdp(entry) for entry in sharding.spec]
    if not any("fsdp" in str(entry) for entry in sharding.spec):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))
