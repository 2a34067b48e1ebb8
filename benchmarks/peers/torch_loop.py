"""The peers' networks and loop in PyTorch, eager or compiled. Imported only where torch is installed.

Data lie on the device as tensors, and a batch is cut out of them by its row numbers, as jaxtrain does it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.peers import torch_networks


class LeNet(nn.Module):
    """``jaxtrain.models.ConvNet`` as in ``experiments/cifar_lenet.py``, channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)])
        self.dense = nn.ModuleList([nn.Linear(400, 120), nn.Linear(120, 84)])
        self.head = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            x = functional.max_pool2d(functional.relu(conv(x)), 2)
        x = x.flatten(1)
        for layer in self.dense:
            x = functional.relu(layer(x))
        return self.head(x)

    def load(self, params: Mapping[str, Any]) -> None:
        """Take the parameters of the Linen network, whose pixels are flattened channels last."""
        with torch.no_grad():
            for k, conv in enumerate(self.convs):
                conv.weight.copy_(_tensor(params[f"conv{k}"]["kernel"]).permute(3, 2, 0, 1))
                conv.bias.copy_(_tensor(params[f"conv{k}"]["bias"]))
            first = dict(params["dense0"])
            kernel = np.asarray(first["kernel"]).reshape(5, 5, 16, -1).transpose(2, 0, 1, 3)
            first["kernel"] = kernel.reshape(400, -1)
            _dense(self.dense[0], first)
            _dense(self.dense[1], params["dense1"])
            _dense(self.head, params["head"])


