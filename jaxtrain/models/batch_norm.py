"""BatchNorm whose statistics are those of fixed slices of the global batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtrain.core.errors import InputError


class BatchNorm(nn.BatchNorm):
    """``flax.linen.BatchNorm`` with statistics of each of ``groups`` slices of the batch.

    With ``groups=1`` it is ``flax.linen.BatchNorm``: statistics are over the global batch. Otherwise the
    batch is cut into ``groups`` blocks of neighbouring rows, and each is normalised by its own mean and
    variance ("ghost batch normalization", Hoffer et al. 2017, arXiv:1705.08741). The blocks depend on the
    batch only, so the result is the same on any mesh. A batch is sharded by rows in blocks, too: if
    ``groups`` is a multiple of the devices that share it, the normalisation needs no communication.

    The running statistics, which evaluation uses, move towards the mean over the groups of their means and of
    their variances: the variance within a group, which is what training divides by. Masked rows count in the
    statistics, as in ``flax.linen.BatchNorm``.

    Attributes:
      groups: slices of the batch, at least 1. In training it must divide the batch (with ``accumulate``, a
        microbatch).

    All other attributes are those of ``flax.linen.BatchNorm``; the parameters and statistics too.

    Raises:
      InputError: ``groups`` is below 1 or does not divide the batch.

    >>> x = jnp.array([[1.0], [3.0], [11.0], [13.0]])
    >>> norm = BatchNorm(use_running_average=False, groups=2)
    >>> variables = norm.init(jax.random.key(0), x)
    >>> y, updated = norm.apply(variables, x, mutable=["batch_stats"])
    >>> y[:, 0].round(3).tolist()
    [-1.0, 1.0, -1.0, 1.0]
    """

    groups: int = 1

    @nn.compact
    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        if self.groups < 1:
            raise InputError(f"BatchNorm(groups={self.groups}): groups must be at least 1")
        average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        if self.groups == 1 or average or self.is_initializing():
            return super().__call__(x, use_running_average, mask=mask)
        if mask is not None or self.axis_name is not None or self.axis % x.ndim != x.ndim - 1:
            raise InputError(f"BatchNorm(groups={self.groups}) takes no mask, no axis_name and axis=-1 only")
        return self._normalize_groups(x)

    def _normalize_groups(self, x: jax.Array) -> jax.Array:
        """Normalise ``float [batch, ..., channels]`` and update the running statistics."""
        features = x.shape[-1:]
        wide = jnp.promote_types(x.dtype, jnp.float32)
        slices = self._slices(x).astype(wide)
        axes = tuple(range(1, slices.ndim - 1))
        mean = slices.mean(axes, keepdims=True)
        # As flax.linen.BatchNorm: mean and variance in one pass over x, in float32 or wider.
        variance = jnp.maximum(0, (slices**2).mean(axes, keepdims=True) - mean**2)
        for name, fresh, each in (("mean", jnp.zeros, mean), ("var", jnp.ones, variance)):
            running = self.variable("batch_stats", name, fresh, features, jnp.float32)
            average = each.reshape(self.groups, -1).mean(0)
            running.value = self.momentum * running.value + (1 - self.momentum) * average
        factor, dtypes = jax.lax.rsqrt(variance + self.epsilon), [x.dtype]
        if self.use_scale:
            scale = self.param("scale", self.scale_init, features, self.param_dtype)
            factor, dtypes = factor * scale[(None,) * (slices.ndim - 1)], [*dtypes, scale.dtype]
        out = (slices - mean) * factor
        if self.use_bias:
            bias = self.param("bias", self.bias_init, features, self.param_dtype)
            out, dtypes = out + bias[(None,) * (slices.ndim - 1)], [*dtypes, bias.dtype]
        return out.reshape(x.shape).astype(self.dtype or jnp.result_type(*dtypes))

    def _slices(self, x: jax.Array) -> jax.Array:
        """Cut the batch into blocks of rows: ``[batch, ...]`` → ``[groups, batch / groups, ...]``."""
        rows, over = divmod(x.shape[0], self.groups)
        if over:
            fits = " or ".join(str(n * self.groups) for n in (rows, rows + 1) if n)
            raise InputError(
                f"a batch of {x.shape[0]} examples (with accumulate, a microbatch) does not divide into "
                f"{self.groups} groups of BatchNorm: use {fits}, or another bn_groups"
            )
        return x.reshape(self.groups, rows, *x.shape[1:])
