"""NaN among the examples is legal where the loss leaves it out, and only there."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxtrain import Experiment, assemble, data, losses, optim, sharding
from jaxtrain.core.errors import InputError
from jaxtrain.metrics import Mean


class Net(nn.Module):
    """Reads ``x`` only."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2)(x)


@dataclasses.dataclass(frozen=True)
class Missing:
    """The mean squared error of the targets that are there.

    Attributes:
      inside: replace NaN before the difference, so that the gradient is finite, too.
    """

    inside: bool = True

    def __call__(self, outputs: Any, batch: Any) -> Any:
        target = batch["target"]
        there = ~jnp.isnan(target) & batch.get("mask", jnp.ones(len(target), bool))[:, None]
        error = outputs - (jnp.where(there, target, 0) if self.inside else target)
        squared = Mean.of(jnp.where(there, error**2, 0), there)
        return squared.total / jnp.maximum(squared.count, 1), {"loss": squared}


def experiment(loss: Any, field: str = "target", value: float = np.nan, **changes: Any) -> Experiment:
    rng = np.random.default_rng(0)
    fields = {
        name: rng.normal(size=(32, width)).astype(np.float32) for name, width in (("x", 3), ("target", 2))
    }
    fields[field][3, 1] = value
    train, test = data.Arrays(fields), data.Arrays({name: x[8:] for name, x in fields.items()})
    return Experiment(
        model=Net(),
        train=train,
        test=test,
        loss=loss,
        optimizer=optim.SGD(lr=0.1),
        batch=8,
        epochs=1,
        **changes,
    )


def notes(exp: Experiment) -> tuple[str, ...]:
    program = assemble(exp, sharding.make_mesh(jax.devices()[:1]))
    program.close()
    return program.notes


@pytest.mark.parametrize("placement", ["device", "stream"])
def test_missing_targets_that_the_loss_leaves_out_are_a_note(placement: str) -> None:
    found = notes(experiment(Missing(), placement=placement))
    assert found == ("train: field 'target' of example 3 holds NaN or infinity, which the loss leaves out",)


@pytest.mark.parametrize(
    ("loss", "field", "value"),
    [
        (losses.MSE(), "target", np.nan),
        (Missing(inside=False), "target", np.nan),  # a finite loss, and a gradient of NaN
        (Missing(), "target", np.inf),
        (Missing(), "x", np.nan),  # the model reads it
    ],
)
def test_other_gaps_are_refused(loss: Any, field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"train: field '{field}' of example 3 holds NaN or infinity: fill"):
        notes(experiment(loss, field, value))
