"""The program of ``mnist_dropout_cnn`` in PyTorch, for an accuracy to hold ours against.

python -m benchmarks.peers.torch_mnist [--seeds 0 1 2] [--epochs 10] [--out FILE]

The same network, data, optimizer, batch and epochs, with PyTorch's own initialisation and order. Needs MNIST
prepared (``python -m jaxtrain prepare mnist``) and ``pip install torch``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import environment
from jaxtrain.data import TFDS

BATCH = 64


def main() -> None:
    """Run the seeds one after the other; the file is written after each of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    record: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.peers.torch_mnist", *sys.argv[1:]]),
        **environment(),
        "runs": [],
    }
    for seed in args.seeds:
        record["runs"].append(run(seed, args.epochs))
        print(json.dumps(record["runs"][-1]), flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps(record, indent=1) + "\n")


def run(seed: int, epochs: int) -> dict[str, Any]:
    """Train from ``seed`` on; test accuracy and loss after every epoch."""
    import torch
    from torch.nn import functional

    torch.manual_seed(seed)
    torch.set_num_threads(1)  # faster than two for steps this small
    (image, label), (test_image, test_label) = data("train"), data("test")
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.5)
    began, tests = time.perf_counter(), []
    for _ in range(epochs):
        net.train()
        for rows in torch.randperm(len(image)).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(net(image[rows]), label[rows]).backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            logits = net(test_image)
        accuracy = (logits.argmax(1) == test_label).float().mean().item()
        tests.append({"accuracy": accuracy, "loss": functional.cross_entropy(logits, test_label).item()})
    steps = epochs * -(-len(image) // BATCH)
    seconds = time.perf_counter() - began
    return {"seed": seed, "steps": steps, "seconds": seconds, "test": tests[-1], "by_epoch": tests}


def network() -> Any:
    """Conv 10, pool, ReLU, conv 20, channel dropout, pool, ReLU, dense 50, ReLU, dropout, dense 10."""
    from torch import nn

    convs = [nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU()]
    convs += [nn.Conv2d(10, 20, 5), nn.Dropout2d(0.5), nn.MaxPool2d(2), nn.ReLU()]
    return nn.Sequential(
        *convs, nn.Flatten(), nn.Linear(320, 50), nn.ReLU(), nn.Dropout(0.5), nn.Linear(50, 10)
    )


def data(split: str) -> tuple[Any, Any]:
    """Normalised images, float32 ``[n, 1, 28, 28]``, and labels."""
    import torch

    source = TFDS("mnist", split)
    batch = source.gather(np.arange(len(source)))
    image = torch.tensor(batch["image"], dtype=torch.float32).permute(0, 3, 1, 2)
    return (image / 255 - 0.1307) / 0.3081, torch.tensor(batch["label"], dtype=torch.int64)


if __name__ == "__main__":
    main()
