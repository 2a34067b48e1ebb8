"""Check and measure jaxtrain on an NVIDIA GPU; start it with ``scripts/gpu_check.sh``.

Every part runs in separate processes with a time limit, so that a failure does not affect the other parts.
The most important parts come first; when the time is over, the rest is reported as skipped. The record is
written after every part. This process never imports JAX, which would allocate the GPU's memory. Without a GPU
nothing is measured.

Exit code: 0 if no part failed (skipped parts and missed goals are in the record), 1 if one did, 2 for bad
arguments or no JAX.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu import parts, programs, runs
from benchmarks.gpu.session import Failed, Session, Skipped, TimedOut, missing

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = ("jax", "flax", "optax", "orbax", "rich")  # jaxtrain does not start without them
MIN_SECONDS = 10  # a part is not started with less time left
CPU_PATIENCE = 10.0  # a CPU that is busy with other work as well: what is tried out there is not the speed

Part = Callable[[Session], dict[str, Any]]

PARTS: dict[str, tuple[Part, float]] = {
    "doctor": (parts.doctor, 60),
    "tests": (parts.tests, 90),
    "exact": (parts.exact, 75),
    "peak": (parts.peak, 45),
    "programs": (programs.programs, 240),
    "cifar_airbench94": (parts.airbench, 120),
    "gpt": (parts.gpt, 150),
    "resnet50": (parts.resnet50, 130),
    "feeding": (parts.child_part("feeding", needs=("grain",)), 60),
    "airbench_torch": (parts.airbench_torch, 60),
    "saving": (parts.child_part("saving", lambda session: session.scratch), 60),
    "attention": (parts.child_part("attention"), 45),
    "scan": (parts.child_part("scan"), 75),
    "guard": (runs.guard, 60),
    "deterministic": (runs.deterministic, 120),
    "memory": (runs.memory, 120),
    "resume_digits": (runs.resume_digits, 120),
    "scaling": (runs.scaling, 60),
    "prepare": (runs.prepare, 90),
    "first_step": (runs.first_step, 60),
    "resume_cifar": (runs.resume_cifar, 120),
    "cifar_cnn": (runs.full("cifar_cnn"), 400),
}
"""Each part with its time limit in seconds, in the order in which they run."""
NEEDS = {
    "gpt": "peak",
    "resnet50": "peak",
    "first_step": "prepare",
    "resume_cifar": "prepare",
    "cifar_cnn": "prepare",
}


def run_parts(session: Session, names: list[str], save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run the parts while there is time.

    Args:
      session: where and how long to run.
      names: of the parts, in order.
      save: called with all results so far after each part.

    Returns:
      The results by name.
    """
    found: dict[str, Any] = {}
    for name in names:
        part, limit = PARTS[name]
        limit *= session.patience
        session.began = time.monotonic()
        session.limit = min(limit, session.deadline - session.began)
        try:
            if session.limit < MIN_SECONDS:
                raise Skipped("no time left")
            if why := missing(*REQUIRED):
                raise Skipped(why)
            figures = {"status": "ok", **part(session)}
        except Skipped as why:
            figures = {"status": "skipped", "why": str(why)}
        except TimedOut as why:  # a failure only if the part had all of its time
            cut = session.limit < limit
            status, reason = ("skipped", f"no time left: {why}") if cut else ("failed", str(why))
            figures = {"status": status, "why": reason}
        except Exception as why:  # the other parts still run
            figures = {"status": "failed", "why": str(why) if isinstance(why, Failed) else repr(why)}
        seconds = time.monotonic() - session.began
        found[name] = {**figures, "took_seconds": round(seconds, 1)}
        save(found)
        print(format_part(name, found[name]), flush=True)
    return found


def format_part(name: str, part: Mapping[str, Any]) -> str:
    """Format the status and the results of a part for the terminal.

    >>> line = {"name": "speed", "unit": "×", "median": 1.25, "n": 8, "goal": ">= 1.1", "met": True}
    >>> print(format_part("gpt", {"status": "ok", "took_seconds": 80.0, "results": [line]}))
    gpt: ok (80 s)
      speed: 1.25 × (n = 8), goal >= 1.1 met
    """
    notes = [str(part[key]) for key in ("why", "cut") if key in part]
    lines = [f"{name}: {' '.join([part['status'], *notes])} ({part['took_seconds']:.0f} s)"]
    for line in part.get("results", ()):
        goal = f", goal {line['goal']} {'met' if line['met'] else 'MISSED'}" if "goal" in line else ""
        lines.append(f"  {line['name']}: {line['median']:.4g} {line['unit']} (n = {line['n']}){goal}")
    lines += [f"  {note}" for note in part.get("notes", ())]
    lines += [f"  skipped {what}: {why}" for what, why in part.get("skipped", {}).items()]
    return "\n".join(lines)


def query_gpu() -> dict[str, Any] | None:
    """Query name, driver and memory of the first GPU, and their number, with nvidia-smi; None without one."""
    fields = ("name", "driver_version", "memory.total")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.splitlines()
    if not lines:
        return None
    first = dict(zip(fields, map(str.strip, lines[0].split(",")), strict=False))
    return {**first, "count": len(lines)}


