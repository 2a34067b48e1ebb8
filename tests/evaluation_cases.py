"""Evaluations with test sets of awkward sizes, and their exact results by NumPy, on one or two processes.

test_exact_evaluation.py also runs this file as a program, in each of two processes.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain import data, losses, models, optim, sharding
from jaxtrain.cli import devices
from jaxtrain.core.types import Model, leaf_paths
from jaxtrain.experiment import Experiment
from jaxtrain.metrics import ConfusionMatrix
from jaxtrain.metrics.rows import Rows
from jaxtrain.monitor.console import Plain
from jaxtrain.program import Program, assemble
from jaxtrain.sharding import multihost
from jaxtrain.train.loop import evaluate

BATCH = 16
SIZES = (1, BATCH - 1, BATCH, BATCH + 1)
KINDS = ("images", "sequences", "regression")
TOGETHER = [
    *(("images", n, "stream") for n in SIZES),
    ("images", BATCH + 1, "device"),
    *((kind, BATCH + 1, "device") for kind in KINDS[1:]),
]
"""The cases that two processes evaluate."""
CLASSES, TOKENS, STEPS, SMOOTHING = 4, 5, 6, 0.1
RELATIVE = 40 * 2**-24
"""Relative tolerance of a mean; see ``check``."""
FAR = 30.0
"""Factor of the inputs of example 0, with copies of which the last batch is padded."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ids(Rows):
    """The example ids of an evaluation, in its order."""

    def compute(self) -> Any:
        return super().compute()["id"]


def count_classes(outputs: Any, batch: Any) -> dict[str, Any]:
    """Return two extra metrics, counts and example ids, for models with classes."""
    if "label" not in batch:
        return {}
    return {
        "counts": ConfusionMatrix.of(outputs, batch["label"], batch.get("mask")),
        "ids": Ids.of({"id": batch["example_id"]}, batch["mask"]),
    }


def fields(kind: str, n: int) -> dict[str, np.ndarray]:
    """Return ``n`` raw examples; image class 3 and sequence token 4 occur only in example 0."""
    rng = np.random.default_rng(n)
    if kind == "sequences":
        tokens = rng.integers(0, TOKENS - 1, (n, STEPS + 1)).astype(np.int32)
        tokens[0] = TOKENS - 1
        return {"tokens": tokens[:, :-1], "label": tokens[:, 1:]}
    image = rng.normal(size=(n, 2, 3, 1)).astype(np.float32)
    image[0] *= FAR
    if kind == "regression":
        return {"image": image, "target": rng.normal(size=(n, 2)).astype(np.float32)}
    label = rng.integers(0, CLASSES - 1, n).astype(np.int32)
    label[0] = CLASSES - 1
    return {"image": image, "label": label}


def bigram() -> Model:
    """Return a bigram table of logits, as an ``(init, apply)`` pair."""

    def init(key: Any, batch: Any) -> Any:
        return {"table": 2 * jax.random.normal(key, (TOKENS, TOKENS))}, {}

    def apply(params: Any, extra: Any, batch: Any, *, train: bool, key: Any) -> Any:
        return jnp.take(params["table"], batch["tokens"], axis=0), extra

    return Model(init, apply)


def experiment(kind: str, n: int, placement: str) -> Experiment:
    """Return an experiment with ``n`` test examples of this kind."""
    model, loss = {
        "images": (models.MLP(widths=(8,), classes=CLASSES), losses.CrossEntropy(SMOOTHING, top=2)),
        "sequences": (bigram(), losses.CrossEntropy()),
        "regression": (models.MLP(widths=(8,), classes=2), losses.MSE()),
    }[kind]
    return Experiment(
        model=model,
        train=data.Arrays(fields(kind, BATCH)),
        test=data.Arrays(fields(kind, n)),
        loss=loss,
        optimizer=optim.SGD(lr=0.1),
        batch=BATCH,
        epochs=1,
        placement=placement,
    )


