"""Shuffled, cropped and flipped batches of CIFAR-10, ready on the device, against a PyTorch DataLoader.

Every side draws uint8 batches in a fresh random order, pads each image by 4, cuts a random 32×32 window and
mirrors half of them:

  resident       ``jaxtrain.data.loader.Resident``: row numbers travel, gather and augmentation are compiled
  streamed       ``jaxtrain.data.loader.Streamed``: gathered by threads on the host, augmented when compiled
  torch, K workers    ``DataLoader`` over a Dataset of single examples, with 0 and 2 workers

The goal is over the faster DataLoader. Pixels are random bytes: what is in them costs no time.
Without torch its part is skipped.

  python -m benchmarks.feeding [--batch N] [--rounds N] [--out FILE]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import common
from jaxtrain import data, sharding
from jaxtrain.data.loader import Loader, Resident, Streamed

PAD = 4
BATCHES = 60  # of each jaxtrain side at once
PEER_BATCHES = 12  # of each DataLoader at once: they are slower
WORKERS = 2


def drawn(loader: Loader, batches: int) -> Callable[[], None]:
    """Goes on through ``batches`` more batches of ``loader``, augmented, and waits for them."""
    prepare = data.compose(lambda batch, _: loader.fetch(batch), data.Flip(), data.Crop(pad=PAD))
    augmented = jax.jit(lambda batch, key, step: prepare(batch, jax.random.fold_in(key, step)))
    key, at = jax.random.key(0), 0

    def work() -> None:
        nonlocal at
        for step in range(at, at + batches):
            batch = augmented(loader.batch(step), key, step)
        jax.block_until_ready(batch)
        at += batches

    return work


def torch_sides(arrays: dict[str, Any], batch: int) -> dict[str, Callable[[], float]]:
    """The DataLoaders by name; seconds an example."""
    from benchmarks import torch_peers  # here: torch is optional

    dataset = torch_peers.Augmented(arrays["image"], arrays["label"], PAD)

    def side(workers: int) -> Callable[[], float]:
        loader = torch_peers.loader(dataset, batch, PEER_BATCHES, workers)
        return common.each(lambda: [None for _ in loader], PEER_BATCHES * batch)

    return {f"torch, {workers} workers": side(workers) for workers in (0, WORKERS)}


def main() -> None:
    """All sides interleaved, one JSON object."""
    parser = common.arguments(__doc__, rounds=10)
    parser.add_argument("--batch", type=int, default=512)
    args = parser.parse_args()
    arrays = common.cifar_like()
    source, mesh = data.Arrays(arrays), sharding.make_mesh(jax.devices()[:1])
    order = data.Order(seed=0, n=len(source), batch=args.batch)
    loaders = {"resident": Resident(source, order, mesh), "streamed": Streamed(source, order, mesh)}
    sides = {
        name: common.each(drawn(loader, BATCHES), BATCHES * args.batch) for name, loader in loaders.items()
    }
    skipped = {}
    try:
        sides |= torch_sides(arrays, args.batch)
    except ImportError as error:
        skipped["torch"] = f"not installed ({error}): pip install torch"
    times = common.interleaved(sides, args.rounds)
    peers = [name for name in times if name.startswith("torch")]
    results = []
    if peers:
        best = min(peers, key=lambda name: statistics.median(times[name]))
        label = f"examples/s over a PyTorch DataLoader, {best.removeprefix('torch, ')}"
        results = [common.speedup(f"{name}: {label}", times[best], times[name], ">= 5") for name in loaders]
    figures = {
        "batch": args.batch,
        "examples_per_second": {name: 1 / value for name, value in common.medians(times).items()},
    }
    common.finish(args, "feeding", results, figures, skipped)


if __name__ == "__main__":
    main()
