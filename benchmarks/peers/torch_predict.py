"""``predict --bench`` of an exported classifier beside PyTorch and onnxruntime on the same CPU.

Exports a run of a convolutional network (``models.CNN`` or ``models.ConvNet``) as an artifact, in ONNX and as
safetensors, builds the same network in PyTorch with the weights of the safetensors file, checks that all
outputs agree to 1e-4 on 256 test examples, and times calls from NumPy inputs to NumPy outputs (logits,
probabilities, labels), in turns.

  python -m benchmarks.peers.torch_predict --workdir RUN [--batches N,N] [--rounds N] [--out FILE]
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch.nn import functional

from benchmarks import common
from benchmarks.int8 import exported
from benchmarks.peers.torch_networks import CNN, ConvNet
from jaxtrain import models
from jaxtrain.artifact.engines import open_model
from jaxtrain.cli.experiments import load_recorded
from jaxtrain.core.text import first_line
from jaxtrain.train import run_record

EXAMPLES = 256
TOLERANCE = 1e-4
TURN = 0.2  # seconds of calls of each side in a round
Run = Callable[[np.ndarray], dict[str, Any]]


def network(model: Any, shape: tuple[int, ...], weights: dict[str, np.ndarray]) -> torch.nn.Module:
    """The network of ``model`` in PyTorch, for images of this shape."""
    if isinstance(model, models.CNN):
        net: Any = CNN(model.widths, model.convs, model.classes, shape[-1])
    else:
        same = model.padding == "SAME"
        net = ConvNet(
            model.widths, model.kernel, same, model.hidden, model.classes, shape[0], channels=shape[-1]
        )
    nested: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for path, array in weights.items():
        collection, layer, leaf = path.split("/")
        nested[collection].setdefault(layer, {})[leaf] = array
    net.load(nested["params"], nested["batch_stats"])
    return net.eval()


def torch_run(net: Any, normalise: Any, threads: int, last: bool = False) -> Run:
    """A function of uint8 images ``[batch, height, width, channel]``, as an artifact is one."""
    mean, std = (torch.tensor(one).reshape(1, -1, 1, 1) for one in (normalise.mean, normalise.std))

    def run(image: np.ndarray) -> dict[str, Any]:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            x = torch.from_numpy(image).permute(0, 3, 1, 2).float()
            x = (x / normalise.scale - mean) / std
            x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            logits = net(x)
            probability, label = functional.softmax(logits, -1), logits.argmax(-1)
        return {"logits": logits.numpy(), "probability": probability.numpy(), "label": label.numpy()}

    return run


def torch_sides(net: Any, normalise: Any) -> dict[str, Run]:
    """Eager, channels last and compiled, each with one thread and with a thread on every core.

    Threads of PyTorch wait for each other in loops, so on a machine with other work one may be faster.
    """
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    sides = {}
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        sides |= {
            f"torch, {threads} threads": torch_run(net, normalise, threads),
            f"torch channels last, {threads} threads": torch_run(last, normalise, threads, last=True),
            f"torch.compile, {threads} threads": torch_run(
                torch.compile(copy.deepcopy(net), dynamic=False), normalise, threads
            ),
        }
    return sides


def numpy_run(model: Any) -> Run:
    """A loaded file with NumPy outputs, as ``predict --bench`` times it."""
    return lambda image: {name: np.asarray(x) for name, x in model({"image": image}).items()}


def check(sides: dict[str, Run], image: np.ndarray, skipped: dict[str, str]) -> dict[str, float]:
    """The largest difference of each side's outputs from jaxtrain's; leaves out what cannot run."""
    expected, found = sides["jaxtrain"](image), {}
    for label, run in list(sides.items()):
        try:
            outputs = run(image)
        except Exception as error:
            if not label.startswith("torch.compile"):
                raise
            skipped[label] = f"{type(error).__name__}: {first_line(error)}"[:200]  # such as no C++ compiler
            del sides[label]
            continue
        difference = max(float(np.abs(outputs[n] - expected[n]).max()) for n in ("logits", "probability"))
        if not difference <= TOLERANCE or (outputs["label"] != expected["label"]).any():
            raise SystemExit(f"{label}: this is not the same model: outputs differ by {difference}")
        found[label] = difference
    return found


def calls(run: Run, image: np.ndarray, times: list[float]) -> Callable[[], float]:
    """A side: the median seconds of its calls in one turn; each is added to ``times``."""

    def side() -> float:
        own: list[float] = []
        while sum(own) < TURN or len(own) < 3:
            began = time.perf_counter()
            run(image)
            own.append(time.perf_counter() - began)
        times.extend(own)
        return float(np.median(own))

    return side


def measure(
    sides: dict[str, Run], image: np.ndarray, rounds: int
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """The figures of each side for this batch, and the ratios of the others' medians to jaxtrain's."""
    times: dict[str, list[float]] = {label: [] for label in sides}
    for run in sides.values():  # compiles
        run(image)
    medians = common.interleave(
        {label: calls(run, image, times[label]) for label, run in sides.items()}, rounds
    )
    batch, figures = len(image), {}
    for label, each in times.items():
        p50, p99 = np.percentile(each, (50, 99))
        figures[label] = {
            "p50_ms": 1e3 * float(p50),
            "p99_ms": 1e3 * float(p99),
            "examples_per_second": batch * len(each) / sum(each),
            "calls": len(each),
        }
    ratios = [
        common.speedup(f"batch {batch}: jaxtrain over {label}", medians[label], medians["jaxtrain"])
        for label in sides
        if label != "jaxtrain"
    ]
    return figures, ratios


def main() -> None:
    """One JSON object."""
    parser = common.arguments(__doc__, rounds=9)
    parser.add_argument("--workdir", type=Path, required=True, metavar="RUN")
    parser.add_argument("--batches", default="1,4,16,64,256")
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # a program for each batch and number of threads
    name, experiment = load_recorded(run_record.load(args.workdir), args.workdir, None)
    test = experiment.test.gather(np.arange(min(EXAMPLES, len(experiment.test))))["image"]
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = {kind: exported(args.workdir, kind, False, Path(folder, f"model.{kind}")) for kind in KINDS}
        net = network(experiment.model, test.shape[1:], load_file(made["safetensors"]))
        (normalise,) = experiment.preprocess
        sides = {
            "jaxtrain": numpy_run(open_model(made["jaxtrain"], "jax")),
            "onnxruntime": numpy_run(open_model(made["onnx"], "onnxruntime")),
            **torch_sides(net, normalise),
        }
        differences = check(sides, test, skipped)
    results, figures = [], {}
    for batch in map(int, args.batches.split(",")):
        image = np.ascontiguousarray(np.resize(test, (batch, *test.shape[1:])))
        figures[batch], ratios = measure(sides, image, args.rounds)
        results += ratios
    about = {"experiment": name, "batches": figures, "largest difference of outputs": differences}
    common.finish(args, "peers.torch_predict", results, about, skipped)


KINDS = ("jaxtrain", "onnx", "safetensors")

if __name__ == "__main__":
    main()