def make(kind: str, n: int, mesh: Any, placement: str) -> Program:
    """Return the program of a case on a mesh."""
    return assemble(experiment(kind, n, placement), mesh, count_classes)


def run_evaluation(program: Program, state: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluate ``state``, by default that of step 0; return the results and its parameters by path."""
    state = program.init() if state is None else state
    try:
        values = evaluate(program, state, "test", Plain())
        return values, {path: np.asarray(leaf) for path, leaf in leaf_paths(state.params).items()}
    finally:
        program.close()


def expected(kind: str, given: dict[str, np.ndarray], params: dict[str, Any]) -> dict[str, Any]:
    """Return the same results by NumPy in float64, over exactly the given examples."""
    n = len(next(iter(given.values())))
    params = {path: np.float64(leaf) for path, leaf in params.items()}
    if kind == "sequences":
        logits = params["table"][given["tokens"]]
    else:
        hidden = given["image"].reshape(n, -1) @ params["dense0/kernel"] + params["dense0/bias"]
        logits = np.maximum(hidden, 0) @ params["head/kernel"] + params["head/bias"]
    if kind == "regression":
        error = logits - given["target"]
        mse = (error**2).mean()
        return {"loss": mse, "mae": np.abs(error).mean(), "rmse": np.sqrt(mse)}
    logits, label = logits.reshape(-1, logits.shape[-1]), given["label"].reshape(-1)
    highest = logits.max(-1, keepdims=True)
    logp = logits - highest - np.log(np.exp(logits - highest).sum(-1, keepdims=True))
    nll = -logp[np.arange(len(label)), label]
    counts = np.zeros((logits.shape[-1],) * 2, np.int64)
    for truth, guess in zip(label, logits.argmax(-1), strict=True):
        counts[truth, guess] += 1
    if kind == "sequences":
        accuracy = np.trace(counts) / len(label)
        return {"loss": nll.mean(), "accuracy": accuracy, "counts": counts, "ids": np.arange(n)}
    better = (logits > logits[np.arange(n), label][:, None]).sum(-1)
    return {
        "loss": nll.mean(),
        "smoothed_loss": ((1 - SMOOTHING) * nll - SMOOTHING * logp.mean(-1)).mean(),
        "accuracy": np.trace(counts) / n,
        "top2": (better < 2).sum() / n,
        "counts": counts,
        "ids": np.arange(n),
    }


def check(kind: str, n: int, values: dict[str, Any], params: Any) -> None:
    """Compare with NumPy: counts and ratios of counts exactly, means of floats to float32 precision.

    The device works in float32: a figure has gone through some 40 roundings (dot products of 6 and 8, a
    softmax of 4, a sum of at most 32), each by at most 2^-24 of what it rounds, and every sum is of numbers
    of one sign. One example too many or too few moves it by far more: ``test_cases_detect_a_wrong_mask``.
    """
    want = expected(kind, fields(kind, n), params)
    assert sorted(values) == sorted(want)
    for name, value in want.items():
        if name in ("counts", "ids"):
            np.testing.assert_array_equal(values[name], value)
        elif name in ("loss", "smoothed_loss", "mae", "rmse"):
            np.testing.assert_allclose(values[name], value, rtol=RELATIVE, err_msg=name)
        else:
            assert values[name] == value, name


def main() -> None:
    port, index, folder = sys.argv[1:]
    devices.simulate_devices(4)
    multihost.start(f"127.0.0.1:{port}", 2, int(index), warn=print)
    mesh = sharding.make_mesh(jax.devices())
    states: dict[str, Any] = {}
    for kind, n, placement in TOGETHER:
        program = make(kind, n, mesh, placement)
        states[kind] = states[kind] if kind in states else program.init()
        values, params = run_evaluation(program, states[kind])
        if multihost.is_process_0():
            parts = {"values": values, "params": params}
            flat = {f"{part}/{name}": value for part, tree in parts.items() for name, value in tree.items()}
            np.savez(Path(folder) / f"{kind}-{n}-{placement}.npz", **flat)
    multihost.barrier("end")


if __name__ == "__main__":
    main()
