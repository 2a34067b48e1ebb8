"""Shuffled, cropped and flipped batches of CIFAR-10, against PyTorch's DataLoader, Grain and ``tf.data``.

Every side draws uint8 batches in a fresh random order, pads each image by 4, cuts a random 32×32 window and
mirrors half of them:

  resident       ``program.loader.Resident``: row numbers travel, gather and augmentation are compiled
  streamed       ``program.loader.Streamed``: gathered by threads on the host, augmented when compiled
  torch, K workers    ``DataLoader`` over a Dataset of single examples, with 0 and 2 workers
  grain, K threads    ``MapDataset`` of single examples, shuffled, mapped and batched, with 0 and 16 threads
                      and with 2 worker processes
  tf.data        ``from_tensor_slices``, shuffle, map and batch, all with AUTOTUNE

jaxtrain's batches are ready on the device and the peers' on the host, which favours the peers. Goals are over
the faster of a peer's variants. Pixels are random bytes: their values do not affect the time. Peers that are
not installed are skipped.

  python -m benchmarks.feeding [--batch N] [--rounds N] [--out FILE]
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import common
from jaxtrain import data, sharding
from jaxtrain.program.loader import Loader, Resident, Streamed, _parse_absl_flags

PAD = 4
BATCHES = 60  # of each jaxtrain side at once
PEER_BATCHES = 12  # of each peer at once: they are slower
WORKERS = 2
GOALS = {
    "torch": ("a PyTorch DataLoader", ">= 5"),
    "grain": ("Grain by examples", ">= 10"),
    "tf.data": ("tf.data", None),
}

Sides = dict[str, Callable[[], float]]


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


def torch_sides(arrays: dict[str, Any], batch: int) -> Sides:
    """The DataLoaders by name; seconds an example."""
    from benchmarks.peers import torch_networks  # here: torch is optional

    dataset = torch_networks.Augmented(arrays["image"], arrays["label"], PAD)

    def side(workers: int) -> Callable[[], float]:
        loader = torch_networks.loader(dataset, batch, PEER_BATCHES, workers)
        return common.each(lambda: [None for _ in loader], PEER_BATCHES * batch)

    return {f"torch, {workers} workers": side(workers) for workers in (0, WORKERS)}


def grain_sides(arrays: dict[str, Any], batch: int) -> Sides:
    """Grain's threads and workers by name; seconds an example."""
    import grain

    def augment(index: int, rng: np.random.Generator) -> dict[str, Any]:
        frame = np.zeros((32 + 2 * PAD, 32 + 2 * PAD, 3), np.uint8)  # as for torch: np.pad is slower
        frame[PAD:-PAD, PAD:-PAD] = arrays["image"][index]
        row, column, flip = rng.integers(0, (2 * PAD + 1, 2 * PAD + 1, 2))
        image = frame[row : row + 32, column : column + 32]
        return {"image": image[:, ::-1] if flip else image, "label": arrays["label"][index]}

    def side(threads: int, workers: int, taken: int = PEER_BATCHES) -> Callable[[], float]:
        examples = grain.MapDataset.range(len(arrays["label"])).seed(0).shuffle().random_map(augment)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=500 if threads else 0)
        batches = examples.repeat().to_iter_dataset(options).batch(batch)
        if workers:
            _parse_absl_flags()
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        stream = iter(batches)
        return common.each(lambda: [next(stream) for _ in range(taken)], taken * batch)

    return {
        "grain, 0 threads": side(0, 0),
        "grain, 16 threads": side(16, 0, PEER_BATCHES // 3),
        f"grain, {WORKERS} workers": side(0, WORKERS),
    }


def tf_sides(arrays: dict[str, Any], batch: int) -> Sides:
    """``tf.data``; seconds an example."""
    import tensorflow as tf

    def augment(image: Any, label: Any) -> Any:
        padded = tf.pad(image, ((PAD, PAD), (PAD, PAD), (0, 0)))
        return tf.image.random_flip_left_right(tf.image.random_crop(padded, (32, 32, 3))), label

    made = tf.data.Dataset.from_tensor_slices((arrays["image"], arrays["label"]))
    made = made.shuffle(len(arrays["label"])).repeat().map(augment, tf.data.AUTOTUNE).batch(batch)
    stream = made.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
    work = functools.partial(next, itertools.islice(stream, PEER_BATCHES - 1, None, PEER_BATCHES))
    return {"tf.data": common.each(work, PEER_BATCHES * batch)}


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
    skipped, packages = {}, {"torch": "torch", "grain": "grain", "tf.data": "tensorflow"}
    for peer, made in (("torch", torch_sides), ("grain", grain_sides), ("tf.data", tf_sides)):
        try:
            sides |= made(arrays, args.batch)
        except ImportError as error:
            skipped[peer] = f"not installed ({error}): pip install {packages[peer]}"
    times = common.interleave(sides, args.rounds)
    results = []
    for peer, (label, goal) in GOALS.items():
        found = [name for name in times if name.partition(",")[0] == peer]
        if found:
            best = min(found, key=lambda name: statistics.median(times[name]))
            over = f"examples/s over {label}{best.removeprefix(peer)}"
            results += [common.speedup(f"{name}: {over}", times[best], times[name], goal) for name in loaders]
    figures = {
        "batch": args.batch,
        "examples_per_second": {name: 1 / value for name, value in common.medians(times).items()},
    }
    common.finish(args, "feeding", results, figures, skipped)


if __name__ == "__main__":
    main()
