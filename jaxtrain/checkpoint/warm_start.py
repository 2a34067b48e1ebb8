"""Read another run's checkpoint by path, without its experiment: warm starts, and plain arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.checkpoint import manifest as manifests
from jaxtrain.checkpoint import store
from jaxtrain.checkpoint.manifest import CheckpointInfo
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import NOT_MODEL_STATE, RANGES, TEACHER, State, leaf_paths

COPIES = ("extra/ema/", "extra/lookahead/")
"""Where a state has averages of parameters and statistics; they start as copies of these."""


def init_from(
    source: str, renames: Sequence[str], state: State, log: Callable[[str], None] = lambda line: None
) -> State:
    """Return ``state`` with the parameters and the model's statistics of another run's checkpoint.

    They are those that ``evaluate`` uses: the averages where that run has them. Pruning masks
    (``compress.Prune``) and ranges of activations (``compress="int8"``) are read where both runs have them.
    The optimizer state, the step and the rest do not change.

    Args:
      source: ``RUN`` or ``RUN:STEP``, the folder of a run; without a step, the best on its validation set or
        else the latest.
      renames: ``OLD=NEW``, prefixes of names in the checkpoint and in ``state``, such as
        ``encoder/block0=block0``; ``head=`` keeps the values of ``head`` in ``state``.
      state: of step 0, with its shardings.
      log: called with a line that says what was read.

    Raises:
      InputError: there is no such checkpoint, or it lacks an array.
      CorruptCheckpointError: it is damaged.
    """
    here = leaf_paths(state)
    with _open_source(source, renames, here, log) as (checkpoints, chosen, wanted):
        there = chosen.manifest["tree"]
        abstract = {
            name: jax.ShapeDtypeStruct(*manifests.parse_spec(there[name]), sharding=here[path].sharding)
            for path, name in wanted.items()
        }
        arrays = checkpoints.restore_some(chosen, abstract)
    seen: set[str] = set()
    values = []
    for path, leaf in here.items():
        name = wanted.get(path)
        if name is None:
            values.append(leaf)
        elif arrays[name].dtype != leaf.dtype:  # an average in float32, see _fits
            values.append(arrays[name].astype(leaf.dtype))
        else:  # One buffer must not be in the state twice: the train step donates them.
            values.append(arrays[name].copy() if name in seen else arrays[name])
        seen |= {name} if name is not None else set()
    log(f"initialized {len(seen)} arrays from {chosen.folder}, {_count_new(here, wanted)} new")
    return jax.tree.unflatten(jax.tree.structure(state), values)


def check_init_from(source: str, renames: Sequence[str], abstract: State) -> None:
    """Raise the errors of ``init_from`` before a state of these shapes exists."""
    with _open_source(source, renames, leaf_paths(abstract), lambda line: None) as (checkpoints, chosen, _):
        checkpoints.check(chosen)


def identify_source(source: str, setting: str = "--init-from ") -> str:
    """Return the step that ``source`` means now and the checksum of its manifest, as text to compare.

    Args:
      source: ``RUN`` or ``RUN:STEP``, as for ``init_from``.
      setting: what the user sets to it, for messages.

    Raises:
      InputError: there is no such checkpoint.
    """
    folder, step = parse_source(source)
    with store.open(folder) as checkpoints:
        chosen = _choose(checkpoints, step, f"{setting}{source}")
    return f"step {chosen.step}, sha256 {str(chosen.manifest.get('seal'))[:16]}"


def load_model(
    source: str, abstract: State, setting: str, log: Callable[[str], None] = lambda line: None
) -> State:
    """Read the parameters and statistics of a run's checkpoint, those that ``evaluate`` uses.

    Args:
      source: ``RUN`` or ``RUN:STEP``, as for ``init_from``.
      abstract: shapes, dtypes and shardings of the model's ``params`` and ``extra``; nothing else is read.
      setting: what the user sets to ``source``, for messages.
      log: called with a line about a checkpoint without checksums.

    Raises:
      InputError: there is no such checkpoint, or its arrays have other names or shapes.
      CorruptCheckpointError: it is damaged.
    """
    here = leaf_paths(abstract)
    with _open_source(source, (), here, log, setting) as (checkpoints, chosen, wanted):
        arrays = checkpoints.restore_some(chosen, {name: here[path] for path, name in wanted.items()})
    leaves = [arrays[wanted[path]] if path in wanted else leaf for path, leaf in here.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def check_model(source: str, abstract: State, setting: str) -> None:
    """Raise the errors of ``load_model`` that need no arrays to be read."""
    with _open_source(source, (), leaf_paths(abstract), lambda line: None, setting):
        pass


@contextlib.contextmanager
def _open_source(
    source: str,
    renames: Sequence[str],
    here: dict[str, Any],
    log: Callable[[str], None],
    setting: str = "--init-from ",
) -> Iterator[tuple[store.Checkpoints, CheckpointInfo, dict[str, str]]]:
    """Open the chosen checkpoint; also yield, by path in the state, the path to read in it."""
    folder, step = parse_source(source)
    pairs = [_pair(text) for text in renames]
    older_hint = f"use an older one: {setting}{folder}:{{step}}"
    with store.open(folder, log=log, older_hint=older_hint) as checkpoints:
        chosen = _choose(checkpoints, step, f"{setting}{source}")
        wanted = {path: name for path in here if (name := _source_of(path, pairs, chosen)) is not None}
        _check(chosen, here, wanted, pairs, setting)
        yield checkpoints, chosen, wanted


def arrays(source: str | Path) -> dict[str, np.ndarray]:
    """Read and verify every array of a run's checkpoint, by path, on the host; needs no experiment file.

    Args:
      source: ``RUN`` or ``RUN:STEP``, as for ``init_from``.

    Raises:
      InputError: there is no such checkpoint, or this version cannot read it.
      CorruptCheckpointError: it is damaged.

    >>> found = arrays("runs/digits_mlp/3f9a12c4-seed0:400")  # doctest: +SKIP
    >>> found["params/Dense_0/kernel"].shape  # doctest: +SKIP
    (64, 128)
    """
    folder, step = parse_source(str(source))
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with store.open(folder, older_hint=f"read an older one: {folder}:{{step}}") as checkpoints:
        chosen = _choose(checkpoints, step, str(source))
        manifests.check_format(chosen)
        shapes = {name: manifests.parse_spec(text) for name, text in chosen.manifest["tree"].items()}
        abstract = {name: jax.ShapeDtypeStruct(*spec, sharding=sharding) for name, spec in shapes.items()}
        return {name: _on_host(leaf) for name, leaf in checkpoints.restore_some(chosen, abstract).items()}


def _on_host(leaf: jax.Array) -> np.ndarray:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def parse_source(source: str) -> tuple[Path, int | None]:
    """Return the folder and the step of ``RUN:STEP``; the step is None for ``RUN``."""
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
        raise InputError(f"{what}: there is no checkpoint in it: give the folder that a run printed")
    if step is None:
        return manifests.best(steps) or steps[-1]
    for saved in steps:
        if saved.step == step:
            return saved
    present = ", ".join(str(saved.step) for saved in steps)
    raise InputError(f"{what}: there is no step {step}: give one of {present}")


def _source_of(path: str, pairs: Sequence[tuple[str, str]], chosen: CheckpointInfo) -> str | None:
    """Return the path in the checkpoint for ``path`` of the state; None for an array that keeps its value."""
    if path == "extra/ema/updates":  # a new average
        return None
    for copy in COPIES:
        if path.startswith(copy):
            rest = path.removeprefix(copy)
            path = rest if rest.startswith("params/") else f"extra/{rest}"
    root, _, name = path.partition("/")
    if root == "extra":
        kind, _, name = name.partition("/")
        root = f"extra/{kind}"
        if kind == "masks":
            return _source_of_mask(name, pairs, chosen)
        absent = kind == RANGES and path not in chosen.manifest["tree"]  # a run without int8 has none
        if kind in NOT_MODEL_STATE or kind == TEACHER or absent:
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


def _source_of_mask(name: str, pairs: Sequence[tuple[str, str]], chosen: CheckpointInfo) -> str | None:
    """Return the path of a pruning mask: what is pruned there stays pruned here, if both runs prune."""
    weights = _source_of(name, pairs, chosen) if name.startswith("params/") else None
    if weights is None:
        return None
    mask = f"extra/masks/{weights.removeprefix('extra/ema/')}"
    return mask if mask in chosen.manifest["tree"] else None


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}/")


def _check(
    chosen: CheckpointInfo,
    here: dict[str, Any],
    wanted: dict[str, str],
    pairs: Sequence[tuple[str, str]],
    setting: str,
) -> None:
    manifests.check_format(chosen)
    names = [path.partition("/")[2] for path in here if path.startswith("params/")]
    for old, new in pairs:
        if not any(_under(name, new or old) for name in names):
            raise InputError(f"--init-map {old}={new}: no parameter here is under {new or old}")
    there = chosen.manifest["tree"]
    for path, name in wanted.items():
        have, want = there.get(name, "absent"), manifests.spec(here[path])
        if have != want and not (have != "absent" and _fits(path, name, have, want)):
            top = path.removeprefix("params/").partition("/")[0]
            fix = f"rename with --init-map OLD=NEW, or keep the new values with --init-map {top}="
            if not setting.startswith("--"):
                fix = f"give {setting}RUN a run whose model takes these inputs"
            raise InputError(
                f"checkpoint {chosen.folder} does not fit: {name} is {have} there and {path} is {want} here; "
                f"{fix}"
            )


def _fits(path: str, name: str, have: str, want: str) -> bool:
    """Whether one is the average of the other in float32, as averages of half-precision floats are."""
    if not (path.startswith(COPIES) or name.startswith(COPIES)):
        return False
    (shape, dtype), (other_shape, other) = manifests.parse_spec(have), manifests.parse_spec(want)
    floats = jnp.issubdtype(dtype, jnp.floating) and jnp.issubdtype(other, jnp.floating)
    return bool(floats and shape == other_shape and jnp.float32 in (dtype, other))


def _count_new(here: dict[str, Any], wanted: dict[str, str]) -> int:
    return sum(path.startswith("params/") and path not in wanted for path in here)
