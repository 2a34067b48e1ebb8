"""``max_pool`` against NumPy and ``flax.linen.max_pool``: values, gradients, dtypes, errors, programs."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxtrain.core.errors import InputError
from jaxtrain.models import max_pool

RNG = np.random.default_rng(0)
STEM = ((1, 1), (1, 1))
OVERLAPPING = [  # image sides, window, stride, padding
    ((8, 8), 3, 2, STEM),
    ((9, 6), 3, 2, "VALID"),
    ((7, 10), 3, 2, "SAME"),
    ((6, 7), 3, 1, "SAME"),
    ((9, 11), 5, 2, ((2, 0), (1, 3))),
    ((19, 20), 10, 9, "VALID"),
]
DISJOINT = [
    ((8, 8), 2, 2, "VALID"),
    ((7, 5), 2, 2, "VALID"),
    ((7, 5), 2, 2, "SAME"),
    ((10, 9), 3, 3, "VALID"),
    ((9, 8), 4, 4, "VALID"),
]


def few_values(sides: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Return images with many ties within a window."""
    return jnp.array(RNG.integers(-2, 2, (2, *sides, 3)), dtype)


def different_values(sides: tuple[int, int]) -> jax.Array:
    return jnp.array(RNG.permutation(2 * 3 * sides[0] * sides[1]).reshape(2, *sides, 3), jnp.float32)


def stock(x: jax.Array, size: int, stride: int, padding: Any) -> jax.Array:
    return nn.max_pool(x, (size, size), (stride, stride), padding)


def with_gradient(pool: Any, x: jax.Array) -> Any:
    """Return values and gradient, with a different integer as the cotangent of each output."""

    @jax.jit
    def run(x: jax.Array) -> Any:
        out, transpose = jax.vjp(pool, x)
        return out, transpose(jnp.arange(out.size, dtype=out.dtype).reshape(out.shape))[0]

    return run(x)


def first_maximum(x: np.ndarray, size: int, stride: int, pads: Any, cotangent: np.ndarray) -> Any:
    """Return values and gradient, in plain loops; padded pixels are never the maximum."""
    (top, bottom), (left, right) = pads
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=-np.inf)
    out, gradient = np.zeros(cotangent.shape), np.zeros(padded.shape)
    for b, row, column, c in np.ndindex(cotangent.shape):
        corner = row * stride, column * stride
        window = padded[b, corner[0] : corner[0] + size, corner[1] : corner[1] + size, c]
        i, j = np.unravel_index(window.argmax(), window.shape)
        out[b, row, column, c] = window[i, j]
        gradient[b, corner[0] + i, corner[1] + j, c] += cotangent[b, row, column, c]
    return out, gradient[:, top : top + x.shape[1], left : left + x.shape[2]]


@pytest.mark.full("[sides3-3-1-SAME]")
@pytest.mark.parametrize(("sides", "size", "stride", "padding"), OVERLAPPING)
def test_overlapping_windows_equal_flax_with_ties(sides: Any, size: int, stride: int, padding: Any) -> None:
    x = few_values(sides)
    ours = with_gradient(lambda x: max_pool(x, size, stride, padding), x)
    chex.assert_trees_all_equal(ours, with_gradient(lambda x: stock(x, size, stride, padding), x))


@pytest.mark.full("[sides2-2-2-SAME]")
@pytest.mark.parametrize(("sides", "size", "stride", "padding"), DISJOINT)
def test_disjoint_windows_equal_flax_without_ties(sides: Any, size: int, stride: int, padding: Any) -> None:
    x = different_values(sides)
    ours = with_gradient(lambda x: max_pool(x, size, stride, padding), x)
    chex.assert_trees_all_equal(ours, with_gradient(lambda x: stock(x, size, stride, padding), x))


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 2, STEM), (2, 2, "VALID")])
def test_values_without_a_gradient_equal_flax(size: int, stride: int, padding: Any) -> None:
    x = few_values((8, 7))
    ours = jax.jit(lambda x: max_pool(x, size, stride, padding))(x)
    chex.assert_trees_all_equal(ours, stock(x, size, stride, padding))


@pytest.mark.parametrize(("sides", "pads"), [((8, 8), STEM), ((9, 6), ((0, 0), (0, 0)))])
def test_overlapping_windows_equal_numpy_with_ties(sides: Any, pads: Any) -> None:
    x = few_values(sides)
    out, gradient = with_gradient(lambda x: max_pool(x, 3, 2, pads), x)
    cotangent = np.arange(out.size).reshape(out.shape)
    want = first_maximum(np.asarray(x), 3, 2, pads, cotangent)
    np.testing.assert_array_equal(out, want[0])
    np.testing.assert_array_equal(gradient, want[1])


