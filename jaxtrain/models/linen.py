"""Flax Linen behind the pure pair ``Model(init, apply)``; no flax type leaves this folder."""

from __future__ import annotations

import inspect
from typing import Any

import flax.errors
import jax
from flax import linen as nn

from jaxtrain.errors import InputError
from jaxtrain.types import NOT_MODEL_STATE, Batch, Model

TARGETS = frozenset({"label", "target", "mask", "example_id", "epoch"})
MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


def as_model(model: Any) -> Model:
    """``model`` as a pure ``Model`` pair: a Linen module, or an ``(init, apply)`` pair as it is.

    A Linen module's ``__call__`` arguments are filled from the batch fields of the same name (optional ones
    called ``label``, ``target``, ``mask``, ``example_id`` or ``epoch`` are not); a single argument of another
    name gets the only field that is none of these. ``train``, ``training`` or ``is_training`` is told whether
    dropout and batch statistics are active, ``deterministic`` or ``use_running_average`` the opposite. A
    method ``check(batch, ids)`` of the module becomes the model's.

    Raises:
      InputError: neither a module nor a pair, or batch statistics without such an argument.

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
    parameters = list(inspect.signature(type(module).__call__).parameters.values())[1:]
    modes = [p.name for p in parameters if p.name in MODES]

    def call(batch: Batch, train: bool) -> dict[str, Any]:
        inputs = [p for p in parameters if p.name not in modes]
        return {**_inputs(module, inputs, batch), **{name: train is MODES[name] for name in modes}}

    def init(key: jax.Array, batch: Batch) -> tuple[Any, dict[str, Any]]:
        params_key, dropout_key = jax.random.split(key)
        rngs = {"params": params_key, "dropout": dropout_key}
        variables = dict(module.init(rngs, **call(batch, train=False)))
        if "batch_stats" in variables and not modes:
            raise InputError(
                f"{type(module).__name__} has batch statistics and its __call__ no argument that says when "
                "to update them: add train: bool, and pass it on"
            )
        return variables.pop("params", {}), variables

    def apply(
        params: Any, extra: dict[str, Any], batch: Batch, *, train: bool, key: jax.Array | None
    ) -> tuple[Any, dict[str, Any]]:
        statistics = {k: v for k, v in extra.items() if k not in NOT_MODEL_STATE}
        # Any other stream that the module asks for falls back to "params".
        rngs = None if key is None else {"dropout": key, "params": jax.random.fold_in(key, 1)}
        mutable: Any = list(statistics) if train else False  # Linen: a list, even empty, gives a pair
        try:
            result = module.apply(
                {"params": params, **statistics}, rngs=rngs, mutable=mutable, **call(batch, train)
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

    return Model(init, apply, getattr(module, "check", None))


def _inputs(module: nn.Module, inputs: list[inspect.Parameter], batch: Batch) -> dict[str, Any]:
    """Arguments by name, so that an optional one that is left out shifts no other."""
    empty = inspect.Parameter.empty
    required = [
        p.name for p in inputs if p.default is empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if all(name in batch for name in required):
        optional = [p.name for p in inputs if p.name not in required and p.name not in TARGETS]
        return {name: batch[name] for name in [*required, *optional] if name in batch}
    fields = [name for name in batch if name not in TARGETS]
    if len(required) == 1 and len(fields) == 1:
        return {required[0]: batch[fields[0]]}
    raise InputError(
        f"{type(module).__name__} takes {', '.join(required)} and the batch has {', '.join(batch)}: "
        "name the module's arguments after batch fields"
    )
