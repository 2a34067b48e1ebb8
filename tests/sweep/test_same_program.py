"""Programs that differ in numbers only become one; all others stay apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.sweep.same_program import merge


def trace(fn):
    return jax.make_jaxpr(fn)(jnp.arange(3.0))


def check(make, values):
    """Merge the programs of all values; the merged one must compute what each does."""
    merged = merge([trace(make(value)) for value in values])
    assert merged is not None
    x = jnp.array([0.5, -1.0, 2.0])
    for value, numbers in zip(values, merged.numbers, strict=True):
        found = jax.jit(merged.fn)(numbers, x)
        np.testing.assert_array_equal(found, jax.tree.leaves(jax.jit(make(value))(x)))
    return merged


def test_numbers_at_the_top_become_inputs():
    merged = check(lambda rate: lambda x: (rate * x + 1, jnp.where(x > rate, x, 0.0)), [0.5, 0.25, 0.125])
    assert [len(numbers) for numbers in merged.numbers] == [2, 2, 2]


def test_equal_programs_have_no_numbers():
    assert check(lambda rate: lambda x: x * 2, [1, 2]).numbers == [[], []]


def test_arrays_that_differ_become_inputs_and_others_stay():
    same = np.array([1.0, 2.0, 3.0], np.float32)
    merged = check(lambda k: lambda x: x * same + np.full(3, k, np.float32), [1.0, 5.0])
    assert [[array.tolist() for array in numbers] for numbers in merged.numbers] == [[[1.0] * 3], [[5.0] * 3]]


def test_weak_types_of_numbers_are_kept():
    half = jnp.bfloat16(2)
    merged = check(lambda rate: lambda x: x.astype(jnp.bfloat16) * half * rate, [0.5, 0.25])
    assert merged.fn(merged.numbers[0], jnp.arange(3.0))[0].dtype == jnp.bfloat16


def squared(x):
    y = x + 1
    return y * y


def multiplied(x):
    y = x + 1
    return y * x


@pytest.mark.parametrize(
    "make",
    [
        lambda k: lambda x: x + 1 if k else x * 1,
        lambda k: squared if k else multiplied,  # the same operations on other inputs
        lambda k: lambda x: jnp.concatenate([x] * (k + 2)),
        lambda k: lambda x: jax.lax.scan(lambda c, _: (c * (k + 0.5), None), x, length=3)[0],
        lambda k: lambda x: jax.lax.cond(x[0] > 0, lambda y: y + k, lambda y: y, x),
        lambda k: lambda x: x.astype(jnp.float16) if k else x,
        lambda k: lambda x: (x, float(k)),
        lambda k: lambda x: jnp.transpose(x[None].repeat(3, 0), (k, 1 - k)),
    ],
    ids=["operation", "inputs", "shape", "in a scan", "in a branch", "dtype", "output", "setting"],
)
def test_other_differences_keep_programs_apart(make):
    assert merge([trace(make(0)), trace(make(1))]) is None
    assert merge([trace(make(1)), trace(make(1))]) is not None
