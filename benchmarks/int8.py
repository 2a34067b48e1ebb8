"""A classifier in float32 and in int8, as an artifact and in ONNX: bytes, accuracy, latency.

Makes the files of a run that has been trained, measures the accuracy of each on the whole test set, and times
them interleaved.

  --int8 RUN      a run with compress=int8 from that one: its int8 files
  --longer RUN    a run in float32 from that one, as long as the other: its float32 files, without times

  python -m benchmarks.int8 --workdir RUN [--int8 RUN] [--longer RUN] [--batches N,N] [--rounds N]
                            [--out FILE]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from jaxtrain.artifact.bench import random_inputs
from jaxtrain.artifact.engines import open_model
from jaxtrain.cli import export
from jaxtrain.cli.experiments import load_recorded
from jaxtrain.train import run_record

SIDES = {"jax": "jaxtrain", "onnxruntime": "onnx"}
LONGER = "float32 trained on"
ROWS = 200  # test examples in a call


def accuracy(model: Any, source: Any) -> float:
    """Accuracy on all examples of ``source``."""
    right = 0
    for start in range(0, len(source), ROWS):
        batch = source.gather(np.arange(start, min(start + ROWS, len(source))))
        right += int(
            (np.asarray(model({n: batch[n] for n in model.manifest.inputs})["label"]) == batch["label"]).sum()
        )
    return right / len(source)


def versions(args: argparse.Namespace) -> dict[str, tuple[Path, bool]]:
    """The folder of each version's run, and whether it is exported in int8."""
    found = {"float32": (args.workdir, False), "int8 after training": (args.workdir, True)}
    if args.int8:
        found["int8 in training"] = (args.int8, True)
    if args.longer:
        found[LONGER] = (args.longer, False)
    return found


def exported(run: Path, kind: str, int8: bool, path: Path) -> Path:
    """The file of a run."""
    words = ["--workdir", str(run), "--out", str(path), "--format", kind]
    if export.main([*words, *(["--quantize", "int8"] if int8 else [])]):
        raise SystemExit(f"export {' '.join(words)} failed")
    return path


def milliseconds(models: dict[str, Any], batch: int, rounds: int) -> tuple[dict[str, float], list[Any]]:
    """The medians of each file, and the ratios of the int8 files to float32."""
    sides = {}
    for side, model in models.items():
        inputs = random_inputs(model.manifest, batch)
        run = lambda m=model, x=inputs: [np.asarray(y) for y in m(x).values()]  # noqa: E731
        run()
        units = max(1, int(0.2 / common.each(run, 1)()))
        sides[side] = common.each(lambda r=run, n=units: [r() for _ in range(n)], units)
    times = common.interleave(sides, rounds)
    ratios = []
    for side in sides:
        engine, version = side.split(", ")
        if version != "float32":
            label = f"{engine}, batch {batch}: {version} over float32"
            ratios.append(common.speedup(label, times[f"{engine}, float32"], times[side]))
    return common.medians(times, 1e3), ratios


def main() -> None:
    """One JSON object."""
    parser = common.arguments(__doc__, rounds=15)
    parser.add_argument("--workdir", type=Path, required=True, metavar="RUN")
    parser.add_argument("--int8", type=Path, metavar="RUN")
    parser.add_argument("--longer", type=Path, metavar="RUN")
    parser.add_argument("--batches", default="1,32,256")
    args = parser.parse_args()
    name, experiment = load_recorded(run_record.load(args.workdir), args.workdir, None)
    models, files, times = {}, {}, {}
    results: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        for engine, kind in SIDES.items():
            for number, (version, (run, int8)) in enumerate(versions(args).items()):
                path = exported(run, kind, int8, Path(folder, f"{number}.{kind}"))
                side = f"{engine}, {version}"
                models[side] = open_model(path, engine)
                files[side] = {"bytes": path.stat().st_size}
        for side, model in models.items():
            files[side]["accuracy"] = accuracy(model, experiment.test)
        timed = {side: model for side, model in models.items() if LONGER not in side}
        for batch in map(int, args.batches.split(",")):
            times[batch], ratios = milliseconds(timed, batch, args.rounds)
            results += ratios
    about = {"experiment": name, "files": files, "milliseconds": times}
    about["versions"] = {one: importlib.metadata.version(one) for one in ("onnx", "onnxruntime")}
    common.finish(args, "int8", results, about)


if __name__ == "__main__":
    main()
