"""Mixed precision: activations in bfloat16 or float16 with float32 parameters, for any model."""

from __future__ import annotations

import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Batch, Model
from jaxtrain.models.adapter import as_model

Precision = Literal["float32", "bfloat16", "float16"]


def compute_in(model: Any, precision: Precision) -> Model:
    """Return ``model`` with activations in ``precision``; parameters and statistics stay float32.

    Parameters and float inputs are cast to ``precision`` before the model, and its outputs back to float32,
    so loss, optimizer and checkpoints are not affected (mixed precision, arXiv:1710.03740). Gradients arrive
    as float32, but JAX computes them in ``precision``: ``make_train_step`` makes their sums float32, and
    ``step.float32_sums.sum_in_float32`` does it for a loop of your own. bfloat16 has the
    range of float32. float16 has more digits but only the range from about 6e-8 to 65,504, so it needs loss
    scaling (``optim.LossScale``).

    Args:
      model: a Linen module or an ``(init, apply)`` pair.
      precision: ``"float32"``, which returns the model unchanged, ``"bfloat16"`` or ``"float16"``.

    Raises:
      InputError: ``precision`` is none of these.

    >>> from jaxtrain.models import MLP
    >>> model = compute_in(MLP(widths=(8,), classes=3), "bfloat16")
    >>> batch = {"image": jnp.ones((2, 4))}
    >>> params, extra = model.init(jax.random.key(0), batch)
    >>> logits, _ = model.apply(params, extra, batch, train=False, key=None)
    >>> params["head"]["kernel"].dtype, logits.dtype
    (dtype('float32'), dtype('float32'))
    """
    check_precision(precision)
    pair = as_model(model)
    if precision == "float32":
        return pair

    def apply(
        params: Any, extra: dict[str, Any], batch: Batch, *, train: bool, key: jax.Array | None
    ) -> tuple[Any, dict[str, Any]]:
        params, batch = _cast((params, batch), jnp.float32, precision)
        outputs, extra = pair.apply(params, extra, batch, train=train, key=key)
        return _cast(outputs, precision, jnp.float32), extra

    return pair._replace(apply=apply)


def check_precision(precision: str) -> None:
    """Raise InputError unless ``precision`` is one of the names in ``Precision``."""
    names = typing.get_args(Precision)
    if precision not in names:
        raise InputError(f"precision is {precision!r}: it must be one of {', '.join(names)}")


def _cast(tree: Any, old: Any, new: Any) -> Any:
    """Cast the arrays of dtype ``old`` to ``new``, and no others."""
    return jax.tree.map(lambda x: x.astype(new) if x.dtype == old else x, tree)
