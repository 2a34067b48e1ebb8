"""What is checked of a loss, a model and stages when an experiment is assembled."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxtrain.core.errors import InputError
from jaxtrain.data import Arrays
from jaxtrain.experiment import Experiment
from jaxtrain.losses import CrossEntropy
from jaxtrain.metrics import Mean, RootMean
from jaxtrain.optim import SGD
from jaxtrain.program import assemble, check_contract
from jaxtrain.step import make_train_step
from jaxtrain.train import bad_examples

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 4)).astype(np.float32)
KEEP = np.arange(4)[None] < RNG.integers(1, 5, 24)[:, None]  # 1 to 4 values of an example count
RAGGED = Arrays({"x": X, "keep": KEEP, "label": (np.arange(24) % 3 + 1).astype(np.int32)})
SQUARE = (
    lambda key, batch: ({"w": jnp.ones((4, 4))}, {}),
    lambda params, extra, batch, *, train, key: (batch["x"] @ params["w"], extra),
)


def ragged(named: str, *others: str) -> Any:
    def loss(outputs: Any, batch: Any) -> Any:
        keep = batch["keep"] & batch.get("mask", jnp.ones(len(outputs), bool))[:, None]
        error = outputs - batch["x"] ** 2
        mean = Mean.of(error**2, keep)
        metrics = {"rows": Mean.of(error[:, 0] ** 2), "rmse": RootMean.of(error[:, :2] ** 2), named: mean}
        return mean.total / mean.count, {name: metrics[name] for name in (*others, named)}

    return loss


EXPERIMENT = Experiment(
    model=SQUARE, train=RAGGED, test=RAGGED, loss=ragged("loss"), optimizer=SGD(lr=0.1), batch=24, epochs=1
)


def change(**changes: Any) -> Experiment:
    return dataclasses.replace(EXPERIMENT, **changes)


def first_update(experiment: Experiment, mesh: Any) -> np.ndarray:
    program = assemble(experiment, mesh)
    state, _ = program.train_step(program.init(), program.train.batch(0), program.key)
    return np.asarray(state.params["w"])


@pytest.mark.full("[names1]")
@pytest.mark.parametrize("names", [("loss",), ("nll",), ("nll", "rows", "rmse")])
def test_microbatches_weigh_as_much_as_their_loss_counts(names: tuple[str, ...], mesh1: Any) -> None:
    """The gradient is that of all values in NumPy, whatever the mean is called."""
    w = np.ones((4, 4))
    gradient = X.T @ (2 * KEEP * (X @ w - X**2)) / KEEP.sum()
    for parts in (1, 6):
        found = first_update(change(loss=ragged(*names), accumulate=parts), mesh1)
        np.testing.assert_allclose(found, w - 0.1 * gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.full(
    "tests/program/test_check_contract.py::test_microbatches_weigh_as_much_as_their_loss_counts"
)
def test_a_microbatch_that_counts_nothing_has_no_weight(mesh1: Any) -> None:
    keep = KEEP.copy()
    keep[::6] = False  # the first microbatch of six, if batches are in this order: its mean is 0 / 0
    data = Arrays({**RAGGED.fields, "keep": keep})
    experiment = change(train=data, loss=ragged("nll"))
    whole, parts = (first_update(dataclasses.replace(experiment, accumulate=n), mesh1) for n in (1, 24))
    np.testing.assert_allclose(parts, whole, rtol=1e-4)


def bare(outputs: Any, batch: Any) -> Any:
    return jnp.square(outputs).mean(), {"rows": Mean.of(outputs[:, 0])}


def test_a_loss_that_reports_no_mean_of_itself_is_refused_with_accumulate(mesh1: Any) -> None:
    assemble(change(loss=bare, eval_every=None), mesh1).close()
    with pytest.raises(
        InputError, match=r"none of the loss's metrics \(rows\) is the mean .* report {\"loss\""
    ):
        assemble(change(loss=bare, accumulate=4), mesh1)


def _error(outputs: Any, batch: Any) -> tuple[Any, Any]:
    keep = batch["keep"] & batch.get("mask", jnp.ones(len(outputs), bool))[:, None]
    return (outputs - batch["x"] ** 2) ** 2, keep


def total(outputs: Any, batch: Any) -> Any:
    mean = Mean.of(*_error(outputs, batch))
    return mean.total, {"loss": mean}


def mean_of_batch(outputs: Any, batch: Any) -> Any:
    error, keep = _error(outputs, batch)
    value = jnp.where(keep, error, 0).sum() / jnp.maximum(keep.sum(), 1)
    return value, {"loss": Mean.of(value)}


def mean_of_rows(outputs: Any, batch: Any) -> Any:
    error, keep = _error(outputs, batch)
    rows = jnp.where(keep, error, 0).sum(1) / keep.sum(1)
    return rows.mean(), {"loss": Mean.of(error, keep)}


def weighted(outputs: Any, batch: Any) -> Any:
    error, _ = _error(outputs, batch)
    weight = jnp.where(batch["label"] > 1, 5.0, 0.1)
    return (weight * error[:, 0]).sum() / weight.sum(), {"loss": Mean.of(error[:, 0])}


@pytest.mark.parametrize("loss", [total, mean_of_batch, mean_of_rows, weighted])
def test_a_loss_that_its_count_does_not_weight_is_refused_with_accumulate(loss: Any, mesh1: Any) -> None:
    with pytest.raises(InputError, match="accumulate=4 changes the loss: a full batch has"):
        assemble(change(loss=loss, accumulate=4), mesh1)


@pytest.mark.full(
    "tests/program/test_check_contract.py::test_microbatches_weigh_as_much_as_their_loss_counts"
)
def test_a_term_of_the_loss_that_every_microbatch_has_is_legal_with_accumulate(mesh1: Any) -> None:
    def loss(outputs: Any, batch: Any) -> Any:
        mean = Mean.of(*_error(outputs, batch))
        return mean.total / jnp.maximum(mean.count, 1) + 0.5, {"loss": mean}

    whole, parts = (first_update(change(loss=loss, accumulate=n), mesh1) for n in (1, 4))
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_the_trial_of_a_loss_has_few_examples_where_outputs_are_large() -> None:
    for shape, rows in (((4, 10), 6), ((4, 1024, 50_257), 1), ((4, 1024, 65), 6), ((4, 512, 512), 4)):
        outputs = {"logits": jax.ShapeDtypeStruct(shape, jnp.float32)}
        assert check_contract._microbatch(change(accumulate=4), outputs) == rows


def test_stages_have_the_positions_of_the_examples_from_init_on(mesh1: Any) -> None:
    def shift(batch: Any, key: Any) -> Any:
        return {**batch, "x": batch["x"] + batch["example_id"][:, None]}

    shifted = Arrays({**RAGGED.fields, "x": X + np.arange(24, dtype=np.float32)[:, None]})
    wanted = first_update(change(train=shifted), mesh1)
    np.testing.assert_allclose(first_update(change(preprocess=(shift,)), mesh1), wanted, rtol=1e-5)


def forgetful(*args: Any, **options: Any) -> Any:
    """A step factory of one's own, whose step returns the parameters in another dtype."""
    step = make_train_step(*args, **options)

    def other(state: Any, batch: Any, key: Any) -> Any:
        state, metrics = step(state, batch, key)
        return state.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)), metrics

    return other


