"""Flax Linen behind the pure pair ``Model(init, apply)``; no flax type leaves this folder."""

from __future__ import annotations

import inspect
import re
from typing import Any

import flax.errors
import jax
from flax import linen as nn

from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line
from jaxtrain.core.types import Batch, Model, Names, split_extra
from jaxtrain.models.remat import Remat, check_remat, remat_model

TARGETS = frozenset({"label", "target", "mask", "example_id", "epoch"})
MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}
REMAT = "remat"


def as_model(model: Any, remat: Remat = "none") -> Model:
    """``model`` as a pure ``Model`` pair: a Linen module, or an ``(init, apply)`` pair as it is.

    A Linen module's ``__call__`` arguments are filled from the batch fields of the same name (optional ones
    called ``label``, ``target``, ``mask``, ``example_id`` or ``epoch`` are not); a single argument of another
    name gets the only field that is none of these. ``train``, ``training`` or ``is_training`` is told whether
    dropout and batch statistics are active, ``deterministic`` or ``use_running_average`` the opposite. A
    method ``check(batch, ids)`` of the module becomes the model's, and ``update_flops(batch)`` its ``flops``.
    Its attribute ``logical_axes``, a dict of regular expression → names, says what the axes of its parameters
    are (``sharding.Rule``); names given by ``nn.with_logical_partitioning`` count as well.

    Args:
      model: a Linen module or a pair.
      remat: what the training pass keeps for the backward pass; the rest is computed again, for less memory.
        A module whose ``__call__`` has an argument ``remat`` is told it and wraps its own blocks
        (``models.remat_block``); any other model is wrapped as a whole.

    Raises:
      InputError: neither a module nor a pair, batch statistics without such an argument, or an unknown
        ``remat``.

    >>> import jax.numpy as jnp
    >>> model = as_model(nn.Dense(3))
    >>> params, extra = model.init(jax.random.key(0), {"x": jnp.zeros((2, 5))})
    >>> params["kernel"].shape
    (5, 3)
    """
    check_remat(remat)
    if isinstance(model, Model):
        return remat_model(model, remat)
    if isinstance(model, nn.Module):
        return _from_linen(model, remat)
    if isinstance(model, tuple) and len(model) == 2 and all(callable(f) for f in model):
        return remat_model(Model(*model), remat)
    raise InputError(f"model is a {type(model).__name__}: give a Flax Linen module or an (init, apply) pair")


def _from_linen(module: nn.Module, remat: Remat) -> Model:
    parameters = list(inspect.signature(type(module).__call__).parameters.values())[1:]
    modes = [p.name for p in parameters if p.name in MODES]
    wraps = any(p.name == REMAT for p in parameters)

    def call(batch: Batch, train: bool) -> dict[str, Any]:
        inputs = [p for p in parameters if p.name not in (*modes, REMAT)]
        told: dict[str, Any] = {name: train is MODES[name] for name in modes}
        if wraps:
            told[REMAT] = remat if train else "none"
        return {**_inputs(module, inputs, batch), **told}

    def init(key: jax.Array, batch: Batch) -> tuple[Any, dict[str, Any]]:
        params_key, dropout_key = jax.random.split(key)
        rngs = {"params": params_key, "dropout": dropout_key}
        variables = dict(nn.unbox(module.init(rngs, **call(batch, train=False))))
        if "batch_stats" in variables and not modes:
            raise InputError(
                f"{type(module).__name__} has batch statistics and its __call__ no argument that says when "
                "to update them: add train: bool, and pass it on"
            )
        return variables.pop("params", {}), variables

    def apply(
        params: Any, extra: dict[str, Any], batch: Batch, *, train: bool, key: jax.Array | None
    ) -> tuple[Any, dict[str, Any]]:
        statistics, _ = split_extra(extra)
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
                f"were made for another shape: {first_line(error)}"
            ) from error
        if not train:
            return result, extra
        outputs, updated = result
        return outputs, {**extra, **updated}

    def axes(batch: Batch) -> dict[str, Names]:
        def boxes(key: jax.Array, batch: Batch) -> Any:
            return module.init(key, **call(batch, train=False))

        boxed = jax.eval_shape(boxes, jax.random.key(0), batch)
        return _boxed_names(boxed) | dict(getattr(module, "logical_axes", {}))

    model = Model(init, apply, getattr(module, "check", None), axes, getattr(module, "update_flops", None))
    return model if wraps else remat_model(model, remat)


def _boxed_names(variables: Any) -> dict[str, Names]:
    """What the module itself says of its axes, by ``nn.with_logical_partitioning``."""
    names = {}
    for collection in variables.values():
        boxes = jax.tree.leaves_with_path(collection, is_leaf=lambda x: isinstance(x, nn.Partitioned))
        for path, box in boxes:
            if isinstance(box, nn.Partitioned):
                names[f"^{re.escape(jax.tree_util.keystr(path, simple=True, separator='/'))}$"] = box.names
    return names


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
