"""What other runs have learned: read by path, without their experiments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain.checkpoint import manifest as manifests
from jaxtrain.checkpoint import store
from jaxtrain.checkpoint.manifest import CheckpointInfo
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import NOT_MODEL_STATE, State, leaf_paths

COPIES = ("extra/ema/", "extra/lookahead/")
"""Where a state holds averages of parameters and statistics, which begin as copies of them."""


def init_from(
    source: str, renames: Sequence[str], state: State, tell: Callable[[str], None] = lambda line: None
) -> State:
    """``state`` with the parameters and the model's statistics of another run's checkpoint.

    Those that ``evaluate`` uses: the averaged ones where that run kept an average. The optimizer, the step
    and all else stay as they are.

    Args:
      source: ``RUN`` or ``RUN:STEP``, the folder of a run; without a step the best on its validation set, or
        the latest.
      renames: ``OLD=NEW``, prefixes of names there and here, such as ``encoder/block0=block0``; ``head=``
        keeps the values that ``head`` has in ``state``.
      state: of step 0, with its shardings.
      tell: called with a line of what was taken.

    Raises:
      InputError: there is no such checkpoint, or it has not the arrays that are needed.
      Damaged: it is not what was saved.
    """
    here = leaf_paths(state)
    with _found(source, renames, here, tell) as (checkpoints, chosen, wanted):
        abstract = {name: _abstract_leaf(here[path]) for path, name in wanted.items()}
        arrays = checkpoints.restore_some(chosen, abstract)
    seen: set[str] = set()
    values = []
    for path, leaf in here.items():
        name = wanted.get(path)
        # One buffer must not be in the state twice: the train step is given them to reuse.
        value = leaf if name is None else arrays[name].copy() if name in seen else arrays[name]
        seen |= {name} if name is not None else set()
        values.append(value)
    tell(f"{len(seen)} arrays of {chosen.folder} to begin with, {_fresh(here, wanted)} new")
    return jax.tree.unflatten(jax.tree.structure(state), values)


def check_init_from(source: str, renames: Sequence[str], abstract: State) -> None:
    """Raise as ``init_from`` would for a state of these shapes, which need not be there yet."""
    with _found(source, renames, leaf_paths(abstract), lambda line: None) as (checkpoints, chosen, _):
        checkpoints.check(chosen)


@contextlib.contextmanager
def _found(
    source: str, renames: Sequence[str], here: dict[str, Any], tell: Callable[[str], None]
) -> Iterator[tuple[store.Checkpoints, CheckpointInfo, dict[str, str]]]:
    """The checkpoint that is meant, and the name there of each path here that is taken from it."""
    folder, step = _parse(source)
    pairs = [_pair(text) for text in renames]
    older = f"begin with an older one: --init-from {folder}:{{step}}"
    with store.open(folder, tell=tell, older=older) as checkpoints:
        chosen = _choose(checkpoints, step, f"--init-from {source}")
        wanted = {path: name for path in here if (name := _source_of(path, pairs, chosen)) is not None}
        _check(chosen, here, wanted, pairs)
        yield checkpoints, chosen, wanted


def arrays(source: str | Path) -> dict[str, np.ndarray]:
    """Every array of a run's checkpoint by path, verified, on the host; needs no experiment file.

    Args:
      source: ``RUN`` or ``RUN:STEP``, as for ``init_from``.

    Raises:
      InputError: there is no such checkpoint, or this version cannot read it.
      Damaged: it is not what was saved.

    >>> found = arrays("runs/digits_mlp/3f9a12c4-seed0:400")  # doctest: +SKIP
    >>> found["params/Dense_0/kernel"].shape  # doctest: +SKIP
    (64, 128)
    """
    folder, step = _parse(str(source))
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with store.open(folder, older=f"read an older one: {folder}:{{step}}") as checkpoints:
        chosen = _choose(checkpoints, step, str(source))
        manifests.check_format(chosen)
        shapes = {name: manifests.parse_spec(text) for name, text in chosen.manifest["tree"].items()}
        abstract = {name: jax.ShapeDtypeStruct(*spec, sharding=place) for name, spec in shapes.items()}
        return {name: np.asarray(leaf) for name, leaf in checkpoints.restore_some(chosen, abstract).items()}


def _parse(source: str) -> tuple[Path, int | None]:
    folder, _, step = source.rpartition(":")
    if folder and step.isdecimal() and not Path(source).is_dir():
        return Path(folder), int(step)
    return Path(source), None


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not old or not equals:
        raise InputError(f"--init-map {text}: give OLD=NEW, or OLD= to keep the new values")
    return old.strip("/"), new.strip("/")


def _choose(checkpoints: store.Checkpoints, step: int | None, what: str) -> CheckpointInfo:
    steps = checkpoints.steps()
    if not steps:
        raise InputError(f"{what}: there is no checkpoint in it; give the folder a run printed")
    if step is None:
        return manifests.best(steps) or steps[-1]
    for saved in steps:
        if saved.step == step:
            return saved
    kept = ", ".join(str(saved.step) for saved in steps)
    raise InputError(f"{what}: step {step} is not kept there; give one of {kept}")


def _source_of(path: str, pairs: Sequence[tuple[str, str]], chosen: CheckpointInfo) -> str | None:
    """The path in the checkpoint of what begins as ``path`` here; None for what stays as it is."""
    for copy in COPIES:
        if path.startswith(copy):
            rest = path.removeprefix(copy)
            path = rest if rest.startswith("params/") else f"extra/{rest}"
    root, _, name = path.partition("/")
    if root == "extra":
        kind, _, name = name.partition("/")
        root = f"extra/{kind}"
        if kind in NOT_MODEL_STATE:
            return None
    elif root != "params":
        return None
    for old, new in pairs:
        if not new and _under(name, old):
            return None
        if new and _under(name, new):
            name = (old + name.removeprefix(new)).strip("/")
            break
    averaged = f"extra/ema/{root.removeprefix('extra/')}/{name}"
    return averaged if averaged in chosen.manifest["tree"] else f"{root}/{name}"


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}/")


def _check(
    chosen: CheckpointInfo, here: dict[str, Any], wanted: dict[str, str], pairs: Sequence[tuple[str, str]]
) -> None:
    manifests.check_format(chosen)
    names = [path.partition("/")[2] for path in here if path.startswith("params/")]
    for old, new in pairs:
        if not any(_under(name, new or old) for name in names):
            raise InputError(f"--init-map {old}={new}: no parameter here is under {new or old}")
    there = chosen.manifest["tree"]
    for path, name in wanted.items():
        have, want = there.get(name, "absent"), manifests.spec(here[path])
        if have != want:
            top = path.removeprefix("params/").partition("/")[0]
            raise InputError(
                f"checkpoint {chosen.folder} does not fit: {name} is {have} there and {path} is {want} here; "
                f"rename with --init-map OLD=NEW, or keep the new values with --init-map {top}="
            )


def _abstract_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _fresh(here: dict[str, Any], wanted: dict[str, str]) -> int:
    return sum(path.startswith("params/") and path not in wanted for path in here)
