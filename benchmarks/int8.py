"""A classifier in float32 and in int8, as an artifact and in ONNX: bytes, accuracy, latency.

Makes the four files of a run that has been trained, measures the accuracy of each on the whole test set, and
times them interleaved.

  python -m benchmarks.int8 --workdir RUN [--batches N,N] [--rounds N] [--out FILE]
"""

from __future__ import annotations

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


def main() -> None:
    """One JSON object."""
    parser = common.arguments(__doc__, rounds=15)
    parser.add_argument("--workdir", type=Path, required=True, metavar="RUN")
    parser.add_argument("--batches", default="1,32,256")
    args = parser.parse_args()
    name, experiment = load_recorded(run_record.load(args.workdir), args.workdir, None)
    models, files = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for engine, kind in SIDES.items():
            for precision, flags in (("float32", []), ("int8", ["--quantize", "int8"])):
                path = Path(folder, f"{precision}.{kind}")
                words = ["--workdir", str(args.workdir), "--out", str(path), "--format", kind, *flags]
                if export.main(words):
                    raise SystemExit(f"export {' '.join(words)} failed")
                side = f"{engine}, {precision}"
                models[side] = open_model(path, engine)
                files[side] = path.stat().st_size
        figures = {
            side: {"bytes": files[side], "accuracy": accuracy(model, experiment.test)}
            for side, model in models.items()
        }
        results, milliseconds = [], {}
        for batch in map(int, args.batches.split(",")):
            sides = {}
            for side, model in models.items():
                inputs = random_inputs(model.manifest, batch)
                run = lambda m=model, x=inputs: [np.asarray(y) for y in m(x).values()]  # noqa: E731
                run()
                units = max(1, int(0.2 / common.each(run, 1)()))
                sides[side] = common.each(lambda r=run, n=units: [r() for _ in range(n)], units)
            times = common.interleave(sides, args.rounds)
            for engine in SIDES:
                pair = times[f"{engine}, float32"], times[f"{engine}, int8"]
                results.append(common.speedup(f"{engine}, batch {batch}: int8 over float32", *pair))
            milliseconds[batch] = common.medians(times, 1e3)
    about = {"experiment": name, "files": figures, "milliseconds": milliseconds}
    about["versions"] = {one: importlib.metadata.version(one) for one in ("onnx", "onnxruntime")}
    common.finish(args, "int8", results, about)


if __name__ == "__main__":
    main()
