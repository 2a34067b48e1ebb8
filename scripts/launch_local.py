#!/usr/bin/env python3
"""Run a command as several processes of one JAX program on this machine.

    scripts/launch_local.py -n 2 --devices-per-process 4 -- python -m jaxtrain.run --experiment digits_cnn

Appends --coordinator, --processes and --process-id (and --simulate-devices) to each copy of the command, and
prefixes its output lines with its process index. Forwards SIGINT and SIGTERM to all processes. If one fails,
terminates the others and exits with the code of the first that failed. Sets GLIBC_TUNABLES to enable huge
pages (faster steps on a Linux CPU) unless it is set.
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

PRINT_LOCK = threading.Lock()


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        usage="%(prog)s -n N [options] -- COMMAND ...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-n", "--processes", type=_positive, required=True, metavar="N", help="number of processes"
    )
    parser.add_argument(
        "--devices-per-process", type=_positive, metavar="K", help="simulate K CPU devices in each process"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="after a failure, time from SIGTERM to SIGKILL for the others; default: %(default)g",
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
    """A group of processes; forwards signals to them and collects their exit codes."""

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._processes: list[subprocess.Popen[str]] = []
        self._ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._signum: int | None = None

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
            for process in self._processes:  # those still running, with their children
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _start(self, number: int, command: list[str]) -> None:
        process = subprocess.Popen(
            command,
            env={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # else the terminal sends Ctrl-C to it too, and a second one skips saving
        )
        self._processes.append(process)
        assert process.stdout is not None and process.stderr is not None
        streams = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        readers = [
            threading.Thread(target=_print_lines, args=(number, *pair), daemon=True) for pair in streams
        ]

        def wait_for_exit() -> None:
            code = process.wait()
            for reader in readers:  # print its last lines before messages about its exit
                reader.join(1.0)
            self._ended.put((number, code))

        for thread in (*readers, threading.Thread(target=wait_for_exit, daemon=True)):
            thread.start()

    def _wait(self) -> int:
        """Wait for all processes; returns the first nonzero code (128 + signal number after a signal)."""
        left, first, deadline = len(self._processes), 0, None
        while left:
            try:
                wait = None if deadline is None else max(0.0, deadline - time.monotonic())
                number, code = self._ended.get(timeout=wait)
            except queue.Empty:
                many, grace = f"{left} of {len(self._processes)} processes", f"{self._grace:g} s"
                print(f"launch_local: {many} did not exit within {grace}: killed", file=sys.stderr)
                return first
            left -= 1
            code = 128 - code if code < 0 else code
            first = first or code
            # After a forwarded signal the others are still saving; a second signal would interrupt that.
            forwarded = self._signum is not None and code == 128 + self._signum
            if code and not forwarded and deadline is None and left:
                print(
                    f"launch_local: process {number} exited with {code}: terminating the others",
                    file=sys.stderr,
                )
                self._signal(signal.SIGTERM)
                deadline = time.monotonic() + self._grace
        if self._signum is not None:
            print(f"launch_local: stopped by {signal.Signals(self._signum).name}", file=sys.stderr)
        return first

    def _forward(self, signum: int, frame: object) -> None:
        self._signum = signum
        self._signal(signum)

    def _signal(self, signum: int) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signum)


def _print_lines(number: int, source: IO[str], target: IO[str]) -> None:
    """Copy lines, prefixed with the process index; keeps reading after ``target`` is closed."""
    for line in source:
        with PRINT_LOCK, contextlib.suppress(OSError, ValueError):
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
