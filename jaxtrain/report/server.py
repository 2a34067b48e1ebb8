"""``report --serve``: the page on this machine, refreshed while runs write."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.report import page
from jaxtrain.report.runs import Reader

HOST = "127.0.0.1"
NAMES = frozenset({"localhost", HOST})
"""Names in the Host header that are answered: a page of another site may give its own name our address."""
EVERY = 2.0
"""Seconds between two looks of the page."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Follower:
    """The content of the page, made again when a run has written something.

    Args:
      reader: of the runs.

    Raises:
      InputError: a folder holds no run.
      RunError: a file cannot be read.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader, self._lock = reader, threading.Lock()
        self._signature: Any = None
        self.look()

    def look(self) -> tuple[str, page.Content]:
        """Return the version of the content, and the content."""
        with self._lock:
            signature = self._reader.signature()
            if signature != self._signature:
                self._content = page.make_content(self._reader.read())
                self._signature = signature
                self._version = hashlib.sha256(repr(signature).encode()).hexdigest()[:16]
            return self._version, self._content


class Server(http.server.ThreadingHTTPServer):
    """The server; ``serve_forever`` runs it.

    Args:
      follower: what it shows.
      port: 0 is a free one.

    Raises:
      InputError: the port cannot be used.
    """

    daemon_threads = True

    def __init__(self, follower: Follower, port: int) -> None:
        self.follower = follower
        if not 0 <= port < 65536:
            raise InputError(f"--port {port}: give 0 (a free one) to 65535")
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise InputError(
                f"port {port} of {HOST} cannot be used ({error.strerror}): choose another with --port, or 0 "
                "for a free one"
            ) from error

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that have gone away."""


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers ``/``, the page, and ``/data?version=V``, what has changed since then."""

    server: Server
    timeout = 30
    server_version, sys_version = "jaxtrain", ""

    def do_GET(self) -> None:
        """Answer a request."""
        name = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if name.lower() not in NAMES:
            self._send_error(HTTPStatus.FORBIDDEN, "the Host header does not name this machine")
            return
        target = urllib.parse.urlsplit(self.path)
        paths: dict[str, Callable[[str], None]] = {"/": self._send_page, "/data": self._send_data}
        answer = paths.get(target.path)
        if answer is None:
            self._send_error(HTTPStatus.NOT_FOUND, "there is nothing here")
            return
        try:
            answer(target.query)
        except (InputError, RunError) as error:  # a run was removed, or a file damaged
            self._send_error(HTTPStatus.SERVICE_UNAVAILABLE, str(error))

    def _send_page(self, query: str) -> None:
        version, content = self.server.follower.look()
        text = page.render(content, live=(version, EVERY))
        self._send(HTTPStatus.OK, "text/html; charset=utf-8", text.encode())

    def _send_data(self, query: str) -> None:
        version, content = self.server.follower.look()
        if urllib.parse.parse_qs(query).get("version") == [version]:
            self._send(HTTPStatus.NO_CONTENT)
            return
        body = {"version": version, "parts": content.parts, "data": content.data}
        self._send(HTTPStatus.OK, "application/json", json.dumps(body, allow_nan=False).encode())

    def _send_error(self, status: HTTPStatus, message: str) -> None:
        self._send(status, "application/json", json.dumps({"error": message}).encode())

    def _send(self, status: HTTPStatus, kind: str | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if kind is not None:
            self.send_header("Content-Type", kind)
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Write no log."""
