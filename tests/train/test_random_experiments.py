"""Random small experiments: evaluation equals NumPy, resume is bitwise, and errors are one line.

The nightly tier draws new experiments for as many examples as ``JAXTRAIN_RANDOM_EXPERIMENTS`` says; the
full tier draws the same few each time.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TIER
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

import jaxtrain
from jaxtrain import checkpoint, data, losses, models, optim, sharding
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.signals import Stopped
from jaxtrain.metrics import Mean
from jaxtrain.models import as_model
from jaxtrain.program import assemble
from jaxtrain.step.factories import eval_state
from jaxtrain.train.dispatch import Dispatch

EXAMPLES = int(os.environ.get("JAXTRAIN_RANDOM_EXPERIMENTS", {"full": 10, "nightly": 300}.get(TIER, 1)))
OPTIMIZERS = (optim.SGD(lr=0.1, momentum=0.9), optim.Adam(lr=optim.OneCycle(peak=1e-2)))
KINDS = ("classify", "regress", "own loss", "tokens", "ignored labels", "binary")
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 3e-2}


@dataclasses.dataclass(frozen=True)
class MeanAbsolute:
    """A user's own loss, which reads the mask and names its metrics as it likes."""

    def __call__(self, outputs, batch):
        error = jnp.abs(outputs.astype(jnp.float32)[:, 0] - batch["target"][:, 0])
        mean = Mean.of(error, batch.get("mask"))
        return mean.total / jnp.maximum(mean.count, 1), {
            "loss": mean,
            "rows": Mean.of(error * 0 + 1, batch.get("mask")),
        }


@dataclasses.dataclass(frozen=True)
class Case:
    """The drawn settings of one experiment."""

    kind: str
    rows: tuple[int, int]  # of train and test
    fields: dict[str, Any]
    devices: int
    stop: float  # where the second run is stopped, as a part of the first one's steps


def examples_of(kind: str, rows: int, seed: int) -> data.Arrays:
    """Random examples of a classification, a regression or a language model."""
    rng = np.random.default_rng((seed, rows))
    if kind == "classify":
        image = rng.integers(0, 255, (rows, 3, 3, 1)).astype(np.uint8)
        return data.Arrays({"image": image, "label": rng.integers(0, 4, rows)})
    if kind == "ignored labels":
        image = rng.normal(size=(rows, 3, 3, 1)).astype(np.float32)
        return data.Arrays({"image": image, "label": rng.integers(-1, 4, rows)})
    if kind == "binary":
        image = rng.normal(size=(rows, 3, 3, 1)).astype(np.float32)
        return data.Arrays({"image": image, "label": (image.sum((1, 2, 3)) > 0).astype(np.uint8)})
    if kind == "tokens":
        tokens = rng.integers(0, 7, (rows, 6)).astype(np.uint8)
        return data.Arrays({"tokens": tokens[:, :-1], "label": tokens[:, 1:].copy()})
    features = rng.normal(size=(rows, 3, 3, 1)).astype(np.float32)
    return data.Arrays({"image": features, "target": features.sum((1, 2, 3), keepdims=True)[..., 0, 0]})


