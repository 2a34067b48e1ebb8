"""Computing in half precision with float32 parameters, for any model."""

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
    """``model`` with its activations in ``precision``; parameters, gradients and statistics stay float32.

    Parameters and float inputs are rounded on the way in, and outputs come back as float32, so the loss, the
    optimizer and checkpoints see no difference (mixed precision, arXiv:1710.03740). bfloat16 has the range of
    float32; float16 has more digits and ends at 65,504 and near 6e-8, so its gradients need
    ``optim.LossScale``.

    Args:
      model: a Linen module or an ``(init, apply)`` pair.
      precision: ``"float32"`` leaves the model as it is.

    Raises:
      InputError: another precision than those three.

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
    """Raise InputError unless ``precision`` is a name that ``Precision`` knows."""
    names = typing.get_args(Precision)
    if precision not in names:
        raise InputError(f"precision is {precision!r}: it must be one of {', '.join(names)}")


def _cast(tree: Any, old: Any, new: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(new) if x.dtype == old else x, tree)
