#!/usr/bin/env python3
"""Run a command as several processes of this machine that work as one.

    scripts/launch_local.py -n 2 --devices-per-process 4 -- python -m jaxtrain.run --experiment digits_cnn

Each copy gets --coordinator, --processes and --process-id (and --simulate-devices) at its end, and its lines
are shown with its number before them. SIGINT and SIGTERM go to all of them. When one fails, the others are
ended, and the exit code is that of the first that failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO

PRINTING = threading.Lock()


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], usage="%(prog)s -n N [options] -- COMMAND ..."
    )
    parser.add_argument("-n", "--processes", type=_positive, required=True, metavar="N", help="how many")
    parser.add_argument(
        "--devices-per-process", type=_positive, metavar="K", help="each simulates K CPU devices"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="from SIGTERM to SIGKILL for the others when one has failed; default: 10",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("give the command after --, such as -- python -m jaxtrain.run --experiment digits_cnn")
    if command[0] in ("python", "python3"):
        command[0] = sys.executable
    if args.devices_per_process:
        command += ["--simulate-devices", str(args.devices_per_process)]
    command += ["--coordinator", f"127.0.0.1:{_free_port()}", "--processes", str(args.processes)]
    return Launch(args.grace).run([[*command, "--process-id", str(i)] for i in range(args.processes)])


class Launch:
    """The processes, and what has ended or asked them to end."""

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._processes: list[subprocess.Popen[str]] = []
        self._ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._asked: int | None = None

    def run(self, commands: list[list[str]]) -> int:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._forward)
        try:
            for number, command in enumerate(commands):
                self._start(number, command)
            return self._wait()
        except OSError as error:
            print(f"launch_local: {commands[0][0]} cannot be started: {error.strerror}", file=sys.stderr)
            return 2
        finally:
            for process in self._processes:  # what is left, and what it has started itself
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _start(self, number: int, command: list[str]) -> None:
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # else the terminal sends it a Ctrl-C too, and two end it at once
        )
        self._processes.append(process)
        assert process.stdout is not None and process.stderr is not None
        streams = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        readers = [threading.Thread(target=_show, args=(number, *pair), daemon=True) for pair in streams]

        def watch() -> None:
            code = process.wait()
            for reader in readers:  # its last lines come before what its end leads to
                reader.join(1.0)
            self._ended.put((number, code))

        for thread in (*readers, threading.Thread(target=watch, daemon=True)):
            thread.start()

    def _wait(self) -> int:
        """Until all have ended; the first code that is not 0, 128 + the signal's number for a signal."""
        left, first, deadline = len(self._processes), 0, None
        while left:
            try:
                wait = None if deadline is None else max(0.0, deadline - time.monotonic())
                number, code = self._ended.get(timeout=wait)
            except queue.Empty:
                print(
                    f"launch_local: {left} of them did not end within {self._grace:g} s: killed",
                    file=sys.stderr,
                )
                return first
            left -= 1
            code = 128 - code if code < 0 else code
            first = first or code
            # Those that a signal asked to stop are still saving, and a second signal would cut that off.
            asked = self._asked is not None and code == 128 + self._asked
            if code and not asked and deadline is None and left:
                print(f"launch_local: process {number} ended with {code}: ending the others", file=sys.stderr)
                self._signal(signal.SIGTERM)
                deadline = time.monotonic() + self._grace
        if self._asked is not None:
            print(f"launch_local: ended by {signal.Signals(self._asked).name}", file=sys.stderr)
        return first

    def _forward(self, signum: int, frame: object) -> None:
        self._asked = signum
        self._signal(signum)

    def _signal(self, signum: int) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signum)


def _show(number: int, source: IO[str], target: IO[str]) -> None:
    """Every line of ``source`` after its process number; goes on reading when nobody reads ``target``."""
    for line in source:
        with PRINTING, contextlib.suppress(OSError, ValueError):
            target.write(f"[{number}] {line.rstrip()}\n")
            target.flush()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("give at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
