"""Wait for all processes over plain TCP before JAX starts: where one is missing, JAX itself ends by SIGABRT.

Process 0 listens where JAX's coordinator will listen a moment later. Each other process connects and sends
one line of JSON: its number, the number of processes and its versions. When all are there, process 0 closes
the port and answers each of them; they wait until JAX has opened the port again. Other programs that connect
are ignored.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxtrain import __version__
from jaxtrain.core.errors import InputError, RunError

LINE = 2048  # bytes; the longest message
GRACE = 5.0  # seconds beyond the timeout in which process 0 reports who is missing
ANSWER_SECONDS = 1.0  # in which a client must have sent its line


def meet(
    coordinator: str, processes: int, process_id: int, timeout: float, warn: Callable[[str], None]
) -> str:
    """Wait until all processes are there; returns the address of process 0 with its host as a number.

    Args:
      coordinator: ``HOST:PORT``, on the machine of process 0.
      processes: how many there are, 2 or more.
      process_id: which of them this is, from 0.
      timeout: seconds to wait for the others.
      warn: called with a line on process 0 when other machines can reach it.

    Raises:
      InputError: an address that cannot be used; processes with different settings or versions.
      RunError: a process is missing after ``timeout``.
    """
    addresses = _resolve(coordinator)
    own = {"jaxtrain": __version__, "jax": jax.__version__, "process": process_id, "processes": processes}
    if process_id:
        return _join(coordinator, own, timeout)
    with _listen(coordinator, addresses) as server:
        address = server.getsockname()
        if not _ip(address).is_loopback:
            warn(
                f"everyone who can reach {coordinator} can join this run (JAX's coordinator has no "
                "authentication): keep it inside a private network"
            )
        where = coordinator if address[0] in coordinator else f"{coordinator} (here {address[0]})"
        _wait_for_all(server, where, own, timeout)
    return _text(address)


def parse(coordinator: str) -> tuple[str, int]:
    """Split ``HOST:PORT``.

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


def _wait_for_all(server: socket.socket, where: str, own: dict[str, Any], timeout: float) -> None:
    """Process 0: let the others connect, then answer all of them, with the error that it raises if any."""
    joined: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as connections:
        try:
            _accept_all(server, where, own, timeout, joined, connections)
        except (InputError, RunError) as error:
            _answer(joined, {"error": str(error), "input": isinstance(error, InputError)})
            raise
        server.close()  # before the answer, after which all look for JAX's service at this port
        _answer(joined, {"error": None})
        for connection in joined.values():  # the side that closes first keeps the port busy for a minute
            with contextlib.suppress(OSError):
                connection.recv(1)


def _accept_all(
    server: socket.socket,
    where: str,
    own: dict[str, Any],
    timeout: float,
    joined: dict[int, socket.socket],
    connections: contextlib.ExitStack,
) -> None:
    """Fill ``joined`` with a connection to each other process; one that ended may connect again."""
    deadline = time.monotonic() + timeout
    others = range(1, own["processes"])
    while missing := [i for i in others if i not in joined or not _is_open(joined[i])]:
        server.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            connection, _ = server.accept()
        except OSError:  # the timeout, or a client that has closed its connection already
            if time.monotonic() < deadline:
                continue
            raise RunError(_missing(missing, where, own, timeout)) from None
        connections.enter_context(connection).settimeout(ANSWER_SECONDS)
        message = _receive(connection, "process")
        if message is None:  # another program
            continue
        number = message["process"]
        duplicate = number == 0 or (number in joined and _is_open(joined[number]))
        joined[-1 if duplicate else number] = connection  # before the check: it gets the answer too
        _check(message, own, where, duplicate)


def _check(message: dict[str, Any], own: dict[str, Any], where: str, duplicate: bool) -> None:
    for name, what in (("processes", "--processes"), ("jaxtrain", "jaxtrain"), ("jax", "jax")):
        if message.get(name) != own[name]:
            raise InputError(
                f"process {message['process']} has {what} {message.get(name)} and process 0 has {own[name]}: "
                "use the same for all"
            )
    if duplicate:
        raise InputError(
            f"two processes came to {where} with --process-id {message['process']}: give each its own, "
            f"from 0 to {own['processes'] - 1}, and each run its own port"
        )


