"""Models in NumPy for the tests of the service, and a client that calls the application in this process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np

from jaxtrain.artifact.manifest import InputSpec, Manifest
from jaxtrain.serve.app import Service, make_app
from jaxtrain.serve.guard import Guard
from jaxtrain.serve.model import Servable
from jaxtrain.serve.settings import Settings, loopback_names

LABELS = ("cat", "<img src=x onerror=alert(1)>", "dog")
LOCAL = loopback_names("127.0.0.1")


def manifest(task: str, inputs: dict[str, InputSpec], outputs: dict[str, InputSpec], **more: Any) -> Manifest:
    """Return a manifest of the name ``example`` and step 7."""
    fields: dict[str, Any] = {"labels": None, "text": None, "sizes": {}, "metrics": {}, "config": {}}
    return Manifest(
        "example", 7, task, inputs, outputs, platforms=("cpu",), versions={}, **{**fields, **more}
    )


class Engine:
    """A model in NumPy.

    Args:
      about: its manifest.
      function: ``inputs -> outputs``.
    """

    words: bytes | None = None

    def __init__(self, about: Manifest, function: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.manifest, self._function = about, function
        self.batches: list[tuple[int, ...]] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, inputs: Any) -> dict[str, Any]:
        """Note the shape of the batch, wait until it may go, and compute."""
        self.batches.append(next(iter(inputs.values())).shape)
        self.go.wait()
        return self._function(inputs)


IMAGE = manifest(
    "classification",
    {"image": InputSpec("uint8", ("batch", 2, 2, 1), white=255)},
    {
        "label": InputSpec("int32", ("batch",)),
        "logits": InputSpec("float32", ("batch", 3)),
        "probability": InputSpec("float32", ("batch", 3)),
    },
    labels=LABELS,
)


def classify(inputs: dict[str, Any]) -> dict[str, Any]:
    """The logits are the first three pixels over 64; pixel 3 of value 13 is a model that fails, 14 NaN."""
    pixels = inputs["image"].reshape(-1, 4).astype(np.float32)
    if (pixels[:, 3] == 13).any():
        raise RuntimeError("the model fails")
    logits = np.where(pixels[:, 3:] == 14, np.float32("nan"), pixels[:, :3] / 64)
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return {
        "label": logits.argmax(-1).astype(np.int32),
        "logits": logits,
        "probability": e / e.sum(-1, keepdims=True),
    }


def images() -> Engine:
    """A classifier of images of 2 × 2 pixels."""
    return Engine(IMAGE, classify)


def texts() -> Engine:
    """A language model of any length up to 100: the next byte is the last one."""
    about = manifest(
        "language_model",
        {"text": InputSpec("int32", ("batch", "length"), 0, 255)},
        {"logits": InputSpec("float32", ("batch", "length", 256))},
        sizes={"length": 100},
        text={"tokens": "bytes"},
    )
    return Engine(about, lambda inputs: {"logits": np.eye(256, dtype=np.float32)[inputs["text"]] * 9})


def numbers(dtype: str) -> Engine:
    """A regression of two numbers: their sum."""
    about = manifest(
        "regression",
        {"x": InputSpec(dtype, ("batch", 2))},
        {"value": InputSpec(dtype, ("batch",))},
    )
    return Engine(about, lambda inputs: {"value": inputs["x"].sum(-1)})


class Client(httpx.AsyncClient):
    """A client of one application in this process.

    Attributes:
      service: behind the application.
      guard: the application.
    """

    service: Service
    guard: Guard


@contextlib.asynccontextmanager
async def client(
    engine: Any, *, warm: bool = True, base: str = "http://127.0.0.1:8000", **settings: Any
) -> AsyncIterator[Client]:
    """Start the application, wait until it is warm, and yield a client."""
    chosen = Settings(**{"max_batch": 4, "max_wait": 0.0, "max_queue": 8, "hosts": LOCAL, **settings})
    ready = asyncio.Event()
    service = Service(Servable(engine, chosen.max_batch), chosen, lambda seconds, error: ready.set())
    guard = make_app(service)
    async with service.running():
        if warm:
            await ready.wait()
        async with Client(transport=httpx.ASGITransport(guard), base_url=base) as one:
            one.service, one.guard = service, guard
            try:
                yield one
            finally:
                if isinstance(engine, Engine):
                    engine.go.set()  # a test that fails must not wait for it


def request(data: Any, shape: tuple[int, ...] = (1, 2, 2, 1), **fields: Any) -> dict[str, Any]:
    """Return an inference request for ``images``."""
    tensor = {"name": "image", "shape": list(shape), "datatype": "UINT8", "data": data, **fields}
    return {"inputs": [tensor]}


INFER = "/v2/models/example/infer"
