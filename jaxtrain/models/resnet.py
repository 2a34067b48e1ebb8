"""Residual networks for ImageNet-sized and small images."""

from __future__ import annotations

from typing import Literal

import jax
from flax import linen as nn

from jaxtrain.core.errors import InputError
from jaxtrain.models.batch_norm import BatchNorm
from jaxtrain.models.layers import check_image, check_rates, conv_axes
from jaxtrain.models.pooling import max_pool
from jaxtrain.models.remat import Remat, remat_block

BlockKind = Literal["basic", "bottleneck"]
Stem = Literal["imagenet", "cifar"]

HE = nn.initializers.variance_scaling(2, "fan_out", "normal")
EXPANSION = 4


class ResNet(nn.Module):
    """ResNet v1.5 (He et al., arXiv:1512.03385), with the stride of a bottleneck in its 3×3 convolution.

    ``stages=(3, 4, 6, 3)`` with bottlenecks is ResNet-50, ``(2, 2, 2, 2)`` with basic blocks ResNet-18. The
    last BatchNorm of every residual branch starts at scale 0, so that each block starts as the identity, and
    the head at a standard deviation of 0.01 (Goyal et al., arXiv:1706.02677, section 5.1). BatchNorm
    statistics are over ``bn_groups`` slices of the global batch. Padding is symmetric, as in PyTorch, so
    PyTorch weights can be used.

    Attributes:
      stages: number of residual blocks in each stage; every stage but the first halves the sides and doubles
        the width.
      block: ``basic`` (3×3, 3×3) or ``bottleneck`` (1×1, 3×3, 1×1 with four times the channels).
      stem: ``imagenet`` (7×7 stride 2, 3×3 max-pool stride 2) or ``cifar`` (3×3, no pooling).
      width: channels of the stem, and of the first stage's 3×3 convolutions.
      classes: number of classes, the size of the output.
      bn_momentum: decay rate of BatchNorm's running statistics, in [0, 1).
      bn_groups: slices of the batch that have BatchNorm statistics of their own, at least 1
        (``models.BatchNorm``); 1 is the global batch.

    Call with ``image: float [batch, height, width, channel]``; returns logits ``[batch, classes]``.

    Raises:
      InputError: the image has another layout or is smaller than the product of all strides.

    >>> import jax.numpy as jnp
    >>> net = ResNet(stages=(1, 1), block="basic", stem="cifar", width=8, classes=5)
    >>> logits, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.ones((4, 8, 8, 3)))
    >>> logits.shape
    (4, 5)
    """

    stages: tuple[int, ...] = (3, 4, 6, 3)
    block: BlockKind = "bottleneck"
    stem: Stem = "imagenet"
    width: int = 64
    classes: int = 1000
    bn_momentum: float = 0.9
    bn_groups: int = 1

    logical_axes = conv_axes(2)  # of a bottleneck the last 1×1 is replicated, as are stem and shortcuts

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False, remat: Remat = "none") -> jax.Array:
        check_rates(self)
        if not self.stages or min(*self.stages, self.width) < 1:
            raise InputError(f"ResNet(stages={self.stages}, width={self.width}): all must be at least 1")
        large = self.stem == "imagenet"
        check_image(image, (4 if large else 1) * 2 ** (len(self.stages) - 1), "ResNet")
        x = _conv(image, self.width, 7 if large else 3, 2 if large else 1, "stem_conv")
        x = nn.relu(_norm(x, train, self, "stem_norm"))
        if large:
            x = max_pool(x, 3, 2, ((1, 1), (1, 1)))
        block = remat_block(ResidualBlock, remat)
        for stage, blocks in enumerate(self.stages):
            for number in range(blocks):
                x = block(
                    width=self.width * 2**stage,
                    stride=2 if stage and not number else 1,
                    kind=self.block,
                    bn_momentum=self.bn_momentum,
                    bn_groups=self.bn_groups,
                    name=f"stage{stage}_block{number}",
                )(x, train)
        return nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.01), name="head")(x.mean((1, 2)))


class ResidualBlock(nn.Module):
    """One residual block: ``[batch, h, w, c]`` → ``[batch, ⌈h / stride⌉, ⌈w / stride⌉, out]``.

    ``out`` is ``width``, or ``4 * width`` for a bottleneck. If the shape changes, the shortcut has a 1×1
    convolution.
    """

    width: int
    stride: int
    kind: BlockKind
    bn_momentum: float
    bn_groups: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        kernels = (1, 3, 1) if self.kind == "bottleneck" else (3, 3)
        widths = [self.width] * len(kernels)
        if self.kind == "bottleneck":
            widths[-1] *= EXPANSION
        strided = kernels.index(3)
        branch, last = x, len(kernels) - 1
        for i, (kernel, width) in enumerate(zip(kernels, widths, strict=True)):
            branch = _conv(branch, width, kernel, self.stride if i == strided else 1, f"conv{i}")
            branch = _norm(branch, train, self, f"norm{i}", zero=i == last)
            if i < last:
                branch = nn.relu(branch)
        if branch.shape != x.shape:
            x = _conv(x, widths[-1], 1, self.stride, "shortcut_conv")
            x = _norm(x, train, self, "shortcut_norm")
        return nn.relu(x + branch)


def _conv(x: jax.Array, width: int, kernel: int, stride: int, name: str) -> jax.Array:
    # "SAME" would pad a strided convolution asymmetrically if the image side is even.
    pad = (kernel // 2, kernel // 2)
    conv = nn.Conv(
        width, (kernel, kernel), (stride, stride), (pad, pad), use_bias=False, kernel_init=HE, name=name
    )
    return conv(x)


def _norm(
    x: jax.Array, train: bool, model: ResNet | ResidualBlock, name: str, zero: bool = False
) -> jax.Array:
    scale = nn.initializers.zeros if zero else nn.initializers.ones
    norm = BatchNorm(
        use_running_average=not train,
        momentum=model.bn_momentum,
        groups=model.bn_groups,
        scale_init=scale,
        name=name,
    )
    return norm(x)
