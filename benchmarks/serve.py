"""Requests a second and p99 of ``serve``, with and without batches, beside FastAPI with PyTorch.

The network is ``digits_cnn``, trained for one epoch, with ``--widths``. Each client keeps one connection and
sends its next request when it has the answer; all run in this process, on the loopback interface, and share
the cores with the server. The services run in turn, and the outputs are compared before anything is timed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from jaxtrain.artifact import tensors
from jaxtrain.data import Digits

INFER = "/v2/models/digits_cnn/infer"
SIDES = {  # name: (server, address)
    "serve": ("batches", INFER),
    "serve, no wait": ("no wait", INFER),
    "serve, batches of 1": ("single", INFER),
    "FastAPI + PyTorch, def": ("torch", "/sync"),
    "FastAPI + PyTorch, async def": ("torch", "/async"),
}
UNITS = {"requests_per_second": "1/s", "p50_ms": "ms", "p99_ms": "ms", "cpu_ms": "ms"}
FLAGS = {"batches": (), "no wait": ("--max-wait", "0"), "single": ("--max-batch", "1", "--max-wait", "0")}


def run(*args: str) -> None:
    """Run a command of jaxtrain."""
    subprocess.run([sys.executable, "-m", *args], check=True, stdout=sys.stderr)


def versions(python: str) -> dict[str, str]:
    """Return the versions of the web servers, and of PyTorch, in an environment."""
    names = ("uvicorn", "h11", "starlette", "fastapi", "pydantic", "torch")
    script = f"import importlib.metadata as m, json; names = {names}\n"
    script += "found = {d.name.lower(): d.version for d in m.distributions()}\n"
    script += "print(json.dumps({n: found[n] for n in names if n in found}))"
    return dict(json.loads(subprocess.check_output([python, "-c", script], text=True)))


def free_port() -> int:
    """Return a port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


@contextlib.contextmanager
def start(command: Sequence[str], port: int) -> Iterator[int]:
    """Start a server, wait until it is ready, and yield its process id; stop it at the end."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as one:
                one.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                if one.recv(100).split()[1] in (b"200", b"404"):
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{' '.join(command)} does not start")
            time.sleep(0.2)
        yield process.pid
    finally:
        process.terminate()
        process.communicate()


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process so far, of all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def message(address: str, image: np.ndarray) -> bytes:
    """Return the bytes of a request for one image."""
    tensor = {"name": "image", "shape": [1, 8, 8, 1], "datatype": "UINT8", "data": image.ravel().tolist()}
    body = json.dumps(
        {"inputs": [tensor], **({"outputs": [{"name": "probability"}]} if "v2" in address else {})}
    )
    head = f"POST {address} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> bytes:
    """Send a request, and return the body of its answer."""
    writer.write(data)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    body = await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
    if b" 200 " not in head[:20]:
        raise SystemExit(f"{head!r} {body!r}")
    return body


async def load(port: int, messages: Sequence[bytes], clients: int, seconds: float) -> list[float]:
    """Return the latencies in seconds of all requests that clients sent within ``seconds``."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (start := time.perf_counter()) < end:
            await ask(reader, writer, messages[(number + len(latencies)) % len(messages)])
            latencies.append(time.perf_counter() - start)
        writer.close()

    await asyncio.gather(*map(client, range(clients)))
    return latencies


async def probabilities(port: int, messages: Sequence[bytes]) -> np.ndarray:
    """Return the outputs for the messages, one after another."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    bodies = [json.loads(await ask(reader, writer, data)) for data in messages]
    writer.close()
    return np.array([body["outputs"][0]["data"] for body in bodies])


def main() -> None:
    """Measure."""
    parser = common.arguments(__doc__ or "", rounds=5)
    parser.add_argument("--widths", default="32,64", help="of the network's stages; default: %(default)s")
    parser.add_argument("--clients", type=int, default=32, help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="of a side in a round; default: %(default)s"
    )
    parser.add_argument("--torch-python", metavar="PATH", help="a Python with torch, fastapi and uvicorn")
    args = parser.parse_args()
    images = Digits("test").gather(np.arange(64))["image"]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        model, weights = folder / "model.jaxtrain", folder / "weights.safetensors"
        settings = ("--set", "epochs=1", "--set", f"model.widths={args.widths}")
        run("jaxtrain.run", "--experiment", "digits_cnn", "--workdir", str(folder / "run"), *settings)
        run("jaxtrain", "export", "--workdir", str(folder / "run"), "--out", str(model))
        kind = ("--format", "safetensors")
        run("jaxtrain", "export", "--workdir", str(folder / "run"), "--out", str(weights), *kind)
        np.savez(folder / "weights.npz", **tensors.decode(weights.read_bytes(), str(weights)))
        ports = {server: free_port() for server in [*FLAGS, *(["torch"] if args.torch_python else [])]}
        pids = {}
        for server, port in ports.items():
            if server == "torch":
                command = [args.torch_python, "-m", "benchmarks.peers.torch_service"]
                command += [str(folder / "weights.npz"), str(port)]
            else:
                command = [sys.executable, "-m", "jaxtrain", "serve", "--model", str(model)]
                command += ["--port", str(port), *FLAGS[server]]
            pids[server] = stack.enter_context(start(command, port))
        sides = {side: place for side, place in SIDES.items() if place[0] in ports}
        rounds = measure(sides, ports, pids, images, args)
    report(args, rounds)


def measure(
    sides: dict[str, tuple[str, str]],
    ports: dict[str, int],
    pids: dict[str, int],
    images: np.ndarray,
    args: Any,
) -> dict[str, list[dict[str, float]]]:
    """Return requests/s, p50, p99 and the server's CPU time of a request, of each side in each round."""
    messages = {side: [message(address, image) for image in images] for side, (_, address) in sides.items()}
    outputs = {s: asyncio.run(probabilities(ports[sides[s][0]], messages[s][:16])) for s in sides}
    for found in outputs.values():
        np.testing.assert_allclose(found, outputs["serve"], atol=1e-4)
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(args.rounds + 1):
        for side in list(sides) if number % 2 else list(sides)[::-1]:
            seconds = args.seconds if number else min(1.0, args.seconds)  # the first round is thrown away
            before = cpu_seconds(pids[sides[side][0]])
            times = asyncio.run(load(ports[sides[side][0]], messages[side], args.clients, seconds))
            p50, p99 = (1000 * np.percentile(times, (50, 99))).tolist()
            if number:
                cpu = 1000 * (cpu_seconds(pids[sides[side][0]]) - before) / len(times)
                rate = len(times) / seconds
                rounds[side].append(
                    {"requests_per_second": rate, "p50_ms": p50, "p99_ms": p99, "cpu_ms": cpu}
                )
    return rounds


def report(args: Any, rounds: dict[str, list[dict[str, float]]]) -> None:
    """Print the medians, and the ratios to the service without batches and to PyTorch."""
    results = []
    for side, rows in rounds.items():
        for name, unit in UNITS.items():
            results.append(common.result(f"{side}: {name}", [row[name] for row in rows], unit))
    figures: dict[str, Any] = {"clients": args.clients, "seconds": args.seconds, "widths": args.widths}
    figures["server_versions"] = versions(sys.executable)
    figures["torch_versions"] = versions(args.torch_python) if args.torch_python else None
    skipped = {} if args.torch_python else {"FastAPI + PyTorch": "no --torch-python"}
    common.finish(args, "serve", results, figures, skipped)


if __name__ == "__main__":
    main()
