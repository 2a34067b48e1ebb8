"""A first evaluation before training: metrics that padding rows change, or that cannot be computed."""

from __future__ import annotations

import contextlib
import functools
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line
from jaxtrain.core.types import Metrics, State
from jaxtrain.metrics import Mean
from jaxtrain.metrics.figures import MetricGroup
from jaxtrain.program import Program, Split
from jaxtrain.program.loader import Resident

SAME = 1e-5  # relative difference that the order of a sum may make
NOISE = 0.02  # added to the initial parameters: layers that start at zero would make all outputs equal


def check_first_evaluation(program: Program) -> list[str]:
    """Evaluate a few batches with padding rows, and check that the metrics leave those rows out.

    Half of a batch is padding, first copies of one example and then other examples; the sums and counts of
    both must be equal. Then all of it is padding: no count may remain that of all rows. This costs an
    initialisation and three evaluation steps; the eval step is compiled earlier than it would be. If
    results are not finite, the same is done without the change of the parameters.

    Args:
      program: from ``jaxtrain.program.assemble``.

    Returns:
      A note for each metric that is averaged over batches, where a split has padding rows.

    Raises:
      InputError: a metric depends on padding rows and a split has some, or its ``merge`` or
        ``compute`` fails.
    """
    name, split = _last_padded(program)
    size, batches = _batch_size(split), _padded_batches(split)
    probes: list[list[Metrics]] = []
    for change in (_disturbed, lambda state: state):
        state = change(program.init())
        probes.append([split.step(state, batch).rows()[0] for batch in batches])
        if all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(probes[-1][:2])):
            break
    _check_computed(probes[-1][0], probes[-1][1], split, state)
    rows = split.batches * size - split.examples
    if not rows:
        return []
    found = {metric: [[row[metric] for row in probe] for probe in probes] for metric in probes[0][0]}
    changed = [m for m, values in found.items() if any(_has_padding(a, b, c, size) for a, b, c in values)]
    if changed:
        raise InputError(
            f"{', '.join(changed)} of an evaluation batch depends on its padding rows, where "
            f'batch["mask"] is false ({rows} rows in the last batch of {name}): average over the '
            'other rows in the loss, such as Mean.of(values, batch.get("mask")), and let no row of the '
            "model's outputs depend on other rows; or set an eval_batch that divides "
            f"{split.examples:,} examples"
        )
    return [
        f"{metric} is averaged over batches, not over examples: report jaxtrain.metrics.Mean.of(values of "
        "each example, mask)"
        for metric, values in found.items()
        if any(_averages_batches(some, none) for some, _, none in values)
    ]


def _last_padded(program: Program) -> tuple[str, Split]:
    """A split whose last batch has padding rows, or any where none has."""
    return max(
        program.evals.items(), key=lambda item: item[1].batches * _batch_size(item[1]) > item[1].examples
    )


def _batch_size(split: Split) -> int:
    return int(split.loader.abstract_batch()["mask"].shape[0])


