"""What distillation and pruning do to the test accuracy of MLPs on MNIST.

``distil``: a small student alone, and the same student with ``compress.Distil`` of a larger teacher, for
several seeds. ``prune``: an MLP without pruning and with ``compress.Prune``. No setting was chosen on the
test set: temperature and alpha, start and end are the defaults.

  python -m benchmarks.compress PART [--seeds N] [--out FILE]      PART is distil or prune

It reads the four idx files in ``$JAXTRAIN_TEST_DATA/mnist`` (default ``../shared/data/mnist``). As a file
with an ``EXPERIMENT`` it is also the teacher's, which is why ``compress.Distil`` names it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import jaxtrain
from jaxtrain import compress, data, losses, models, monitor, optim

FOLDER = Path(os.environ.get("JAXTRAIN_TEST_DATA", "../shared/data"), "mnist")
SPARSITIES = (0.5, 0.8, 0.9)


def mnist(split: str) -> data.Arrays:
    """Return the images ``uint8 [n, 28, 28, 1]`` and labels of ``train`` or ``t10k``."""

    def read(kind: str, header: int) -> np.ndarray:
        return np.frombuffer(
            gzip.decompress((FOLDER / f"{split}-{kind}-ubyte.gz").read_bytes())[header:], np.uint8
        )

    return data.Arrays(
        {
            "image": read("images-idx3", 16).reshape(-1, 28, 28, 1),
            "label": read("labels-idx1", 8).astype(np.int32),
        }
    )


def experiment(*widths: int, epochs: float, **changes: Any) -> jaxtrain.Experiment:
    """Return an MLP on MNIST."""
    settings: dict[str, Any] = {
        "model": models.MLP(widths=widths, classes=10),
        "train": mnist("train"),
        "test": mnist("t10k"),
        "loss": losses.CrossEntropy(),
        "optimizer": optim.Adam(lr=optim.OneCycle(peak=4e-3)),
        "preprocess": (data.Normalise(mean=(0.1307,), std=(0.3081,)),),
        "batch": 512,
        "epochs": epochs,
        "eval_every": None,
        "save_every": epochs,
        "log_every": 1000,
    }
    return jaxtrain.Experiment(**(settings | changes))


EXPERIMENT = dataclasses.replace(
    experiment(512, 512, epochs=8, augment=(data.Crop(pad=2),)),
    model=models.MLP(widths=(512, 512), classes=10, dropout=0.2),
)


def accuracy(exp: jaxtrain.Experiment, folder: Path) -> tuple[float, dict[str, Any]]:
    """Train; return the test accuracy of the last step in percent, and the run's result."""
    result = jaxtrain.fit(exp, folder=folder, mesh="data=1", console=monitor.make_console(quiet=True))
    return 100 * result["test"]["accuracy"], result


def summary(name: str, values: list[float], **more: Any) -> dict[str, Any]:
    """Return a row of the table: mean and sample standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    row = {"name": name, "unit": "%", "mean": statistics.mean(values), "std": spread, "n": len(values)}
    print(
        name, " ".join(f"{value:.2f}" for value in values), f"mean {row['mean']:.2f}", more or "", flush=True
    )
    return {**row, "values": values, **more}


def distil(seeds: int, folder: Path) -> list[dict[str, Any]]:
    """Train the teacher, and students alone and with it."""
    value, _ = accuracy(EXPERIMENT, folder / "teacher")
    rows = [summary("teacher: MLP 512-512, dropout 0.2, shifted images, 8 epochs", [value])]
    loss = compress.Distil(teacher=str(folder / "teacher"), teacher_experiment=str(Path(__file__).resolve()))
    for width in (16, 32):
        for name, own in (("alone", losses.CrossEntropy()), ("distilled, T=4, alpha=0.5", loss)):
            values = [
                accuracy(
                    experiment(width, epochs=8, loss=own, seed=seed), folder / f"{width}-{name[:5]}-{seed}"
                )[0]
                for seed in range(seeds)
            ]
            rows.append(summary(f"student: MLP {width}, 8 epochs, {name}", values))
    return rows


def prune(seeds: int, folder: Path) -> list[dict[str, Any]]:
    """Train an MLP dense and pruned."""
    stages: dict[str, tuple[Any, ...]] = {"dense": ()}
    stages |= {f"{100 * part:g} % zeros": (compress.Prune(sparsity=part),) for part in SPARSITIES}
    stages["2:4"] = (compress.Prune(pattern="2:4"),)
    rows = []
    for name, stage in stages.items():
        values, sparsity = [], 0.0
        for seed in range(seeds):
            exp = experiment(300, 100, epochs=8, post_update=stage, seed=seed)
            value, result = accuracy(exp, folder / f"{name}-{seed}")
            values.append(value)
            sparsity = result.get("sparsity", {}).get("total", 0.0)
        rows.append(summary(f"MLP 300-100, 8 epochs, {name}", values, sparsity=sparsity))
    return rows


def main() -> None:
    """Run one part and write its table."""
    from benchmarks import common

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("distil", "prune"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON there")
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = (distil if args.part == "distil" else prune)(args.seeds, Path(folder))
    common.finish(args, "compress", rows, {"seconds": time.perf_counter() - began})


if __name__ == "__main__":
    main()
