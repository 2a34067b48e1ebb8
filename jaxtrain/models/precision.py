"""Computing in bfloat16 with float32 parameters, for any model."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxtrain.models.linen import as_model
from jaxtrain.types import Batch, Model

ComputeDtype = Literal["float32", "bfloat16"]


def compute_in(model: Any, dtype: ComputeDtype) -> Model:
    """``model`` with its activations in ``dtype``; parameters, gradients and statistics stay float32.

    Parameters and float inputs are rounded on the way in, and outputs come back as float32, so the loss, the
    optimizer and checkpoints see no difference (mixed precision, arXiv:1710.03740; bfloat16 has the range of
    float32 and needs no loss scaling).

    Args:
      model: a Linen module or an ``(init, apply)`` pair.
      dtype: ``"float32"`` leaves the model as it is.

    >>> from jaxtrain.models import MLP
    >>> model = compute_in(MLP(widths=(8,), classes=3), "bfloat16")
    >>> batch = {"image": jnp.ones((2, 4))}
    >>> params, extra = model.init(jax.random.key(0), batch)
    >>> logits, _ = model.apply(params, extra, batch, train=False, key=None)
    >>> params["head"]["kernel"].dtype, logits.dtype
    (dtype('float32'), dtype('float32'))
    """
    pair = as_model(model)
    if dtype == "float32":
        return pair

    def apply(
        params: Any, extra: dict[str, Any], batch: Batch, *, train: bool, key: jax.Array | None
    ) -> tuple[Any, dict[str, Any]]:
        params, batch = _cast((params, batch), jnp.float32, dtype)
        outputs, extra = pair.apply(params, extra, batch, train=train, key=key)
        return _cast(outputs, dtype, jnp.float32), extra

    return pair._replace(apply=apply)


def _cast(tree: Any, old: Any, new: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(new) if x.dtype == old else x, tree)
