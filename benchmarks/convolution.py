"""Training steps of three shipped networks against stock ``flax.linen.Conv`` and PyTorch.

One fixed batch of normalised float32 images, no augmentation, the same parameters to start from, the same
loss, optimizer and batch on every side: 128 for ``cifar_small_cnn`` and ``cifar_lenet``, 256 for
``cifar_cnn``. PyTorch runs eagerly with contiguous and with channels-last images, of which the faster
counts, and by ``torch.compile`` where that works. Without torch that part is skipped. The stock side is the
same model with stock convolutions. ``a device a core`` is the library's program with the batch split over as
many CPU devices as there are cores, as ``--simulate-devices`` makes them.

On a machine that others use, threads wait for each other. ``--cpu-time`` counts the process's CPU seconds
instead, which means something on one core only: ``taskset -c 1 python -m ... --cpu-time``.

  python -m benchmarks.convolution [--nets NAME ...] [--eager] [--cpu-time] [--rounds N] [--out FILE]
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np
import optax
from flax import linen as nn

from benchmarks import common
from jaxtrain import losses, models, optim, sharding
from jaxtrain.core.text import first_line
from jaxtrain.step import make_init, make_train_step

SPLIT = "a device a core"
CNN_DECAY, CNN_SMOOTHING = 5e-4, 0.1  # experiments/cifar_cnn.py
NETS: dict[str, dict[str, Any]] = {
    "cifar_small_cnn": {"model": models.ConvNet((32, 64)), "batch": 128, "steps": 4},
    "cifar_lenet": {
        "model": models.ConvNet((6, 16), kernel=5, padding="VALID", hidden=(120, 84)),
        "batch": 128,
        "steps": 8,
    },
    "cifar_cnn": {"model": models.CNN((32, 96, 192), convs=2), "batch": 256, "steps": 1},
}


def stock(width: int, kernel: int, **settings: Any) -> nn.Conv:
    """``models.conv.conv`` as one writes it with stock Flax."""
    return nn.Conv(width, (kernel, kernel), **settings)


def optimizer(name: str) -> optax.GradientTransformation:
    """The experiment's own, at a fixed rate."""
    if name == "cifar_small_cnn":
        return optim.Adam(lr=1e-3).build()
    if name == "cifar_lenet":
        return optim.SGD(lr=1e-3, momentum=0.9).build()
    return optim.SGD(lr=0.01, momentum=0.9, nesterov=True, weight_decay=CNN_DECAY).build()


class Jax:
    """Compiled steps on one fixed batch, with jaxtrain's convolutions or stock ones, on the first devices."""

    def __init__(self, name: str, batch: dict[str, Any], plain: bool = False, devices: int = 1) -> None:
        self.model, tx = NETS[name]["model"], optimizer(name)
        loss = losses.CrossEntropy(smoothing=CNN_SMOOTHING if name == "cifar_cnn" else 0.0)
        mesh = sharding.make_mesh(jax.devices()[:devices])
        replicated, split = sharding.replicated(mesh), sharding.batch_split(mesh)
        self.batch, self.key = jax.device_put(batch, split), jax.device_put(jax.random.key(1), replicated)
        where = f"jaxtrain.models.{'cnn' if name == 'cifar_cnn' else 'convnet'}.conv"
        with mock.patch(where, stock) if plain else mock.patch.object(self, "model", self.model):
            init = sharding.compile(make_init(self.model, tx), args=(None, split), out=replicated)
            self.state = init(jax.random.key(0), self.batch)
            update = make_train_step(self.model, loss, tx)
            step = sharding.compile(update, args=(replicated, split, replicated), out=replicated, donate=(0,))
            self.step = step.lower(self.state, self.batch, self.key).compile()
            self.logits = np.asarray(self._apply())

    def params(self) -> dict[str, Any]:
        """A copy on the host."""
        return jax.tree.map(np.array, self.state.params)

    def _apply(self) -> jax.Array:
        variables = {"params": self.state.params, **self.state.extra}
        return self.model.apply(variables, self.batch["image"], train=True, mutable=["batch_stats"])[0]

    def steps(self, count: int) -> None:
        """``count`` updates, finished."""
        for _ in range(count):
            self.state, _ = self.step(self.state, self.batch, self.key)
        jax.block_until_ready(self.state)


