"""A plain service of the same network: FastAPI, pydantic and PyTorch, one request a call of the model.

Started by ``python -m benchmarks.serve``: ``python -m benchmarks.peers.torch_service WEIGHTS.npz PORT``.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.peers.torch_networks import CNN

MEAN, STD, WHITE = 0.305, 0.376, 16  # of digits_cnn


class Tensor(BaseModel):
    """An input of the Open Inference Protocol."""

    name: str
    shape: list[int]
    datatype: str
    data: list[int]


class Inputs(BaseModel):
    """A request."""

    inputs: list[Tensor]


def make_net(weights: dict[str, np.ndarray]) -> CNN:
    """Return the network of ``jaxtrain.models.CNN`` weights by path, for evaluation."""
    tree: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    for path, array in weights.items():
        kind, layer, name = path.split("/")
        tree[kind].setdefault(layer, {})[name] = array
    stages = sorted({int(layer.split("_")[0][5:]) for layer in tree["params"] if layer.startswith("stage")})
    widths = [tree["params"][f"stage{n}_conv0"]["kernel"].shape[-1] for n in stages]
    net = CNN(widths, 2, 10, channels=1)
    net.load(tree["params"])
    for i, stage in enumerate(net.stages):
        for j, (_, norm) in enumerate(stage):
            statistics = tree["batch_stats"][f"stage{i}_conv{j}_norm"]
            norm.running_mean.copy_(torch.from_numpy(statistics["mean"].copy()))
            norm.running_var.copy_(torch.from_numpy(statistics["var"].copy()))
    return net.eval()


def make_app(net: CNN) -> FastAPI:
    """Return the service: ``/sync`` runs in FastAPI's thread pool, ``/async`` in its event loop."""
    app = FastAPI()

    def predict(request: Inputs) -> dict[str, Any]:
        tensor = request.inputs[0]
        image = torch.tensor(tensor.data, dtype=torch.float32).reshape(tensor.shape).permute(0, 3, 1, 2)
        with torch.inference_mode():
            probability = torch.softmax(net((image / WHITE - MEAN) / STD), 1)
        return {
            "outputs": [
                {
                    "name": "probability",
                    "shape": list(probability.shape),
                    "datatype": "FP32",
                    "data": probability.flatten().tolist(),
                }
            ]
        }

    @app.post("/sync")
    def sync(request: Inputs) -> dict[str, Any]:
        return predict(request)

    @app.post("/async")
    async def asynchronous(request: Inputs) -> dict[str, Any]:
        return predict(request)

    return app


if __name__ == "__main__":
    with np.load(sys.argv[1]) as file:
        app = make_app(make_net(dict(file)))
    uvicorn.run(app, port=int(sys.argv[2]), log_level="error", http="h11")
