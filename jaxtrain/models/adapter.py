"""Wrap Flax Linen modules as the pure pair ``Model(init, apply)``; no Flax type leaves this package."""

from __future__ import annotations

import inspect
import re
import zlib
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
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

    Collections that the model only writes, with ``self.sow`` or ``self.perturb``, are outputs and not part of
    its state: they are dropped, except those that the attribute ``sown_outputs`` names.

    In evaluation a module that asks for a random stream other than ``dropout``, such as
    ``self.make_rng("noise")``, gets one that depends on the position of the batch in its split only (its
    first ``example_id``), so every evaluation with this ``eval_batch`` draws the same numbers on any mesh.

    Optional attributes of the module:

    - ``sown_outputs``, names of collections that it sows, such as ``("losses",)``: its outputs become
      ``(outputs, {"losses": ...})``, for a loss that needs them. Sowing nothing gives an empty dict.
    - ``check(batch, ids)`` checks host data, after ``preprocess``, and becomes ``Model.check``.
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
    sown_outputs = tuple(getattr(module, "sown_outputs", ()))
    dropped: set[str] = set()

    def arguments(batch: Batch, train: bool) -> dict[str, Any]:
        inputs = [p for p in parameters if p.name not in (*modes, REMAT)]
        flags: dict[str, Any] = {name: train is MODES[name] for name in modes}
        if wraps_blocks:
            flags[REMAT] = remat if train else "none"
        return {**_inputs(module, inputs, batch), **flags}

    def init(key: jax.Array, batch: Batch) -> tuple[Any, dict[str, Any]]:
        params_key, dropout_key = jax.random.split(key)
        rngs, inputs = {"params": params_key, "dropout": dropout_key}, arguments(batch, train=False)
        variables = dict(nn.unbox(module.init(rngs, **inputs)))
        if "batch_stats" in variables and not modes:
            raise InputError(
                f"{type(module).__name__} has batch statistics and its __call__ has no argument that says "
                "when to update them: add train: bool, and pass it on"
            )
        params = variables.pop("params", {})
        written = {name for name in variables if _is_only_written(module, name, rngs, inputs)}
        dropped.update(written.difference(sown_outputs))
        return params, {name: tree for name, tree in variables.items() if name not in written}

    def apply(
        params: Any, extra: dict[str, Any], batch: Batch, *, train: bool, key: jax.Array | None
    ) -> tuple[Any, dict[str, Any]]:
        statistics, _ = split_extra(extra)
        variables, mutable = {"params": params, **statistics}, list(sown_outputs)
        try:
            if train:
                # Any other random stream that the module uses falls back to "params".
                rngs = None if key is None else {"dropout": key, "params": jax.random.fold_in(key, 1)}
                mutable += statistics
                outputs, updated = module.apply(
                    variables, rngs=rngs, mutable=mutable, **arguments(batch, train)
                )
            else:
                outputs, updated = _evaluate(module, variables, mutable, arguments(batch, train), batch)
        except flax.errors.ScopeParamShapeError as error:
            shapes = ", ".join(f"{k} {v.shape}" for k, v in batch.items())
            raise InputError(
                f"the batch ({shapes}) does not fit the parameters of {type(module).__name__}, which "
                f"were initialised for another shape: {first_line(error)}"
            ) from error
        updated = dict(updated)
        sown = {name: jax.tree.map(jnp.asarray, updated.pop(name, {})) for name in sown_outputs}
        if sown_outputs:
            outputs = outputs, sown
        return outputs, {**extra, **updated} if train else extra

    def axes(batch: Batch) -> dict[str, Names]:
        def init_boxed(key: jax.Array, batch: Batch) -> Any:
            return module.init(key, **arguments(batch, train=False))

        boxed = jax.eval_shape(init_boxed, jax.random.key(0), batch)
        return _boxed_names(boxed) | dict(getattr(module, "logical_axes", {}))

    model = Model(
        init,
        apply,
        getattr(module, "check", None),
        axes,
        getattr(module, "update_flops", None),
        lambda: tuple(sorted(dropped)),
    )
    return model if wraps_blocks else remat_model(model, remat)


def _is_only_written(module: nn.Module, name: str, rngs: Any, inputs: dict[str, Any]) -> bool:
    """Whether the module also runs without the collection ``name``: then it only sows or perturbs it."""
    if name == "batch_stats":
        return False
    try:
        mutable = nn.DenyList([name, "intermediates"])
        jax.eval_shape(lambda rngs: module.init(rngs, mutable=mutable, **inputs), rngs)
    except Exception:  # it reads what is not there; Flax and the model raise many types
        return False
    return True


def _evaluate(
    module: nn.Module, variables: Any, mutable: list[str], inputs: dict[str, Any], batch: Batch
) -> tuple[Any, Any]:
    """Apply the module in evaluation, with the random streams that it asks for and no others."""
    rngs: dict[str, jax.Array] = {}
    while True:
        try:
            outputs, updated = module.apply(variables, rngs=rngs, mutable=mutable, **inputs)
            return outputs, updated
        except flax.errors.InvalidRngError as error:
            asked = re.search(r'PRNG for "([^"]+)"', str(error))
            if asked is None or asked[1] in rngs:
                raise
            if asked[1] == "dropout":
                raise InputError(
                    f"{type(module).__name__} draws from the random stream dropout in evaluation too: give "
                    "nn.Dropout deterministic=not train, with train: bool an argument of __call__; for other "
                    "random numbers give make_rng another name"
                ) from error
            place = batch["example_id"][0] if "example_id" in batch else 0
            stream = jax.random.key(zlib.crc32(asked[1].encode()))
            rngs[asked[1]] = jax.random.fold_in(stream, place)


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
