"""Folders of runs as the trainer writes them, without training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.monitor import pictures

NASTY = "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
CONFIG = {"model": "CNN", "optimizer.lr": "0.1", "batch": "32", "seed": "0", "select": "'accuracy'"}


def curve(steps: int = 40, noise: float = 0.0, seed: int = 0) -> list[dict[str, Any]]:
    """Records of a run: training every step, and an evaluation every ten steps."""
    rng, rows = np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        loss = 2.0 / step + noise * float(rng.normal())
        speed = {"examples_per_second": 640.0, "process_rss_bytes": 1e8 + step}
        rows.append({"step": step, "epoch": step / 10, "train/loss": loss, "train/accuracy": 0.5, **speed})
        if step % 10 == 0:
            rows.append({"step": step, "test/loss": loss + 0.1, "test/accuracy": 0.9})
    return rows


def write_run(
    folder: Path,
    rows: Iterable[dict[str, Any]] = (),
    result: dict[str, Any] | None = None,
    name: str = "digits",
    record: dict[str, Any] | None = None,
    **config: str,
) -> Path:
    """Write the folder of a run; settings are changed with ``optimizer__lr="0.2"``."""
    folder.mkdir(parents=True)
    settings = CONFIG | {path.replace("__", "."): text for path, text in config.items()}
    about = {"name": name, "overrides": ["seed=" + settings["seed"]], "steps": 40, "git": "abc-dirty"}
    about |= {"mesh": {"data": 1, "fsdp": 1, "model": 1}, "versions": {"jax": "0.10"}, **(record or {})}
    (folder / "config.json").write_text(json.dumps({**about, "config": settings}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def result_of(accuracy: float, **more: Any) -> dict[str, Any]:
    """A ``result.json``."""
    return {"steps": 40, "test": {"accuracy": accuracy, "loss": 1 - accuracy}, "seconds": 2.5, **more}


def write_seeds(folder: Path, accuracies: Sequence[float] = (0.9, 0.95, 0.97)) -> list[Path]:
    """Write runs that differ in the seed only."""
    return [
        write_run(folder / f"seed{n}", curve(noise=0.05, seed=n), result_of(one), seed=str(n))
        for n, one in enumerate(accuracies)
    ]


def write_evaluation(run: Path, matrix: list[list[int]], names: Sequence[str] | None = None) -> None:
    """Write what ``evaluate --mistakes`` writes."""
    folder = run / "evaluation" / "000040-test"
    folder.mkdir(parents=True)
    names = list(names or map(str, range(len(matrix))))
    mistake = {"id": 7, "label": names[0], "prediction": names[1], "probability": 0.75}
    body = {"step": 40, "split": "test", "examples": sum(map(sum, matrix)), "figures": {"confusion": matrix}}
    (folder / "figures.json").write_text(json.dumps({**body, "class_names": names, "mistakes": [mistake]}))
    (folder / "mistakes.png").write_bytes(pictures.png(np.zeros((8, 8, 3), np.uint8)))


def write_sweep(folder: Path, scores: dict[tuple[str, str], float]) -> Path:
    """Write a sweep of ``optimizer.lr`` and ``model``, one run a setting."""
    folder.mkdir(parents=True)
    members = []
    for number, ((lr, model), score) in enumerate(scores.items()):
        settings = {"optimizer.lr": lr, "model": model}
        write_run(folder / f"m{number}", curve(20), result_of(score), optimizer__lr=lr, model=model)
        members.append({"folder": f"m{number}", "settings": settings, "seed": 0})
    body = {"experiment": "digits", "strategy": "grid", "metric": "accuracy", "baseline": {}}
    (folder / "sweep.json").write_text(json.dumps({**body, "members": members}))
    return folder
