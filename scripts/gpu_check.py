"""Checks and measures jaxtrain on an NVIDIA GPU; start it with ``scripts/gpu_check.sh``.

Every part runs in a process of its own with a time limit, so that one that fails hides none of the others.
This process never imports JAX, which would take the GPU's memory. Without a GPU nothing is measured.

Exit code: 0 when no part failed (what was skipped is said), 1 when one did, 2 for bad arguments or no JAX.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_session import Failed, Session, Skipped, TimedOut

ROOT = Path(__file__).resolve().parent.parent


# The parts: each gives figures, or raises Skipped or Failed.


def doctor(session: Session) -> dict[str, Any]:
    """``python -m jaxtrain doctor`` finds nothing wrong."""
    return {"output": session.run("-m", "jaxtrain", "doctor").splitlines()}


def tests(session: Session) -> dict[str, Any]:
    """The tests that need a GPU."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    if session.cpu:
        raise Skipped("these need a GPU")
    where = ["--rootdir", ROOT, "-c", ROOT / "pyproject.toml", ROOT / "tests" / "test_gpu.py"]
    env = {"JAXTRAIN_TEST_GPU": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    output = session.run("-m", "pytest", "-m", "gpu", "-rs", *where, **env)
    return {name: int(count) for count, name in re.findall(r"(\d+) (passed|skipped)", output)}


def resume_digits(session: Session) -> dict[str, Any]:
    """Stopped by SIGTERM, ``digits_cnn`` goes on to the same bits."""
    settings = {"epochs": 6 if session.cpu else 200, "log_every": 5, "eval_every": "None"}
    return _resume(session, "digits_cnn", settings, signal.SIGTERM)


def prepare(session: Session) -> dict[str, Any]:
    """CIFAR-10 in the TFDS layout, from the original files."""
    _need_data(session)
    prepared = any(session.data.glob("cifar10/*/dataset_info.json")) if session.data.is_dir() else False
    if prepared:
        session.env["TFDS_DATA_DIR"] = str(session.data)
        return {"seconds": 0.0, "from": "a prepared folder"}
    began = time.monotonic()
    session.run("-m", "jaxtrain", "prepare", "cifar10", "--from", session.data)
    return {"seconds": time.monotonic() - began, "from": "the original files"}


def first_step(session: Session) -> dict[str, Any]:
    """From the start of a process to the end of its first step of ``cifar_cnn``, nothing cached."""
    _need_data(session)
    return session.child("first_step", "cifar_cnn", 2 if session.cpu else 100)


def resume_cifar(session: Session) -> dict[str, Any]:
    """Killed after a checkpoint, ``cifar_cnn`` goes on from there to the same bits."""
    _need_data(session)
    length = {"epochs": 0.08, "save_every": 0.02} if session.cpu else {"epochs": 4, "save_every": 0.5}
    return _resume(session, "cifar_cnn", {**length, "eval_every": "None"}, signal.SIGKILL)


def full(name: str) -> Callable[[Session], dict[str, Any]]:
    """The part that runs experiment ``name`` at full length, with the command a user types."""

    def part(session: Session) -> dict[str, Any]:
        _need_data(session)
        settings = {"epochs": 0.1, "eval_every": "None"} if session.cpu else {}
        began = time.monotonic()
        session.run(*session.train(name, name, settings))
        found = json.loads((session.scratch / name / "result.json").read_text())
        keys = ("steps", "test", "examples_per_second", "seconds")
        return {**{key: found[key] for key in keys}, "wall_seconds": time.monotonic() - began}

    return part


def memory(session: Session) -> dict[str, Any]:
    """What ``plan`` says of ``digits_cnn``: do microbatches, recomputation and bfloat16 save memory here?"""
    found = {}
    for name, settings in {
        "whole": [],
        "accumulate": ["accumulate=4"],
        "remat": ["remat=nothing_saveable"],
        "bfloat16": ["precision=bfloat16"],
    }.items():
        words = [word for setting in ["batch=512", *settings] for word in ("--set", setting)]
        out = session.run("-m", "jaxtrain", "plan", "--experiment", "digits_cnn", "--json", *words)
        plan = json.loads(out.splitlines()[-1])
        found[name] = {"compiled_for": plan["compiled_for"], **plan["bytes_per_device"]}
    return found


def scaling(session: Session) -> dict[str, Any]:
    """Throughput of ``digits_cnn`` on one device, and on all of them."""
    count = session.child("device")["count"]
    counts = ",".join(map(str, sorted({1, count})))
    path = session.scratch / "scaling.json"
    short = (
        ["--set", "batch=128", "--steps", "2", "--rounds", "2"] if session.cpu else ["--set", "batch=1024"]
    )
    session.run("-m", "jaxtrain", "bench", "--scaling", counts, *short, "--json", path)
    return dict(json.loads(path.read_text()))


def deterministic(session: Session) -> dict[str, Any]:
    """What ``--deterministic`` costs a step of ``digits_cnn``, and of ``cifar_cnn`` with its data."""
    found = {}
    for name in ("digits_cnn", *(("cifar_cnn",) if session.data is not None else ())):
        path = session.scratch / f"deterministic-{name}.json"
        short = ["--set", "batch=32", "--steps", "1", "--rounds", "2"] if session.cpu else []
        session.run(
            "-m", "jaxtrain", "bench", "--deterministic", "--experiment", name, *short, "--json", path
        )
        figures = json.loads(path.read_text())
        found[name] = {key: figures[key] for key in ("cost", "step_ms", "xla_flags", "steps", "rounds")}
    return found


def guard(session: Session) -> dict[str, Any]:
    """What the guard on loss, gradient, update and labels costs a step (``benchmarks.guard``)."""
    path = session.scratch / "guard.json"
    session.run("-m", "benchmarks.guard", "--rounds", "2" if session.cpu else "40", "--out", path)
    return dict(json.loads(path.read_text()))


def _need_data(session: Session) -> None:
    if session.data is None:
        raise Skipped("no CIFAR-10: give --data")


def _resume(session: Session, name: str, settings: dict[str, Any], signum: signal.Signals) -> dict[str, Any]:
    """The same command straight through, and stopped and given again: are all arrays bitwise equal?"""
    straight, broken = f"{name}-straight", f"{name}-broken"
    session.run(*session.train(name, straight, settings), "--deterministic")
    process = session.start(*session.train(name, broken, settings), "--deterministic")
    _stop_midway(session, process, session.scratch / broken, signum)
    session.run(*session.train(name, broken, settings), "--deterministic")
    result = json.loads((session.scratch / broken / "result.json").read_text())
    figures = {"signal": signum.name, "steps": result["steps"], "resumed_from": result["resumed_from"]}
    if not 0 < result["resumed_from"] < result["steps"]:
        raise Failed(f"the run was not resumed half-way: {figures}")
    found = session.child("compare", session.scratch / straight, session.scratch / broken)
    if found["different"]:
        raise Failed(f"{figures}: not the same bits in {', '.join(found['different'][:5])}")
    return {**figures, **found}


def _stop_midway(
    session: Session, process: subprocess.Popen[str], folder: Path, signum: signal.Signals
) -> None:
    """Signal a run as soon as it has logged a step (SIGTERM) or completed a checkpoint (SIGKILL)."""
    records, kill = folder / "metrics.jsonl", signum == signal.SIGKILL
    while process.poll() is None and session.left() > 0:
        saved = any(folder.glob("checkpoints/*/manifest.json"))
        if saved if kill else records.exists() and records.stat().st_size > 0:
            process.send_signal(signum)
            break
        time.sleep(0.005)
    session.end(process, -signum if kill else 128 + signum)


PARTS: dict[str, tuple[Callable[[Session], dict[str, Any]], float]] = {
    "doctor": (doctor, 60),
    "tests": (tests, 120),
    "resume_digits": (resume_digits, 120),
    "prepare": (prepare, 90),
    "memory": (memory, 120),
    "scaling": (scaling, 60),
    "deterministic": (deterministic, 120),
    "guard": (guard, 60),
    "first_step": (first_step, 60),
    "resume_cifar": (resume_cifar, 120),
    "cifar_airbench94": (full("cifar_airbench94"), 180),
    "cifar_cnn": (full("cifar_cnn"), 400),
}
"""Each with the most seconds it may take; the longest comes last and gets what is left."""
ON_CIFAR = ("first_step", "resume_cifar", "cifar_airbench94", "cifar_cnn")


# The program.


def carry_out(session: Session) -> dict[str, Any]:
    """Run every part for which there is time; their results by name."""
    found: dict[str, Any] = {}
    for name, (part, most) in PARTS.items():
        session.began = time.monotonic()
        session.limit = min(most, session.deadline - session.began)
        try:
            if session.limit < 10:
                raise Skipped("no time left")
            if name in ON_CIFAR and session.data is not None and found["prepare"]["status"] != "ok":
                raise Skipped(f"prepare {found['prepare']['status']}")
            figures = {"status": "ok", **part(session)}
        except Skipped as why:
            figures = {"status": "skipped", "why": str(why)}
        except TimedOut as why:  # in less than a part is meant to have, that is no failure
            cut = session.limit < most
            figures = {
                "status": "skipped" if cut else "failed",
                "why": f"no time left: {why}" if cut else str(why),
            }
        except Exception as why:  # one part must not take the rest with it
            figures = {"status": "failed", "why": f"{why if isinstance(why, Failed) else repr(why)}"}
        took = time.monotonic() - session.began
        found[name] = {**figures, "took_seconds": round(took, 1)}
        print(
            f"{name}: {figures['status']} {figures.get('why', '')} ({took:.0f} s)".replace("  ", " "),
            flush=True,
        )
    return found


def nvidia() -> dict[str, str] | None:
    """What the driver says of the first GPU; None without one."""
    fields = ("name", "driver_version", "memory.total")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    first = done.stdout.partition("\n")[0]
    return dict(zip(fields, map(str.strip, first.split(",")), strict=False)) or None


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Check and measure jaxtrain on an NVIDIA GPU.")
    parser.add_argument(
        "--data", type=Path, metavar="DIR_OR_TAR", help="CIFAR-10: original files or prepared"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything")
    parser.add_argument("--allow-cpu", action="store_true", help="try this script out, shortened, on a CPU")
    args = parser.parse_args()
    if args.data is not None and not args.data.exists():
        parser.error(f"--data {args.data} does not exist")
    return args


def write(
    folder: Path, device: dict[str, Any], card: dict[str, str] | None, parts: dict[str, Any], began: float
) -> Path:
    """The record of it all, in a file named after the device and the day."""
    record = {
        "check": "gpu_check",
        "command": shlex.join(["scripts/gpu_check.sh", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        **device,
        "cores": len(os.sched_getaffinity(0)),
        "nvidia": card,
        "parts": parts,
        "seconds": round(time.monotonic() - began, 1),
    }
    slug = re.sub(r"[^a-z0-9]+", "-", device["device"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu_check-{slug}-{record['date']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def main() -> int:
    """Everything; returns the exit code."""
    args, began, card = arguments(), time.monotonic(), nvidia()
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env.setdefault("CUDA_VISIBLE_DEVICES", "0")  # figures are those of one card
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        scratch, data = Path(folder), args.data and args.data.resolve()
        env["TFDS_DATA_DIR"] = str(scratch / "tfds")
        session = Session(scratch, data, False, env, began + 60 * args.minutes - 15, 90.0, began)
        try:
            device = session.child("device")
        except Failed as why:
            print(f"JAX does not start, so nothing was measured: {why}")
            return 2
        session.cpu = device["platform"] not in ("gpu", "cuda")
        if session.cpu and not args.allow_cpu:
            lacks = "JAX does not use the NVIDIA GPU (install jax[cuda12] or jax[cuda13])"
            print(f"{lacks if card else 'no NVIDIA GPU here'}: nothing was measured")
            return 0
        parts = carry_out(session)
    path = write(args.out, {**device, "device": "cpu"} if session.cpu else device, card, parts, began)
    print(f"written to {path}")
    return 1 if any(part["status"] == "failed" for part in parts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