def peers(
    name: str, params: Any, batch: dict[str, np.ndarray], eager: bool, skipped: dict[str, str]
) -> dict[str, Any]:
    """PyTorch's sides by name, with as many threads as there are cores; only the eager ones if ``eager``."""
    from benchmarks.peers import torch_networks  # here: torch is optional

    torch = torch_networks.torch
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def trainer(channels_last: bool, compiled: bool = False) -> Any:
        if name == "cifar_cnn":
            net = torch_networks.CNN((32, 96, 192), 2, 10)
            settings: dict[str, Any] = {"smoothing": CNN_SMOOTHING, "weight_decay": CNN_DECAY}
        elif name == "cifar_lenet":
            net = torch_networks.ConvNet((6, 16), 5, False, (120, 84), 10)
            settings = {"optimizer": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9)}
        else:
            net = torch_networks.ConvNet((32, 64), 3, True, (), 10)
            settings = {"optimizer": functools.partial(torch.optim.Adam, lr=1e-3)}
        return torch_networks.Trainer(
            net, params, batch["image"], batch["label"], channels_last, compiled=compiled, **settings
        )

    sides = {"torch contiguous": trainer(False), "torch channels_last": trainer(True)}
    if eager:
        skipped["torch.compile"] = "--eager"
        return sides
    try:
        compiled = trainer(True, compiled=True)
        compiled.steps(1)
        sides["torch.compile"] = compiled
    except Exception as error:  # no compiler, or a version that has none for this Python
        skipped["torch.compile"] = f"{type(error).__name__}: {first_line(error)}"
    return sides


def seconds(side: Any, steps: int, size: int, clock: Callable[[], float]) -> float:
    """For one example of ``steps`` updates."""
    began = clock()
    side.steps(steps)
    return (clock() - began) / (steps * size)


def measure(
    name: str, rounds: int, eager: bool, clock: Callable[[], float], skipped: dict[str, str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Results and figures of one network."""
    size, steps = NETS[name]["batch"], NETS[name]["steps"]
    raw = common.cifar_like(size)
    batch = {"image": (raw["image"] / 127.5 - 1).astype(np.float32), "label": raw["label"]}
    ours = Jax(name, batch)
    sides: dict[str, Any] = {"jaxtrain": ours, "stock flax": Jax(name, batch, plain=True)}
    if (cores := len(jax.devices())) > 1:
        sides[SPLIT] = Jax(name, batch, devices=cores)
    logits = {side: value.logits for side, value in sides.items()}
    try:
        sides |= (found := peers(name, ours.params(), batch, eager, skipped))
        # The compiled one has made a step already, to see whether it works.
        logits |= {side: found[side].logits() for side in found if side != "torch.compile"}
    except ImportError as error:
        skipped["torch"] = f"not installed ({error}): pip install torch"
    differences = {side: float(abs(value - ours.logits).max()) for side, value in logits.items()}
    if max(differences.values()) > 1e-3:
        raise SystemExit(f"these are not the same network: logits differ by {differences}")

    work: dict[str, Callable[[], float]] = {
        side: functools.partial(seconds, value, steps, size, clock) for side, value in sides.items()
    }
    times = common.interleave(work, rounds)
    results = [
        common.speedup(f"{name}: examples/s over stock nn.Conv", times["stock flax"], times["jaxtrain"])
    ]
    rivals = [side for side in times if side.startswith("torch c")]
    if rivals:
        best = min(rivals, key=lambda side: statistics.median(times[side]))
        label = f"{name}: examples/s over PyTorch eager, {best.removeprefix('torch ')}"
        results.append(common.speedup(label, times[best], times["jaxtrain"], ">= 1.0"))
        if SPLIT in times:
            results.append(common.speedup(f"{label}, {SPLIT}", times[best], times[SPLIT]))
    if SPLIT in times:
        results.append(common.speedup(f"{name}: examples/s, {SPLIT}", times["jaxtrain"], times[SPLIT]))
    if "torch.compile" in times:
        label = f"{name}: examples/s over torch.compile, channels_last"
        results.append(common.speedup(label, times["torch.compile"], times["jaxtrain"]))
    figures = {
        "batch": size,
        "steps a round": steps,
        "examples_per_second": {side: 1 / value for side, value in common.medians(times).items()},
        "best_examples_per_second": {side: 1 / min(values) for side, values in times.items()},
        "largest difference of logits": differences,
    }
    return results, figures


def main() -> None:
    """The networks in turn, all sides of each interleaved, one JSON object."""
    parser = common.arguments(__doc__, rounds=12)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--eager", action="store_true", help="leave torch.compile out")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, on one core")
    args = parser.parse_args()
    if args.cpu_time and len(os.sched_getaffinity(0)) > 1:
        parser.error("--cpu-time needs one core: taskset -c 1 python -m benchmarks.convolution --cpu-time")
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    clock = time.process_time if args.cpu_time else time.perf_counter
    results: list[dict[str, Any]] = []
    figures: dict[str, Any] = {"seconds": "CPU" if args.cpu_time else "wall"}
    skipped: dict[str, str] = {}
    for name in args.nets:
        found, figures[name] = measure(name, args.rounds, args.eager, clock, skipped)
        results += found
    common.finish(args, "convolution", results, figures, skipped)


if __name__ == "__main__":
    main()
