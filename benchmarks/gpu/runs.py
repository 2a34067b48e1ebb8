"""The parts of ``scripts/gpu_check.py`` that run jaxtrain's own commands, as users type them."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.session import Failed, Session, Skipped, missing


def resume_digits(session: Session) -> dict[str, Any]:
    """Stopped by SIGTERM, ``digits_cnn`` resumes to the same bits."""
    _need("sklearn", "tensorboardX")
    settings = {"epochs": 6 if session.cpu else 200, "log_every": 5, "eval_every": "None"}
    return _resume(session, "digits_cnn", settings, signal.SIGTERM)


def prepare(session: Session) -> dict[str, Any]:
    """CIFAR-10 in the TFDS layout, from the original files."""
    if session.data is None:
        raise Skipped("no CIFAR-10: give --data")
    _need("tensorflow_datasets", "array_record", "PIL")
    prepared = any(session.data.glob("cifar10/*/dataset_info.json")) if session.data.is_dir() else False
    if prepared:
        session.env["TFDS_DATA_DIR"] = str(session.data)
        session.facts["prepared"] = True
        return {"seconds": 0.0, "from": "a prepared folder"}
    began = time.monotonic()
    session.run("-m", "jaxtrain", "prepare", "cifar10", "--from", session.data)
    session.facts["prepared"] = True
    return {"seconds": time.monotonic() - began, "from": "the original files"}


def first_step(session: Session) -> dict[str, Any]:
    """From the start of a process to the end of its first step of ``cifar_cnn``, nothing cached."""
    _need_data(session)
    count = 2 if session.cpu else 100
    return session.child("first_step", "cifar_cnn", count, JAX_ENABLE_COMPILATION_CACHE="false")


def resume_cifar(session: Session) -> dict[str, Any]:
    """Killed after a checkpoint, ``cifar_cnn`` resumes from it to the same bits."""
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
    _need("sklearn")
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
    _need("sklearn")
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
    _need("sklearn")
    found = {}
    for name in ("digits_cnn", *(("cifar_cnn",) if "prepared" in session.facts else ())):
        path = session.scratch / f"deterministic-{name}.json"
        short = ["--set", "batch=32", "--steps", "1", "--rounds", "2"] if session.cpu else []
        session.run("-m", "benchmarks.deterministic", "--experiment", name, *short, "--out", path)
        figures = json.loads(path.read_text())["figures"]
        found[name] = {key: figures[key] for key in ("cost", "step_ms", "xla_flags", "steps", "rounds")}
    return found


def guard(session: Session) -> dict[str, Any]:
    """What the guard on loss, gradient, update and labels costs a step (``benchmarks.guard``)."""
    path = session.scratch / "guard.json"
    session.run("-m", "benchmarks.guard", "--rounds", "2" if session.cpu else "40", "--out", path)
    return dict(json.loads(path.read_text()))


def _need(*packages: str) -> None:
    if why := missing(*packages):
        raise Skipped(why)


def _need_data(session: Session) -> None:
    """Prepared CIFAR-10, which ``prepare`` leaves."""
    if session.data is None:
        raise Skipped("no CIFAR-10: give --data")
    if "prepared" not in session.facts:
        raise Skipped("CIFAR-10 was not prepared")


def _resume(session: Session, name: str, settings: dict[str, Any], signum: signal.Signals) -> dict[str, Any]:
    """Compare a run straight through with one that is stopped and resumed: are all arrays bitwise equal?"""
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
