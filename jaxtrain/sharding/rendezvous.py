"""Have all processes come? Asked over plain TCP first: where one is missing, JAX itself ends by SIGABRT.

Process 0 listens where JAX's coordinator will listen a moment later. Each of the others says in one line of
JSON who it is. When all have come, process 0 closes the port and tells them to go on, and they wait until
JAX has opened it again. Whoever connects and says anything else is not heard.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxtrain import __version__
from jaxtrain.core.errors import InputError, RunError

LINE = 2048  # bytes; no line of ours is longer
GRACE = 5.0  # seconds, for what takes a moment on a machine that is there


def meet(
    coordinator: str, processes: int, process_id: int, timeout: float, warn: Callable[[str], None]
) -> str:
    """Wait until all processes are there; returns the address of process 0 with its host as a number.

    Args:
      coordinator: ``HOST:PORT``, on the machine of process 0.
      processes: how many there are, 2 or more.
      process_id: which of them this is, from 0.
      timeout: seconds to wait for the others.
      warn: takes a line on process 0 when other machines can reach it.

    Raises:
      InputError: an address that cannot be used, or processes that do not fit together.
      RunError: somebody has not come in time.
    """
    addresses = _resolve(coordinator)
    who = {"jaxtrain": __version__, "jax": jax.__version__, "process": process_id, "processes": processes}
    if process_id:
        return _join(coordinator, addresses, who, timeout)
    with _listen(coordinator, addresses) as server:
        address = server.getsockname()
        if not _number(address).is_loopback:
            warn(
                f"whoever can reach {coordinator} can join this run, because JAX's coordinator asks nobody "
                "who they are: keep it inside a private network"
            )
        _Reception(server, coordinator, who, timeout).run()
    return _text(address)


def parse(coordinator: str) -> tuple[str, int]:
    """The host and the port of ``HOST:PORT``.

    Raises:
      InputError: it is not of that form.

    >>> parse("[fd00::1]:29400")
    ('fd00::1', 29400)
    """
    host, _, port = coordinator.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    number = int(port) if port.isascii() and port.isdigit() and len(port) < 6 else 0
    if not host or not 0 < number < 2**16 or "[" in host or "]" in host or (":" in host) != bracketed:
        raise InputError(
            f"--coordinator {coordinator}: write HOST:PORT, such as 10.0.0.1:29400 or [fd00::1]:29400"
        )
    return host, number


class _Reception:
    """Process 0's side: lets the others come, refuses what does not fit, and ignores strangers."""

    def __init__(self, server: socket.socket, where: str, who: dict[str, Any], timeout: float) -> None:
        self._server, self._where, self._who, self._timeout = server, where, who, timeout
        self._came: dict[int, socket.socket] = {}
        self._heard: dict[socket.socket, bytes] = {}  # of every connection
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        try:
            self._wait()
            # The port is free before anybody goes on, and they look for JAX's service there.
            self._server.close()
            self._tell("go", "")
            for connection in self._came.values():  # whoever closes first keeps the port busy for a minute
                with contextlib.suppress(OSError):
                    while connection.recv(LINE):
                        pass
        except InputError as error:
            self._tell("input", str(error))
            raise
        except RunError as error:
            self._tell("run", str(error))
            raise
        finally:
            self._selector.close()
            for connection in self._heard:
                connection.close()

    def _wait(self) -> None:
        deadline = time.monotonic() + self._timeout
        self._selector.register(self._server, selectors.EVENT_READ)
        while missing := [i for i in range(1, self._who["processes"]) if i not in self._came]:
            left = deadline - time.monotonic()
            if left <= 0:
                raise RunError(self._nobody(missing))
            for key, _ in self._selector.select(left):
                if key.fileobj is self._server:
                    with contextlib.suppress(OSError):  # it has hung up already
                        connection, _ = self._server.accept()
                        connection.settimeout(GRACE)
                        self._selector.register(connection, selectors.EVENT_READ)
                        self._heard[connection] = b""
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._hear(key.fileobj)

    def _hear(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(LINE)
        except OSError:
            data = b""
        known = connection in self._came.values()
        if data and not known:
            self._heard[connection] += data
            heard = self._heard[connection]
            if b"\n" not in heard and len(heard) < LINE:
                return
            message = _message(heard)
            if message is not None:
                self._admit(message, connection)
                return
        if not data or not known:  # a process that is gone and may come again, or a stranger
            self._selector.unregister(connection)
            del self._heard[connection]
            self._came = {i: other for i, other in self._came.items() if other is not connection}
            connection.close()

    def _admit(self, message: dict[str, Any], connection: socket.socket) -> None:
        came, known = message.get("process"), self._came
        self._came = {**known, -1: connection}  # whatever is wrong, it is told too
        if message.get("processes") != self._who["processes"]:
            raise InputError(
                f"process {came} was started with --processes {message.get('processes')} and process 0 with "
                f"--processes {self._who['processes']}: give all the same number"
            )
        for name in ("jaxtrain", "jax"):
            if message.get(name) != self._who[name]:
                raise InputError(
                    f"process {came} has {name} {message.get(name)} and process 0 has {self._who[name]}: "
                    "install the same everywhere"
                )
        if came in (0, *known):
            raise InputError(
                f"two processes came to {self._where} with --process-id {came}: give each its own, of 0 to "
                f"{self._who['processes'] - 1}, and each run its own port"
            )
        self._came = {**known, message["process"]: connection}

    def _tell(self, verdict: str, text: str) -> None:
        for connection in self._came.values():
            with contextlib.suppress(OSError):
                connection.sendall(_line({"jaxtrain": __version__, "verdict": verdict, "text": text}))

    def _nobody(self, missing: list[int]) -> str:
        many = len(missing) > 1
        host, _ = parse(self._where)
        own = self._server.getsockname()
        here = f" (here {own[0]})" if own[0] != host else ""
        return (
            f"process{'es' if many else ''} {', '.join(map(str, missing))} of {self._who['processes']} "
            f"{'have' if many else 'has'} not come to {self._where}{here} within {self._timeout:g} s: see "
            "whether they were started, with the same --coordinator, and can reach it"
        )


def _join(where: str, addresses: list[Any], who: dict[str, Any], timeout: float) -> str:
    """The side of every other process; returns the address at which process 0 answered."""
    deadline = time.monotonic() + timeout
    why = "nothing listens there"
    while True:
        for family, _, _, _, address in addresses:
            try:
                with socket.socket(family, socket.SOCK_STREAM) as connection:
                    connection.settimeout(max(0.1, min(GRACE, deadline - time.monotonic())))
                    connection.connect(address)
                    connection.sendall(_line(who))
                    # Process 0 has its own time-out and says so; this one is for a process 0 that is stuck.
                    connection.settimeout(timeout + GRACE)
                    answer = _answer(connection, where)
            except OSError as error:
                why = error.strerror or str(error)
                continue
            if answer is None:
                why = "it hung up"
            elif answer["verdict"] == "go":
                return _opened(family, address)
            else:
                kind = InputError if answer["verdict"] == "input" else RunError
                raise kind(str(answer["text"]))
        if time.monotonic() > deadline:
            raise RunError(
                f"no process 0 at {where} within {timeout:g} s ({why}): see whether it was started, with the "
                "same --coordinator, and whether this machine can reach it"
            )
        time.sleep(0.1)


def _answer(connection: socket.socket, where: str) -> dict[str, Any] | None:
    """What process 0 says; None when it hangs up without a word."""
    heard = b""
    while b"\n" not in heard and len(heard) < LINE:
        data = connection.recv(LINE)
        if not data:
            break
        heard += data
    if not heard:
        return None
    message = _message(heard)
    if message is None or not {"verdict", "text"} <= message.keys():
        raise InputError(f"another program than jaxtrain answers at {where}: choose another port")
    return message


def _opened(family: int, address: Any) -> str:
    """Wait until JAX's service is there: its client ends the process where nobody answers."""
    deadline = time.monotonic() + 2 * GRACE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.settimeout(GRACE)
            connection.connect(address)
            return _text(address)
        time.sleep(0.02)
    raise RunError(f"process 0 at {_text(address)} did not start JAX's service: see its own message")


def _resolve(coordinator: str) -> list[Any]:
    """Where to try, as ``socket.getaddrinfo`` has it."""
    host, port = parse(coordinator)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"--coordinator {coordinator}: no machine is called {host} "
            f"({getattr(error, 'strerror', None) or error}): give its address"
        ) from error
    for _, _, _, _, address in found:
        if _number(address).is_unspecified:
            raise InputError(
                f"--coordinator {coordinator} is every address of this machine and none that the others can "
                "go to: give one, in a private network"
            )
    return found


def _listen(coordinator: str, addresses: list[Any]) -> socket.socket:
    """Listen at the first of ``addresses`` that is this machine's."""
    for family, _, _, _, address in addresses:
        server = socket.socket(family, socket.SOCK_STREAM)
        try:
            # Connections of an earlier run that linger do not keep the port; a listener does.
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
            server.listen(1024)
        except OSError as error:
            server.close()
            if error.errno == errno.EADDRNOTAVAIL:
                continue
            if error.errno == errno.EADDRINUSE:
                raise InputError(
                    f"process 0: port {address[1]} of {address[0]} is in use, by another run or program: "
                    "choose another in --coordinator"
                ) from error
            raise InputError(
                f"process 0: cannot listen at {coordinator} ({error.strerror}): choose another --coordinator"
            ) from error
        return server
    raise InputError(
        f"process 0: {coordinator} is no address of this machine: process 0 runs where --coordinator points"
    )


def _number(address: Any) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(address[0])


def _text(address: Any) -> str:
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _message(heard: bytes) -> dict[str, Any] | None:
    """The first line, if it is one of ours."""
    try:
        message = json.loads(heard.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) and "jaxtrain" in message else None
