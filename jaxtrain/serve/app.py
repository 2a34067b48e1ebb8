"""The ASGI application: the Open Inference Protocol, the page, and Prometheus metrics."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

import jaxtrain
from jaxtrain.artifact.batch import check_batch
from jaxtrain.artifact.engines import Prediction
from jaxtrain.artifact.examples import Example
from jaxtrain.core.errors import InputError
from jaxtrain.serve import page, protocol
from jaxtrain.serve.batcher import Arrays, Batcher, Closed, QueueFull
from jaxtrain.serve.guard import Guard, error_response
from jaxtrain.serve.metrics import Metrics
from jaxtrain.serve.model import Servable
from jaxtrain.serve.present import present
from jaxtrain.serve.protocol import Refused
from jaxtrain.serve.settings import BODY_SECONDS, MAX_HELD_BODIES, MAX_PIXELS, Settings

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
CLIENT_GONE = 499  # of nginx: nobody reads it, and the metrics count it


class Service:
    """The endpoints, and the model behind them.

    Args:
      model: to serve.
      settings: limits.
      on_ready: called when the model is warm with the seconds that took, or with the error that prevents it.
    """

    def __init__(
        self,
        model: Servable,
        settings: Settings,
        on_ready: Callable[[float, Exception | None], None] = lambda seconds, error: None,
    ) -> None:
        self.model, self.settings, self.ready = model, settings, False
        self._on_ready = on_ready
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._decoders = ThreadPoolExecutor(2, thread_name_prefix="decode")
        self._held = 0  # bytes of all bodies
        self.batcher: Batcher | None = None
        self.metrics = Metrics(lambda: 0 if self.batcher is None else self.batcher.waiting)

    @contextlib.asynccontextmanager
    async def running(self, app: Any = None) -> AsyncIterator[None]:
        """Warm up in the background; at the end run what is queued."""
        loop, settings = asyncio.get_running_loop(), self.settings

        def run(batch: dict[str, np.ndarray]) -> Any:
            return loop.run_in_executor(self._executor, self.model.run, batch)

        limits = settings.max_batch, settings.max_wait, settings.max_queue
        async with Batcher(run, *limits, self.metrics.batch) as self.batcher:
            warming = asyncio.create_task(self.warm_up())
            try:
                yield
            finally:
                self.ready = False
                warming.cancel()
        for executor in (self._executor, self._decoders):
            executor.shutdown(cancel_futures=True)

    async def warm_up(self) -> None:
        """Run every batch size once; the service is ready after that."""
        loop, start, sizes = asyncio.get_running_loop(), time.perf_counter(), self.model.warm_up()
        try:
            while await loop.run_in_executor(self._executor, next, sizes, None):
                pass
        except Exception as error:
            self._on_ready(time.perf_counter() - start, error)
            return
        self.ready = True
        self.metrics.ready.set(1)
        self._on_ready(time.perf_counter() - start, None)

    async def index(self, request: Request) -> Response:
        """The page; it asks for everything else by itself."""
        return Response(page.HTML, media_type="text/html", headers={"Content-Security-Policy": page.POLICY})

    async def live(self, request: Request) -> Response:
        """Whether the process answers."""
        return _json({"live": True})

    async def server_ready(self, request: Request) -> Response:
        """Whether the model is warm."""
        self._check_ready()
        return _json({"ready": True})

    async def server_metadata(self, request: Request) -> Response:
        """Name and version, and the name of the model."""
        about = {"name": "jaxtrain", "version": jaxtrain.__version__, "extensions": []}
        return _json({**about, "models": [self.model.name]})

    async def model_metadata(self, request: Request) -> Response:
        """What the model takes and returns."""
        self._check_model(request)
        return _json(self.model.metadata())

    async def model_ready(self, request: Request) -> Response:
        """Whether the model is warm."""
        self._check_model(request)
        self._check_ready()
        return _json({"name": self.model.name, "ready": True})

    async def infer(self, request: Request) -> Response:
        """Predictions for arrays, or for texts."""
        self._check_model(request)
        self._check_ready()
        if _media_type(request) != "application/json" or "inference-header-content-length" in request.headers:
            raise Refused(415, "send JSON, with Content-Type: application/json and no binary data")
        async with self._body(request) as body:
            wanted = protocol.parse(body, self.model.manifest, self.settings.max_batch)
        arrays = self._tokenize(wanted.texts) if wanted.texts else wanted.arrays
        outputs = await self._in_time(request, self._submit(arrays))
        data = protocol.response(self.model.manifest, self.model.name, wanted, outputs)
        return Response(data, media_type="application/json")

    async def predict(self, request: Request) -> Response:
        """The classes of one image, sent as a file, or of a text, sent as ``{"text": "..."}``."""
        self._check_ready()
        kind, media = self.model.kind, _media_type(request)
        wanted = "application/json" if kind == "text" else "image/"
        if kind == "array":
            raise Refused(400, f"the model takes arrays: send them to /v2/models/{self.model.name}/infer")
        if not media.startswith(wanted):
            raise Refused(415, f"the model takes {kind}s: send one with Content-Type: {wanted}")
        async with self._body(request) as body:
            return _json(await self._in_time(request, self._predict(kind, body)))

    async def prometheus(self, request: Request) -> Response:
        """Metrics."""
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def routes(self) -> list[Route]:
        """Return what is answered."""
        model = "/v2/models/{name}"
        routes = [
            Route("/", self.index),
            Route("/metrics", self.prometheus),
            Route("/predict", self.predict, methods=["POST"]),
            Route("/v2", self.server_metadata),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.server_ready),
        ]
        for path in (model, model + "/versions/{version}"):
            routes += [
                Route(path, self.model_metadata),
                Route(path + "/ready", self.model_ready),
                Route(path + "/infer", self.infer, methods=["POST"]),
            ]
        return routes

    def _check_model(self, request: Request) -> None:
        name, version = request.path_params["name"], request.path_params.get("version")
        if name != self.model.name:
            raise Refused(404, f"there is no model of this name: the model is {self.model.name}")
        if version not in (None, (only := str(self.model.manifest.step))):
            raise Refused(404, f"{name} has no such version: the version is {only}")

    def _check_ready(self) -> None:
        if not self.ready:
            raise Refused(503, "the model is not ready: it is warming up, or the server stops")

    @contextlib.asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        """Read the body within the limits of bytes and time."""
        body = bytearray()
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refused(415, "send the body without Content-Encoding")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                await self._read(request, body)
        except TimeoutError as error:
            raise Refused(408, f"the body did not arrive within {BODY_SECONDS:g} s") from error
        except ClientDisconnect as error:
            raise Refused(CLIENT_GONE, "the client has gone") from error
        else:
            yield bytes(body)
        finally:
            self._held -= len(body)

    async def _read(self, request: Request, body: bytearray) -> None:
        limit = self.settings.max_body
        too_large = Refused(413, f"the body has more than {limit} bytes")
        if int(request.headers.get("content-length", 0)) > limit:  # h11 has checked that it is a number
            raise too_large
        async for chunk in request.stream():
            body += chunk
            self._held += len(chunk)
            if len(body) > limit:
                raise too_large
            if self._held > MAX_HELD_BODIES * limit:
                raise Refused(503, "too many bytes are sent at once: try again later")

    def _tokenize(self, texts: tuple[str, ...]) -> Arrays:
        rows = [self._text(text).inputs for text in texts]
        if len({np.shape(array) for row in rows for array in row.values() if np.ndim(array)}) > 1:
            raise Refused(
                400, "the texts of one request must have the same number of tokens: send each alone"
            )
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _text(self, text: str) -> Example:
        try:
            return self.model.reader.text(text.encode(), "the text")
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise Refused(400, "the text is not Unicode") from error
        except InputError as error:
            raise Refused(400, str(error)) from error

    async def _predict(self, kind: str, body: bytes) -> dict[str, Any]:
        """Decode, run and describe one example."""
        if kind == "text":
            data = protocol.read_json(body)
            if data.keys() != {"text"} or not isinstance(data["text"], str):
                raise Refused(400, 'send {"text": "..."}')
            example = self._text(data["text"])
        else:
            decode, loop = self.model.reader.image, asyncio.get_running_loop()
            try:
                example = await loop.run_in_executor(
                    self._decoders, decode, body, "the image", FORMATS, MAX_PIXELS
                )
            except InputError as error:
                raise Refused(400, str(error)) from error
        outputs = await self._submit(
            {name: np.asarray(array)[None] for name, array in example.inputs.items()}
        )
        row = {name: array[0] for name, array in outputs.items()}
        return present(self.model.manifest, Prediction(example, row))

    async def _submit(self, inputs: Arrays) -> dict[str, np.ndarray]:
        assert self.batcher is not None
        try:
            check_batch(self.model.manifest, inputs)
            return await self.batcher.submit(inputs)
        except QueueFull as error:
            raise Refused(429, f"{self.settings.max_queue} examples are waiting: try again later") from error
        except Closed as error:
            raise Refused(503, "the server stops") from error
        except InputError as error:
            raise Refused(400, str(error)) from error

    async def _in_time(self, request: Request, work: Coroutine[Any, Any, Any]) -> Any:
        """Return the result of ``work``; cancel it when the time is over or the client has gone."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait(
                (task, gone), timeout=self.settings.timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if task.done():
                return task.result()
            if gone.done():
                raise Refused(CLIENT_GONE, "the client has gone")
            raise Refused(503, f"no result within {self.settings.timeout:g} s: the server is too busy")
        finally:
            task.cancel()
            gone.cancel()


async def _disconnected(request: Request) -> None:
    """Wait until the client closes the connection, after its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def make_app(service: Service) -> Guard:
    """Return the ASGI application of a service."""
    app = Starlette(
        routes=service.routes(),
        lifespan=service.running,
        exception_handlers={Refused: _refused, HTTPException: _http_error, Exception: _bug},
    )
    app.router.redirect_slashes = False  # it is 404, as JSON
    return Guard(app, service.settings, service.metrics.request)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error_response(error.status, str(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is nothing at this address", 405: "this address does not take this method"}
    headers = None if error.headers is None else dict(error.headers)
    return error_response(error.status_code, what.get(error.status_code, error.detail), headers)


async def _bug(request: Request, error: Exception) -> Response:
    return error_response(500, "internal error: the server's stderr has the traceback")


def _json(data: Any) -> Response:
    return Response(protocol.encode(data), media_type="application/json")


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()
