"""The pieces of ``scripts/gpu_check.py`` that need JAX, each run in a separate process.

python -m benchmarks.gpu.child NAME [ARGS] [--tiny]      prints a line of JSON, or several of growing length
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np


def device() -> dict[str, Any]:
    """The first device, and versions; needs nothing of jaxtrain."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "torch")
    plugins = ("jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
    versions = {"python": platform.python_version()}
    for package in (*names, *plugins):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    first = jax.local_devices()[0]
    memory = (first.memory_stats() or {}).get("bytes_limit")
    return {
        "platform": first.platform,
        "device": first.device_kind,
        "count": jax.local_device_count(),
        "memory": memory,
        "versions": versions,
    }


def first_step(name: str, count: str) -> dict[str, Any]:
    """Seconds since the process was started until a step is finished, and the pace of ``count`` more."""
    from jaxtrain import sharding
    from jaxtrain.cli import experiments
    from jaxtrain.program import assemble

    compiling: list[float] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiling.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    _, _, experiment = experiments.load_experiment(name, [])
    program = assemble(experiment, sharding.make_mesh())
    state = program.init()
    times = [time.time()]
    for number in range(1 + int(count)):
        state, _ = program.train_step(state, program.train.batch(number), program.key)
        if number == 0:
            jax.block_until_ready(state)
            times.append(time.time())
    jax.block_until_ready(state)
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "first_step_seconds": times[1] - float(os.environ["GPU_CHECK_BEGAN"]),
        "of_which_compiling": sum(compiling),
        "longest_compile": max(compiling, default=0.0),
        "step_ms": 1e3 * (time.time() - times[1]) / int(count),
        "batch": experiment.batch,
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }


def compare(one: str, other: str) -> dict[str, Any]:
    """The arrays in which the last checkpoints of two finished runs differ, in any bit."""
    from jaxtrain import checkpoint, sharding
    from jaxtrain.cli import experiments
    from jaxtrain.program import assemble
    from jaxtrain.train import run_record

    states = []
    _, experiment = experiments.load_recorded(run_record.load(Path(one)), Path(one))
    program = assemble(experiment, sharding.make_mesh())
    for folder in (one, other):
        with checkpoint.open(Path(folder)) as saved:
            newest = saved.latest()
            assert newest is not None and newest.step == program.steps, f"{folder} is not finished"
            states.append(jax.tree_util.tree_leaves_with_path(saved.restore(newest, program.abstract_state)))
    different = [
        jax.tree_util.keystr(path)
        for (path, a), (_, b) in zip(*states, strict=True)
        if np.asarray(a).tobytes() != np.asarray(b).tobytes()
    ]
    return {"arrays": len(states[0]), "different": different}


def from_module(module: str, function: str) -> Callable[..., Iterator[dict[str, Any]]]:
    """A function of another module that yields its figures; ``--tiny`` as its last argument is for a CPU."""

    def run(*args: str) -> Iterator[dict[str, Any]]:
        import importlib

        words = [word for word in args if word != "--tiny"]
        work = getattr(importlib.import_module(f"benchmarks.{module}"), function)
        yield from work(*words, tiny="--tiny" in args)

    return run


def card(folder: str) -> dict[str, Any]:
    """What ``plan --for`` takes to describe the first device; a file of figures is written to ``folder``."""
    from benchmarks.gpu import card_file

    return card_file.find(folder)


FUNCTIONS: dict[str, Callable[..., dict[str, Any] | Iterator[dict[str, Any]]]] = {
    "device": device,
    "card": card,
    "first_step": first_step,
    "compare": compare,
    "exact": from_module("gpu.exact", "exact"),
    "peak": from_module("gpu.measure", "peaks"),
    "attention": from_module("gpu.measure", "attentions"),
    "scan": from_module("gpu.measure", "scans"),
    "feeding": from_module("gpu.measure", "feeding"),
    "saving": from_module("gpu.measure", "saving"),
    "airbench": from_module("gpu.airbench", "airbench"),
}


def main(name: str, *args: str) -> None:
    """One of ``FUNCTIONS``; one that yields prints a line each time, of which the last has everything."""
    found = FUNCTIONS[name](*args)
    for each in [found] if isinstance(found, dict) else found:
        print(json.dumps(each, default=float), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