def test_the_step_of_any_factory_must_keep_the_state(mesh1: Any) -> None:
    says = r"an update changes the state's params/w from float32\[4, 4\] to bfloat16"
    with pytest.raises(InputError, match=says):
        assemble(change(step_factory=forgetful), mesh1)
    with pytest.raises(InputError, match=r"step_factory makes must return .state, metrics."):
        assemble(change(step_factory=lambda *args: lambda state, batch, key: state), mesh1)
    bare = change(step_factory=lambda *args: lambda state, batch, key: (state, {"loss": jnp.ones(())}))
    with pytest.raises(InputError, match=r"step_factory makes returns the metric 'loss' as a bare"):
        assemble(bare, mesh1)


def plain(model: Any, loss: Any, tx: Any, prepare: Any, post_update: Any) -> Any:
    """A step factory without options."""
    return make_train_step(model, loss, tx, prepare, post_update)


def test_a_factory_without_the_arguments_that_an_experiment_needs_is_refused(mesh1: Any) -> None:
    assemble(change(step_factory=plain), mesh1).close()
    says = r"calls plain\(.*, accumulate=, unroll=\), .* unexpected keyword argument 'accumulate'; give"
    with pytest.raises(InputError, match=says):
        assemble(change(step_factory=plain, accumulate=2), mesh1)


