"""What every request passes: the Host header, the token, headers of the response, the log and the counts."""

from __future__ import annotations

import hmac
import json
import sys
import time
import traceback
from collections.abc import Callable

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxtrain.serve.settings import Settings

OPEN = frozenset({"/", "/v2/health/live", "/v2/health/ready"})
"""Paths without the token: the page, which holds nothing of the model, and what orchestrators ask for."""
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """Return an error as the protocol writes it: ``{"error": message}``."""
    if status in (429, 503):
        headers = {"Retry-After": "1", **(headers or {})}
    body = json.dumps({"error": message})
    return Response(body, status, media_type="application/json", headers=headers)


class Guard:
    """ASGI middleware around the application.

    Args:
      app: the application.
      settings: who may use it.
      observe: called with the endpoint's name, the status and the seconds of each request.

    Attributes:
      stopping: whether the server stops: then each response closes its connection, and says so.
    """

    stopping = False

    def __init__(self, app: ASGIApp, settings: Settings, observe: Callable[[str, int, float], None]) -> None:
        self.app, self._settings, self._observe = app, settings, observe
        self._token = None if settings.token is None else settings.token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass on the application's start and end."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                close = [(b"connection", b"close")] if self.stopping else []
                message = {**message, "headers": [*message["headers"], *HEADERS, *close]}
            await send(message)

        try:
            await (self._refusal(scope) or self.app)(scope, receive, send_with_headers)
        except Exception:  # a bug, or the model failed: the other requests go on
            sys.stderr.write(traceback.format_exc())
            sys.stderr.flush()
            if not status:
                await error_response(500, "internal error")(scope, receive, send_with_headers)
        finally:
            seconds = time.perf_counter() - start
            endpoint = getattr(scope.get("endpoint"), "__name__", "other")
            self._observe(endpoint, status, seconds)
            if self._settings.verbose:
                self._log(scope, status, seconds)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = HTTPConnection(scope).headers
        hosts = self._settings.hosts
        if hosts is not None and _without_port(headers.get("host", "")) not in hosts:
            return error_response(
                403, "the Host header does not name this machine: use localhost or 127.0.0.1"
            )
        if self._token is None or scope["path"] in OPEN:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(given.encode("latin-1"), self._token):
            return None
        message = "this server wants its token: Authorization: Bearer TOKEN"
        return error_response(401, message, {"WWW-Authenticate": "Bearer"})

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        """Write a line; the target is printable ASCII, which h11 has checked, and its query is left out."""
        client = (scope.get("client") or ("-",))[0]
        target = scope.get("raw_path", b"").decode("ascii", "replace")[:200]
        sys.stderr.write(f"{client} {scope['method']} {target} {status} {1000 * seconds:.1f} ms\n")
        sys.stderr.flush()


def _without_port(host: str) -> str:
    """Return the name in a Host header.

    >>> [_without_port(host) for host in ("LocalHost:8000", "[::1]:8000", "[::1]", "")]
    ['localhost', '[::1]', '[::1]', '']
    """
    name, _, port = host.rpartition(":")
    return (name if name and port.isdigit() else host).lower()
