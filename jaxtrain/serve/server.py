"""The server process: its socket, uvicorn with time limits for connections, signals, and the start."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.signals import STOP_SIGNALS
from jaxtrain.core.text import first_line
from jaxtrain.serve import settings as limits
from jaxtrain.serve.app import Service, make_app
from jaxtrain.serve.model import Servable
from jaxtrain.serve.settings import Settings, is_loopback


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to ``host`` and ``port``; port 0 is a free one.

    Raises:
      InputError: the address cannot be bound, such as a port in use.
    """
    if not 0 <= port < 2**16:
        raise InputError(f"--port {port}: give 0 (a free port) to 65535")
    address = "127.0.0.1" if host == "localhost" else host
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"--host {host}: there is no such address ({error.strerror or error})") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(where)
        bound.listen(128)  # now, so that a port in use is known before the model is loaded
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        raise InputError(
            f"port {port} of {host} cannot be used ({error.strerror or error}): choose another --port, or 0 "
            "for a free one"
        ) from error
    return bound


class Connection(H11Protocol):
    """A connection that is closed when it sends no complete request head, or does not read, in time.

    uvicorn has a time limit for idle connections only, which one byte of a head ends.
    """

    _timer: asyncio.TimerHandle | None = None
    _unsent = float("inf")

    def connection_made(self, transport: Any) -> None:
        """Start to wait for a request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Stop the time while a request is answered; it does not start again with each byte of a head."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Start to wait for the next request, and for the client to read this response."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the time."""
        super().connection_lost(exc)
        self._stop()

    def shutdown(self) -> None:
        """Close the connection after the request that is being answered."""
        if self.conn.our_state is not h11.ERROR:
            super().shutdown()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(limits.HEAD_SECONDS, self._abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _abort(self) -> None:
        self._timer = None
        unsent = self.transport.get_write_buffer_size()
        if 0 < unsent < self._unsent:  # a large response that is being read
            self._unsent = unsent
            self._watch()
        else:
            self.transport.abort()


class Server(uvicorn.Server):
    """A server whose end after a signal is no failure; the second signal ends it at once."""

    signum: int | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into a request to stop; uvicorn would raise the signal again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {number: signal.signal(number, self.handle_exit) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop accepting and finish what is queued; the second time, stop at once."""
        if self.signum is not None:
            self.force_exit = True
        self.signum = sig
        self.config.app.stopping = True  # type: ignore[union-attr]
        self.should_exit = True


def serve(
    model: Servable, settings: Settings, bound: socket.socket, host: str, write: Callable[[str], Any]
) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code: 0, or 128 + the number of a second signal.

    Args:
      model: to serve.
      settings: limits.
      bound: of ``open_socket``.
      host: as the user wrote it.
      write: prints a line.

    Raises:
      RunError: the model cannot run.
    """
    failed: list[Exception] = []
    port = bound.getsockname()[1]
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{port}/"

    def on_ready(seconds: float, error: Exception | None) -> None:
        if error is not None:
            failed.append(error)
            server.should_exit = True
        elif not server.should_exit:
            write(f"ready after {seconds:.1f} s: {address} (Ctrl-C stops)")

    server = Server(_config(make_app(Service(model, settings, on_ready)), settings))
    write(f"{model.name} ({model.manifest.task}), listening on {address}")
    if not is_loopback(host):
        write(
            "other machines can reach it with the token; nothing is encrypted: put a proxy with TLS before it"
        )
    sizes = ", ".join(map(str, model.batches))
    texts = f" and texts of {', '.join(map(str, model.lengths))} tokens" if model.lengths else ""
    write(f"warming up: batches of {sizes}{texts}")
    asyncio.run(server.serve(sockets=[bound]))
    if failed:
        raise RunError(f"{model.name} cannot run: {first_line(failed[0])[:300]}") from failed[0]
    if server.force_exit:
        write("stopped at once: requests were lost")
        return 128 + (server.signum or 0)
    write(f"stopped after {server.server_state.total_requests:,} requests")
    return 0


def _config(app: Any, settings: Settings) -> uvicorn.Config:
    # What uvicorn logs is at most one connection's mistake; failures of the application are printed by Guard.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING if settings.verbose else logging.CRITICAL)
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=limits.MAX_CONNECTIONS,
        timeout_keep_alive=int(limits.HEAD_SECONDS),
        timeout_graceful_shutdown=int(settings.timeout + limits.BODY_SECONDS) + 1,
    )


def flush_line(text: str) -> None:
    """Print a line to stdout at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
