"""The same network and the same augmentation in PyTorch. Imported only where torch is installed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler


class CNN(nn.Module):
    """``jaxtrain.models.CNN`` with BatchNorm, ReLU and residual stages, channels first."""

    def __init__(self, widths: Sequence[int], convs: int, classes: int, channels: int = 3) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        before = channels
        for width in widths:
            stage = nn.ModuleList()
            for _ in range(convs):
                conv = nn.Conv2d(before, width, 3, padding=1, bias=False)
                stage.append(nn.ModuleList([conv, nn.BatchNorm2d(width, eps=1e-5, momentum=0.1)]))
                before = width
            self.stages.append(stage)
        self.head = nn.Linear(before, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            for number, (conv, norm) in enumerate(stage):
                x = conv(x)
                if number == 0:
                    x = functional.max_pool2d(x, 2)
                x = functional.relu(norm(x))
                if number == 0:
                    first = x
            if len(stage) > 1:
                x = x + first
        return self.head(x.mean((2, 3)))

    def load(self, params: Mapping[str, Any]) -> None:
        """Take the parameters of the Linen network, named ``stage0_conv0_norm`` and the like."""
        with torch.no_grad():
            for i, stage in enumerate(self.stages):
                for j, (conv, norm) in enumerate(stage):
                    name = f"stage{i}_conv{j}"
                    conv.weight.copy_(_tensor(params[name]["kernel"]).permute(3, 2, 0, 1))
                    norm.weight.copy_(_tensor(params[f"{name}_norm"]["scale"]))
                    norm.bias.copy_(_tensor(params[f"{name}_norm"]["bias"]))
            self.head.weight.copy_(_tensor(params["head"]["kernel"]).T)
            self.head.bias.copy_(_tensor(params["head"]["bias"]))


class ConvNet(nn.Module):
    """``jaxtrain.models.ConvNet`` with ReLU and pooling by 2, for images of 32×32, channels first."""

    def __init__(
        self, widths: Sequence[int], kernel: int, same: bool, hidden: Sequence[int], classes: int
    ) -> None:
        super().__init__()
        self.convs, before, side = nn.ModuleList(), 3, 32
        for width in widths:
            self.convs.append(nn.Conv2d(before, width, kernel, padding=kernel // 2 if same else 0))
            before, side = width, (side if same else side - kernel + 1) // 2
        self.flat = (before, side, side)
        sizes = [before * side * side, *hidden, classes]
        self.dense = nn.ModuleList(map(nn.Linear, sizes[:-1], sizes[1:]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            x = functional.max_pool2d(functional.relu(conv(x)), 2)
        x = x.flatten(1)
        for layer in self.dense[:-1]:
            x = functional.relu(layer(x))
        return self.dense[-1](x)

    def load(self, params: Mapping[str, Any]) -> None:
        """Take the parameters of the Linen network, which flattens with channels last."""
        with torch.no_grad():
            for i, conv in enumerate(self.convs):
                conv.weight.copy_(_tensor(params[f"conv{i}"]["kernel"]).permute(3, 2, 0, 1))
                conv.bias.copy_(_tensor(params[f"conv{i}"]["bias"]))
            names = [*(f"dense{i}" for i in range(len(self.dense) - 1)), "head"]
            for i, (name, layer) in enumerate(zip(names, self.dense, strict=True)):
                kernel = _tensor(params[name]["kernel"])
                if i == 0:
                    channels, rows, columns = self.flat
                    kernel = kernel.reshape(rows, columns, channels, -1).permute(2, 0, 1, 3).flatten(0, 2)
                layer.weight.copy_(kernel.T)
                layer.bias.copy_(_tensor(params[name]["bias"]))


class Trainer:
    """Training steps on one fixed batch, in a given memory format.

    Args:
      params: of the Linen network.
      image: float32 ``[batch, height, width, 3]``; ``label``: ``[batch]``.
      channels_last: memory format of network and images.
      optimizer: makes one of parameter groups; default: SGD with Nesterov momentum.
      compiled: by ``torch.compile``; else eager.
    """

    def __init__(
        self,
        net: CNN | ConvNet,
        params: Mapping[str, Any],
        image: np.ndarray,
        label: np.ndarray,
        channels_last: bool,
        smoothing: float = 0.0,
        weight_decay: float = 0.0,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        compiled: bool = False,
    ) -> None:
        net.load(params)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.net = net.to(memory_format=layout)
        self.image = _tensor(image).permute(0, 3, 1, 2).contiguous(memory_format=layout)
        self.label = torch.tensor(label, dtype=torch.int64)
        self.loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
        kernels = [p for p in net.parameters() if p.ndim > 1]
        others = [p for p in net.parameters() if p.ndim == 1]
        groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": others}]
        make = optimizer or functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True)
        self.optimizer = make(groups)
        self.run: Any = torch.compile(self.net) if compiled else self.net

    def logits(self) -> np.ndarray:
        """Of the batch, with the batch's own statistics; changes the running ones."""
        with torch.no_grad():
            return self.net.train()(self.image).numpy()

    def steps(self, count: int) -> None:
        """``count`` updates."""
        for _ in range(count):
            self.optimizer.zero_grad(set_to_none=True)
            self.loss(self.run(self.image), self.label).backward()
            self.optimizer.step()


class Augmented(Dataset):
    """One example at a time, cropped from a zero-padded frame and flipped, as uint8 tensors.

    Written with NumPy because that is faster for one small image than tensor operations are.
    """

    def __init__(self, image: np.ndarray, label: np.ndarray, pad: int) -> None:
        self.image, self.label, self.pad = image, label, pad
        self.rng: np.random.Generator | None = None

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.rng is None:  # in each worker its own
            self.rng = np.random.default_rng(torch.initial_seed())
        image, pad = self.image[index], self.pad
        height, width, channels = image.shape
        frame = np.zeros((height + 2 * pad, width + 2 * pad, channels), image.dtype)
        frame[pad : pad + height, pad : pad + width] = image
        row, column, flip = self.rng.integers(0, (2 * pad + 1, 2 * pad + 1, 2))
        image = frame[row : row + height, column : column + width]
        image = np.ascontiguousarray(image[:, ::-1] if flip else image)
        return torch.from_numpy(image), int(self.label[index])


def loader(dataset: Augmented, batch: int, batches: int, workers: int) -> DataLoader:
    """``batches`` shuffled batches each time it is iterated over; its workers live on in between."""
    return DataLoader(
        dataset,
        batch_size=batch,
        sampler=_Shuffled(len(dataset), batch * batches),
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,  # fork does not go with JAX's threads
    )


class _Shuffled(Sampler):
    def __init__(self, n: int, count: int) -> None:
        self._n, self._count = n, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self._n)[: self._count].tolist())


def _tensor(array: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(array, np.float32))