def _padded_batches(split: Split) -> list[Any]:
    """The first batch: half of it padding, with copies of one example and with others, and all padding."""
    batch, size, last = split.loader.batch(0), _batch_size(split), split.batches - 1
    far = None
    if last and split.examples % size:
        with contextlib.suppress(Exception):  # of a user's source: the evaluation that reads it says so
            far = getattr(split.loader, "batch_here", split.loader.batch)(last)
    split.loader.close()  # the evaluation starts a stream of its own
    resident = isinstance(split.loader, Resident)
    data = {"data": batch["data"]} if resident else {}  # all examples
    fields, far = ({k: x for k, x in (b or {}).items() if k not in data} for b in (batch, far))
    fill: Any = functools.partial(_fill, np)
    if not isinstance(batch["mask"], np.ndarray):
        shardings = split.loader.shardings
        where = {name: shardings[name] if resident else shardings for name in fields}
        fill = jax.jit(functools.partial(_fill, jnp), out_shardings=where)
    half = max(1, min(size, split.examples) // 2)
    wanted = ((half, True), (half, False), (0, False))
    return [{**data, **fill(fields, far, np.int32(real), np.bool_(copies))} for real, copies in wanted]


def _fill(xp: Any, fields: dict[str, Any], far: dict[str, Any], real: Any, copies: Any) -> dict[str, Any]:
    """Make all rows but the first ``real`` padding.

    With ``copies`` they are copies of the first row. Else every second one is the first row of ``far``, a
    batch with other labels where the examples are in the order of their labels.
    """
    places = xp.arange(len(fields["mask"]))
    mask = fields["mask"] & (places < real)

    def filled(name: str, x: Any) -> Any:
        column = (-1, *(1,) * (x.ndim - 1))
        other = xp.where((places % 2).reshape(column), far[name][:1], x) if far else x
        return xp.where(mask.reshape(column), x, xp.where(copies, x[:1], other))

    return {**{name: filled(name, x) for name, x in fields.items()}, "mask": mask}


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


def _check_computed(metrics: Metrics, others: Metrics, split: Split, state: State) -> None:
    """Raise InputError for a metric whose ``merge`` or ``compute`` fails on the host."""
    for name, metric in metrics.items():
        what = "merged"
        try:
            merged, what = metric.merge(others[name]), "computed"
            try:
                value = merged.compute()
            except (ValueError, ArithmeticError):  # such as a curve of examples that are all of one class
                value = _compute_all(name, split, state)
        except Exception as error:  # a user's metric
            raise InputError(
                f"the metric {name} of an evaluation cannot be {what}: {type(error).__name__}: "
                f"{first_line(error)[:200]} (--debug shows where)"
            ) from error
        if not _is_result(value):
            raise InputError(
                f"the metric {name} of an evaluation computes {first_line(repr(value))[:60]}: let its "
                "compute() return a real number, an array of them or a dict of these"
            )


def _compute_all(name: str, split: Split, state: State) -> Any:
    """Compute the metric of as many batches as it needs; raise what it raises on all of them."""
    metric: Any = None
    for number in range(split.batches):
        row = split.step(state, split.loader.batch(number)).rows()[0][name]
        metric = row if metric is None else metric.merge(row)
        try:
            value = metric.compute()
        except (ValueError, ArithmeticError):
            if number == split.batches - 1:
                raise
        else:
            break
    split.loader.close()
    return value


def _is_result(value: Any) -> bool:
    """Whether ``value`` is a real number, an array or list of them, or a dict of these."""
    if isinstance(value, Mapping):
        return all(map(_is_result, value.values()))
    if isinstance(value, numbers.Real):
        return True
    try:
        dtype = np.asarray(value).dtype
    except Exception:  # a list of lists of different lengths, or an object of the user's
        return False
    return jnp.issubdtype(dtype, jnp.bool_) or (
        jnp.issubdtype(dtype, jnp.number) and not jnp.issubdtype(dtype, jnp.complexfloating)
    )


def _has_padding(copies: Any, others: Any, none: Any, size: int) -> bool:
    """Whether padding rows change a metric, or it counts them (its values for the three batches)."""
    if _differ(copies, others):
        return True
    if isinstance(copies, MetricGroup):
        return any(
            _has_padding(copies.metrics[k], others.metrics[k], none.metrics[k], size) for k in copies.metrics
        )
    return size > 1 and _counts_padding(copies, none, size)


def _differ(one: Any, other: Any) -> bool:
    """Whether two values of a metric differ by more than rounding."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return any(
        not np.allclose(np.asarray(a), np.asarray(b), rtol=SAME, atol=SAME / 10, equal_nan=True)
        for a, b in pairs
    )


def _counts_padding(some: Any, none: Any, size: int) -> bool:
    """Whether one of a metric's sums counts each of ``size`` rows, padding or not."""
    if isinstance(some, Mean):
        leaves, counts = [some.total, some.count], [_count(some.count, none.count, 2 * some.count, size)]
    else:
        columns = [jax.tree.leaves(metric) for metric in (some, none, some.merge(some))]
        leaves, counts = columns[0], []
        if len({*map(len, columns)}) == 1:
            counts = [_count(x, y, double, size) for x, y, double in zip(*columns, strict=True)]
    found = {x for x in counts if x}
    sums = [x for x in leaves if np.ndim(x) or float(x) not in found]
    # Such as the mean of a weight, which no row changes; a total of 0 may be one by chance.
    constant = bool(sums) and all(np.all(x) for x in sums) and not _differ(some, none)
    return bool(found) and not constant


def _count(some: Any, none: Any, double: Any, size: int) -> float:
    """The number if it may count all rows: merged by addition, the same without rows; else 0."""
    if any(np.ndim(x) or not np.isfinite(x) for x in (some, none, double)):
        return 0.0
    same = some == none and double == 2 * some
    return float(some) if same and some > 0 and some % size == 0 else 0.0


def _averages_batches(some: Any, none: Any) -> bool:
    """Whether a mean counts batches, or what is no number of rows, though the rows change its sum."""
    if isinstance(some, MetricGroup):
        return any(_averages_batches(some.metrics[name], none.metrics[name]) for name in some.metrics)
    if not isinstance(some, Mean) or np.ndim(some.count):
        return False
    return some.count == none.count > 0 and _differ(some.total, none.total)
