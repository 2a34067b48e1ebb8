"""GPT-2 small and ResNet-50 in PyTorch, for a GPU: the arithmetic of ``benchmarks.gpu.workloads``.

Parameters in float32 and computation in bfloat16 by autocast, ``torch.compile``, fused optimizers, ResNet in
channels_last, data on the device: what PyTorch's own guides recommend. Imported only where torch is there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """``jaxtrain.models.transformer.Block`` without rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm0, self.norm1 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm0(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        h = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(h.transpose(1, 2).reshape(batch, length, width))
        return x + self.contract(functional.gelu(self.expand(self.norm1(x)), approximate="tanh"))


class GPT(nn.Module):
    """``jaxtrain.models.GPT`` with learned positions, no dropout and the embedding as its head."""

    def __init__(self, vocab: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocab, width), nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                last = name.endswith(("project.weight", "contract.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if last else 0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.embed.weight).flatten(0, 1)


class Bottleneck(nn.Module):
    """1×1, 3×3 with the stride, 1×1 to four times the channels; BatchNorm behind each."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        sizes, strides, kernels = (before, width, width, 4 * width), (1, stride, 1), (1, 3, 1)
        self.convs = nn.ModuleList(map(conv, sizes[:-1], sizes[1:], kernels, strides))
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, sizes[1:]))
        nn.init.zeros_(self.norms[-1].weight)
        self.shortcut = nn.Identity()
        if before != sizes[-1]:
            self.shortcut = nn.Sequential(conv(before, sizes[-1], 1, stride), nn.BatchNorm2d(sizes[-1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = x
        for number, (convolution, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            branch = norm(convolution(branch))
            branch = functional.relu(branch) if number < 2 else branch
        return functional.relu(self.shortcut(x) + branch)


class ResNet(nn.Module):
    """``jaxtrain.models.ResNet`` of bottlenecks, for uint8 images of ImageNet's size."""

    def __init__(self, stages: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1))
        self.stem, self.norm, before = conv(3, width, 7, 2), nn.BatchNorm2d(width), width
        blocks = []
        for stage, count in enumerate(stages):
            for number in range(count):
                blocks.append(Bottleneck(before, width * 2**stage, 2 if stage and not number else 1))
                before = 4 * width * 2**stage
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(before, 1000)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = (image.float() / 255 - self.mean) / self.std
        x = functional.relu(self.norm(self.stem(x)))
        x = self.blocks(functional.max_pool2d(x, 3, 2, 1))
        return self.head(x.mean((2, 3)))


def conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    """Without bias, padded on all sides, as He et al. initialise it."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


class Trainer:
    """Updates on data that lie on the device: four batches, or two of images.

    Args:
      name: ``gpt`` or ``resnet50``.
      batch: examples of an update.
      tiny: the small ones, for a CPU.
    """

    def __init__(self, name: str, batch: int, tiny: bool) -> None:
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._batch, self._at = batch, 0
        net = self._gpt(tiny) if name == "gpt" else self._resnet(tiny)
        # A CPU, where only the code is tried out, would compile for a minute.
        how = "aot_eager" if tiny else "inductor"
        self._net, self._compiled = net, torch.compile(self._loss, backend=how)

    def steps(self, count: int) -> None:
        """So many updates, finished."""
        for _ in range(count):
            first = self._at % (len(self._inputs) // self._batch) * self._batch
            rows = slice(first, first + self._batch)
            self._at += 1
            loss = self._compiled(self._inputs[rows], self._labels[rows].flatten())
            loss.backward()
            self._tx.step()
            self._tx.zero_grad(set_to_none=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def about(self) -> dict[str, Any]:
        """Versions, size and memory."""
        cuda = self._device.type == "cuda"
        return {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if cuda else None,
            "parameters": sum(parameter.numel() for parameter in self._net.parameters()),
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        }

    def _loss(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self._device.type, torch.bfloat16):
            return functional.cross_entropy(
                self._net(inputs).float(), labels, label_smoothing=self._smoothing
            )

    def _gpt(self, tiny: bool) -> nn.Module:
        sizes = (512, 64, 128, 2, 2) if tiny else (50_304, 1024, 768, 12, 12)
        net, self._smoothing = GPT(*sizes).to(self._device), 0.0
        shape = (4 * self._batch, sizes[1] + 1)
        tokens = torch.randint(sizes[0], shape, device=self._device)
        self._inputs, self._labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        kernels = [parameter for parameter in net.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in net.parameters() if parameter.ndim == 1]
        groups = [{"params": kernels, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self._tx: Any = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
        return net

    def _resnet(self, tiny: bool) -> nn.Module:
        side, stages, width = (32, (1,), 8) if tiny else (224, (3, 4, 6, 3), 64)
        net = ResNet(stages, width).to(self._device, memory_format=torch.channels_last)
        self._smoothing, count = 0.1, 2 * self._batch
        image = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, device=self._device)
        self._inputs = image.contiguous(memory_format=torch.channels_last)
        self._labels = torch.randint(1000, (count,), device=self._device)
        kernels = [parameter for parameter in net.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in net.parameters() if parameter.ndim == 1]
        groups = [{"params": kernels, "weight_decay": 1e-4}, {"params": others}]
        self._tx = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, fused=True)
        return net
