"""Convolutions that are faster on CPUs; on other devices they are those of Flax."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxtrain.models.plain_operators import are_plain

Pads = tuple[tuple[int, int], tuple[int, int]]

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# The gradient of the kernel is a convolution too: the image's channels are its batch, the examples its
# channels, the gradient of the output its kernel, and the gradient of the kernel its output.
GRADIENT_DIMENSIONS = lax.ConvDimensionNumbers((3, 0, 1, 2), (3, 0, 1, 2), (2, 3, 0, 1))
PLAIN = "plain"
SMALL = 16  # up to this many examples and outputs XLA:CPU does not choose the slow implementation
VECTOR = 8  # float32 lanes of a CPU vector, at least
BLOCK = 4  # pixels of a row that are combined into one


def conv(width: int, kernel: int, **settings: Any) -> nn.Conv:
    """Return ``flax.linen.Conv`` with a square kernel: same parameters, initial values and outputs.

    Only on CPUs it is computed differently: the gradient of the kernel, and the outputs if there are few
    channels (``convolve``).

    Args:
      width: output channels.
      kernel: side of the kernel.
      **settings: any other field of ``flax.linen.Conv``.

    >>> variables = conv(8, 3, use_bias=False).init(jax.random.key(0), jnp.zeros((1, 6, 6, 3)))
    >>> variables["params"]["kernel"].shape
    (3, 3, 3, 8)
    """
    return nn.Conv(width, (kernel, kernel), conv_general_dilated=convolve, **settings)


def convolve(
    image: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Any,
    *,
    dimension_numbers: Any = DIMENSIONS,
    feature_group_count: int = 1,
    lhs_dilation: Sequence[int] = (1, 1),
    rhs_dilation: Sequence[int] = (1, 1),
    precision: Any = None,
) -> jax.Array:
    """Compute ``lax.conv_general_dilated``, with the arguments that ``flax.linen.Conv`` passes.

    Strided, dilated and grouped convolutions, and 1×1 kernels, are passed on to it unchanged.

    Args:
      image: float ``[batch, h, w, c]``.
      kernel: float ``[rows, columns, c, width]``.

    >>> convolve(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5)), (1, 1), "VALID").shape
    (1, 2, 2, 5)
    """
    plain = {*strides, *lhs_dilation, *rhs_dilation, feature_group_count} == {1}
    if are_plain() or not plain or image.ndim != 4 or max(kernel.shape[:2]) == 1 or precision is not None:
        return lax.conv_general_dilated(
            image,
            kernel,
            strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            precision=precision,
        )
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(image.shape[1:3], kernel.shape[:2], (1, 1), padding)
    (top, bottom), (left, right) = padding
    return _convolution.bind(image, kernel, pads=((int(top), int(bottom)), (int(left), int(right))))


def saveable(primitive: Primitive, *_: Any, **__: Any) -> bool:
    """Policy for ``jax.checkpoint``: save the outputs of the convolutions of this module."""
    return primitive is _convolution


def _plain(image: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    return lax.conv_general_dilated(image, kernel, (1, 1), pads, dimension_numbers=DIMENSIONS)


def _blocked(image: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """Compute ``BLOCK`` neighbouring pixels of a row at a time, as channels of one pixel of a narrower image.

    XLA:CPU computes channels that do not fill a vector one by one. The channels of four pixels fill it, and
    combining them is a reshape without a copy. The combined kernel contains the kernel, shifted, once per
    pixel.
    """
    b, _, width, channels = image.shape
    rows, columns, _, outputs = kernel.shape
    out = width + sum(pads[1]) - columns + 1
    blocks = -(-out // BLOCK)  # of the output
    span = -(-(columns - 1) // BLOCK) + 1  # blocks under one kernel
    right = (blocks + span - 1) * BLOCK - width - pads[1][0]
    zero, none = jnp.zeros((), image.dtype), (0, 0, 0)
    image = lax.pad(image, zero, (none, none, (pads[1][0], right, 0), none))  # a negative padding crops
    image = image.reshape(b, image.shape[1], -1, BLOCK * channels)
    shifted = [
        jnp.pad(kernel, ((0, 0), (start, span * BLOCK - columns - start), (0, 0), (0, 0)))
        for start in range(BLOCK)
    ]
    kernel = jnp.stack(shifted, 3).reshape(rows, span, BLOCK * channels, BLOCK * outputs)
    blocked = _plain(image, kernel, (pads[0], (0, 0)))
    return blocked.reshape(b, blocked.shape[1], blocks * BLOCK, outputs)[:, :, :out]


def _cpu_plain(image: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    compute = _blocked if max(kernel.shape[2:]) < VECTOR else _plain
    return compute(image, kernel, pads)


def _gradient(image: jax.Array, cotangent: jax.Array, pads: Pads) -> jax.Array:
    """Compute the gradient of the kernel as JAX does."""
    return lax.conv_general_dilated(image, cotangent, (1, 1), pads, dimension_numbers=GRADIENT_DIMENSIONS)


def _cpu_gradient(image: jax.Array, cotangent: jax.Array, pads: Pads) -> jax.Array:
    """Compute the gradient of the kernel, with rows of zeros added to the gradient of the output.

    XLA:CPU runs 2-D convolutions with YNNPACK (jaxlib 0.10.2), which takes 1.6 to 4 times as long as Eigen
    for this one, whose window is as large as the image. A window with more rows than the image goes to Eigen.
    The columns are padded first: with padding in the convolution itself the image would be smaller than
    the window, and XLA would swap the two and compute the result in a plain loop.
    """
    if max(image.shape[0], cotangent.shape[-1]) <= SMALL:
        return _gradient(image, cotangent, pads)
    (top, bottom), columns = pads
    extra = max(0, image.shape[1] + 1 - cotangent.shape[1])
    image = jnp.pad(image, ((0, 0), (0, 0), columns, (0, 0)))
    cotangent = jnp.pad(cotangent, ((0, 0), (0, extra), (0, 0), (0, 0)))
    return _gradient(image, cotangent, ((top, bottom + extra), (0, 0)))


def _primitive(name: str, plain: Callable[..., jax.Array], cpu: Callable[..., jax.Array]) -> Primitive:
    """Make a JAX primitive that lowers to ``cpu`` on CPUs and to ``plain`` on other devices.

    It is linear in each of its two arguments. ``lax.platform_dependent`` would leave a branch in programs for
    other devices. Under ``vmap`` it is ``plain`` everywhere.
    """

    def shape(*args: Any, pads: Pads) -> Any:
        out = jax.eval_shape(functools.partial(plain, pads=pads), *args)
        return jax.core.ShapedArray(out.shape, out.dtype)

    def batched(args: Any, axes: Any, *, pads: Pads) -> tuple[jax.Array, int]:
        return jax.vmap(functools.partial(plain, pads=pads), axes)(*args), 0

    def gradient_of_first(cotangent: Any, first: Any, second: Any, *, pads: Pads) -> jax.Array:
        return jax.linear_transpose(lambda x: plain(x, second, pads), first.aval)(cotangent)[0]

    def gradient_of_second(cotangent: Any, first: Any, second: Any, *, pads: Pads) -> jax.Array:
        if plain is _plain:
            return _kernel_gradient.bind(first, cotangent, pads=pads)
        return jax.linear_transpose(lambda y: plain(first, y, pads), second.aval)(cotangent)[0]

    primitive = Primitive(name)
    setattr(primitive, PLAIN, plain)  # for counting FLOPs (``program.flops``)
    primitive.def_impl(jax.jit(primitive.bind, static_argnames="pads"))
    primitive.def_abstract_eval(shape)
    batching.primitive_batchers[primitive] = batched
    ad.defbilinear(primitive, gradient_of_first, gradient_of_second)
    mlir.register_lowering(primitive, mlir.lower_fun(plain, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(cpu, multiple_results=False), platform="cpu")
    return primitive


_kernel_gradient = _primitive("kernel_gradient", _gradient, _cpu_gradient)
_convolution = _primitive("convolution", _plain, _cpu_plain)
