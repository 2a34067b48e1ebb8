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
from jaxtrain.models import as_model
from jaxtrain.program import missing_values


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


def experiment(
    loss: Any, field: str = "target", value: float = np.nan, row: int = 3, **changes: Any
) -> Experiment:
    rng = np.random.default_rng(0)
    fields = {
        name: rng.normal(size=(32, width)).astype(np.float32) for name, width in (("x", 3), ("target", 2))
    }
    fields[field][row, 1] = value
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


def test_examples_are_named_by_their_index_in_the_source_where_some_are_held_out() -> None:
    exp = dataclasses.replace(experiment(losses.MSE(), row=20), holdout=8)
    kept, _ = data.holdout(32, 8)
    assert kept.tolist().index(20) != 20
    with pytest.raises(InputError, match=r"^train: field 'target' of example 20 holds NaN"):
        notes(exp)


def test_a_stage_that_cannot_be_tried_is_named() -> None:
    def centre(batch: Any, key: Any) -> Any:
        return {**batch, "target": batch["target"] - batch["mean"]}

    check = missing_values.check_finite(experiment(losses.MSE(), preprocess=(centre,)), as_model(Net()))
    with pytest.raises(
        InputError, match=r"holds NaN or infinity \(preprocess cannot be tried .* KeyError: 'mean'"
    ):
        check({"x": np.ones((2, 3)), "target": np.full((2, 2), np.nan)}, np.arange(2))
