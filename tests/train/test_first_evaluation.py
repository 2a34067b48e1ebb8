"""The evaluation before training: losses and models that padding rows change, and metrics that fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain import fit
from jaxtrain.core.errors import InputError
from jaxtrain.data import Arrays
from jaxtrain.experiment import Experiment
from jaxtrain.losses import CrossEntropy
from jaxtrain.metrics import Mean
from jaxtrain.monitor import make_console
from jaxtrain.optim import EMA, SGD
from jaxtrain.program import assemble
from jaxtrain.train.first_evaluation import check_first_evaluation

RNG = np.random.default_rng(5)
X = RNG.normal(size=(21, 4)).astype(np.float32)
LABEL = (np.arange(21) % 3).astype(np.int32)
DATA = Arrays({"x": X, "label": LABEL})
LINE = (
    lambda key, batch: ({"w": jnp.zeros((4, 3))}, {}),
    lambda params, extra, batch, *, train, key: (batch["x"] @ params["w"], extra),
)
EXPERIMENT = Experiment(
    model=LINE, train=DATA, test=DATA, loss=CrossEntropy(), optimizer=SGD(lr=0.1), batch=8, epochs=1
)


def unmasked(outputs: Any, batch: Any) -> Any:
    nll = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"])
    return nll.mean(), {"loss": Mean.of(nll), "seen": Mean.of(jnp.ones_like(nll), batch.get("mask"))}


def recall(outputs: Any, batch: Any) -> Any:
    """Recall of class 0, and the loss: their counts differ from the number of examples, legally."""
    loss, metrics = CrossEntropy()(outputs, batch)
    positive = (batch["label"] == 0) & batch.get("mask", jnp.ones(8, bool))
    return loss, metrics | {"recall": Mean.of(outputs.argmax(-1) == 0, positive)}


def counted(outputs: Any, batch: Any) -> Any:
    """The sum leaves padding out, and the count does not."""
    loss, metrics = CrossEntropy()(outputs, batch)
    return loss, metrics | {"per_row": Mean(metrics["loss"].total, jnp.float32(len(outputs)))}


def of_weights(outputs: Any, batch: Any) -> Any:
    """A mean over batches of what no row changes."""
    loss, metrics = CrossEntropy()(outputs, batch)
    return loss, metrics | {"constant": Mean.of(jnp.arange(8.0)), "one": Mean.of(loss)}


def contrastive(masked: bool) -> Callable[..., Any]:
    """Each row against all rows of its batch, or against the rows that are no padding."""

    def loss(outputs: Any, batch: Any) -> Any:
        mask = batch.get("mask", jnp.ones(8, bool))
        scores = outputs @ outputs.T
        if masked:
            scores = jnp.where(mask[None], scores, -jnp.inf)
        nll = Mean.of(optax.softmax_cross_entropy_with_integer_labels(scores, jnp.arange(8)), mask)
        return nll.total / jnp.maximum(nll.count, 1), {"loss": nll}

    return loss


def centred(params: Any, extra: Any, batch: Any, *, train: bool, key: Any) -> Any:
    outputs = batch["x"] @ params["w"]
    return outputs - outputs.mean(0, keepdims=True), extra


def change(**changes: Any) -> Experiment:
    return dataclasses.replace(EXPERIMENT, **changes)


def check(experiment: Experiment, mesh: Any) -> None:
    program = assemble(experiment, mesh)
    try:
        check_first_evaluation(program)
    finally:
        program.close()


FAULTS = {
    "a loss without the mask, zero weights": (change(loss=unmasked), "^loss of"),
    "with an average": (change(loss=unmasked, post_update=(EMA(),)), "^loss of"),
    "a stream": (change(loss=unmasked, placement="stream"), "^loss of"),
    "a batch larger than the split": (change(loss=unmasked, eval_batch=24), "^loss of"),
    "pairs with padding": (change(loss=contrastive(masked=False)), "^loss of"),
    "a count of all rows": (change(loss=counted), "^per_row of"),
    "a model that centres its batch": (change(model=(LINE[0], centred)), "loss.* of"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_metric_that_padding_changes_is_refused_by_name(name: str, mesh1: Any) -> None:
    experiment, says = FAULTS[name]
    rows = r"depends on its padding rows, where .* \(3 rows in the last batch of test\)"
    with pytest.raises(InputError, match=f"{says} an evaluation batch {rows}"):
        check(experiment, mesh1)


LEGAL = {
    "cross-entropy": EXPERIMENT,
    "a metric of some examples": change(loss=recall),
    "a metric of no rows": change(loss=of_weights),
    "pairs without padding": change(loss=contrastive(masked=True)),
    "no batch has padding": change(loss=unmasked, eval_batch=7),
    "a stream": change(placement="stream"),
}


@pytest.mark.parametrize("name", LEGAL)
def test_no_false_alarm(name: str, mesh1: Any) -> None:
    check(LEGAL[name], mesh1)


@pytest.mark.parametrize("placement", ["device", "stream"])
def test_on_a_mesh_of_eight(placement: Any, mesh8: Any) -> None:
    check(change(placement=placement), mesh8)
    with pytest.raises(InputError, match=r"^loss of an evaluation batch"):
        check(change(loss=unmasked, placement=placement), mesh8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Broken(Mean):
    def compute(self) -> float:
        raise KeyError("scale")


def broken(outputs: Any, batch: Any) -> Any:
    loss, metrics = CrossEntropy()(outputs, batch)
    return loss, metrics | {"odd": Broken.of(outputs)}


def test_a_metric_that_cannot_be_computed_ends_before_the_folder_is_made(tmp_path, mesh1) -> None:
    for loss, says in (
        (broken, "metric odd of an evaluation cannot be computed: KeyError"),
        (unmasked, "^loss"),
    ):
        with pytest.raises(InputError, match=says):
            fit(change(loss=loss), folder=tmp_path / "run", mesh=mesh1, console=make_console(quiet=True))
        assert not (tmp_path / "run" / "config.json").exists()
