"""Flax collections that are only written, and random streams in evaluation."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxtrain.core.errors import InputError
from jaxtrain.models import as_model

KEY = jax.random.key(0)
BATCH = {"x": jnp.ones((4, 3)), "example_id": jnp.arange(8, 12)}


class Sows(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        table = self.variable("constants", "table", lambda: jnp.full((), 3.0))
        h = self.perturb("h", nn.Dense(2)(x))
        self.sow("losses", "aux", (h**2).mean())
        self.sow("count", "calls", 1.0, reduce_fn=lambda a, b: a + b, init_fn=lambda: 0.0)
        self.sow("intermediates", "h", h)
        return h * table.value


class Reported(Sows):
    sown_outputs: ClassVar = ("losses",)


@pytest.mark.parametrize("train", [True, False])
def test_sown_collections_are_outputs_and_no_state(train: bool) -> None:
    model = as_model(Sows())
    params, extra = model.init(KEY, BATCH)
    assert set(extra) == {"constants"} and model.dropped is not None
    assert model.dropped() == ("count", "losses", "perturbations")
    outputs, after = model.apply(params, extra, BATCH, train=train, key=KEY if train else None)
    assert outputs.shape == (4, 2) and jax.tree.structure(after) == jax.tree.structure(extra)


@pytest.mark.parametrize("train", [True, False])
def test_a_module_can_give_what_it_sows_to_the_loss(train: bool) -> None:
    model = as_model(Reported())
    params, extra = model.init(KEY, BATCH)
    (outputs, sown), after = model.apply(params, extra, BATCH, train=train, key=KEY if train else None)
    h = np.asarray(outputs) / 3
    np.testing.assert_allclose(sown["losses"]["aux"][0], (h**2).mean(), rtol=1e-6)
    assert set(after) == {"constants"}


class Noisy(nn.Module):
    stream: str = "noise"

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x + jax.random.normal(self.make_rng(self.stream), x.shape)


def test_a_random_stream_in_evaluation_depends_on_the_place_alone() -> None:
    model = as_model(Noisy())
    first, _ = model.apply({}, {}, BATCH, train=False, key=None)
    again, _ = jax.jit(lambda b: model.apply({}, {}, b, train=False, key=None))(BATCH)
    np.testing.assert_allclose(first, again, rtol=1e-6)
    other, _ = model.apply({}, {}, {**BATCH, "example_id": jnp.arange(12, 16)}, train=False, key=None)
    assert (first != other).all()
    for name in ("prior", "my-noise", "a b"):
        stream, _ = as_model(Noisy(name)).apply({}, {}, BATCH, train=False, key=None)
        assert (first != stream).all()


class AlwaysDrops(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dropout(0.5, deterministic=False)(x)


def test_dropout_that_is_never_off_is_refused_in_evaluation() -> None:
    for module in (AlwaysDrops(), Noisy("dropout")):
        says = f"{type(module).__name__} draws from the random stream dropout in evaluation too"
        with pytest.raises(InputError, match=says):
            as_model(module).apply({}, {}, BATCH, train=False, key=None)
