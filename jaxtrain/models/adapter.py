"""Wrap Flax Linen modules as the pure pair ``Model(init, apply)``; no Flax type leaves this package."""

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
    """Return ``model`` as a pure ``Model`` pair.

    The arguments of a Linen module's ``__call__`` are filled as follows:

    - An argument gets the batch field of the same name. Optional arguments named ``label``, ``target``,
      ``mask``, ``example_id`` or ``epoch`` are not filled.
    - If there is one required argument and no field of its name, it gets the only field that is not one of
      those five.
    - ``train``, ``training`` or ``is_training`` is True while training (dropout is active, batch statistics
      are updated) and False in evaluation; ``deterministic`` and ``use_running_average`` are the opposite.
    - ``remat`` gets the setting of that name.

    Optional attributes of the module:

    - ``check(batch, ids)`` checks raw host data and becomes ``Model.check``.
    - ``update_flops(batch)`` returns the FLOPs of an update and becomes ``Model.flops``.
    - ``logical_axes``, a dict of regular expression → axis names, names the axes of the parameters
      (``sharding.Rule``). Names from ``nn.with_logical_partitioning`` are used as well.

    Args:
      model: a Linen module, or an ``(init, apply)`` pair, which is returned as a ``Model``.
      remat: which activations are saved for the backward pass (``models.Remat``); the rest is recomputed. A
        module whose ``__call__`` has an argument ``remat`` wraps its own blocks (``models.remat_block``);
        any other model is wrapped as one block.

    Raises:
      InputError: ``model`` is neither a module nor a pair, it has batch statistics and no argument for the
        training mode, or ``remat`` is unknown.

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
    wraps_blocks = any(p.name == REMAT for p in parameters)

    def arguments(batch: Batch, train: bool) -> dict[str, Any]:
        inputs = [p for p in parameters if p.name not in (*modes, REMAT)]
        flags: dict[str, Any] = {name: train is MODES[name] for name in modes}
        if wraps_blocks:
            flags[REMAT] = remat if train else "none"
        return {**_inputs(module, inputs, batch), **flags}

    def init(key: jax.Array, batch: Batch) -> tuple[Any, dict[str, Any]]:
        params_key, dropout_key = jax.random.split(key)
        rngs = {"params": params_key, "dropout": dropout_key}
        variables = dict(nn.unbox(module.init(rngs, **arguments(batch, train=False))))
        if "batch_stats" in variables and not modes:
            raise InputError(
                f"{type(module).__name__} has batch statistics and its __call__ has no argument that says "
                "when to update them: add train: bool, and pass it on"
            )
        return variables.pop("params", {}), variables

    def apply(
        params: Any, extra: dict[str, Any], batch: Batch, *, train: bool, key: jax.Array | None
    ) -> tuple[Any, dict[str, Any]]:
        statistics, _ = split_extra(extra)
        # Any other random stream that the module uses falls back to "params".
        rngs = None if key is None else {"dropout": key, "params": jax.random.fold_in(key, 1)}
        mutable: Any = (
            list(statistics) if train else False
        )  # Linen returns a pair for a list, even an empty one
        try:
            result = module.apply(
                {"params": params, **statistics}, rngs=rngs, mutable=mutable, **arguments(batch, train)
            )
        except flax.errors.ScopeParamShapeError as error:
            shapes = ", ".join(f"{k} {v.shape}" for k, v in batch.items())
            raise InputError(
                f"the batch ({shapes}) does not fit the parameters of {type(module).__name__}, which "
                f"were initialised for another shape: {first_line(error)}"
            ) from error
        if not train:
            return result, extra
        outputs, updated = result
        return outputs, {**extra, **updated}

    def axes(batch: Batch) -> dict[str, Names]:
        def init_boxed(key: jax.Array, batch: Batch) -> Any:
            return module.init(key, **arguments(batch, train=False))

        boxed = jax.eval_shape(init_boxed, jax.random.key(0), batch)
        return _boxed_names(boxed) | dict(getattr(module, "logical_axes", {}))

    model = Model(init, apply, getattr(module, "check", None), axes, getattr(module, "update_flops", None))
    return model if wraps_blocks else remat_model(model, remat)


def _boxed_names(variables: Any) -> dict[str, Names]:
    """Return the axis names given by ``nn.with_logical_partitioning``, as regular expression → names."""
    names = {}
    for collection in variables.values():
        boxes = jax.tree.leaves_with_path(collection, is_leaf=lambda x: isinstance(x, nn.Partitioned))
        for path, box in boxes:
            if isinstance(box, nn.Partitioned):
                names[f"^{re.escape(jax.tree_util.keystr(path, simple=True, separator='/'))}$"] = box.names
    return names


def _inputs(module: nn.Module, inputs: list[inspect.Parameter], batch: Batch) -> dict[str, Any]:
    """Return the module's array arguments by name, so that leaving out an optional one shifts no other."""
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
