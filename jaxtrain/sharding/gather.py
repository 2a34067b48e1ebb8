"""The gathering of parameters that ``fsdp`` has split, just for the time that they are used."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.core.types import Batch, Model


def gather_params(model: Model, shardings: Any, again: bool = False) -> Model:
    """``model``, whose ``apply`` takes parameters split over ``fsdp`` and works on whole ones.

    Stated, not left to XLA: it might move activations instead, and its partitioner gives wrong gradients
    for some convolutions whose kernels are split over two axes. A gradient is summed and split as soon as it
    is there (FSDP, arXiv:2304.11277; ZeRO stage 3, arXiv:1910.02054).

    Args:
      model: takes whole parameters.
      shardings: ``NamedSharding`` of each parameter; without ``fsdp`` in them ``model`` comes back.
      again: gather once more for the backward pass, instead of keeping whole parameters for it.
    """
    whole = jax.tree.map(_without_fsdp, shardings)
    if whole == shardings:
        return model

    def gather(params: Any) -> Any:
        def one(param: jax.Array, now: NamedSharding, then: NamedSharding) -> jax.Array:
            if now == then:
                return param
            # The first is for the gradient, which comes back through both.
            param = jax.lax.with_sharding_constraint(param, now)
            return jax.lax.with_sharding_constraint(param, then)

        return jax.tree.map(one, params, shardings, whole)

    def apply(
        params: Any, extra: dict[str, Any], batch: Batch, *, train: bool, key: jax.Array | None
    ) -> tuple[Any, dict[str, Any]]:
        def forward(params: Any, extra: Any, batch: Batch, key: Any) -> tuple[Any, dict[str, Any]]:
            return model.apply(gather(params), extra, batch, train=train, key=key)

        if train and again:
            forward = jax.checkpoint(forward, policy=_keep_all_but_gathered)
        return forward(params, extra, batch, key)

    return model._replace(apply=apply)


def _keep_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """The policy of ``jax.checkpoint`` that computes again nothing but where an array lies."""
    return bool(primitive.name != "sharding_constraint")


def _without_fsdp(sharding: NamedSharding) -> NamedSharding:
    def kept(entry: Any) -> Any:
        axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        return tuple(axis for axis in axes if axis != "fsdp") or None

    entries = [kept(entry) for entry in sharding.spec]
    if not any("fsdp" in str(entry) for entry in sharding.spec):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))
