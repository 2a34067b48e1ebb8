"""How long a save holds up training, and how fast steps are while it is being written.

MLPs with AdamW whose states have about 12, 100 and 400 MB, in CPU memory. The device is idle when a save
starts, so no training arithmetic is counted. "Held up" is the time of ``Checkpoints.save`` and of a step
after it that only increments the counter, with the state donated: by then the save must have copied what it
still reads. An "entire save" ends when the manifest exists, with nothing else running. Interleaved with it: a
copy of the state (``np.array`` of each array, into new memory), and Orbax's own ``save_async`` with its
defaults, which writes no checksums.

Then training steps, some without a save, and some from the start of a save until its manifest exists.

  python -m benchmarks.checkpoint [--rounds N] [--sizes 1,8,32] [--folder DIR] [--out FILE]
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import common
from jaxtrain import checkpoint, data, losses, models, optim, sharding
from jaxtrain.core.types import State, leaf_paths
from jaxtrain.experiment import Experiment
from jaxtrain.program import Program, assemble

WIDTH, BATCH = 1024, 16
SIZES = "1,8,32"  # hidden layers: 12.6 MB each with AdamW's two moments
QUIET = 3  # steps timed without a save, after each with one


@jax.jit
def _count(state: State) -> State:
    return state.replace(step=state.step + 1)


def program(layers: int) -> Program:
    """An MLP of ``layers`` hidden layers, 1,024 wide."""
    rng = np.random.default_rng(0)
    images = {"image": rng.standard_normal((2 * BATCH, WIDTH), np.float32)}
    some = data.Arrays({**images, "label": rng.integers(0, 10, 2 * BATCH, np.int32)})
    exp = Experiment(
        model=models.MLP(widths=(WIDTH,) * layers),
        train=some,
        test=some,
        loss=losses.CrossEntropy(),
        optimizer=optim.AdamW(lr=1e-4),
        batch=BATCH,
        epochs=1,
    )
    return assemble(exp, sharding.make_mesh(jax.devices()[:1]))


class Saves:
    """A state, and the ways to save it."""

    def __init__(self, run: Program, folder: Path, saved: checkpoint.Checkpoints) -> None:
        self._program, self._folder, self._saved = run, folder, saved
        self._counted = jax.jit(_count, donate_argnums=0)
        self.state, _ = saved.restore_or(run.init, run.abstract_state)
        self._step, self._batch = 0, run.train.batch(0)
        self.total: dict[str, list[float]] = {"jaxtrain": [], "Orbax alone": []}
        self.state = self._counted(self.state)
        self.train(2)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(x.nbytes for x in jax.tree.leaves(self.state))

    def train(self, steps: int) -> list[float]:
        """Seconds of each of so many steps."""
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            self.state, _ = self._program.train_step(self.state, self._batch, self._program.key)
            jax.block_until_ready(self.state)
            times.append(time.perf_counter() - began)
        return times

    def memcpy(self) -> float:
        """Seconds of copying every array."""
        began = time.perf_counter()
        copies = [np.array(x) for x in jax.tree.leaves(self.state)]
        seconds = time.perf_counter() - began
        del copies
        return seconds

    def counting(self) -> float:
        """Seconds of the step that only counts."""
        began = time.perf_counter()
        self.state = jax.block_until_ready(self._counted(self.state))
        return time.perf_counter() - began

    def save(self) -> float:
        """Seconds that a save holds up the loop."""
        self._step += 1
        jax.block_until_ready(self.state)
        began = time.perf_counter()
        self._saved.save(self._step, self.state)
        self.counting()
        blocked = time.perf_counter() - began
        self._saved.wait()
        self.total["jaxtrain"].append(time.perf_counter() - began)
        return blocked

    def orbax(self) -> float:
        """The same of Orbax's ``save_async`` with its defaults."""
        from orbax.checkpoint import v1 as ocp

        to = self._folder / "orbax"
        jax.block_until_ready(self.state)
        began = time.perf_counter()
        response = ocp.save_async(to, leaf_paths(self.state), overwrite=True)
        self.counting()
        blocked = time.perf_counter() - began
        response.result()
        self.total["Orbax alone"].append(time.perf_counter() - began)
        shutil.rmtree(to)
        return blocked

    def while_writing(self) -> tuple[float, float, int]:
        """Seconds of a step with no save, of one while a save is being written, and how many of those."""
        quiet = statistics.median(self.train(QUIET))
        self._step += 1
        self._saved.save(self._step, self.state)
        self.counting()
        busy: list[float] = []
        while not (self._folder / "checkpoints" / f"{self._step:06d}" / "manifest.json").exists():
            busy += self.train(1)
        self._saved.wait()
        return quiet, statistics.fmean(busy[:-1] or busy), len(busy)


def measure(layers: int, folder: Path, rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Results and figures for one size."""
    with checkpoint.open(folder, max_to_keep=1) as saved:
        side = Saves(program(layers), folder, saved)
        sides: dict[str, Callable[[], float]] = {
            "memcpy": side.memcpy,
            "counting step": side.counting,
            "save": side.save,
            "save by Orbax alone": side.orbax,
        }
        rounds = max(3, rounds // (1 + layers // 8))
        times = common.interleave(sides, rounds)
        rows = [side.while_writing() for _ in range(rounds)]
    totals = {name: values[1:] for name, values in side.total.items()}
    allowed = [1.2 * seconds + 0.02 for seconds in times["memcpy"]]
    name = f"{side.size / 1e6:.0f} MB"
    results = [
        common.speedup(f"{name}: blocked / (1.2 memcpy + 20 ms)", times["save"], allowed, "< 1.0"),
        common.speedup(f"{name}: blocked / entire save", times["save"], totals["jaxtrain"], "< 0.1"),
        common.result(f"{name}: step while writing / step", [b / q for q, b, _ in rows], "×", "< 1.5"),
        common.speedup(f"{name}: Orbax alone / blocked", times["save by Orbax alone"], times["save"]),
    ]
    figures = {
        "bytes": side.size,
        "held_up_ms": common.medians(times, 1e3),
        "entire_ms": common.medians(totals, 1e3),
        "step_ms": 1e3 * statistics.median(q for q, _, _ in rows),
        "step_while_writing_ms": 1e3 * statistics.median(b for _, b, _ in rows),
        "steps_while_writing": statistics.median(n for _, _, n in rows),
    }
    return results, {name: figures}


def main() -> None:
    """Every size, one JSON object."""
    parser = common.arguments(__doc__, rounds=9)
    parser.add_argument("--sizes", default=SIZES, help="hidden layers, with commas")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    args = parser.parse_args()
    results, figures = [], {}
    for layers in map(int, args.sizes.split(",")):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            found, more = measure(layers, Path(folder), args.rounds)
        results += found
        figures |= more
    common.finish(args, "checkpoint", results, figures)


if __name__ == "__main__":
    main()
