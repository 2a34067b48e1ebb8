"""The airbench94 recipe in PyTorch (Jordan 2024, arXiv:2404.00498), for a time on the same card as ours.

python -m benchmarks.gpu.torch_airbench DIR_OR_TAR [--tiny]

Written from the recipe's description: half precision, channels_last, data on the device. The time counts
whitening, training and the evaluation with averaged views, and leaves out loading, a warm-up and compiling.
Prints a line of JSON after every seed; the last has everything.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.gpu.airbench import SEEDS, lines
from benchmarks.gpu.measure import left
from benchmarks.gpu.workloads import cifar10

BATCH, EPOCHS, SMOOTHING, MOMENTUM = 1024, 9.9, 0.2, 0.85
SCALE = 1024 * (1 + 1 / (1 - MOMENTUM))
RATE, DECAY = 11.5 / SCALE, 0.0153 * 1024 / SCALE


class Group(nn.Module):
    """Conv, max-pool, BatchNorm, GELU, conv, BatchNorm, GELU."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.conv0, self.conv1 = identity(before, width), identity(width, width)
        self.norm0, self.norm1 = norm(width), norm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.gelu(self.norm0(functional.max_pool2d(self.conv0(x), 2)))
        return functional.gelu(self.norm1(self.conv1(x)))