@pytest.mark.parametrize("name", ["ema", "masks", "lookahead", "loss_scale"])
def test_statistics_with_a_name_of_the_state_are_refused(name: str, mesh1: Any) -> None:
    init, apply = SQUARE
    model = (lambda key, batch: (init(key, batch)[0], {name: jnp.ones(2)}), apply)
    with pytest.raises(InputError, match=f"^the model's collection '{name}' has a name that the state uses"):
        assemble(change(model=model), mesh1)


class Named(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(4)(x) + self.variable("ema", "shift", jnp.zeros, (1, 4)).value


def test_a_linen_collection_with_a_name_of_the_state_is_refused(mesh1: Any) -> None:
    with pytest.raises(
        InputError, match=r"^the model's collection 'ema' has a name that the state uses: rename"
    ):
        assemble(change(model=Named()), mesh1)


THREE = (
    lambda key, batch: ({"w": jnp.ones((4, 3))}, {}),
    lambda params, extra, batch, *, train, key: (batch["x"] @ params["w"], extra),
)


@dataclasses.dataclass(frozen=True)
class Shift:
    """Labels 1.. to 0.., or by another number."""

    by: int = 1

    def __call__(self, batch: Any, key: Any) -> Any:
        return {**batch, "label": batch["label"] - self.by}


@dataclasses.dataclass(frozen=True)
class FromImage:
    def __call__(self, batch: Any, key: Any) -> Any:
        return {"x": batch["x"], "label": (batch["x"][:, 0] > 0).astype(jnp.int32)}


@dataclasses.dataclass(frozen=True)
class Stream:
    arrays: Arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def gather(self, ids: Any) -> Any:
        return self.arrays.gather(ids)


def classify(*stages: Any, **changes: Any) -> Experiment:
    return change(model=THREE, loss=CrossEntropy(), preprocess=stages, batch=8, **changes)


def test_labels_are_checked_as_the_model_gets_them(mesh1: Any) -> None:
    with pytest.raises(InputError, match="train: label 3 of example 2 in field 'label' is outside"):
        assemble(classify(), mesh1)
    with pytest.raises(InputError, match=r"train: label -1 of example 0 .*, also in example 3, 6"):
        assemble(classify(Shift(2)), mesh1)
    with pytest.raises(InputError, match="label -1 of example"):
        assemble(classify(Shift(2), train=Stream(RAGGED), placement="stream"), mesh1)
    for source in (RAGGED, Stream(RAGGED)):
        program = assemble(classify(Shift(), train=source, test=source, placement="stream"), mesh1)
        program.train.batch(1)
        assert bad_examples.locate(program, 1) == []  # the raw label 3 is no fault
        program.close()
    label = np.where(np.arange(24) == 7, 9, RAGGED.fields["label"])
    program = assemble(
        classify(Shift(), train=Stream(Arrays({**RAGGED.fields, "label": label})), placement="stream"), mesh1
    )
    (found,) = [one for step in range(program.steps) for one in bad_examples.locate(program, step + 1)]
    assert found.examples.tolist() == [7] and "is 8, no class of 0..2, after" in found.text
    program.close()


def test_labels_that_a_stage_makes_are_legal_and_missing_ones_are_not(mesh1: Any) -> None:
    images = Arrays({"x": X})
    assemble(classify(FromImage(), train=images, test=images), mesh1).close()
    with pytest.raises(InputError, match="CrossEntropy needs the batch field 'label'; the batch has"):
        assemble(classify(train=images, test=images), mesh1)


@dataclasses.dataclass(frozen=True)
class Guess:
    """Makes a label from the image in training, as self-supervision does, or spoils a part of the labels."""

    spoil: int = 0

    def __call__(self, batch: Any, key: Any) -> Any:
        label = batch["label"] + self.spoil if self.spoil else (batch["x"][:, 0] > 0).astype(jnp.int32)
        return {**batch, "label": label}


def test_a_label_that_augmentation_makes_is_left_to_the_guard(mesh1: Any) -> None:
    bad, good = (Arrays({"x": X, "label": np.full(24, n, np.int32)}) for n in (9, 1))
    assemble(classify(train=bad, test=good, augment=(Guess(),)), mesh1).close()
    with pytest.raises(InputError, match="test: label 9 of example 0"):
        assemble(classify(train=bad, test=bad, augment=(Guess(),)), mesh1)
    program = assemble(classify(train=good, test=good, augment=(Guess(spoil=40),)), mesh1)
    (found,) = bad_examples.locate(program, 1)
    assert found.stage and "is 41, no class" in found.text


def test_values_in_memory_are_checked_in_full_in_chunks(mesh1: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("jaxtrain.program.prepared.CHUNK", 40)
    label = np.ones(24, np.int32)
    label[23] = 5
    with pytest.raises(InputError, match="label 4 of example 23 in field 'label' is outside"):
        assemble(classify(Shift(), train=Arrays({**RAGGED.fields, "label": label})), mesh1)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    made: Any

    def build(self, steps: int) -> Any:
        if isinstance(self.made, Exception):
            raise self.made
        return self.made


def pair(init: Any, apply: Any = lambda params, extra, batch, **_: (batch["x"], extra)) -> dict[str, Any]:
    return {"model": (init, apply)}


REFUSED = {
    "optimizer fails": (
        {"optimizer": Optimizer(KeyError("lr"))},
        r"Optimizer.build\(1\) failed: KeyError: 'lr'",
    ),
    "no optimizer": ({"optimizer": Optimizer(0.1)}, "returns a float: return an Optax transformation"),
    "init": (
        pair(lambda key, batch: jnp.ones(3)),
        "init returns a .*: return .params, extra.",
    ),
    "apply": (
        pair(SQUARE[0], lambda params, extra, batch, **_: batch["x"]),
        "apply returns a .*: return .outputs, extra.",
    ),
    "no outputs": (
        pair(SQUARE[0], lambda params, extra, batch, **_: (None, extra)),
        "the model returns nothing",
    ),
    "one path": (
        pair(lambda key, batch: ({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {})),
        "path params/a/b",
    ),
    "inside": (
        pair(lambda key, batch: ({"a/b": jnp.ones(1), "a": jnp.ones(1)}, {})),
        "an array at params/a and another at params/a/b",
    ),
    "surrogate": (pair(lambda key, batch: ({"w\ud800": jnp.ones(1)}, {})), r"params/w\\ud800.*valid UTF-8"),
    "integer": (
        pair(lambda key, batch: ({"w": jnp.ones((4, 4)), "n": jnp.arange(3)}, {})),
        "the parameter n is",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_keep_its_contract_is_refused(name: str, mesh1: Any) -> None:
    changes, says = REFUSED[name]
    with pytest.raises(InputError, match=says):
        assemble(change(**changes), mesh1)


def test_an_optimizer_of_optax_is_no_subclass_of_anything(mesh1: Any) -> None:
    assemble(
        change(optimizer=Optimizer(optax.chain(optax.scale_by_adam(), optax.scale(-1.0)))), mesh1
    ).close()
    assert jax.tree.leaves(assemble(change(), mesh1).abstract_state.params)[0].shape == (4, 4)
