"""What a state must keep through an update: its arrays, with their shapes and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import NOT_MODEL_STATE, TEACHER, State, leaf_paths


def check_state_unchanged(before: State, after: Any) -> None:
    """Raise InputError, naming the array, unless an update keeps the state's structure, shapes and dtypes.

    A state that changes is traced and compiled again, and no checkpoint of it can be restored.

    Args:
      before: the state, arrays or shapes.
      after: the state after the update.

    >>> before = State(jnp.int32(0), {"w": jnp.zeros(3)}, {"seen": jnp.int32(0)}, ())
    >>> check_state_unchanged(before, before.replace(extra={"seen": before.extra["seen"] * 0.9}))
    Traceback (most recent call last):
        ...
    jaxtrain.core.errors.InputError: an update changes the state's extra/seen from int32[] to float32[]: start
    it with the dtype and shape that updates give it, or cast it back
    """
    if not isinstance(after, State):
        raise InputError(
            f"an update returns a {type(after).__name__} as its state: return state.replace(...) of the State"
        )
    old, new = _specs(before), _specs(after)
    for path in [*old, *new]:
        if old.get(path) != new.get(path):
            raise InputError(
                f"an update changes the state's {path} from {old.get(path, 'absent')} to "
                f"{new.get(path, 'absent')}: start it with the dtype and shape that updates give it, or cast "
                "it back"
            )
    structures: list[Any] = [jax.tree.structure(before), jax.tree.structure(after)]
    if structures[0] != structures[1]:
        raise InputError(
            "an update changes the structure of the state, such as a list to a tuple: return the containers "
            "that the state had"
        )


def check_trainable(params: Any) -> None:
    """Raise InputError, naming the array, for parameters that have no gradient: integers, booleans and keys.

    >>> check_trainable({"w": jnp.zeros(3), "table": jnp.arange(4)})
    Traceback (most recent call last):
        ...
    jaxtrain.core.errors.InputError: the parameter table is int32[4], which no gradient exists for: let the
    model's init return it in its second dict, (params, {"constants": ...}); in Flax use self.variable
    """
    for path, leaf in leaf_paths(params).items():
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise InputError(
                f"the parameter {path} is {_spec(leaf)}, which no gradient exists for: let the model's init "
                'return it in its second dict, (params, {"constants": ...}); in Flax use self.variable'
            )


def check_pair(result: Any, function: str, wanted: str) -> tuple[Any, Any]:
    """Return the result of a model's ``init`` or ``apply``; raise InputError unless it is such a pair."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise InputError(f"the model's {function} returns a {type(result).__name__}: return {wanted}")
    if not isinstance(result[1], Mapping):
        raise InputError(
            f"the model's {function} returns a {type(result[1]).__name__} as its statistics: return {wanted} "
            "with a dict, {} for none"
        )
    return result


def check_names(extra: Mapping[str, Any]) -> None:
    """Raise InputError for statistics of a model under a name that the state has for something else.

    >>> check_names({"batch_stats": {}, "ema": {}})
    Traceback (most recent call last):
        ...
    jaxtrain.core.errors.InputError: the model's collection 'ema' has a name that the state uses: rename it
    """
    for name in extra:
        if name in NOT_MODEL_STATE or name == TEACHER:
            raise InputError(f"the model's collection {name!r} has a name that the state uses: rename it")


def without_weak_types(state: State) -> State:
    """Return ``state`` with the types of JAX's Python scalars made those of arrays.

    ``jnp.full(3, 0.1)`` has a weak type, which an update loses, and then the next one is compiled again.
    """

    def strong(x: Any) -> Any:
        return jax.lax.convert_element_type(x, x.dtype) if getattr(x, "weak_type", False) else x

    strong_state: State = jax.tree.map(strong, state)
    return strong_state


def _specs(tree: Any) -> dict[str, str]:
    return {path: _spec(leaf) for path, leaf in leaf_paths(tree).items()}


def _spec(leaf: Any) -> str:
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