def experiment_of(case: Case) -> jaxtrain.Experiment:
    """Build the experiment of ``case``."""
    model, loss = {
        "classify": (models.MLP(widths=(4,), classes=4), losses.CrossEntropy()),
        "ignored labels": (models.MLP(widths=(4,), classes=4), losses.CrossEntropy(ignore=-1)),
        "binary": (models.MLP(widths=(4,), classes=1), losses.BinaryCrossEntropy()),
        "regress": (models.MLP(widths=(4,), classes=1), losses.MSE()),
        "own loss": (models.MLP(widths=(4,), classes=1), MeanAbsolute()),
        "tokens": (models.GPT(vocab=7, context=5, width=4, depth=1, heads=2), losses.CrossEntropy()),
    }[case.kind]
    train, test = (examples_of(case.kind, n, seed) for seed, n in enumerate(case.rows))
    return jaxtrain.Experiment(model=model, train=train, test=test, loss=loss, log_every=1, **case.fields)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw settings, some of which are refused: a batch that does not divide, more held out than there is."""
    devices, accumulate = draw(st.sampled_from([1, 8])), draw(st.sampled_from([1, 1, 2, 3]))
    even = devices * accumulate
    batch = draw(st.sampled_from([even, even, 2 * even, 3 * even, 5]))
    fields = {
        "batch": batch,
        "epochs": draw(st.sampled_from([0.5, 1, 2.3])),
        "accumulate": accumulate,
        "eval_batch": draw(st.sampled_from([None, None, devices, 2 * devices, 3])),
        "precision": draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"])),
        "placement": draw(st.sampled_from(["auto", "stream"])),
        "holdout": draw(st.sampled_from([0, 0, 1, 0.3])),
        "select": "-loss",
        "drop_remainder": draw(st.booleans()),
        "guard": draw(st.sampled_from(["stop", "skip", "off"])),
        "post_update": draw(st.sampled_from([(), (optim.EMA(decay=0.9),)])),
        "optimizer": draw(st.sampled_from(OPTIMIZERS)),
        "seed": draw(st.integers(0, 3)),
        "save_every": draw(st.sampled_from([0.3, 1])),
    }  # fmt: skip
    rows = (
        draw(st.integers(1, 2 * batch + 1) | st.integers(batch, 2 * batch + 1)),
        draw(st.integers(1, batch + 1)),
    )
    kind = draw(st.sampled_from(KINDS))
    return Case(kind, rows, fields, devices, draw(st.floats(0, 1)))


def numpy_metrics(kind: str, outputs: np.ndarray, fields: dict[str, np.ndarray]) -> dict[str, float]:
    """The metrics of all examples at once, in float64."""
    outputs = outputs.astype(np.float64)
    if kind == "binary":
        logit, label = outputs[:, 0], fields["label"]
        loss = np.logaddexp(0, logit) - label * logit
        return {"loss": loss.mean(), "accuracy": ((logit > 0) == label).mean()}
    if kind in ("classify", "tokens", "ignored labels"):
        label = fields["label"]
        outputs, label = outputs[label >= 0], label[label >= 0]
        log_sum = np.log(np.exp(outputs - outputs.max(-1, keepdims=True)).sum(-1)) + outputs.max(-1)
        loss = log_sum - np.take_along_axis(outputs, label[..., None].astype(int), -1)[..., 0]
        return {"loss": loss.mean(), "accuracy": (outputs.argmax(-1) == label).mean()}
    error = outputs - fields["target"]
    return {"loss": (error**2).mean() if kind == "regress" else np.abs(error).mean()}


def run(case: Case, folder: Path, mesh: Any, stop_at: int | None = None) -> dict[str, Any]:
    """``jaxtrain.fit``, stopped by SIGINT in update ``stop_at`` where one is given."""
    with pytest.MonkeyPatch.context() as patch:
        dispatch = Dispatch.__call__

        def call(self, state, step, count):
            if stop_at is not None and step < stop_at <= step + count:
                os.kill(os.getpid(), signal.SIGINT)
            return dispatch(self, state, step, count)

        patch.setattr(Dispatch, "__call__", call)
        return jaxtrain.fit(experiment_of(case), folder=folder, mesh=mesh)


def restore(case: Case, folder: Path, mesh: Any) -> Any:
    """The state of the last checkpoint, on the host."""
    program = assemble(experiment_of(case), mesh)
    try:
        with checkpoint.open(folder) as saved:
            return jax.device_get(saved.restore(saved.latest(), program.abstract_state))
    finally:
        program.close()


def check_evaluation(case: Case, result: dict[str, Any], state: Any) -> None:
    """Compare the result's metrics with NumPy's, from the outputs for all test examples in one batch."""
    fields = examples_of(case.kind, case.rows[1], 1).fields
    params, extra = eval_state(state)
    model = as_model(experiment_of(case).model)
    batch = {name: jnp.asarray(array) for name, array in fields.items()}
    outputs = model.apply(params, extra, batch, train=False, key=None)[0]
    tolerance = TOLERANCE[case.fields["precision"]]
    for name, value in numpy_metrics(case.kind, np.asarray(outputs), fields).items():
        if name == "accuracy" and tolerance > 1e-3:
            continue  # ties are broken by rounding
        found = np.nan if result["test"][name] is None else result["test"][name]
        np.testing.assert_allclose(found, value, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.full(
    "tests/program/test_exact_evaluation.py",
    "tests/train/test_loop.py::test_stop_and_resume_is_bitwise_the_straight_run",
    "tests/losses/test_losses.py",
)
@settings(
    max_examples=EXAMPLES,
    derandomize=TIER != "nightly",
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking trains hundreds more
    suppress_health_check=list(HealthCheck),
)
@given(case=cases())
def test_a_random_experiment_is_exact_or_refused_in_one_line(case, capsys):
    mesh = sharding.make_mesh(jax.devices()[: case.devices])
    with tempfile.TemporaryDirectory() as name:
        straight, cut = Path(name, "straight"), Path(name, "cut")
        try:
            result = run(case, straight, mesh)
        except (InputError, RunError) as error:
            assert str(error) and "\n" not in str(error), case
            assert not (straight / "result.json").exists()
            event("refused: " + " ".join(word for word in str(error).split() if word.isalpha())[:60])
            return
        event(f"trained on {case.devices}, {case.kind}")
        state = restore(case, straight, mesh)
        check_evaluation(case, result, state)
        stop_at = 1 + int(case.stop * (result["steps"] - 1))
        try:
            run(case, cut, mesh, stop_at)
        except Stopped:
            resumed = run(case, cut, mesh)
            assert str(resumed["test"]) == str(result["test"])  # as text, in which NaN equals NaN
            event(f"stopped and resumed, {case.kind}")
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restore(case, cut, mesh)), strict=True):
            np.testing.assert_array_equal(a, b)
        capsys.readouterr()