class MLP(nn.Module):
    """``jaxtrain.models.MLP`` on flattened images of ``pixels`` numbers."""

    def __init__(self, pixels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        sizes = (pixels, *widths)
        pairs = itertools.pairwise(sizes)
        self.dense = nn.ModuleList([nn.Linear(before, after) for before, after in pairs])
        self.head = nn.Linear(sizes[-1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for layer in self.dense:
            x = functional.relu(layer(x))
        return self.head(x)

    def load(self, params: Mapping[str, Any]) -> None:
        """Take the parameters of the Linen network; images have one channel."""
        with torch.no_grad():
            for k, layer in enumerate(self.dense):
                _dense(layer, params[f"dense{k}"])
            _dense(self.head, params["head"])


class GPT(nn.Module):
    """``jaxtrain.models.GPT`` with rotary positions and no dropout."""

    def __init__(self, vocab: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList([_Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.embed.weight)
        return logits.flatten(0, 1)

    def load(self, params: Mapping[str, Any]) -> None:
        """Take the parameters of the Linen network."""
        with torch.no_grad():
            self.embed.weight.copy_(_tensor(params["embed"]["embedding"]))
            _norm(self.norm, params["norm"])
            for k, block in enumerate(self.blocks):
                block.load(params[f"block{k}"])


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm0, self.norm1 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm0(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(_rotate(q), _rotate(k), v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, length, width))
        hidden = functional.gelu(self.expand(self.norm1(x)), approximate="tanh")
        return x + self.contract(hidden)

    def load(self, params: Mapping[str, Any]) -> None:
        """Its kernels have the heads as a dimension."""
        width = self.project.in_features
        for name, shape in (("qkv", (width, -1)), ("project", (width, width))):
            kernel = np.asarray(params[name]["kernel"]).reshape(shape)
            _dense(getattr(self, name), {"kernel": kernel, "bias": np.ravel(params[name]["bias"])})
        for name in ("expand", "contract"):
            _dense(getattr(self, name), params[name])
        _norm(self.norm0, params["norm0"])
        _norm(self.norm1, params["norm1"])


class Loop:
    """Training on the device ``where``; a compiled network takes its compilation in the first round.

    Args:
      case: "lenet", "cifar_cnn", "mlp" or "gpt".
      exp: the experiment, for its data and its optimizer's settings.
      params: initial parameters, of the Linen network.
      compiled: by ``torch.compile``.
      channels_last: memory format of network and images.
    """

    def __init__(
        self, case: str, exp: Any, params: Mapping[str, Any], compiled: bool, channels_last: bool, where: str
    ) -> None:
        torch.set_num_threads(2)
        self._exp, self._case, self._where = exp, case, torch.device(where)
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        fields = exp.train.fields
        inputs = torch.tensor(fields.get("image", fields.get("tokens")), device=self._where)
        if inputs.ndim == 4:
            inputs = inputs.permute(0, 3, 1, 2).contiguous(memory_format=self._layout)
        self._inputs = inputs if inputs.is_floating_point() else inputs.to(torch.int64)
        self._labels = torch.tensor(fields["label"], dtype=torch.int64, device=self._where)
        self._net, self._tx = self._begin(params, compiled)
        self._order, self._at = torch.randperm(len(inputs)), 0

    def steps(self, count: int) -> None:
        """``count`` updates, finished."""
        for _ in range(count):
            if self._at + self._exp.batch > len(self._order):
                self._order, self._at = torch.randperm(len(self._order)), 0
            rows = self._order[self._at : self._at + self._exp.batch]
            self._at += self._exp.batch
            self._update(rows.to(self._where, non_blocking=True))
        if self._where.type == "cuda":
            torch.cuda.synchronize()

    def losses(self, count: int) -> list[float]:
        """Of the first ``count`` updates, all on the first examples of the set; only before ``steps``."""
        rows = torch.arange(self._exp.batch, device=self._where)
        return [self._update(rows).item() for _ in range(count)]

    def _update(self, rows: torch.Tensor) -> torch.Tensor:
        inputs = self._inputs[rows]
        if inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=self._layout)
        self._tx.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(self._net(inputs), self._labels[rows].flatten())
        loss.backward()
        self._tx.step()
        return loss.detach()

    def _begin(self, params: Mapping[str, Any], compiled: bool) -> tuple[Any, torch.optim.Optimizer]:
        net = _network(self._case, self._exp)
        net.load(params)
        net = net.train().to(self._where, memory_format=self._layout)
        lr = self._exp.optimizer.lr
        if self._case == "gpt":
            tx: torch.optim.Optimizer = torch.optim.Adam(net.parameters(), lr=lr)
        else:
            tx = torch.optim.SGD(net.parameters(), lr=lr, momentum=self._exp.optimizer.momentum)
        return (torch.compile(net) if compiled else net), tx


def variants(case: str) -> dict[str, tuple[bool, bool]]:
    """``name -> (compiled, channels_last)``: what is measured."""
    layouts = {"": False} if case in ("mlp", "gpt") else {", contiguous": False, ", channels_last": True}
    return {
        f"{how}{layout}": (how == "torch.compile", last)
        for how in ("torch eager", "torch.compile")
        for layout, last in layouts.items()
    }


def _network(case: str, exp: Any) -> Any:
    if case.startswith("lenet"):
        return LeNet()
    if case == "mlp":
        return MLP(int(np.prod(exp.train.fields["image"].shape[1:])), exp.model.widths)
    if case == "gpt":
        return GPT(exp.model.vocab, exp.model.width, exp.model.depth, exp.model.heads)
    return torch_networks.CNN(exp.model.widths, exp.model.convs, exp.model.classes)


def _rotate(x: torch.Tensor, base: float = 10_000.0) -> torch.Tensor:
    """``[batch, heads, length, size]``, as ``jaxtrain.models.transformer.rotate``."""
    length, half = x.shape[2], x.shape[3] // 2
    frequency = base ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(length, device=x.device)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


def _dense(layer: nn.Linear, params: Mapping[str, Any]) -> None:
    layer.weight.copy_(_tensor(params["kernel"]).T)
    layer.bias.copy_(_tensor(params["bias"]))


def _norm(layer: nn.LayerNorm, params: Mapping[str, Any]) -> None:
    layer.weight.copy_(_tensor(params["scale"]))
    layer.bias.copy_(_tensor(params["bias"]))


def _tensor(array: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(array, np.float32))
