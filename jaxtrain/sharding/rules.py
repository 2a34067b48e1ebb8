"""Shardings for every array of the state: rules map logical axes to mesh axes.

A model names the axes of its parameters once (``logical_axes``). A rule says which mesh axis splits a name.
The built-in rules are Megatron's (Shoeybi et al. 2019, arXiv:1909.08053): a layer that widens is split by
its outputs and the next one by its inputs, so that a pair communicates once. The axis ``fsdp`` needs no
names: it splits the largest dimension that it divides (ZeRO stage 3, arXiv:1910.02054).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.core.errors import InputError
from jaxtrain.core.text import did_you_mean
from jaxtrain.core.types import NOT_MODEL_STATE, RANGES, Names, State, leaf_paths
from jaxtrain.sharding.mesh import AXES, mesh_text

LOGICAL: Mapping[str, str | None] = {
    "vocab": "model",  # tokens, users, items: rows of an embedding and outputs of a head on them
    "heads": "model",  # attention heads
    "mlp": "model",  # the hidden layer between two dense ones
    "channels": "model",  # between the two convolutions of a pair
    "embed": None,  # the residual stream
    "classes": None,
}
"""The built-in rules: logical axis → mesh axis; None is not split."""

SMALLEST = 2**12
"""``fsdp`` does not split arrays with fewer elements: the communication would cost more than it saves."""

Spec = tuple[str | tuple[str, ...] | None, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """An entry of an experiment's ``rules``: the mesh axes that split a logical axis or an array.

    Attributes:
      match: a logical axis when ``axes`` is a mesh axis or None; otherwise a regular expression that is
        searched in the paths of the state (``params/head/kernel``, ``opt_state/0/mu/head/kernel``).
        Optimizer state and averages follow their parameter unless a rule matches their own path.
      axes: a mesh axis; or one entry for each dimension of the array: a mesh axis, several of them or None.
        Such an array is placed exactly like this, and ``fsdp`` does not split it further.

    >>> Rule("vocab", None), Rule("head/kernel$", ("fsdp", "model"))
    (Rule(match='vocab', axes=None), Rule(match='head/kernel$', axes=('fsdp', 'model')))
    """

    match: str
    axes: str | Spec | None


@dataclasses.dataclass(frozen=True)
class Placement:
    """Shardings of a state.

    Attributes:
      shardings: the state's tree, of ``NamedSharding``.
      unsplit: paths of arrays with at least ``SMALLEST`` elements that ``fsdp`` could not divide.
    """

    shardings: State
    unsplit: tuple[str, ...]


def place(
    state: State,
    mesh: Mesh,
    names: Mapping[str, Names] | None = None,
    rules: Sequence[Rule] = (),
    check_used: bool = True,
) -> Placement:
    """Choose a sharding for every array of ``state``.

    Args:
      state: arrays or their ``jax.ShapeDtypeStruct``.
      mesh: the devices.
      names: regular expression → logical axes of the parameters and statistics whose path it matches; the
        first match wins. None: the model's names are unknown, and rules for names are not checked.
      rules: in order of precedence, before the built-in ones.
      check_used: False accepts path rules that match nothing, and a mesh axis ``model`` that splits nothing.

    Raises:
      InputError: a rule or a name that matches nothing, sizes that do not divide, or a mesh axis ``model``
        that splits no parameter.

    >>> params = {"head": {"kernel": jax.ShapeDtypeStruct((64, 128), "float32")}}
    >>> mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "model"), devices=jax.devices()[:1])
    >>> place(State(0, params, {}, ()), mesh).shardings.params["head"]["kernel"].is_fully_replicated
    True
    """
    leaves, specs, unsplit = leaf_paths(state), {}, []
    placer = _Placer(mesh, names, tuple(rules), leaf_paths(state.params))
    for path, leaf in sorted(leaves.items(), key=lambda item: not item[0].startswith("params/")):
        specs[path] = spec = placer.spec(path, tuple(jax.numpy.shape(leaf)))
        large = math.prod(jax.numpy.shape(leaf)) >= SMALLEST
        if large and mesh.shape["fsdp"] > 1 and "fsdp" not in _flat(spec) and not placer.has_rule(path):
            unsplit.append(path)
    if check_used:
        placer.check_used(leaves, specs)
    shardings = [NamedSharding(mesh, PartitionSpec(*_trim(specs[path]))) for path in leaves]
    return Placement(jax.tree.unflatten(jax.tree.structure(state), shardings), tuple(unsplit))


def spec_text(sharding: NamedSharding) -> str:
    """Write one word for each dimension, ``-`` where it is not split; empty for a replicated array.

    >>> mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "model"), devices=jax.devices()[:1])
    >>> spec_text(NamedSharding(mesh, PartitionSpec(None, ("fsdp", "model"))))
    '- fsdp+model'
    """
    words = ["+".join(_entry(axes)) or "-" for axes in sharding.spec]
    return " ".join(words) if any(word != "-" for word in words) else ""


class _Placer:
    """Compute specs one by one: parameters first, then the arrays that follow them."""

    def __init__(
        self,
        mesh: Mesh,
        names: Mapping[str, Names] | None,
        rules: tuple[Rule, ...],
        params: Mapping[str, Any],
    ) -> None:
        self._mesh, self._names, self._params = mesh, dict(names or {}), params
        self._path_rules = [rule for rule in rules if isinstance(rule.axes, tuple | list)]
        named = {rule.match: rule.axes for rule in reversed(rules) if rule not in self._path_rules}
        self._logical: dict[str, Any] = {**LOGICAL, **named}
        self._known: dict[tuple[str, tuple[int, ...]], Spec] = {}
        self._check_expressions()
        self._check_axes(named)
        if names is not None:
            self._check_names(named)

    def spec(self, path: str, shape: tuple[int, ...]) -> Spec:
        """Return the mesh axes of each dimension."""
        if path.startswith(f"extra/{RANGES}/"):  # scalars, whatever rules say of the weights in their names
            return ()
        head, _, rest = path.partition("/")
        if head == "extra":
            collection, _, rest = rest.partition("/")
            of_model = collection not in NOT_MODEL_STATE
        else:
            of_model = head == "params"
        rule = self._path_rule(path)
        if rule is not None:
            spec = self._exact(rule, path, shape)
        elif of_model:
            spec = self._by_size(self._by_name(path, rest, shape, head == "params"), shape)
        else:
            spec = self._follows(path, shape)
        if of_model:
            self._known[rest, shape] = spec
        return spec

    def has_rule(self, path: str) -> bool:
        """Return whether a rule matches this path."""
        return self._path_rule(path) is not None

    def check_used(self, leaves: Mapping[str, Any], specs: Mapping[str, Spec]) -> None:
        """Raise InputError for a path rule that matches nothing, and for ``model`` splitting nothing."""
        for rule in self._path_rules:
            if not any(re.search(rule.match, path) for path in leaves):
                raise InputError(
                    f"rules: {rule.match!r} matches no array of the state, which has {_example(leaves)}"
                )
        size = self._mesh.shape["model"]
        if size > 1 and not any("model" in _flat(spec) for spec in specs.values()):
            raise InputError(
                f"mesh {mesh_text(self._mesh.shape)}: no parameter of this model is split over model, so "
                f"groups of {size} devices would repeat the same work: use data or fsdp for them, or name "
                "the parameters' axes (logical_axes of the module, or rules of the experiment)"
            )

    def _path_rule(self, path: str) -> Rule | None:
        return next((rule for rule in self._path_rules if re.search(rule.match, path)), None)

    def _exact(self, rule: Rule, path: str, shape: tuple[int, ...]) -> Spec:
        axes = tuple(rule.axes or ())
        if len(axes) != len(shape):
            raise InputError(
                f"rules: {rule.match!r} has {len(axes)} entries and {path} {list(shape)} has {len(shape)} "
                "dimensions: give one entry for each, None where it is not split"
            )
        return self._divided(path, shape, axes)

    def _by_name(self, path: str, rest: str, shape: tuple[int, ...], required: bool) -> Spec:
        """Return the mesh axes that the rules assign to the names of a parameter's dimensions."""
        found = next((names for match, names in self._names.items() if re.search(match, rest)), None)
        if found is None:
            if required and self._names and self._mesh.shape["model"] > 1:
                idle = [m for m in self._names if not any(re.search(m, known) for known in self._params)]
                raise InputError(
                    f"no rule says how {path} {list(shape)} is split over model: add it to the module's "
                    f"logical_axes{f' (in which {idle[0]!r} matches nothing)' if idle else ''}, or put "
                    f"sharding.Rule({rest + '$'!r}, {(None,) * len(shape)}) into the experiment's rules to "
                    "replicate it"
                )
            return (None,) * len(shape)
        if isinstance(found, str):
            raise InputError(f"logical_axes has the text {found!r} for {path}: write ({found!r},)")
        if len(found) != len(shape):
            raise InputError(
                f"logical_axes names {len(found)} axes {found} for {path} {list(shape)}: give one for each "
                "dimension, None for one that is never split"
            )
        for name in found:
            if name is not None and name not in self._logical:
                hint = did_you_mean(name, self._logical)
                raise InputError(
                    f"no rule for the logical axis {name!r} of {path}: "
                    f"{hint} (or add sharding.Rule({name!r}, 'model') or sharding.Rule({name!r}, None) to "
                    "the experiment's rules)"
                )
        axes = tuple(None if name is None else self._logical[name] for name in found)
        return self._divided(path, shape, axes, found)

    def _divided(self, path: str, shape: tuple[int, ...], axes: Spec, names: Names | None = None) -> Spec:
        """Remove axes of size 1; raise InputError unless the others differ and divide the shape."""
        spec: list[Any] = []
        used_axes = [axis for axis in _flat(axes) if self._mesh.shape[axis] > 1]
        if len(set(used_axes)) < len(used_axes):
            raise InputError(
                f"{path} {list(shape)}: rules split two dimensions over one mesh axis: {axes}: give one None"
            )
        for number, entry in enumerate(axes):
            used = [axis for axis in _entry(entry) if self._mesh.shape[axis] > 1]
            parts = math.prod(self._mesh.shape[axis] for axis in used)
            if shape[number] % parts:
                name = names[number] if names else None
                fix = f"replicate it with sharding.Rule({name!r}, None)" if name else "change its rule"
                raise InputError(
                    f"{path} {list(shape)}: {name or f'dimension {number}'} of {shape[number]} does not "
                    f"divide over {'×'.join(used)} = {parts}: use a mesh with "
                    f"{_smaller(used, shape[number], parts)}, change the model's size, or {fix}"
                )
            spec.append(used[0] if len(used) == 1 else tuple(used) or None)
        return tuple(spec)

    def _by_size(self, spec: Spec, shape: tuple[int, ...]) -> Spec:
        """Split the largest dimension that ``fsdp`` divides over it."""
        size = self._mesh.shape["fsdp"]
        if size == 1 or math.prod(shape) < SMALLEST or "fsdp" in _flat(spec):
            return spec
        model = self._mesh.shape["model"]
        parts = [size * (model if entry else 1) for entry in spec]
        fitting = [d for d in range(len(shape)) if shape[d] % parts[d] == 0]
        if not fitting:
            return spec
        best = max(fitting, key=lambda d: (spec[d] is None, shape[d]))
        axes = (*_entry(spec[best]), "fsdp")
        return (*spec[:best], axes if len(axes) > 1 else "fsdp", *spec[best + 1 :])

    def _follows(self, path: str, shape: tuple[int, ...]) -> Spec:
        """Return the spec of the parameter with this shape whose path ends this one (moments, averages)."""
        words = path.split("/")
        for start in range(1, len(words)):
            known = self._known.get(("/".join(words[start:]), shape))
            if known is not None:
                return known
        return self._by_size((None,) * len(shape), shape)

    def _check_names(self, named: Mapping[str, Any]) -> None:
        """Raise InputError for a rule for a logical axis that the model does not have."""
        names = {name for axes in self._names.values() for name in axes if name}
        for name in named:
            if name not in names:
                hint = did_you_mean(name, sorted(names))
                raise InputError(
                    f"rules: the model has no logical axis {name!r}: {hint} (a regular expression needs one "
                    "entry for each dimension, in a tuple)"
                )

    def _check_axes(self, named: Mapping[str, Any]) -> None:
        entries = [axes for rule in self._path_rules for axes in rule.axes or ()]
        for axis in (axis for entry in [*entries, *named.values()] for axis in _entry(entry)):
            if axis not in AXES:
                raise InputError(f"rules: no mesh axis is called {axis!r}: {did_you_mean(axis, AXES)}")

    def _check_expressions(self) -> None:
        where = [("rules", rule.match) for rule in self._path_rules] + [
            ("logical_axes", m) for m in self._names
        ]
        for place, match in where:
            try:
                re.compile(match)
            except re.error as error:
                raise InputError(
                    f"{place}: {match!r} is not a regular expression ({error}): correct it"
                ) from error


def _entry(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _trim(spec: Spec) -> Spec:
    """Drop the unsplit dimensions at the end, as JAX does."""
    while spec and spec[-1] is None:
        spec = spec[:-1]
    return spec


def _flat(spec: Spec) -> list[str]:
    return [axis for entry in spec for axis in _entry(entry)]


def _smaller(axes: list[str], length: int, parts: int) -> str:
    """Suggest a size that divides the length and the requested size, so that it divides the devices too."""
    return f"{'×'.join(axes)} = {max(n for n in range(1, parts) if length % n == 0 and parts % n == 0)}"


def _example(leaves: Mapping[str, Any]) -> str:
    return max(leaves, key=len, default="params/head/kernel")
