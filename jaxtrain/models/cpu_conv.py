"""Convolutions as XLA computes them fastest on CPUs; on other devices they are Flax's own."""

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

Pads = tuple[tuple[int, int], tuple[int, int]]

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# As a convolution: the image's channels are its batch, the examples its channels, the output's gradient its
# kernel and the kernel's gradient its output.
GRADIENT_DIMENSIONS = lax.ConvDimensionNumbers((3, 0, 1, 2), (3, 0, 1, 2), (2, 3, 0, 1))
PLAIN = "plain"
SMALL = 16  # with no more examples and outputs than this XLA:CPU does not take the slow way
VECTOR = 8  # float32 numbers that a CPU works on at once, at least
BLOCK = 4  # pixels of a row whose channels are taken for those of one


def conv(width: int, kernel: int, **settings: Any) -> nn.Conv:
    """``flax.linen.Conv`` with a square kernel: the same parameters, initial values and outputs.

    How it is computed differs on CPUs alone: the gradient of the kernel, and the outputs where channels are
    few (``convolve``).

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
    """What ``lax.conv_general_dilated`` gives, as ``flax.linen.Conv`` calls it.

    Strided, dilated and grouped convolutions, and those of kernels of 1×1, are its own in every way.

    Args:
      image: float ``[batch, h, w, c]``.
      kernel: float ``[rows, columns, c, width]``.

    >>> convolve(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5)), (1, 1), "VALID").shape
    (1, 2, 2, 5)
    """
    plain = {*strides, *lhs_dilation, *rhs_dilation, feature_group_count} == {1}
    if not plain or image.ndim != 4 or max(kernel.shape[:2]) == 1 or precision is not None:
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
    """Is this the convolution that is made here? A policy for ``jax.checkpoint``."""
    return primitive is _convolution


def _plain(image: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    return lax.conv_general_dilated(image, kernel, (1, 1), pads, dimension_numbers=DIMENSIONS)


def _blocked(image: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """The outputs of ``BLOCK`` pixels of a row at a time, as channels of one pixel of a narrower image.

    Channels that do not fill a vector are computed one by one. Four pixels' channels do fill it, and bringing
    them together moves nothing in memory. A kernel for all of them holds the kernel once for each, shifted.
    """
    b, _, width, channels = image.shape
    rows, columns, _, outputs = kernel.shape
    out = width + sum(pads[1]) - columns + 1
    blocks, span = -(-out // BLOCK), -(-(columns - 1) // BLOCK) + 1  # of the output; under one kernel
    right = (blocks + span - 1) * BLOCK - width - pads[1][0]
    zero, none = jnp.zeros((), image.dtype), (0, 0, 0)
    image = lax.pad(image, zero, (none, none, (pads[1][0], right, 0), none))  # below 0 it crops
    image = image.reshape(b, image.shape[1], -1, BLOCK * channels)
    shifted = [
        jnp.pad(kernel, ((0, 0), (at, span * BLOCK - columns - at), (0, 0), (0, 0))) for at in range(BLOCK)
    ]
    kernel = jnp.stack(shifted, 3).reshape(rows, span, BLOCK * channels, BLOCK * outputs)
    made = _plain(image, kernel, (pads[0], (0, 0)))
    return made.reshape(b, made.shape[1], blocks * BLOCK, outputs)[:, :, :out]


def _cpu_plain(image: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    compute = _blocked if max(kernel.shape[2:]) < VECTOR else _plain
    return compute(image, kernel, pads)


def _gradient(image: jax.Array, cotangent: jax.Array, pads: Pads) -> jax.Array:
    """The kernel's gradient as JAX writes it."""
    return lax.conv_general_dilated(image, cotangent, (1, 1), pads, dimension_numbers=GRADIENT_DIMENSIONS)


def _cpu_gradient(image: jax.Array, cotangent: jax.Array, pads: Pads) -> jax.Array:
    """The kernel's gradient, by the same convolution with a row of zeros added to the output's gradient.

    XLA:CPU gives 2-D convolutions to YNNPACK (jaxlib 0.10.2), which takes 1.6 to 4 times as long as Eigen for
    this one, whose window is as large as the image. What has more rows in the window than in the image goes
    to Eigen. The columns are padded outside: padded by the convolution itself the image would be smaller than
    the window, and XLA would exchange the two and compute the result in a plain loop.
    """
    if max(image.shape[0], cotangent.shape[-1]) <= SMALL:
        return _gradient(image, cotangent, pads)
    (top, bottom), columns = pads
    extra = max(0, image.shape[1] + 1 - cotangent.shape[1])
    image = jnp.pad(image, ((0, 0), (0, 0), columns, (0, 0)))
    cotangent = jnp.pad(cotangent, ((0, 0), (0, extra), (0, 0), (0, 0)))
    return _gradient(image, cotangent, ((top, bottom + extra), (0, 0)))


def _primitive(name: str, plain: Callable[..., jax.Array], cpu: Callable[..., jax.Array]) -> Primitive:
    """What is computed by ``cpu`` on CPUs and by ``plain`` elsewhere, in whatever program it ends up.

    It is linear in each of its two arguments. ``lax.platform_dependent`` would leave a case distinction in
    programs for other devices. Under ``vmap`` it is ``plain`` everywhere.
    """

    def shape(*args: Any, pads: Pads) -> Any:
        out = jax.eval_shape(functools.partial(plain, pads=pads), *args)
        return jax.core.ShapedArray(out.shape, out.dtype)

    def batched(args: Any, axes: Any, *, pads: Pads) -> tuple[jax.Array, int]:
        return jax.vmap(functools.partial(plain, pads=pads), axes)(*args), 0

    def of_first(cotangent: Any, first: Any, second: Any, *, pads: Pads) -> jax.Array:
        return jax.linear_transpose(lambda x: plain(x, second, pads), first.aval)(cotangent)[0]

    def of_second(cotangent: Any, first: Any, second: Any, *, pads: Pads) -> jax.Array:
        if plain is _plain:
            return _kernel_gradient.bind(first, cotangent, pads=pads)
        return jax.linear_transpose(lambda y: plain(first, y, pads), second.aval)(cotangent)[0]

    made = Primitive(name)
    setattr(made, PLAIN, plain)  # for whoever counts operations (``plan.flops``)
    made.def_impl(jax.jit(made.bind, static_argnames="pads"))
    made.def_abstract_eval(shape)
    batching.primitive_batchers[made] = batched
    ad.defbilinear(made, of_first, of_second)
    mlir.register_lowering(made, mlir.lower_fun(plain, multiple_results=False))
    mlir.register_lowering(made, mlir.lower_fun(cpu, multiple_results=False), platform="cpu")
    return made


_kernel_gradient = _primitive("kernel_gradient", _gradient, _cpu_gradient)
_convolution = _primitive("convolution", _plain, _cpu_plain)
