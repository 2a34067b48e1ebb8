"""Training steps per second against other libraries: same model, data, precision and optimizer.

  jaxtrain     the loop of ``train.loop.fit`` with its records, and with ``steps_per_execution="auto"``
  hand         a loop written by hand around a step written by hand, with flax, optax and ``jax.jit``
  stock flax   the loop of Flax's documentation, with its layers: ``TrainState``, batches by ``device_put``
  keras        Keras 3 on JAX, ``model.fit``
  torch        PyTorch, eager and ``torch.compile``, images contiguous and channels last, on JAX's kind of
               device; two threads on a CPU

Networks: LeNet (``experiments/cifar_lenet.py``) at batch 4 and 128, the default ``cifar_cnn`` at batch 128, a
small MLP, and a small GPT. All in float32; SGD with momentum 0.9, Adam for the GPT. Images are float32 and
random, not augmented. All sides start with the same parameters, and the losses of three updates on one batch
must agree within 1e-4 before anything is timed. Peers that are not installed are left out.

  python -m benchmarks.peers [--cases NAME...] [--rounds N] [--out FILE]
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import common
from benchmarks.peers import flax_stock
from benchmarks.sides import Case, Fit, Hand, assemble_without_saves, experiment, lenet
from jaxtrain import data, models, optim
from jaxtrain.core.text import first_line
from jaxtrain.train import autotune

UPDATES = 3  # whose losses must agree
TURN = 0.4  # seconds
GOALS = {("lenet_4", "keras"), ("lenet_128", "keras"), ("lenet_128", "torch"), ("cifar_cnn_128", "torch")}


def cases() -> dict[str, Callable[[], Case]]:
    """Each takes some tenths of a second a turn on two cores."""

    def images(model: Any, batch: int, chunk: int, side: int = 32, channels: int = 3) -> Case:
        rng, n = np.random.default_rng(0), chunk * batch
        image = rng.standard_normal((n, side, side, channels), np.float32)
        source = data.Arrays({"image": image, "label": rng.integers(0, 10, n, np.int32)})
        return Case(experiment(model, source, batch), chunk)

    def gpt() -> Case:
        rng, model = (
            np.random.default_rng(0),
            models.GPT(context=64, width=128, depth=2, heads=4, dropout=0.0),
        )
        text = rng.integers(0, 256, (64, 65), np.uint8)
        source = data.Arrays({"tokens": text[:, :-1], "label": text[:, 1:].astype(np.int32)})
        return Case(experiment(model, source, 16, optimizer=optim.Adam(lr=1e-3)), 4, optax.adam(1e-3))

    return {
        "lenet_4": lambda: images(lenet(), 4, 256),
        "lenet_128": lambda: images(lenet(), 128, 10),
        "cifar_cnn_128": lambda: images(models.CNN(), 128, 4),
        "mlp_32": lambda: images(models.MLP(widths=(64,)), 32, 512, side=8, channels=1),
        "gpt_16": gpt,
    }


@dataclasses.dataclass
class Sides:
    """What is compared on one case: objects with ``steps(count)`` and ``losses(count)``."""

    each: dict[str, Any]
    skipped: dict[str, str]
    together: int


def sides_of(name: str, case: Case, stack: contextlib.ExitStack) -> Sides:
    """All that is installed."""
    exp, program = case.experiment, assemble_without_saves(case.experiment)
    first, together = program.init(), autotune.choose(program).count
    own = {
        "mlp": flax_stock.StockMLP((64,)),
        "lenet": flax_stock.StockLeNet(),
        "cifar": flax_stock.StockCNN(),
    }
    model = own.get(name.partition("_")[0], exp.model)
    sides: dict[str, Any] = {
        "jaxtrain": Fit(program, stack, together),
        "hand": Hand(case, program),
        "stock flax": flax_stock.Loop(model, exp, case.tx, first),
    }
    skipped, params = {}, jax.device_get(first.params)
    for peer, made in (("keras", _keras), ("torch", _torch)):
        try:
            sides |= made(name.rpartition("_")[0], exp, params)
        except ImportError as error:
            skipped[peer] = f"not installed ({error}): pip install {peer}"
        except Unmeasured as error:
            skipped[f"{name}: {peer}"] = str(error)
    return Sides(sides, skipped, together)


class Unmeasured(Exception):
    """Why a peer that is installed is left out."""


def _keras(case: str, exp: Any, params: Any) -> dict[str, Any]:
    from benchmarks.peers import keras_fit  # here: keras is optional

    if case == "gpt":
        raise Unmeasured("Keras has no layer of rotary attention: it would be another model")
    return {"keras": keras_fit.Loop(case, exp, params)}


def _torch(case: str, exp: Any, params: Any) -> dict[str, Any]:
    from benchmarks.peers import torch_loop  # here: torch is optional

    where = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if where == "cuda" and not torch_loop.torch.cuda.is_available():
        raise Unmeasured("this PyTorch has no CUDA")
    return {
        label: torch_loop.Loop(case, exp, params, compiled, last, where)
        for label, (compiled, last) in torch_loop.variants(case).items()
    }


def check(name: str, sides: Sides) -> dict[str, list[float]]:
    """The losses of the first updates of each side, which must be the same; leaves out what cannot run."""
    losses = {}
    for label, side in list(sides.each.items()):
        try:
            losses[label] = side.losses(UPDATES)
        except Exception as error:
            if label != "torch.compile" and not label.startswith("torch.compile,"):
                raise
            line = first_line(error)  # such as no C++ compiler
            sides.skipped[f"{name}: {label}"] = f"{type(error).__name__}: {line}"
            del sides.each[label]
    # Both libraries may round the factors of a product to 10 bits on a GPU (TF32).
    bound = 1e-4 if jax.default_backend() == "cpu" else 1e-2
    worst = max(float(np.abs(np.subtract(each, losses["hand"])).max()) for each in losses.values())
    if not worst <= bound:
        raise SystemExit(f"{name}: these are not the same training: losses of {UPDATES} updates {losses}")
    return losses


def turn(label: str, side: Any, chunk: int) -> Callable[[], float]:
    """Seconds a step of ``side``, over ``chunk`` steps or, for PyTorch, over as many as ``TURN`` has.

    Its threads wait for each other in loops, and where other programs use the same cores they wait long.
    """
    if label.startswith("torch"):
        side.steps(2)
        chunk = max(2, min(chunk, int(TURN / common.each(lambda: side.steps(4), 4)())))
    return common.each(lambda: side.steps(chunk), chunk)


def ratios(name: str, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """jaxtrain over each kind of peer; of PyTorch's layouts the faster counts."""
    found = []
    for peer in ("hand", "stock flax", "keras", "torch eager", "torch.compile"):
        labels = [label for label in times if label.partition(",")[0] == peer]
        if labels:
            best = min(labels, key=lambda label: statistics.median(times[label]))
            goal = ">= 1" if (name, peer.replace(".", " ").split()[0]) in GOALS else None
            label = f"{name}: steps/s, jaxtrain over {best}"
            found.append(common.speedup(label, times[best], times["jaxtrain"], goal))
    return found


def main() -> None:
    """All cases, one JSON object."""
    parser = common.arguments(__doc__, rounds=10)
    parser.add_argument("--cases", nargs="+", choices=list(cases()), default=list(cases()))
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    figures, skipped = {}, {}
    for name in args.cases:
        with contextlib.ExitStack() as stack:
            case = cases()[name]()
            sides = sides_of(name, case, stack)
            losses = check(name, sides)
            timed = {label: turn(label, side, case.chunk) for label, side in sides.each.items()}
            times = common.interleave(timed, args.rounds)
        results += ratios(name, times)
        skipped |= sides.skipped
        figures[name] = {
            "batch": case.experiment.batch,
            "steps a round": case.chunk,
            "updates a dispatch": sides.together,
            "step_ms": common.medians(times, 1e3),
            f"losses of {UPDATES} updates": losses,
        }
    common.finish(args, "peers", results, figures, skipped)


if __name__ == "__main__":
    main()
