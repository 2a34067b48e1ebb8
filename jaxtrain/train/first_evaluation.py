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
from jaxtrain.metrics import Mean
from jaxtrain.program import Program, Split
from jaxtrain.program.loader import Resident

SAME = 1e-5  # relative difference that the order of a sum may make
NOISE = 0.02  # added to the initial parameters: layers that start at zero would make all outputs equal


def check_first_evaluation(program: Program) -> None:
    """Evaluate a few batches with padding rows, and check that the metrics leave those rows out.

    Half of a batch is padding, first copies of one example and then other examples; the sums and counts of
    both must be equal. Then all of it is padding: a count of all rows must not stay, where its sum changes.
    This costs an initialisation and three evaluation steps; the eval step is compiled earlier than it would
    be.

    Args:
      program: from ``jaxtrain.program.assemble``.

    Raises:
      InputError: a metric depends on padding rows and a split has some, or its ``compute`` fails.
    """
    name, split = _last_padded(program)
    state, size = _disturbed(program.init()), _batch_size(split)
    copies, others, empty = (split.step(state, batch).rows()[0] for batch in _padded_batches(split))
    _check_computed(copies)
    changed = [metric for metric in copies if _differ(copies[metric], others[metric])]
    changed += [
        metric
        for metric in copies
        if metric not in changed and _counts_padding(copies[metric], empty[metric], size)
    ]
    rows = split.batches * size - split.examples
    if rows and changed:
        raise InputError(
            f"{', '.join(changed)} of an evaluation batch depends on its padding rows, where "
            f'batch["mask"] is false ({rows} rows in the last batch of {name}): average over the '
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


def _padded_batches(split: Split) -> list[Any]:
    """The first batch: half of it padding, with copies of one example and with others, and all padding."""
    batch = split.loader.batch(0)
    split.loader.close()  # the evaluation starts a stream of its own
    resident = isinstance(split.loader, Resident)
    data = {"data": batch["data"]} if resident else {}  # all examples
    fields = {name: array for name, array in batch.items() if name not in data}
    fill: Any = functools.partial(_fill, np)
    if not isinstance(batch["mask"], np.ndarray):
        shardings = split.loader.shardings
        where = {name: shardings[name] if resident else shardings for name in fields}
        fill = jax.jit(functools.partial(_fill, jnp), out_shardings=where)
    half = max(1, min(_batch_size(split), split.examples) // 2)
    wanted = ((half, True), (half, False), (0, False))
    return [{**data, **fill(fields, np.int32(real), np.bool_(copies))} for real, copies in wanted]


def _fill(xp: Any, fields: dict[str, Any], real: Any, copies: Any) -> dict[str, Any]:
    """Make all rows but the first ``real`` padding; with ``copies`` they are copies of the first row."""
    mask = fields["mask"] & (xp.arange(len(fields["mask"])) < real)

    def filled(x: Any) -> Any:
        own = mask | ~copies
        return xp.where(own.reshape(-1, *(1,) * (x.ndim - 1)), x, x[:1])

    return {**{name: filled(x) for name, x in fields.items()}, "mask": mask}


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


def _differ(one: Any, other: Any) -> bool:
    """Whether two values of a metric differ by more than rounding."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return any(
        not np.allclose(np.asarray(a), np.asarray(b), rtol=SAME, atol=SAME / 10, equal_nan=True)
        for a, b in pairs
    )


def _counts_padding(some: Any, none: Any, size: int) -> bool:
    """Whether a mean counts each of ``size`` rows, padding or not, though its sum leaves padding out."""
    if not isinstance(some, Mean) or size == 1 or float(some.count) != float(none.count):
        return False
    return float(some.count) > 0 and float(some.count) % size == 0 and _differ(some.total, none.total)
