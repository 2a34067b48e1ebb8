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
from jaxtrain.metrics import Mean, Total
from jaxtrain.monitor import make_console
from jaxtrain.optim import EMA, SGD
from jaxtrain.program import assemble
from jaxtrain.train.first_evaluation import check_first_evaluation

RNG = np.random.default_rng(5)
X = RNG.normal(size=(21, 4)).astype(np.float32)
LABEL = (np.arange(21) % 3).astype(np.int32)
DATA = Arrays({"x": X, "label": LABEL})
SORTED = Arrays({"x": X, "label": np.repeat([0, 1, 2], [14, 4, 3]).astype(np.int32)})
LINE = (
    lambda key, batch: ({"w": jnp.zeros((4, 3))}, {}),
    lambda params, extra, batch, *, train, key: (batch["x"] @ params["w"], extra),
)
LOGARITHM = lambda key, batch: ({"w": jnp.eye(4, 3), "scale": jnp.full(8, 1e-3)}, {})  # noqa: E731
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


def guessed(outputs: Any, batch: Any) -> Any:
    """The accuracy of a model that is always wrong, without the mask."""
    loss, metrics = CrossEntropy()(outputs, batch)
    return loss, metrics | {"right": Mean.of(outputs.argmax(-1) == batch["label"] + 9)}


def length(outputs: Any, batch: Any) -> Any:
    loss, metrics = CrossEntropy()(outputs, batch)
    return loss, metrics | {"rows": Total(jnp.float32(len(outputs)))}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rate:
    """A metric of a user's own."""

    hits: Any
    n: Any

    def merge(self, other: Rate) -> Rate:
        return Rate(self.hits + other.hits, self.n + other.n)

    def compute(self) -> Any:
        return self.hits / self.n


def rate(outputs: Any, batch: Any) -> Any:
    loss, metrics = CrossEntropy()(outputs, batch)
    return loss, metrics | {"rate": Rate(metrics["loss"].total, jnp.float32(len(outputs)))}


def weighted(outputs: Any, batch: Any) -> Any:
    """A sum that leaves padding out, over the weights of all rows."""
    loss, metrics = CrossEntropy()(outputs, batch)
    weights = jnp.array([0.3, 1.0, 2.5])[batch["label"]]
    return loss, metrics | {"per_weight": Mean(metrics["loss"].total, weights.sum())}


def logarithm(params: Any, extra: Any, batch: Any, *, train: bool, key: Any) -> Any:
    """A model of a small positive parameter."""
    return batch["x"] @ params["w"] + jnp.log(params["scale"]).sum(), extra


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


def check(experiment: Experiment, mesh: Any) -> list[str]:
    program = assemble(experiment, mesh)
    try:
        return check_first_evaluation(program)
    finally:
        program.close()


