"""How step time and memory scale with batch, width, depth, length and devices, against the FLOPs of a step.

Each curve changes one size of an ordinary run (``assemble``: the guard, data on the device, AdamW). Step
time is wall time; memory is XLA's figure for the compiled step on one device: temporaries, state and batch.
An exponent is the slope between the logarithms of size and value over the three
largest sizes. That of the time may exceed that of the step's floating-point operations (``plan.model_flops``)
by at most 0.15, that of the memory the largest power in its formula:

  batch     activations: batch^1
  width     weights of a hidden layer and their optimizer state: width^2
  depth     weights and activations: depth^1
  sequence  attention's weights for each pair of positions: length^2
  devices   data parallel, 256 examples a device: devices^0 on each

Simulated devices share the cores of this machine, so their time grows with the total work.

  python -m benchmarks.growth [--rounds N] [--plot FILE.png] [--out FILE]
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import common
from benchmarks.sharding import experiment, images, text
from jaxtrain import models, optim, sharding
from jaxtrain.experiment import Experiment
from jaxtrain.program import assemble, flops, memory

LEAST = 0.02  # seconds that a side is timed for, if it takes a step or more
MOST = 0.15  # by how much an exponent may be above that of the arithmetic
LARGE = 3  # sizes that the exponents are of
ADAMW = optim.AdamW(lr=1e-4)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One size that changes.

    Attributes:
      about: the run.
      sizes: in ascending order.
      make: the experiment of a size.
      memory: the largest power in the memory's formula.
      devices: of a size.
    """

    about: str
    sizes: Sequence[int]
    make: Callable[[int], Experiment]
    memory: float
    devices: Callable[[int], int] = lambda size: 1


def curves() -> dict[str, Curve]:
    """All of them; the largest step of each takes some hundredths of a second on two cores."""
    digits = images((28, 28, 1))

    def dense(batch: int, width: int, depth: int) -> Experiment:
        return experiment(models.MLP(widths=(width,) * depth), digits, batch, optimizer=ADAMW)

    def gpt(length: int) -> Experiment:
        net = models.GPT(vocab=256, context=length, width=128, depth=1, heads=2, dropout=0.0)
        return experiment(net, text(length), 2)

    return {
        "batch": Curve("784-256-256-10", [8, 64, 512, 1024, 2048, 4096], lambda n: dense(n, 256, 2), 1),
        "width": Curve("784-n-n-10, batch 256", [32, 128, 256, 512, 1024], lambda n: dense(256, n, 2), 2),
        "depth": Curve("256 wide, batch 256", [1, 2, 4, 8, 16], lambda n: dense(256, 256, n), 1),
        "sequence": Curve("GPT of one block, width 128, 2 heads, batch 2", [32, 64, 128, 256, 512], gpt, 2),
        "devices": Curve(
            "784-256-256-10, 256 examples a device",
            [1, 2, 4, 8],
            lambda n: dense(256 * n, 256, 2),
            0,
            lambda n: n,
        ),
    }