class Net(nn.Module):
    """The network, whose whitening convolution is filled from images."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        self.groups = nn.Sequential(*map(Group, (24, *widths[:-1]), widths))
        self.head = nn.Linear(widths[-1], 10, bias=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(self.groups(functional.gelu(self.whiten(image))), 3)
        return self.head(x.flatten(1)) / 9

    @torch.no_grad()
    def fill(self, image: torch.Tensor) -> None:
        """Whitening from normalised images, in float32."""
        patches = image.float().unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / torch.sqrt(values + 5e-4)).flip(1).T.reshape(12, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


def identity(before: int, width: int) -> nn.Conv2d:
    """3×3 without bias; the identity in the first outputs."""
    layer = nn.Conv2d(before, width, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(layer.weight[: min(before, width)])
    return layer


def norm(width: int) -> nn.BatchNorm2d:
    """In float32, with a bias and a scale that stays 1."""
    layer = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
    layer.weight.requires_grad_(False)
    return layer


class Recipe:
    """Runs of the recipe on data that lie on the device; the network is compiled once, if at all."""

    def __init__(self, sets: list[dict[str, Any]], tiny: bool, compiled: bool) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cudnn.benchmark = True
        self._half = torch.float16 if self._device.type == "cuda" else torch.float32
        self._batch = 128 if tiny else BATCH
        self._widths = (8, 16, 16) if tiny else (64, 256, 256)
        self._net = Net(self._widths).to(self._device, self._half, memory_format=torch.channels_last)
        for layer in self._net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.float()
        self._run: Any = torch.compile(self._net) if compiled else self._net
        (self._image, self._label), (self._test, self._truth) = map(self._sent, sets)
        self.steps = math.ceil((1.0 if tiny else EPOCHS) * (len(self._image) // self._batch))

    def run(self, seed: int, most: int | None = None) -> dict[str, float]:
        """Accuracy and seconds of a seed; ``most`` cuts the training short, for warming up."""
        torch.manual_seed(seed)
        self._net.load_state_dict(Net(self._widths).state_dict())
        self._net.whiten.bias.requires_grad_(True)
        self._wait()
        began = time.perf_counter()
        self._net.fill(self._image[:5000])
        self._train(self.steps if most is None else min(most, self.steps))
        self._wait()
        trained = time.perf_counter()
        accuracy = self._evaluate()
        self._wait()
        end = time.perf_counter()
        return {
            "seed": seed,
            "accuracy": accuracy,
            "seconds": end - began,
            "train_seconds": trained - began,
            "evaluate_seconds": end - trained,
        }

    def _train(self, steps: int) -> None:
        biases = [p for name, p in self._net.named_parameters() if "norm" in name and p.requires_grad]
        known = {id(p) for p in biases}
        others = [p for p in self._net.parameters() if p.requires_grad and id(p) not in known]
        groups = [
            {"params": biases, "lr": 64 * RATE, "weight_decay": DECAY / (64 * RATE)},
            {"params": others, "lr": RATE, "weight_decay": DECAY / RATE},
        ]
        tx = torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM, nesterov=True)
        rates = torch.optim.lr_scheduler.LambdaLR(tx, self._rate)
        slow = {k: v.clone() for k, v in self._net.state_dict().items() if v.is_floating_point()}
        epoch, flipped = len(self._image) // self._batch, mirror(self._image)
        self._net.train()
        for step in range(steps):
            if step % epoch == 0:
                image = crop(flipped if step // epoch % 2 == 0 else flipped.flip(-1))
                order = torch.randperm(len(image), device=self._device)
            if step == (3 * epoch if steps == self.steps else steps - 2):  # warming up compiles both
                self._net.whiten.bias.requires_grad_(False)
            rows = order[step % epoch * self._batch :][: self._batch]
            logits = self._run(image[rows].contiguous(memory_format=torch.channels_last))
            loss = functional.cross_entropy(
                logits.float(), self._label[rows], label_smoothing=SMOOTHING, reduction="sum"
            )
            tx.zero_grad(set_to_none=True)
            loss.backward()
            tx.step()
            rates.step()
            if (step + 1) % 5 == 0:
                self._look_ahead(slow, 0.95**5 * ((step + 1) / self.steps) ** 3)
        self._look_ahead(slow, 1.0)

    def _rate(self, step: int) -> float:
        peak = 0.23 * self.steps
        if step < peak:
            return 0.2 + 0.8 * step / peak
        return 1 + (0.07 - 1) * (step - peak) / (self.steps - peak)

    @torch.no_grad()
    def _look_ahead(self, slow: dict[str, torch.Tensor], decay: float) -> None:
        now = self._net.state_dict()
        for name, average in slow.items():
            average.lerp_(now[name], 1 - decay)
            now[name].copy_(average)

    @torch.no_grad()
    def _evaluate(self) -> float:
        self._net.eval()
        padded, right = functional.pad(self._test, (1, 1, 1, 1), "reflect"), 0
        for first in range(0, len(self._test), 2000):
            rows = slice(first, first + 2000)
            views = [self._test[rows], padded[rows, :, :32, :32], padded[rows, :, 2:, 2:]]
            logits = [0.5 * (self._net(view) + self._net(view.flip(-1))) for view in views]
            total = 0.5 * logits[0] + 0.25 * (logits[1] + logits[2])
            right += (total.argmax(1) == self._truth[rows]).sum()
        return float(right) / len(self._test)

    def _sent(self, fields: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.tensor((0.4914, 0.4822, 0.4465), device=self._device).view(1, 3, 1, 1)
        std = torch.tensor((0.2470, 0.2435, 0.2616), device=self._device).view(1, 3, 1, 1)
        image = torch.tensor(fields["image"], device=self._device).permute(0, 3, 1, 2).float() / 255
        image = ((image - mean) / std).to(self._half).contiguous(memory_format=torch.channels_last)
        return image, torch.tensor(fields["label"], dtype=torch.int64, device=self._device)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def mirror(image: torch.Tensor) -> torch.Tensor:
    """Half of them, by chance."""
    chance = torch.rand(len(image), device=image.device) < 0.5
    return torch.where(chance.view(-1, 1, 1, 1), image.flip(-1), image)


def crop(image: torch.Tensor, pad: int = 2) -> torch.Tensor:
    """A random window of each, of its size, out of a frame of reflections: one move at a time."""
    padded = functional.pad(image, (pad,) * 4, "reflect")
    out, side = torch.empty_like(image), image.shape[-1]
    moves = torch.randint(2 * pad + 1, (len(image), 2), device=image.device)
    for row in range(2 * pad + 1):
        for column in range(2 * pad + 1):
            chosen = (moves[:, 0] == row) & (moves[:, 1] == column)
            out[chosen] = padded[chosen, :, row : row + side, column : column + side]
    return out


def measure(folder: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Eager, then compiled where there is time; all that there is after every seed."""
    sets = list(cifar10(Path(folder)))
    if tiny:
        sets = [{k: v[:512] for k, v in fields.items()} for fields in sets]
    runs: dict[str, list[dict[str, float]]] = {}
    for name in ("eager", *(() if tiny else ("torch.compile",))):
        if runs and left() < 45:
            break
        recipe = Recipe(sets, tiny, compiled=name == "torch.compile")
        recipe.run(0, most=5)
        for seed in range(2 if tiny else SEEDS):
            if seed > 1 and left() < 1.5 * runs[name][-1]["seconds"]:
                break
            runs.setdefault(name, []).append(recipe.run(seed))
            results = [line for each, found in runs.items() for line in lines(f"PyTorch {each}", found)]
            for line in results:  # a check of the peer, which is no goal of ours
                for key in ("goal", "met"):
                    line.pop(key, None)
            yield {
                "results": results,
                "figures": {"torch": torch.__version__, "steps": recipe.steps, "runs": runs},
            }


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--tiny"]
    for figures in measure(words[0], "--tiny" in sys.argv):
        print(json.dumps(figures, default=float), flush=True)