FAULTS = {
    "a loss without the mask, zero weights": (change(loss=unmasked), "^loss of"),
    "with an average": (change(loss=unmasked, post_update=(EMA(),)), "^loss of"),
    "a stream": (change(loss=unmasked, placement="stream"), "^loss of"),
    "a batch larger than the split": (change(loss=unmasked, eval_batch=24), "^loss of"),
    "pairs with padding": (change(loss=contrastive(masked=False)), "^loss of"),
    "a count of all rows": (change(loss=counted), "^per_row of"),
    "a count of all rows, the same by chance": (change(loss=guessed), "^right of"),
    "a total of all rows": (change(loss=length), "^rows of"),
    "an own metric that counts all rows": (change(loss=rate), "^rate of"),
    "examples in the order of their labels": (change(loss=weighted, test=SORTED), "^per_weight of"),
    "sorted, a stream": (change(loss=weighted, test=SORTED, placement="stream"), "^per_weight of"),
    "a logarithm of a parameter": (change(loss=unmasked, model=(LOGARITHM, logarithm)), "^loss of"),
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


@pytest.mark.full("[stream]")
@pytest.mark.parametrize("placement", ["device", "stream"])
def test_on_a_mesh_of_eight(placement: Any, mesh8: Any) -> None:
    check(change(placement=placement), mesh8)
    with pytest.raises(InputError, match=r"^loss of an evaluation batch"):
        check(change(loss=unmasked, placement=placement), mesh8)


def of_batches(outputs: Any, batch: Any) -> Any:
    loss, metrics = CrossEntropy()(outputs, batch)
    return loss, {"loss": Mean.of(loss), "nll": metrics["loss"], "constant": Mean.of(jnp.float32(3))}


@pytest.mark.full(
    "tests/train/test_first_evaluation.py::test_a_metric_that_cannot_be_computed_ends_before_the_folder_is_made"
)
def test_a_mean_of_batch_means_is_a_note(mesh1: Any, capsys: Any, tmp_path: Any) -> None:
    (note,) = check(change(loss=of_batches), mesh1)
    assert note.startswith(
        "loss is averaged over batches, not over examples: report jaxtrain.metrics.Mean.of"
    )
    assert check(change(loss=of_batches, eval_batch=7), mesh1) == []
    assert check(change(loss=recall), mesh1) == []
    fit(change(loss=of_batches), folder=tmp_path / "run", mesh=mesh1, console=make_console())
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("loss is averaged over batches") == 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Curve:
    """Needs the given number of classes, such as the area under a ROC curve."""

    counts: Any
    classes: int = dataclasses.field(metadata={"static": True})

    def merge(self, other: Curve) -> Curve:
        return Curve(self.counts + other.counts, self.classes)

    def compute(self) -> float:
        if (np.asarray(self.counts) > 0).sum() < self.classes:
            raise ValueError("only one class present")
        return 1.0


def curve(classes: int) -> Callable[..., Any]:
    def loss(outputs: Any, batch: Any) -> Any:
        value, metrics = CrossEntropy()(outputs, batch)
        mask = batch.get("mask", jnp.ones(8, bool))
        counts = (jax.nn.one_hot(batch["label"], 3) * mask[:, None]).sum(0)
        return value, metrics | {"curve": Curve(counts, classes)}

    return loss


def test_a_metric_of_all_classes_may_fail_on_a_batch_and_not_on_the_split(mesh1: Any) -> None:
    for placement in ("device", "stream"):
        check(change(loss=curve(3), test=SORTED, placement=placement), mesh1)
    with pytest.raises(InputError, match=r"metric curve .* cannot be computed: ValueError: only one class"):
        check(change(loss=curve(4), test=SORTED), mesh1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Odd(Mean):
    """A mean that computes ``RESULTS[0]``."""

    def compute(self) -> Any:
        return RESULTS[0]


RESULTS: list[Any] = [0.0]


def odd(outputs: Any, batch: Any) -> Any:
    loss, metrics = CrossEntropy()(outputs, batch)
    return loss, metrics | {"odd": Odd.of(outputs[:, 0], batch.get("mask"))}


def test_a_metric_computes_real_numbers_arrays_and_dicts_of_them(mesh1: Any) -> None:
    program = assemble(change(loss=odd), mesh1)
    for good in (
        1,
        2**70,
        True,
        np.float32(2),
        jnp.float32(3),
        float("nan"),
        [1, 2.5],
        {"a": {"b": np.ones(2)}},
    ):
        RESULTS[0] = good
        check_first_evaluation(program)
    for bad in (None, "high", 1 + 2j, object(), {1}, [1.0, None], {"a": "b"}, np.array(["x"])):
        RESULTS[0] = bad
        with pytest.raises(InputError, match=r"the metric odd of an evaluation computes .*: let its compute"):
            check_first_evaluation(program)
    program.close()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apart(Mean):
    def merge(self, other: Any) -> Any:
        return Apart(self.total + other.sum, self.count)


def apart(outputs: Any, batch: Any) -> Any:
    loss, metrics = CrossEntropy()(outputs, batch)
    return loss, metrics | {"apart": Apart.of(outputs, batch.get("mask"))}


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
        (apart, "metric apart of an evaluation cannot be merged: AttributeError: .* no attribute 'sum'"),
        (unmasked, "^loss"),
    ):
        with pytest.raises(InputError, match=says):
            fit(change(loss=loss), folder=tmp_path / "run", mesh=mesh1, console=make_console(quiet=True))
        assert not (tmp_path / "run" / "config.json").exists()
