"""Flax Linen behind the pure pair ``Model(init, apply)``; no flax type leaves this folder."""

from __future__ import annotations

import inspect
from typing import Any

import flax.errors
import jax
from flax import linen as nn

from jaxtrain.errors import InputError
from jaxtrain.types import NOT_MODEL_STATE, Batch, Model

TARGETS = frozenset({"label", "target", "mask"})


def as_model(model: Any) -> Model:
    """``model`` as a pure ``Model`` pair: a Linen module, or an ``(init, apply)`` pair as it is.

    A Linen module's ``__call__`` arguments are filled from the batch fields of the same name; a single
    argument of another name gets the only field that is not ``label``, ``target`` or ``mask``. An
    argument called ``train`` is told whether dropout and batch statistics are active.

    Raises:
      InputError: neither a module nor a pair.

    >>> import jax.numpy as jnp
    >>> model = as_model(nn.Dense(3))
    >>> params, extra = model.init(jax.random.key(0), {"x": jnp.zeros((2, 5))})
    >>> params["kernel"].shape
    (5, 3)
    """
    if isinstance(model, Model):
        return model
    if isinstance(model, nn.Module):
        return _from_linen(model)
    if isinstance(model, tuple) and len(model) == 2 and all(callable(f) for f in model):
        return Model(*model)
    raise InputError(f"model is a {type(model).__name__}: give a Flax Linen module or an (init, apply) pair")


def _from_linen(module: nn.Module) -> Model:
    signature = inspect.signature(type(module).__call__)
    names = [name for name in signature.parameters if name not in ("self", "train")]
    takes_train = "train" in signature.parameters

    def call(batch: Batch, train: bool) -> tuple[list[Any], dict[str, Any]]:
        required = [n for n in names if signature.parameters[n].default is inspect.Parameter.empty]
        return _inputs(module, names, required, batch), {"train": train} if takes_train else {}

    def init(key: jax.Array, batch: Batch) -> tuple[Any, dict[str, Any]]:
        args, kwargs = call(batch, train=False)
        params_key, dropout_key = jax.random.split(key)
        variables = dict(module.init({"params": params_key, "dropout": dropout_key}, *args, **kwargs))
        return variables.pop("params", {}), variables

    def apply(
        params: Any, extra: dict[str, Any], batch: Batch, *, train: bool, key: jax.Array | None
    ) -> tuple[Any, dict[str, Any]]:
        args, kwargs = call(batch, train)
        statistics = {k: v for k, v in extra.items() if k not in NOT_MODEL_STATE}
        rngs = None if key is None else {"dropout": key}
        mutable: Any = list(statistics) if train else False  # Linen: a list, even empty, gives a pair
        try:
            result = module.apply(
                {"params": params, **statistics}, *args, rngs=rngs, mutable=mutable, **kwargs
            )
        except flax.errors.ScopeParamShapeError as error:
            shapes = ", ".join(f"{k} {v.shape}" for k, v in batch.items())
            raise InputError(
                f"the batch ({shapes}) does not fit the parameters of {type(module).__name__}, which "
                f"were made for another shape: {str(error).splitlines()[0]}"
            ) from error
        if not train:
            return result, extra
        outputs, updated = result
        return outputs, {**extra, **updated}

    return Model(init, apply)


def _inputs(module: nn.Module, names: list[str], required: list[str], batch: Batch) -> list[Any]:
    if all(name in batch for name in required):
        return [batch[name] for name in names if name in batch]
    fields = [name for name in batch if name not in TARGETS]
    if len(required) == 1 and len(fields) == 1:
        return [batch[fields[0]]]
    raise InputError(
        f"{type(module).__name__} takes {', '.join(required)} and the batch has {', '.join(batch)}: "
        "name the module's arguments after batch fields"
    )