def _missing(missing: list[int], where: str, own: dict[str, Any], timeout: float) -> str:
    many = len(missing) > 1
    return (
        f"process{'es' if many else ''} {', '.join(map(str, missing))} of {own['processes']} "
        f"{'have' if many else 'has'} not connected to {where} within {timeout:g} s: check that "
        f"{'they were' if many else 'it was'} started with the same --coordinator and can reach it"
    )


def _join(coordinator: str, own: dict[str, Any], timeout: float) -> str:
    """Every other process: connect to process 0, again until it is there; returns its address."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection(parse(coordinator), max(0.1, min(GRACE, timeout))) as connection:
                connection.sendall(_line(own))
                address = connection.getpeername()
                connection.settimeout(
                    timeout + GRACE
                )  # process 0 has the same timeout, and says who is missing
                answer = _receive(connection, "error")
            reason = "what answers there is not jaxtrain"
        except OSError as error:
            answer, reason = None, error.strerror or str(error)
        if answer is not None and answer["error"] is None:
            return _wait_for_service(address)
        if answer is not None:
            raise (InputError if answer["input"] else RunError)(answer["error"])
        if time.monotonic() > deadline:
            raise RunError(
                f"no process 0 at {coordinator} within {timeout:g} s ({reason}): check that it was started "
                "with the same --coordinator and that this machine can reach it"
            )
        time.sleep(0.1)


def _wait_for_service(address: Any) -> str:
    """Wait until JAX's service listens at ``address``: its client aborts the process where nothing does."""
    deadline = time.monotonic() + 2 * GRACE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(address[:2], GRACE):
            return _text(address)
        time.sleep(0.02)
    raise RunError(f"process 0 at {_text(address)} did not start JAX's service: see its own message")


def _resolve(coordinator: str) -> list[Any]:
    """Look up the addresses of the coordinator, as ``socket.getaddrinfo`` returns them."""
    host, port = parse(coordinator)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"--coordinator {coordinator}: unknown host {host} "
            f"({getattr(error, 'strerror', None) or error}): give its address"
        ) from error
    if any(_ip(address).is_unspecified for *_, address in found):
        raise InputError(
            f"--coordinator {coordinator} means every address of this machine, and the others cannot connect "
            "to that: give one address, in a private network"
        )
    return found


def _listen(coordinator: str, addresses: list[Any]) -> socket.socket:
    """Listen at the first of ``addresses`` that is this machine's."""
    reasons = []
    for family, _, _, _, address in addresses:
        server = socket.socket(family, socket.SOCK_STREAM)
        try:
            # Connections of an earlier run that linger do not keep the port busy; a listener does.
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
            server.listen(1024)
        except OSError as error:
            server.close()
            reasons.append(error.strerror)
        else:
            return server
    raise InputError(
        f"process 0 cannot listen at {coordinator} ({reasons[0]}): give --coordinator an address of the "
        "machine on which process 0 runs, and a free port"
    )


def _answer(connections: dict[int, socket.socket], message: dict[str, Any]) -> None:
    for connection in connections.values():
        with contextlib.suppress(OSError):
            connection.sendall(_line({"jaxtrain": __version__, **message}))


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _receive(connection: socket.socket, key: str) -> dict[str, Any] | None:
    """Read one message that has ``key``; None for anything else."""
    try:
        with connection.makefile("rb") as file:
            message = json.loads(file.readline(LINE))
    except (OSError, ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) and {"jaxtrain", key} <= message.keys() else None


def _is_open(connection: socket.socket) -> bool:
    """Return whether the process at the other end is still there."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        connection.settimeout(ANSWER_SECONDS)


def _ip(address: Any) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(address[0])


def _text(address: Any) -> str:
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"