class Point:
    """One size of a curve: its compiled step and its state."""

    def __init__(self, exp: Experiment, devices: int) -> None:
        self._program = program = assemble(exp, sharding.make_mesh(jax.devices()[:devices]))
        self.flops = flops.model_flops(program)
        compiled = program.train_step.lower(*memory.abstract_args(program)).compile()  # type: ignore[attr-defined]
        found = compiled.memory_analysis()
        parts = memory.device_arrays(program).items()  # exact; XLA's arguments hold the data set too
        self.memory = found.temp_size_in_bytes + sum(
            one.bytes for part, arrays in parts if part != "data" for one in arrays
        )
        self._state, self._batch = program.init(), program.train.batch(0)
        self._steps = 1
        self._steps = max(1, round(LEAST / min(self.seconds() for _ in range(3))))

    def seconds(self) -> float:
        """Of a step."""
        began = time.perf_counter()
        for _ in range(self._steps):
            self._state, metrics = self._program.train_step(self._state, self._batch, self._program.key)
            jax.block_until_ready(metrics)
        jax.block_until_ready(self._state)
        return (time.perf_counter() - began) / self._steps


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The slope over the largest sizes, in logarithms.

    >>> round(exponent([1, 2, 4, 8], [9.0, 4.0, 16.0, 64.0]), 6)
    2.0
    """
    return float(np.polyfit(np.log(sizes[-LARGE:]), np.log(values[-LARGE:]), 1)[0])


def measure(name: str, curve: Curve, rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The results of a curve, and its points."""
    points = {size: Point(curve.make(size), curve.devices(size)) for size in curve.sizes}
    times = common.interleave({str(size): point.seconds for size, point in points.items()}, rounds)
    flops = [point.flops for point in points.values()]
    memory = [point.memory for point in points.values()]
    arithmetic = exponent(curve.sizes, flops)
    slopes = [exponent(curve.sizes, row) for row in zip(*times.values(), strict=True)]
    results = [
        common.result(f"{name}: time", slopes, "exponent", f"< {arithmetic + MOST:.3f}"),
        common.result(
            f"{name}: memory", [exponent(curve.sizes, memory)], "exponent", f"< {curve.memory + MOST:.3f}"
        ),
    ]
    quartiles = [np.percentile(values, (25, 50, 75)) * 1e3 for values in times.values()]
    figures = {
        "run": curve.about,
        "sizes": list(curve.sizes),
        "step_ms": [float(row[1]) for row in quartiles],
        "step_ms_q1": [float(row[0]) for row in quartiles],
        "step_ms_q3": [float(row[2]) for row in quartiles],
        "flops": flops,
        "bytes": memory,
        "exponents_by_arithmetic": {"time": arithmetic, "memory": curve.memory},
    }
    return results, figures


def draw(figures: dict[str, dict[str, Any]], path: Path) -> None:
    """Every curve: step time above, memory below, each with what the arithmetic says of the large end."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(3.2 * len(figures), 6), layout="constrained")
    axes = sheet.subplots(2, len(figures), squeeze=False)
    for column, (name, curve) in enumerate(figures.items()):
        sizes, ms, mb = curve["sizes"], curve["step_ms"], [b / 1e6 for b in curve["bytes"]]
        above, below = axes[0][column], axes[1][column]
        above.fill_between(sizes, curve["step_ms_q1"], curve["step_ms_q3"], alpha=0.3)
        above.plot(sizes, ms, "o-", label="measured (median, quartiles)")
        above.plot(sizes, [ms[-1] * f / curve["flops"][-1] for f in curve["flops"]], "--", label="operations")
        power = curve["exponents_by_arithmetic"]["memory"]
        below.plot(sizes, mb, "o-", label="by XLA")
        below.plot(sizes, [mb[-1] * (n / sizes[-1]) ** power for n in sizes], "--", label=f"power {power}")
        above.set(title=name, ylabel="step, ms" if not column else "")
        below.set(xlabel=name, ylabel="memory of a device, MB" if not column else "")
        for one, values in ((above, ms), (below, mb)):
            one.set(xscale="log", yscale="log", ylim=(min(values) / 3, max(values) * 3))
            one.set_xticks(sizes[:: -(-len(sizes) // 5)], [str(n) for n in sizes[:: -(-len(sizes) // 5)]])
            one.minorticks_off()
            one.grid(alpha=0.3)
            one.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(path, dpi=90)


def main() -> None:
    """Every curve, one JSON object."""
    parser = common.arguments(__doc__, rounds=9)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (pip install 'jaxtrain[plot]')")
    args = parser.parse_args()
    if jax.config.jax_platforms == "cpu" or not jax.config.jax_platforms:
        jax.config.update("jax_num_cpu_devices", 8)
    results: list[dict[str, Any]] = []
    figures: dict[str, dict[str, Any]] = {}
    skipped = {}
    for name, curve in curves().items():
        if curve.devices(curve.sizes[-1]) > jax.device_count():
            skipped[name] = f"there are {jax.device_count()} devices"
            continue
        found, figures[name] = measure(name, curve, args.rounds)
        results += found
    common.finish(args, "growth", results, figures, skipped)
    if args.plot is not None:
        draw(figures, args.plot)


if __name__ == "__main__":
    main()
