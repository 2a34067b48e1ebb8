"""Max-pooling from strided slices, with a gradient rule of its own (docs/decisions/max-pool-gradient.md)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from jaxtrain.core.errors import InputError
from jaxtrain.models.plain_operators import are_plain

Padding = Literal["VALID", "SAME"] | tuple[tuple[int, int], tuple[int, int]]
WORD_BITS = 32
_Entry = tuple[jax.Array, list[jax.Array]]


def max_pool(x: jax.Array, size: int = 2, stride: int | None = None, padding: Padding = "VALID") -> jax.Array:
    """Max-pool square windows: float ``[batch, h, w, c]`` → ``[batch, rows, columns, c]``.

    The values are those of ``flax.linen.max_pool`` with the same window, stride and padding, NaN included.
    The gradient of a window goes to its maximum. Where windows overlap, the first of several equal maxima
    (by row, then column) receives it, as in JAX; where they do not, equal maxima share it. The gradient of a
    window that contains NaN goes to one of its elements, not always to the NaN.

    Training saves which elements were the maxima, one byte per window of the usual sizes, and not ``x``. The
    gradient needs no scatter, so it is the same in every run on a GPU too.

    Args:
      x: float ``[batch, h, w, c]``.
      size: side of a window in pixels, at least 1.
      stride: pixels between windows, at least 1 and at most ``size``; ``None`` is ``size``, without overlap.
      padding: ``"VALID"``, ``"SAME"`` or ``((top, bottom), (left, right))`` in pixels, each less than
        ``size``. Padded pixels are -inf.

    Raises:
      InputError: size, stride or padding is out of range, or the padded image is smaller than a window.

    >>> import jax.numpy as jnp
    >>> x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    >>> max_pool(x)[0, :, :, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    >>> max_pool(x, 3, 2, ((1, 1), (1, 1)))[0, :, :, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    windows = _windows(x, size, size if stride is None else stride, padding)
    if are_plain():
        return nn.max_pool(x, (size, size), (windows.stride, windows.stride), windows.pads)
    return _pool(x, windows)


@dataclasses.dataclass(frozen=True)
class _Windows:
    """Windows of ``size`` pixels a side, ``stride`` pixels apart, in an image with ``pads``."""

    size: int
    stride: int
    pads: tuple[tuple[int, int], tuple[int, int]]

    @property
    def overlap(self) -> bool:
        return self.stride < self.size

    @property
    def blocks(self) -> int:
        """Windows that cover a pixel, along one side, at most."""
        return -(-self.size // self.stride)

    @property
    def span(self) -> int:
        """Side of the square of positions that ``code`` numbers: ``size``, rounded up to entire strides."""
        return self.blocks * self.stride

    def code(self, row: int, column: int) -> int:
        """Return the number of a position, different for positions just outside a window too."""
        return row * self.span + column

    @property
    def bits(self) -> int:
        """Bits of a share (``_shared_maximum``)."""
        rounds = (self.size**2 - 1).bit_length()
        return (rounds + 1).bit_length()

    @property
    def per_word(self) -> int:
        """Shares in a word."""
        return WORD_BITS // self.bits

    def slices(self, x: jax.Array) -> Iterator[jax.Array]:
        """Yield ``[b, rows, columns, c]``: for each position in a window, that element of every window."""
        (top, bottom), (left, right) = self.pads
        if top or bottom or left or right:
            lowest = jnp.array(-jnp.inf, x.dtype)
            x = lax.pad(x, lowest, ((0, 0, 0), (top, bottom, 0), (left, right, 0), (0, 0, 0)))
        b, h, w, c = x.shape
        last = (h - self.size) // self.stride * self.stride, (w - self.size) // self.stride * self.stride
        for i, j in itertools.product(range(self.size), repeat=2):
            stop = (b, i + last[0] + 1, j + last[1] + 1, c)
            yield lax.slice(x, (0, i, j, 0), stop, (1, self.stride, self.stride, 1))


def _windows(x: jax.Array, size: int, stride: int, padding: Padding) -> _Windows:
    where = f"max_pool(size={size}, stride={stride}, padding={padding!r})"
    if not 1 <= stride <= size:
        raise InputError(f"{where}: size must be at least 1, and stride between 1 and size")
    if isinstance(padding, str):
        pads = lax.padtype_to_pads(x.shape[1:3], (size, size), (stride, stride), padding)
        padding = (pads[0][0], pads[0][1]), (pads[1][0], pads[1][1])
    if not all(0 <= pad < size for side in padding for pad in side):
        raise InputError(f"{where}: each padding must be at least 0 and less than size")
    if any(side + sum(pads) < size for side, pads in zip(x.shape[1:3], padding, strict=True)):
        raise InputError(f"{where}: the image {tuple(x.shape)} is smaller than a window")
    return _Windows(size, stride, padding)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _pool(x: jax.Array, windows: _Windows) -> jax.Array:
    parts = list(windows.slices(x))
    return functools.reduce(jnp.maximum, parts)


@_pool.defjvp
def _pool_jvp(
    windows: _Windows, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Return the tangent at each window's maximum, found by comparing pairs of elements.

    JAX's rule for ``max`` over an axis compares each element with the maximum. XLA may compute an element
    twice, for the maximum and for the comparison, and round it differently; then none is equal, and the
    gradient is lost or 0 / 0. Comparing two elements always selects one, even if they differ in the last bit
    only.

    The tangent is written as a masked sum over the positions of a window, because the transpose of that, the
    gradient, is elementwise: XLA computes it in one kernel, without padding, scatter or atomic additions.
    """
    (x,), (tangent,) = primals, tangents
    if windows.overlap:
        out, index = _first_maximum(windows, x)
        return out, _at_index(windows, index, tangent)
    out, words = _shared_maximum(windows, x)
    return out, _at_shares(windows, words, tangent)


def _first_maximum(windows: _Windows, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the maximum of each window, and the code of the first position that has it."""
    dtype = jnp.uint8 if windows.span**2 <= 256 else jnp.int32
    best, *others = windows.slices(x)
    index = jnp.zeros(best.shape, dtype)
    for position, part in enumerate(others, 1):
        code = windows.code(*divmod(position, windows.size))
        index = jnp.where(part > best, jnp.array(code, dtype), index)
        best = jnp.maximum(best, part)
    return best, index


def _at_index(windows: _Windows, index: jax.Array, tangent: jax.Array) -> jax.Array:
    """Return the tangent at ``index`` of each window: ``[b, h, w, c]`` → ``[b, rows, columns, c]``.

    A pixel is in up to ``blocks`` windows along each side, at positions ``stride`` apart.
    """
    stride, (rows, columns) = windows.stride, index.shape[1:3]
    tiles = _tiles(windows, tangent, index.shape)
    row, column = _tile_positions(stride)
    parts = []
    for down, right in itertools.product(range(windows.blocks), repeat=2):
        code = row * windows.span + column + windows.code(down * stride, right * stride)
        hit = index[:, :, None, :, None] == code.astype(index.dtype)
        parts.append(jnp.where(hit, tiles[:, down : down + rows, :, right : right + columns], 0))
    return functools.reduce(jnp.add, parts).sum((2, 4))


def _tiles(windows: _Windows, tangent: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Cut ``[b, h, w, c]`` into tiles of ``stride`` pixels a side: ``[b, tiles, stride, tiles, stride, c]``.

    The end is padded to an entire tile, not cropped: the transpose of a crop is a padding of the gradient,
    for which XLA:GPU writes it a second time.
    """
    pads, counts = [], []
    for side, (before, _), outputs in zip(tangent.shape[1:3], windows.pads, shape[1:3], strict=True):
        tiles = max(outputs + windows.blocks - 1, -(-(side + before) // windows.stride))
        pads.append((before, tiles * windows.stride - side - before, 0))
        counts.append(tiles)
    tangent = lax.pad(tangent, jnp.zeros((), tangent.dtype), ((0, 0, 0), *pads, (0, 0, 0)))
    stride = windows.stride
    return tangent.reshape(tangent.shape[0], counts[0], stride, counts[1], stride, tangent.shape[-1])


def _tile_positions(side: int) -> tuple[jax.Array, jax.Array]:
    shape = (1, 1, side, 1, side, 1)
    return lax.broadcasted_iota(jnp.int32, shape, 2), lax.broadcasted_iota(jnp.int32, shape, 4)


def _shared_maximum(windows: _Windows, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Return the maximum of each window, and the share of every element in its gradient.

    Elements are compared in pairs, the larger ones again, and so on; two equal ones halve the gradient. A
    share is 0 (no gradient) or one more than the number of halvings. The shares of a window are packed into
    words: ``[b, rows, columns, c]``, uint8 if they fit, else uint32.
    """
    entries = [(part, [jnp.ones(part.shape, jnp.uint8)]) for part in windows.slices(x)]
    while len(entries) > 1:
        pairs = [_larger(*entries[k : k + 2]) for k in range(0, len(entries) - 1, 2)]
        entries = pairs + entries[len(pairs) * 2 :]
    ((best, shares),) = entries
    dtype = jnp.uint8 if len(shares) * windows.bits <= 8 else jnp.uint32
    words = []
    for start in range(0, len(shares), windows.per_word):
        chunk = shares[start : start + windows.per_word]
        fields = [share.astype(dtype) << k * windows.bits for k, share in enumerate(chunk)]
        words.append(functools.reduce(jnp.bitwise_or, fields))
    return best, words


def _larger(a: _Entry, b: _Entry) -> _Entry:
    """Return the larger of two values, with the shares of the elements that they are the maxima of."""
    (left, left_shares), (right, right_shares) = a, b
    tie, first, none = left == right, left > right, jnp.uint8(0)
    halved = [[share + (share > 0) for share in shares] for shares in (left_shares, right_shares)]
    shares = [
        *(jnp.where(tie, h, jnp.where(first, s, none)) for h, s in zip(halved[0], left_shares, strict=True)),
        *(jnp.where(tie, h, jnp.where(first, none, s)) for h, s in zip(halved[1], right_shares, strict=True)),
    ]
    return jnp.maximum(left, right), shares


def _at_shares(windows: _Windows, words: list[jax.Array], tangent: jax.Array) -> jax.Array:
    """Return the sum of each window's tangents, weighted by their shares: ``[b, rows, columns, c]``."""
    rows, columns = words[0].shape[1:3]
    tiles = _tiles(windows, tangent, words[0].shape)[:, :rows, :, :columns]
    row, column = _tile_positions(windows.size)
    word_number, place = jnp.divmod(row * windows.size + column, windows.per_word)
    share = jnp.zeros((), words[0].dtype)
    for number, word in enumerate(words):
        shift = (place * windows.bits).astype(word.dtype)
        found = (word[:, :, None, :, None] >> shift) & (2**windows.bits - 1)
        share = jnp.where(word_number == number, found, share)
    factor = jnp.ones((), tangent.dtype)
    for halvings in range(1, 2**windows.bits - 1):
        factor = jnp.where(share == halvings + 1, jnp.array(0.5**halvings, tangent.dtype), factor)
    return jnp.where(share > 0, tiles * factor, 0).sum((2, 4))
