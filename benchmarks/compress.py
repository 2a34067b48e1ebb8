"""What distillation and pruning do to test accuracy, with loops of ``make_train_step`` on two CPU cores.

``distil``: small students on MNIST, alone and with ``compress.Distil`` of a larger teacher. ``prune``: an MLP
on the digits of scikit-learn, dense and with ``compress.Prune``. No setting was chosen on the test sets:
temperature, alpha, start, end and rounds are the defaults. The student with 5,000 images was chosen on the
last 10,000 training images, after one with all of them had gained nothing.

  python -m benchmarks.compress PART [--seeds N] [--out FILE]      PART is distil or prune

MNIST is read from the four idx files in ``$JAXTRAIN_TEST_DATA/mnist`` (default ``../shared/data/mnist``).
"""

from __future__ import annotations

import argparse
import gzip
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from jaxtrain import compress, data, losses, models, optim
from jaxtrain.core.types import State
from jaxtrain.models import as_model
from jaxtrain.step import make_init, make_train_step, scan_steps

FOLDER = Path(os.environ.get("JAXTRAIN_TEST_DATA", "../shared/data"), "mnist")
SPARSITIES = (0.5, 0.8, 0.9)
Fields = dict[str, np.ndarray]


def mnist(split: str) -> Fields:
    """Return images ``float32 [n, 28, 28]``, normalised, and labels of ``train`` or ``t10k``."""

    def read(kind: str, header: int) -> np.ndarray:
        return np.frombuffer(
            gzip.decompress((FOLDER / f"{split}-{kind}-ubyte.gz").read_bytes())[header:], np.uint8
        )

    image = (read("images-idx3", 16).reshape(-1, 28, 28) / np.float32(255) - 0.1307) / 0.3081
    return {"image": image.astype(np.float32), "label": read("labels-idx1", 8).astype(np.int32)}


def digits(split: str) -> Fields:
    """Return images ``float32 [n, 8, 8, 1]`` in [0, 1] and labels."""
    source = data.Digits(split)
    fields = source.gather(np.arange(len(source)))
    scale = np.float32(fields["image"].max())
    return {"image": fields["image"].astype(np.float32) / scale, "label": fields["label"].astype(np.int32)}


def train(
    model: Any,
    train_set: Fields,
    test_set: Fields,
    seeds: Sequence[int],
    epochs: int,
    batch: int,
    loss: Any = None,
    post_update: Sequence[Any] = (),
    extra: dict[str, Any] | None = None,
) -> tuple[list[float], list[State]]:
    """Train ``model`` once for each seed; return test accuracies in percent, and the last states."""
    n = len(train_set["label"])
    steps = epochs * (n // batch)
    tx = optim.Adam(lr=optim.OneCycle(peak=4e-3)).build(steps)
    stages = [stage.build(steps) for stage in post_update]
    step = make_train_step(model, loss or losses.CrossEntropy(), tx, post_update=stages)
    update = jax.jit(scan_steps(step), donate_argnums=0)
    init = jax.jit(make_init(model, tx, post_update=stages))
    arrays = {name: jnp.asarray(array) for name, array in train_set.items()}

    @jax.jit
    def correct(state: State, fields: Any) -> jax.Array:
        outputs, _ = as_model(model).apply(state.params, {}, fields, train=False, key=None)
        return (outputs.argmax(-1) == fields["label"]).mean()

    accuracies, states = [], []
    for seed in seeds:
        order = data.Order(seed, n, batch, drop_remainder=True)
        state = init(jax.random.key(seed), {name: array[:batch] for name, array in arrays.items()})
        state = state.replace(extra={**state.extra, **jax.tree.map(jnp.copy, extra or {})})
        for start in range(0, steps, n // batch):  # an epoch in one call
            ids = np.stack([order.indices(start + number) for number in range(n // batch)])
            state, _ = update(state, {k: x[ids] for k, x in arrays.items()}, jax.random.key(seed))
        accuracies.append(100 * float(correct(state, test_set)))
        states.append(state)
    return accuracies, states


def summary(name: str, values: list[float], **more: Any) -> dict[str, Any]:
    """Return a row of the table: mean and sample standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    row = {"name": name, "unit": "%", "mean": statistics.mean(values), "std": spread, "n": len(values)}
    print(name, [round(value, 2) for value in values], f"mean {row['mean']:.2f}", more or "", flush=True)
    return {**row, "values": values, **more}


def distil(seeds: int) -> list[dict[str, Any]]:
    """Train the teacher, and students alone and with it."""
    train_set, test_set = mnist("train"), mnist("t10k")
    teacher = models.MLP(widths=(512, 512), classes=10, dropout=0.3)
    values, (state,) = train(teacher, train_set, test_set, [100], epochs=8, batch=512)
    rows = [summary("teacher: MLP 512-512, dropout 0.3, 60,000 images, 8 epochs", values)]
    held = {"teacher": {"params": state.params, "extra": {}}}
    for width, examples, epochs, batch in ((64, 5_000, 20, 128), (16, 60_000, 8, 512)):
        student = models.MLP(widths=(width,), classes=10)
        part = {field: array[:examples] for field, array in train_set.items()}
        settings = (part, test_set, range(seeds), epochs, batch)
        name = f"student: MLP {width}, {examples:,} images, {epochs} epochs"
        values, _ = train(student, *settings)
        rows.append(summary(f"{name}, alone", values))
        values, _ = train(compress.with_teacher(student, teacher), *settings, compress.Distil(), extra=held)
        rows.append(summary(f"{name}, distilled, T=4, alpha=0.5", values))
    return rows


def prune(seeds: int) -> list[dict[str, Any]]:
    """Train an MLP dense and pruned."""
    train_set, test_set = digits("train"), digits("test")
    stages: dict[str, tuple[Any, ...]] = {"dense": ()}
    stages |= {f"{100 * part:g} % zeros": (compress.Prune(sparsity=part),) for part in SPARSITIES}
    stages["2:4"] = (compress.Prune(pattern="2:4"),)
    rows = []
    for name, stage in stages.items():
        model = models.MLP(widths=(128, 64), classes=10)
        values, states = train(model, train_set, test_set, range(seeds), 40, 128, post_update=stage)
        zeros = [compress.sparsity(state).get("total", 0.0) for state in states]
        assert len(set(zeros)) == 1
        rows.append(summary(f"MLP 128-64, 40 epochs, {name}", values, sparsity=zeros[0]))
    return rows


def main() -> None:
    """Run one part and write its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("distil", "prune"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON there")
    args = parser.parse_args()
    began = time.perf_counter()
    rows = (distil if args.part == "distil" else prune)(args.seeds)
    common.finish(args, "compress", rows, {"seconds": time.perf_counter() - began})


if __name__ == "__main__":
    main()
