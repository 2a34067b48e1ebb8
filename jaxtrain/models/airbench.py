"""The airbench network for CIFAR-10, its whitening initialisation and its test-time augmentation.

The recipe (Jordan 2024, arXiv:2404.00498) trains CIFAR-10 to 94 % in ten epochs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Batch, Names
from jaxtrain.models.batch_norm import BatchNorm
from jaxtrain.models.layers import check_image, check_rates, conv_axes
from jaxtrain.models.pooling import max_pool

WHITEN = "whiten"


class Airbench(nn.Module):
    """A whitening convolution, groups of convolutions, a 3×3 max-pool, and a dense head.

    The whitening convolution is 2×2, VALID, with bias. ``Whiten`` initialises its kernel, which should then
    be frozen (``optim.Group("whiten/kernel", lr=0)``). A group is conv 3×3 → max-pool 2 → BatchNorm → GELU,
    then further conv 3×3 → BatchNorm → GELU at the pooled size. These convolutions have no bias, and their
    first output channels start as the identity. BatchNorm has a bias and no scale, and float32 statistics. An
    image side of 32 becomes 31, 15, 7, 3 and 1.

    Attributes:
      widths: output channels of each group; image sides must be at least ``3 * 2**len(widths) + 1``.
      convs: convolutions in a group, at least 1.
      classes: number of classes, the size of the output.
      residual: add a group's first activation to its last, before the GELU. No effect if ``convs`` is 1; the
        96 % recipe uses it, with 3.
      whiten: output channels of the whitening convolution; even, and at most 8 per image channel for
        ``Whiten``.
      scale: factor that multiplies the logits.
      bn_momentum: decay rate of BatchNorm's running statistics, in [0, 1).
      bn_groups: slices of the batch that have BatchNorm statistics of their own, at least 1
        (``models.BatchNorm``); 1 is the global batch.

    Call with ``image: float [batch, height, width, channel]``; returns logits ``[batch, classes]``.

    >>> net = Airbench(widths=(8, 16, 16), classes=5)
    >>> variables = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> jax.jit(net.apply)(variables, jnp.zeros((4, 32, 32, 3))).shape
    (4, 5)
    """

    widths: tuple[int, ...] = (64, 256, 256)
    convs: int = 2
    classes: int = 10
    residual: bool = False
    whiten: int = 24
    scale: float = 1 / 9
    bn_momentum: float = 0.6
    bn_groups: int = 1

    @property
    def logical_axes(self) -> dict[str, Names]:
        """Axis names of the parameters, for ``sharding.place``."""
        return {"whiten/kernel$": (None,) * 4, "whiten/bias$": (None,), **conv_axes(self.convs)}

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        check_rates(self)
        if self.convs < 1 or self.whiten < 1 or not self.widths or min(self.widths) < 1:
            raise InputError(
                f"Airbench(widths={self.widths}, convs={self.convs}, whiten={self.whiten}): all must be at "
                "least 1"
            )
        check_image(image, 3 * 2 ** len(self.widths) + 1, "Airbench")
        whiten = nn.Conv(self.whiten, (2, 2), padding="VALID", kernel_init=uniform_init, name=WHITEN)
        x = _gelu(whiten(image))
        for group, width in enumerate(self.widths):
            x = self._group(x, width, f"group{group}", train)
        x = max_pool(x, 3)
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(self.classes, use_bias=False, kernel_init=uniform_init, name="head")(x) * self.scale

    def _group(self, x: jax.Array, width: int, name: str, train: bool) -> jax.Array:
        first = _gelu(
            self._batch_norm(max_pool(self._conv(x, width, f"{name}_conv0")), train, f"{name}_norm0")
        )
        x = first
        for conv in range(1, self.convs):
            x = self._batch_norm(self._conv(x, width, f"{name}_conv{conv}"), train, f"{name}_norm{conv}")
            if self.residual and conv == self.convs - 1:
                x = x + first
            x = _gelu(x)
        return x

    def _conv(self, x: jax.Array, width: int, name: str) -> jax.Array:
        return nn.Conv(width, (3, 3), use_bias=False, kernel_init=identity_init, name=name)(x)

    def _batch_norm(self, x: jax.Array, train: bool, name: str) -> jax.Array:
        norm = BatchNorm(
            momentum=self.bn_momentum, groups=self.bn_groups, epsilon=1e-12, use_scale=False, name=name
        )
        return norm(x, use_running_average=not train)


@dataclasses.dataclass(frozen=True)
class Whiten:
    """Initialise the convolution named ``whiten`` from data, so that its outputs are decorrelated.

    Goes into ``Experiment.data_init``. The filters are the eigenvectors v of the uncentred covariance of all
    image patches of the kernel's size, in descending order of their eigenvalues λ, scaled to
    ``v / sqrt(λ + eps)``, followed by the same filters negated. Computed in float32; the sign of a filter is
    the one that makes its largest weight positive.

    Attributes:
      examples: number of images for the covariance: the first ones of the training set, preprocessed and not
        augmented; at least 1.
      eps: added to the eigenvalues, above 0, so that directions with little variance are not amplified.

    Call with ``params`` and a batch with ``image: float [examples, height, width, channel]``; returns params.

    Raises:
      InputError: there is no such kernel, or it has too many filters or an odd number of them.

    >>> params = {"whiten": {"kernel": jnp.zeros((2, 2, 3, 24)), "bias": jnp.zeros(24)}}
    >>> batch = {"image": jax.random.normal(jax.random.key(0), (8, 32, 32, 3))}
    >>> kernel = Whiten(examples=8)(params, batch)["whiten"]["kernel"]
    >>> kernel.shape, bool((kernel[..., :12] == -kernel[..., 12:]).all())
    ((2, 2, 3, 24), True)
    """

    examples: int = 5000
    eps: float = 5e-4

    def __post_init__(self) -> None:
        if self.examples < 1 or self.eps <= 0:
            raise InputError(f"{self}: examples must be at least 1 and eps above 0")

    def __call__(self, params: Any, batch: Batch) -> Any:
        path, kernel = _find_kernel(params)
        filters = self._filters(batch["image"][: self.examples], kernel.shape)
        return _replace_at(params, path, filters.astype(kernel.dtype))

    def _filters(self, image: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Return float32 filters of ``shape``: ``[height, width, channel, filter]``."""
        *patch, count = shape
        size = patch[0] * patch[1] * patch[2]
        if count % 2 or count > 2 * size:
            raise InputError(
                f"Whiten: a kernel of {shape} has {size} whitening filters and their negatives: set the "
                f"model's whiten to an even number of at most {2 * size}"
            )
        values, vectors = jnp.linalg.eigh(patch_covariance(image, patch[0], patch[1]))
        values, vectors = values[::-1], vectors[:, ::-1]  # eigh's order is ascending
        largest = jnp.take_along_axis(vectors, jnp.abs(vectors).argmax(0)[None], axis=0)
        # Linear algebra libraries choose the sign freely; it may depend on the last bit of the covariance.
        filters = vectors * jnp.sign(largest) / jnp.sqrt(values + self.eps)[None]
        half = filters[:, : count // 2]
        return jnp.concatenate([half, -half], axis=1).reshape(shape)


class TestTimeViews(nn.Module):
    """Average the logits over six views of each image in evaluation (test-time augmentation).

    The views are the image and its mirror image (half of the weight), and both shifted by ``shift`` pixels up
    and left and down and right (the other half), with the border reflected. Training calls ``net`` on the
    image alone. The views go through ``net`` one after another, so memory does not grow.

    Attributes:
      net: a module that takes ``(image, train)`` and returns logits; its parameters are under ``"net"``.
      shift: shift of the views in pixels, at least 1.

    Call with ``image: float [batch, height, width, channel]``; returns logits ``[batch, classes]``.

    >>> net = TestTimeViews(Airbench(widths=(8,), classes=5))
    >>> variables = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    >>> list(variables["params"]), jax.jit(net.apply)(variables, jnp.zeros((4, 8, 8, 3))).shape
    (['net'], (4, 5))
    """

    __test__ = False  # not a test, whatever pytest makes of the name

    net: nn.Module
    shift: int = 1

    @property
    def logical_axes(self) -> dict[str, Names]:
        """The ``logical_axes`` of ``net``."""
        return getattr(self.net, "logical_axes", {})

    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        if self.shift < 1:
            raise InputError(f"TestTimeViews(shift={self.shift}): shift must be at least 1 pixel")
        if train or self.is_initializing():
            return self.net(image, train=train)
        shift = self.shift
        padded = jnp.pad(image, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="reflect")
        height, width = image.shape[1:3]
        total = 0.5 * self._with_mirror(image)
        for start in (0, 2 * shift):
            view = padded[:, start : start + height, start : start + width]
            total = total + 0.25 * self._with_mirror(view)
        return total

    def _with_mirror(self, image: jax.Array) -> jax.Array:
        return 0.5 * (self.net(image, train=False) + self.net(image[:, :, ::-1], train=False))


def uniform_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Draw from U(±1/√fan_in), for a kernel ``[..., in, out]``."""
    bound = math.prod(shape[:-1]) ** -0.5
    # Drawn flat: the numbers are the same, and four dimensions take XLA:CPU seconds to compile.
    return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)


def identity_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Return ``uniform_init`` with the identity in the first outputs: output i equals input i for i < in.

    For a kernel ``[height, width, in, out]`` of odd height and width.
    """
    height, width, inputs, outputs = shape
    same = min(inputs, outputs)
    kernel = uniform_init(key, shape, dtype).at[..., :same].set(0)
    return kernel.at[height // 2, width // 2, jnp.arange(same), jnp.arange(same)].set(1)


def patch_covariance(image: jax.Array, height: int, width: int) -> jax.Array:
    """Return the uncentred covariance of all ``height × width`` patches: float32 ``[size, size]``.

    ``size`` is ``height * width * channels``; a patch is flattened like a kernel, by row, column and channel.

    >>> patch_covariance(jnp.ones((1, 3, 3, 1)), 2, 2).shape
    (4, 4)
    """
    image = image.astype(jnp.float32)
    rows, columns = image.shape[1] - height + 1, image.shape[2] - width + 1
    shifted = [image[:, i : i + rows, j : j + columns] for i in range(height) for j in range(width)]
    patches = jnp.concatenate(shifted, axis=-1)
    # HIGHEST, because a GPU would round the factors to TF32.
    total = jnp.einsum("nhwi,nhwj->ij", patches, patches, precision=jax.lax.Precision.HIGHEST)
    return total / (image.shape[0] * rows * columns)


def _gelu(x: jax.Array) -> jax.Array:
    return nn.gelu(x, approximate=False)


def _find_kernel(params: Any) -> tuple[tuple[str, ...], jax.Array]:
    """Return path and value of the ``whiten`` kernel, which may be inside another module."""
    leaves = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    found = [
        (tuple(path.split("/")), leaf) for path, leaf in leaves if f"/{path}".endswith(f"/{WHITEN}/kernel")
    ]
    if len(found) != 1 or found[0][1].ndim != 4:
        names = ", ".join(path for path, leaf in leaves if leaf.ndim == 4) or "none"
        raise InputError(
            f"Whiten: the model must have one convolution named {WHITEN!r}, as Airbench has; the kernels of "
            f"its convolutions are {names}"
        )
    return found[0]


def _replace_at(tree: Any, path: tuple[str, ...], value: jax.Array) -> Any:
    if not path:
        return value
    return {**tree, path[0]: _replace_at(tree[path[0]], path[1:], value)}