def usable_gpus(device: Mapping[str, Any], card: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return how many GPUs one process can use, and the ``CUDA_VISIBLE_DEVICES`` that shows all of them.

    The environment's own ``CUDA_VISIBLE_DEVICES`` decides where it is set. A process can use one MIG slice.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if " MIG " in device["device"]:
        return {"gpus": 1}
    if given is not None or card is None:
        return {"gpus": device["count"]}
    return {"gpus": card["count"], "visible": ",".join(map(str, range(card["count"])))}


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description="Check and measure jaxtrain on an NVIDIA GPU.", allow_abbrev=False
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR_OR_TAR", help="CIFAR-10: original files or a prepared data set"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        metavar="DIR",
        help="folder for the record; default: benchmarks/results",
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="total time; default: %(default)g")
    parser.add_argument("--only", metavar="PART,PART", help=f"run only some of {','.join(PARTS)}")
    parser.add_argument(
        "--rest",
        type=Path,
        metavar="RECORD",
        help="run only the parts for which the run of RECORD had no time",
    )
    parser.add_argument("--allow-cpu", action="store_true", help="test this script, shortened, on a CPU")
    args = parser.parse_args()
    if not args.minutes >= 1:
        parser.error(f"--minutes {args.minutes:g}: give at least 1")
    if args.data is not None and not args.data.exists():
        parser.error(f"--data {args.data} does not exist")
    args.compared = []
    args.names = list(PARTS) if args.only is None else args.only.split(",")
    if unknown := [name for name in args.names if name not in PARTS]:
        parser.error(f"--only {unknown[0]}: there are {', '.join(PARTS)}")
    if args.rest is not None:
        try:
            record = json.loads(args.rest.read_text())
            args.names = unfinished(record, args.names)
            args.compared = list(record["figures"].get("programs", {}).get("cases", ()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--rest {args.rest} is not a record of this script: {error!r}")
    return args


def unfinished(record: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return those parts for which an earlier run had no time, with what they need of others.

    >>> late = {"status": "skipped", "why": "no time left"}
    >>> parts = {"gpt": {"status": "ok"}, "prepare": {"status": "ok"}, "resume_cifar": late}
    >>> unfinished({"parts": parts}, ["gpt", "scan", "prepare", "resume_cifar"])
    ['scan', 'prepare', 'resume_cifar']
    """
    names = list(names)
    left = set()
    for name in names:
        part = record["parts"].get(name, {"why": "no time left"})
        reasons = (part.get("why", ""), *part.get("skipped", {}).values())
        cut = "cut" in part and part["took_seconds"] < PARTS[name][1] - 1  # by the end of the run
        left |= {name} if cut or any(why.startswith("no time left") for why in reasons) else set()
    left |= {NEEDS[name] for name in left & set(NEEDS)}
    return [name for name in names if name in left]


def free_path(folder: Path, name: str) -> Path:
    """Return the path of a new record: two runs of one day do not overwrite each other's."""
    paths = (folder / f"{name}{suffix}.json" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(path for path in paths if not path.exists())


def make_record(
    device: dict[str, Any], card: dict[str, Any] | None, parts: Mapping[str, Any]
) -> dict[str, Any]:
    """Make the record: like that of ``benchmarks.common.finish``, with the status of every part."""
    skipped = {name: part["why"] for name, part in parts.items() if part["status"] != "ok"}
    for name, part in parts.items():
        skipped |= {f"{name}: {what}": why for what, why in part.get("skipped", {}).items()}
        skipped |= {f"{name}: the rest": part["cut"]} if "cut" in part else {}
    return {
        "benchmark": "gpu_check",
        "command": shlex.join(["scripts/gpu_check.sh", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        **device,
        "cores": len(os.sched_getaffinity(0)),
        "nvidia": card,
        "results": [line for part in parts.values() for line in part.get("results", ())],
        "figures": {name: part["figures"] for name, part in parts.items() if "figures" in part},
        "skipped": skipped,
        "parts": {
            name: {key: value for key, value in part.items() if key not in ("results", "figures")}
            for name, part in parts.items()
        },
    }


def main() -> int:
    """Run the checks; returns the exit code."""
    args, began, card = parse_arguments(), time.monotonic(), query_gpu()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what has been started, too
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env.setdefault("CUDA_VISIBLE_DEVICES", "0")  # measure a single card
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        scratch, data = Path(folder), args.data and args.data.resolve()
        env |= shared_environment(scratch)
        session = Session(scratch, data, False, env, began + 60 * args.minutes - 15, 90.0, began)
        try:
            device = session.child("device")
        except Failed as why:
            print(f"nothing was measured: JAX does not start: {why}")
            return 2
        session.cpu = device["platform"] not in ("gpu", "cuda")
        if session.cpu and not args.allow_cpu:
            unused = "JAX does not use the NVIDIA GPU (install jax[cuda12] or jax[cuda13])"
            why = unused if card else "no NVIDIA GPU here"
            print(f"{why}: nothing was measured; skipped: {', '.join(args.names)}")
            return 0
        session.memory = device["memory"] or 0
        session.facts |= usable_gpus(device, card) | {"compared": args.compared}
        if session.cpu:  # compiling takes most of the time, and the figures are not used
            env.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
            session.patience = CPU_PATIENCE
        device = {**device, "device": "cpu"} if session.cpu else device
        slug = re.sub(r"[^a-z0-9]+", "-", device["device"].lower()).strip("-")
        args.out.mkdir(parents=True, exist_ok=True)
        path = free_path(args.out, f"gpu_check-{slug}-{datetime.date.today().isoformat()}")

        def save(found: dict[str, Any]) -> None:
            record = make_record(device, card, found) | {"seconds": round(time.monotonic() - began, 1)}
            path.write_text(json.dumps(record, indent=1, default=float) + "\n")

        found = run_parts(session, args.names, save)
    print(f"written to {path}")
    return 1 if any(part["status"] == "failed" for part in found.values()) else 0


def shared_environment(scratch: Path) -> dict[str, str]:
    """Return environment variables of all parts: one compile cache, and no preallocated GPU memory."""
    cache = scratch / "compiled"
    cache.mkdir(mode=0o700)
    return {
        "TFDS_DATA_DIR": str(scratch / "tfds"),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
    }


if __name__ == "__main__":
    sys.exit(main())