@pytest.mark.parametrize(
    ("window", "shares"),
    [
        ([[1, 7], [7, 2]], [[0, 0.5], [0.5, 0]]),
        ([[7, 7], [7, 2]], [[0.25, 0.25], [0.5, 0]]),  # as pairs: the first row against the second
        ([[7, 7], [7, 7]], [[0.25, 0.25], [0.25, 0.25]]),
        ([[1, 1], [2, 7]], [[0, 0], [0, 1]]),
        ([[7, 1, 0], [3, 7, 2], [4, 5, 6]], [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0]]),
    ],
)
def test_disjoint_windows_share_the_gradient_of_a_tie(window: Any, shares: Any) -> None:
    x = jnp.array(window, jnp.float32)[None, :, :, None]
    gradient = jax.jit(jax.grad(lambda x: max_pool(x, len(window)).sum()))(x)
    assert gradient[0, :, :, 0].tolist() == shares


@pytest.mark.full("tests/models/test_pooling.py::test_disjoint_windows_share_the_gradient_of_a_tie")
@pytest.mark.parametrize(("sides", "size", "stride", "padding"), DISJOINT)
def test_shares_of_a_window_sum_to_its_gradient(sides: Any, size: int, stride: int, padding: Any) -> None:
    out, gradient = with_gradient(lambda x: max_pool(x, size, stride, padding), few_values(sides))
    assert float(gradient.sum()) == out.size * (out.size - 1) / 2


@pytest.mark.full("tests/models/test_pooling.py::test_overlapping_windows_equal_flax_with_ties")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("size", "stride"), [(3, 2), (2, 2)])
def test_half_precision_equals_flax(dtype: Any, size: int, stride: int) -> None:
    x = jnp.array(RNG.permutation(2 * 6 * 6).reshape(2, 6, 6, 1), dtype)
    ours = with_gradient(lambda x: max_pool(x, size, stride), x)
    chex.assert_trees_all_equal(ours, with_gradient(lambda x: stock(x, size, stride, "VALID"), x))
    assert ours[1].dtype == dtype


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 2, STEM), (2, 2, "VALID")])
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_values_of_nan_and_infinities_equal_flax(
    special: float, size: int, stride: int, padding: Any
) -> None:
    x = different_values((8, 8)).at[:, 2:5, ::3].set(special)
    ours = with_gradient(lambda x: max_pool(x, size, stride, padding), x)
    theirs = with_gradient(lambda x: stock(x, size, stride, padding), x)
    chex.assert_trees_all_equal(ours[0], theirs[0])
    assert np.isfinite(ours[1]).all()


def test_gradient_of_windows_of_minus_infinity_equals_flax() -> None:
    x = different_values((8, 8)).at[:, 1:5, 1:5].set(-jnp.inf)
    ours = with_gradient(lambda x: max_pool(x, 3, 2), x)
    chex.assert_trees_all_equal(ours, with_gradient(lambda x: stock(x, 3, 2, "VALID"), x))


@pytest.mark.full("tests/models/test_pooling.py::test_overlapping_windows_equal_numpy_with_ties")
@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 2, STEM), (2, 2, "VALID")])
def test_forward_mode_and_vmap_equal_flax(size: int, stride: int, padding: Any) -> None:
    x, tangent = different_values((8, 8)), different_values((8, 8))
    ours, theirs = (
        jax.jvp(jax.vmap(lambda x, pool=pool: pool(x[None], size, stride, padding)[0]), (x,), (tangent,))
        for pool in (max_pool, stock)
    )
    chex.assert_trees_all_equal(ours, theirs)


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 2, STEM), (2, 2, "VALID")])
def test_gradient_has_no_scatter(size: int, stride: int, padding: Any) -> None:
    gradient = jax.grad(lambda x: max_pool(x, size, stride, padding).sum())
    assert "scatter" not in jax.jit(gradient).lower(few_values((8, 8))).as_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0,), "size must be at least 1, and stride between 1 and size"),
        ((2, 3), "size must be at least 1, and stride between 1 and size"),
        ((3, 2, ((3, 0), (0, 0))), "each padding must be at least 0 and less than size"),
        ((3, 2, ((0, 0), (-1, 0))), "each padding must be at least 0 and less than size"),
        ((9,), "the image \\(2, 8, 8, 3\\) is smaller than a window"),
    ],
)
def test_settings_out_of_range_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        max_pool(few_values((8, 8)), *settings)
