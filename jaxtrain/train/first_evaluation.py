"""A first evaluation before training: metrics that padding rows change, or that cannot be computed."""

from __future__ import annotations

import functools
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
    fill: Any = functools.partial(_fill, np)
    if not isinstance(batch["mask"], np.ndarray):
        shardings = split.loader.shardings
        where = {name: shardings[name] if isinstance(shardings, dict) else shardings for name in fields}
        fill = jax.jit(functools.partial(_fill, jnp), out_shardings=where)
    return [{**data, **fill(fields, np.int32(row))} for row in _PADDING]


def _fill(xp: Any, fields: dict[str, Any], source: Any) -> dict[str, Any]:
    """Make the second half of a batch padding, and copies of row ``source`` of the first half."""
    mask = fields["mask"]
    real = mask & (xp.arange(len(mask)) < max(1, len(mask) // 2))
    row = xp.clip(xp.where(source < 0, real.sum() + source, source), 0, real.sum() - 1)

    def filled(x: Any) -> Any:
        return xp.where(real.reshape(-1, *(1,) * (x.ndim - 1)), x, x[row][None])

    return {**{name: filled(x) for name, x in fields.items()}, "mask": real}


def _disturbed(state: State) -> State:
    """``state`` with other float parameters, and with the averages that evaluation uses instead of them."""
    pattern = NOISE * np.random.default_rng(0).standard_normal(1009)

    def disturb(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        shards = [  # on the host, because nothing has to be compiled for it
            jax.device_put(np.asarray(s.data) + np.resize(pattern, s.data.shape).astype(x.dtype), s.device)
            for s in x.addressable_shards
        ]
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)

    params, extra = jax.tree.map(disturb, state.params), state.extra
    if "ema" in extra:
        averaged = jax.tree.map(disturb, extra["ema"]["params"])
        extra = {**extra, "ema": {**extra["ema"], "params": averaged}}
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
