"""A first evaluation before training: metrics that padding rows change, or that cannot be computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line
from jaxtrain.core.types import Metrics, State
from jaxtrain.program import Program, Split

SAME = 1e-5  # relative difference that the order of a sum may make
NOISE = 0.02  # added to the initial parameters: layers that start at zero would make all outputs equal


def check_first_evaluation(program: Program) -> None:
    """Evaluate one batch of a split, with a part of its rows as padding, and check its metrics.

    The padding rows hold one real example after the other, and nothing else changes. So this costs an
    initialisation and as many evaluation steps as ``_PADDING``; the eval step is compiled earlier than it
    would be.

    Args:
      program: from ``jaxtrain.program.assemble``.

    Raises:
      InputError: a metric depends on padding rows and a split has some, or its ``compute`` fails.
    """
    name, split = _last_padded(program)
    state = _disturbed(program.init())
    padded = [split.step(state, batch).rows()[0] for batch in _padded_batches(split)]
    _check_computed(padded[0])
    rows = split.batches * _batch_size(split) - split.examples
    changed = [metric for metric in padded[0] if any(_differ(padded[0], one, metric) for one in padded[1:])]
    if rows and changed:
        raise InputError(
            f"{', '.join(changed)} of an evaluation batch changes with the contents of its padding rows "
            f'({rows} rows in the last batch of {name}), where batch["mask"] is false: average over the '
            'other rows in the loss, such as Mean.of(values, batch.get("mask")), and let no row of the '
            "model's outputs depend on other rows; or set an eval_batch that divides "
            f"{split.examples:,} examples"
        )


def _last_padded(program: Program) -> tuple[str, Split]:
    """A split whose last batch has padding rows, or any where none has."""
    return max(
        program.evals.items(), key=lambda item: item[1].batches * _batch_size(item[1]) > item[1].examples
    )


def _batch_size(split: Split) -> int:
    return int(split.loader.abstract_batch()["mask"].shape[0])


_PADDING = (0, 1, -1)  # the rows that the padding rows are copies of: the first, second and last real one


def _padded_batches(split: Split) -> list[Any]:
    """The first batch with padding from its middle on, filled with different examples."""
    batch = split.loader.batch(0)
    split.loader.close()  # the evaluation starts a stream of its own
    data = {name: array for name, array in batch.items() if name == "data"}  # resident: all examples

    fields = {name: array for name, array in batch.items() if name != "data"}
    shardings = split.loader.shardings
    where = {name: shardings[name] if isinstance(shardings, dict) else shardings for name in fields}

    def fill(fields: dict[str, Any], source: jax.Array) -> dict[str, Any]:
        mask = fields["mask"]
        real = mask & (jnp.arange(len(mask)) < max(1, len(mask) // 2))
        row = jnp.clip(jnp.where(source < 0, real.sum() + source, source), 0, real.sum() - 1)

        def filled(x: jax.Array) -> jax.Array:
            return jnp.where(real.reshape(-1, *(1,) * (x.ndim - 1)), x, x[row])

        return {**{name: filled(x) for name, x in fields.items()}, "mask": real}

    compiled = jax.jit(fill, out_shardings=where)
    return [{**data, **compiled(fields, np.int32(row))} for row in _PADDING]


def _disturbed(state: State) -> State:
    """``state`` with other float parameters, and with the averages that evaluation uses instead of them."""

    def disturb(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        places = sum(
            ((7 + 5 * axis) * jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in range(x.ndim)),
            start=jnp.zeros(x.shape, jnp.int32),
        )
        return x + (NOISE * jnp.cos(places.astype(jnp.float32))).astype(x.dtype)

    shardings = jax.tree.map(lambda x: x.sharding, state.params)
    disturb_all = jax.jit(lambda tree: jax.tree.map(disturb, tree), out_shardings=shardings, donate_argnums=0)
    params, extra = disturb_all(state.params), state.extra
    if "ema" in extra:
        extra = {**extra, "ema": {**extra["ema"], "params": disturb_all(extra["ema"]["params"])}}
    return state.replace(params=params, extra=extra)


def _check_computed(metrics: Metrics) -> None:
    """Raise InputError for a metric whose ``compute`` fails on the host."""
    for name, metric in metrics.items():
        try:
            metric.compute()
        except Exception as error:  # a user's metric
            raise InputError(
                f"the metric {name} of an evaluation cannot be computed: {type(error).__name__}: "
                f"{first_line(error)[:200]} (--debug shows where)"
            ) from error


def _differ(one: Metrics, other: Metrics, name: str) -> bool:
    pairs = zip(jax.tree.leaves(one[name]), jax.tree.leaves(other[name]), strict=True)
    return any(
        not np.allclose(np.asarray(a), np.asarray(b), rtol=SAME, atol=SAME / 10, equal_nan=True)
        for a, b in pairs
    )
