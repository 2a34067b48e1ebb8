"""Training steps of ``cifar_cnn``: its pooling against stock ``flax.linen.max_pool``, and PyTorch.

One fixed batch of normalised float32 images, no augmentation, the same parameters to start from, the same
loss and the same SGD on every side. PyTorch (eager) runs with contiguous and with channels-last images, and
the faster of the two counts. Without torch that part is skipped.

  python -m benchmarks.pooling [--batch N] [--rounds N] [--out FILE]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

from benchmarks import common
from jaxtrain import losses, models, optim
from jaxtrain.step import make_init, make_train_step

WIDTHS, CONVS, CLASSES = (32, 96, 192), 2, 10  # experiments/cifar_cnn.py
SMOOTHING, DECAY = 0.1, 5e-4
STEPS = 2  # timed at once


class StockCNN(nn.Module):
    """``models.CNN`` as one writes it with stock Flax, parameters by the same names."""

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        x = image
        for stage, width in enumerate(WIDTHS):
            for number in range(CONVS):
                name = f"stage{stage}_conv{number}"
                x = nn.Conv(width, (3, 3), use_bias=False, name=name)(x)
                if number == 0:
                    x = nn.max_pool(x, (2, 2), (2, 2))
                x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name=f"{name}_norm")(x))
                if number == 0:
                    first = x
            x = x + first
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


class Jax:
    """Compiled steps of ``model`` on one fixed batch."""

    def __init__(self, model: nn.Module, batch: dict[str, Any]) -> None:
        loss = losses.CrossEntropy(smoothing=SMOOTHING)
        tx: optax.GradientTransformation = optim.SGD(
            lr=0.01, momentum=0.9, nesterov=True, weight_decay=DECAY
        ).build()
        self.batch, self.key = jax.device_put(batch), jax.random.key(1)
        self.state = jax.jit(make_init(model, tx))(jax.random.key(0), self.batch)
        self.step = jax.jit(make_train_step(model, loss, tx), donate_argnums=0)
        self.model = model

    def params(self) -> dict[str, Any]:
        """A copy on the host."""
        return jax.tree.map(np.array, self.state.params)

    def logits(self) -> np.ndarray:
        """Of the batch, with the batch's own statistics."""
        variables = {"params": self.state.params, **self.state.extra}
        image = self.batch["image"]
        return np.asarray(self.model.apply(variables, image, train=True, mutable=["batch_stats"])[0])

    def steps(self, count: int) -> None:
        """``count`` updates, finished."""
        for _ in range(count):
            self.state, _ = self.step(self.state, self.batch, self.key)
        jax.block_until_ready(self.state)


def torch_trainers(params: Any, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """PyTorch's sides by name, with as many threads as there are cores."""
    from benchmarks.peers import torch_networks  # here: torch is optional

    torch_networks.torch.manual_seed(0)
    return {
        f"torch {name}": torch_networks.Trainer(
            torch_networks.CNN(WIDTHS, CONVS, CLASSES),
            params,
            batch["image"],
            batch["label"],
            channels_last,
            SMOOTHING,
            DECAY,
        )
        for name, channels_last in (("contiguous", False), ("channels_last", True))
    }


def main() -> None:
    """All sides interleaved, one JSON object."""
    parser = common.arguments(__doc__, rounds=8)
    parser.add_argument("--batch", type=int, default=256)
    args = parser.parse_args()
    raw = common.cifar_like(args.batch)
    batch = {"image": (raw["image"] / 127.5 - 1).astype(np.float32), "label": raw["label"]}

    jaxtrain, stock = Jax(models.CNN(WIDTHS, CONVS, CLASSES), batch), Jax(StockCNN(), batch)
    sides: dict[str, Any] = {"jaxtrain": jaxtrain, "stock flax": stock}
    skipped = {}
    try:
        sides |= torch_trainers(jaxtrain.params(), batch)
    except ImportError as error:
        skipped["torch"] = f"not installed ({error}): pip install torch"
    want = jaxtrain.core.chunked_logits()
    differences = {name: float(abs(side.logits() - want).max()) for name, side in sides.items()}
    if max(differences.values()) > 1e-3:
        raise SystemExit(f"these are not the same network: logits differ by {differences}")

    work: dict[str, Callable[[], float]] = {
        name: common.each(lambda side=side: side.steps(STEPS), STEPS * args.batch)
        for name, side in sides.items()
    }
    times = common.interleave(work, args.rounds)
    results = [
        common.speedup(
            "cifar_cnn: examples/s over stock nn.max_pool", times["stock flax"], times["jaxtrain"], ">= 1.3"
        )
    ]
    peers = {name: values for name, values in times.items() if name.startswith("torch")}
    if peers:
        best = min(peers, key=lambda name: statistics.median(peers[name]))
        label = f"cifar_cnn: examples/s over PyTorch eager, {best.removeprefix('torch ')}"
        results.append(common.speedup(label, peers[best], times["jaxtrain"]))
    figures = {
        "batch": args.batch,
        "steps a round": STEPS,
        "examples_per_second": {name: 1 / value for name, value in common.medians(times).items()},
        "largest difference of logits": differences,
    }
    common.finish(args, "pooling", results, figures, skipped)


if __name__ == "__main__":
    main()
