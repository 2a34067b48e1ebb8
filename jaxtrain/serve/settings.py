"""Limits of the service and who may use it."""

from __future__ import annotations

import dataclasses
import ipaddress

from jaxtrain.core.errors import InputError

TOKEN = "JAXTRAIN_SERVE_TOKEN"
"""The environment variable with the token that clients must send."""
SHORTEST_TOKEN = 16  # characters
BODY_SECONDS = 30.0
"""The time in which a request's body must arrive."""
HEAD_SECONDS = 20.0
"""The time in which a connection must send the next complete request head, and read what is sent to it."""
MAX_PIXELS = 2**24
"""Largest image that is decoded: 16.8 million pixels."""
MAX_CONNECTIONS = 512
"""Above this number of connections, requests get 503."""
MAX_HELD_BODIES = 16
"""All bodies together may hold this many times ``max_body``."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the service.

    Attributes:
      max_batch: examples in a batch, and in a request, at most.
      max_wait: seconds that a request waits for others at most, before its batch starts.
      max_queue: examples that wait for a batch at most; above it requests get 429.
      max_body: bytes of a request's body at most.
      timeout: seconds after which a request that has no result gets 503.
      token: what clients must send; None: nothing.
      hosts: the names in the Host header that are answered, in lower case; None: all.
      verbose: write a line for each request to stderr.

    >>> Settings(max_batch=0)
    Traceback (most recent call last):
        ...
    jaxtrain.core.errors.InputError: --max-batch 0: give 1 to 1024
    """

    max_batch: int = 32
    max_wait: float = 0.002
    max_queue: int = 256
    max_body: int = 2**24
    timeout: float = 30.0
    token: str | None = None
    hosts: frozenset[str] | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.max_batch <= 1024:
            raise InputError(f"--max-batch {self.max_batch}: give 1 to 1024")
        if not 0 <= self.max_wait <= 1:
            raise InputError(f"--max-wait {1000 * self.max_wait:g}: give 0 to 1000 milliseconds")
        if self.max_queue < self.max_batch:
            raise InputError(f"--max-queue {self.max_queue}: give at least --max-batch, {self.max_batch}")
        if not 1 <= self.max_body <= 2**30:
            raise InputError("--max-body: give from 1 byte to 1 GiB")
        if not 0 < self.timeout <= 3600:
            raise InputError(f"--timeout {self.timeout:g}: give seconds above 0, at most 3600")
        if self.token is not None and not _is_token(self.token):
            raise InputError(
                f"{TOKEN} must have at least {SHORTEST_TOKEN} letters, digits or signs of ASCII, no spaces: "
                "for example the output of openssl rand -hex 32"
            )


def _is_token(text: str) -> bool:
    return len(text) >= SHORTEST_TOKEN and text.isascii() and text.isprintable() and " " not in text


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches ``host``, without asking for a name's address.

    >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.com")]
    [True, True, True, False, False]
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def loopback_names(host: str) -> frozenset[str]:
    """Return the names in a Host header that mean this machine.

    A page of another site may give its own name the address 127.0.0.1 (DNS rebinding); then the browser lets
    it read our answers, and only the Host header shows the name.
    """
    return frozenset({"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host})
