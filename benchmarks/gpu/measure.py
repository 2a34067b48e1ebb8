"""What ``scripts/gpu_check.py`` measures in one process: products, attention, dispatch, feeding, saving.

Every function yields all its figures after each new one, so a process that times out has printed the others.
``tiny`` is for trying it out on a CPU.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common, peak_flops
from benchmarks.gpu import workloads
from jaxtrain import checkpoint, sharding
from jaxtrain.core.types import State
from jaxtrain.models.attention import attend, cudnn_refusal
from jaxtrain.monitor.peak_flops import datasheet_peak, device_name
from jaxtrain.program import Program, assemble
from jaxtrain.train.dispatch import InFlight

Figures = Iterator[dict[str, Any]]
LAP = 0.15  # seconds of one side of a round: well above what the clock and the start of a program take


def left() -> float:
    """Seconds until this process times out; infinity without a limit."""
    until = os.environ.get("GPU_CHECK_UNTIL")
    return float("inf") if until is None else float(until) - time.time()


def rounds(sides: Mapping[str, Callable[[], float]], most: int = 12) -> dict[str, list[float]]:
    """``common.interleave`` with as many rounds as there is time for: 2 to ``most``."""
    for side in sides.values():  # compiles
        side()
    began = time.perf_counter()
    for side in sides.values():
        side()
    once = time.perf_counter() - began
    return common.interleave(sides, max(2, min(most, int(left() / 2 / once) - 1)) if once < left() else 2)


def mesh() -> Any:
    """Of the first device."""
    return sharding.make_mesh(jax.devices()[:1])


def peaks(tiny: bool) -> Figures:
    """Square matrix products in bfloat16 and float32 (TF32 on devices with it), against the datasheet."""
    device = jax.devices()[0]
    results: list[dict[str, Any]] = []
    figures: dict[str, Any] = {"device": device_name(device)}
    for precision in ("bfloat16", "float32"):
        sizes = (256, 512) if tiny else ()
        again = [
            statistics.median(peak_flops.measure(device, precision, rounds=3, sizes=sizes)) for _ in range(3)
        ]
        table = datasheet_peak(device.device_kind, precision)
        results.append(common.result(f"{precision}: matrix products", [x / 1e12 for x in again], "TFLOP/s"))
        figures[precision] = {
            "measured_flops": statistics.median(again),
            "table_flops": None if table is None else table.flops,
            "measured_over_table": None if table is None else statistics.median(again) / table.flops,
        }
        yield {"results": results, "figures": figures}


def attentions(tiny: bool) -> Figures:
    """cuDNN's fused attention against XLA's, forward and backward, causal, in bfloat16."""
    results: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    heads, size = (2, 64) if tiny else (12, 64)
    for length in (64, 128) if tiny else (512, 1024, 2048, 4096):
        batch = max(1, (256 if tiny else 32_768) // length)
        shape = (batch, length, heads, size)
        refused = cudnn_refusal(shape, jnp.bfloat16, True)
        kinds = ["xla"] if refused else ["cudnn", "xla"]
        times = rounds({kind: _attention(shape, kind) for kind in kinds})
        figures[f"length {length}"] = {"batch": batch, "heads": heads, "ms": common.medians(times, 1e3)}
        if refused:
            figures["cudnn"] = f"skipped: {refused}"
        else:
            name = f"length {length}: speed of cuDNN's attention over XLA's, forward and backward"
            results.append(common.speedup(name, times["xla"], times["cudnn"]))
        yield {"results": results, "figures": figures}


def _attention(shape: tuple[int, ...], kind: Any) -> Callable[[], float]:
    """Seconds of a forward and backward pass."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)

    @jax.jit
    def both(q: Any, k: Any, v: Any, g: Any) -> Any:
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, True, kind), q, k, v)
        return out, *pull(g)

    def work(count: int) -> None:
        for _ in range(count):
            out = both(q, k, v, g)
        jax.block_until_ready(out)

    return lap(work)


def lap(work: Callable[[int], None], seconds: float = LAP) -> Callable[[], float]:
    """A side: seconds for one of as many units as take about ``seconds`` together."""
    count: list[int] = []

    def side() -> float:
        if not count:
            work(1)  # compiles
            began = time.perf_counter()
            work(2)
            count.append(max(1, int(seconds * 2 / max(time.perf_counter() - began, 1e-6))))
        began = time.perf_counter()
        work(count[0])
        return (time.perf_counter() - began) / count[0]

    return side


class Steps:
    """Updates of a program, ``count`` at once, with the bounded queue that the loop has.

    Args:
      program: what is trained; its state continues from call to call.
      count: updates dispatched at once.
      fixed: give every update the first batch, which lies on the device, instead of reading on.
    """

    def __init__(self, program: Program, count: int = 1, fixed: bool = False) -> None:
        self._program, self._count, self._state = program, count, program.init()
        self._at, self._fixed = 0, jax.block_until_ready(program.train.batch(0)) if fixed else None

    def __call__(self, updates: int) -> None:
        """At least so many updates, finished."""
        program, count = self._program, self._count
        flight = InFlight(program.experiment.max_in_flight)
        for _ in range(-(-updates // count)):
            if count == 1:
                batch = program.train.batch(self._at) if self._fixed is None else self._fixed
                self._state, metrics = program.train_step(self._state, batch, program.key)
            else:
                batches, shared = program.train.batches(self._at, count)
                self._state, metrics = program.train_steps(self._state, batches, program.key, shared)
            self._at += count
            flight.add(metrics)
        jax.block_until_ready(self._state)


def scans(tiny: bool) -> Figures:
    """Updates dispatched one by one, and 8 and 32 at once."""
    results: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    made: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
        "mlp": (lambda: workloads.mlp(tiny), (8, 32)),
        "digits_cnn": (lambda: workloads.digits(tiny), (8, 32)),
        "cifar_airbench94": (lambda: _airbench_like(tiny), (workloads.AT_ONCE,)),
    }
    for name, (make, counts) in made.items():
        if figures and left() < (5 if tiny else 40):
            figures[name] = "skipped: no time left"
            continue
        program = assemble(make(), mesh())
        sides = {str(count): lap_of(Steps(program, count), count) for count in (1, *counts)}
        times = rounds(sides, most=8)
        figures[name] = {"batch": program.experiment.batch, "us_an_update": common.medians(times, 1e6)}
        for count in counts:
            what = f"{name}: updates/s, {count} at once over one by one"
            results.append(common.speedup(what, times["1"], times[str(count)]))
        yield {"results": results, "figures": figures}


def _airbench_like(tiny: bool) -> Any:
    return workloads.airbench(*_cut(workloads.made_up_cifar10(), tiny), tiny)


def _cut(sets: list[dict[str, np.ndarray]], tiny: bool) -> list[dict[str, np.ndarray]]:
    sizes = (512, 256) if tiny else (None, None)
    return [{k: v[:n] for k, v in fields.items()} for fields, n in zip(sets, sizes, strict=True)]


def lap_of(steps: Steps, count: int) -> Callable[[], float]:
    """Seconds of an update, over a multiple of ``count`` updates."""
    side = lap(lambda dispatches: steps(dispatches * count))
    return lambda: side() / count


def feeding(tiny: bool) -> Figures:
    """Training fed by the real loader, against the same training on one repeated batch."""
    results: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    for placement in ("device", "stream"):
        program = assemble(workloads.cifar(placement, tiny), mesh())
        try:
            # Longer laps, so that what was read ahead while the other side had its turn counts little.
            long = 4 * LAP
            sides = {
                "fed": lap(Steps(program), long),
                "synthetic": lap(Steps(program, fixed=True), long),
            }
            times = rounds(sides, most=10)
        except ImportError as error:
            figures[placement] = f"skipped: {error}"
            continue
        finally:
            program.close()
        figures[placement] = {"batch": program.experiment.batch, "step_ms": common.medians(times, 1e3)}
        name = f"{placement}: updates/s of cifar_cnn, fed over synthetic"
        results.append(common.speedup(name, times["synthetic"], times["fed"], ">= 0.97"))
        yield {"results": results, "figures": figures}


def saving(folder: str, tiny: bool) -> Figures:
    """The blocking part of an asynchronous save of about 1 GB, against a memcpy and the entire save."""
    rows = 2**10 if tiny else 2**13
    make = jax.jit(lambda key: jax.random.normal(key, (rows, 1024)))  # 32 MB each
    arrays = {f"kernel{k}": make(key) for k, key in enumerate(jax.random.split(jax.random.key(0), 32))}
    state = State(jnp.zeros((), jnp.int32), arrays, {}, {})
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    source = np.ones(size // 8)
    target = np.zeros_like(source)  # touched, so that no page is new
    times: dict[str, list[float]] = {"blocking": [], "total": [], "memcpy": [], "device_to_host": []}
    with (
        tempfile.TemporaryDirectory(dir=folder) as where,
        checkpoint.open(Path(where), max_to_keep=1) as saved,
    ):
        for number in itertools.count(1):
            state = jax.block_until_ready(_moved(state))  # new arrays, without cached host copies
            clock = [time.perf_counter()]
            saved.save(number, state)
            clock.append(time.perf_counter())
            saved.wait()
            clock.append(time.perf_counter())
            taken = {
                "blocking": clock[1] - clock[0],
                "total": clock[2] - clock[0],
                **_copies(state, source, target),
            }
            if number > 1:  # the first imports and compiles
                for name, seconds in taken.items():
                    times[name].append(seconds)
                yield _saving(times, size)
            if number > 6 or left() < 3 * sum(taken.values()):
                break


_moved = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state))


def _copies(state: State, source: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Seconds of copying as many bytes in the host's memory, and of fetching the state from the device."""
    fresh = jax.block_until_ready(_moved(state))
    clock = [time.perf_counter()]
    np.copyto(target, source)
    clock.append(time.perf_counter())
    jax.device_get(fresh)
    clock.append(time.perf_counter())
    return {"memcpy": clock[1] - clock[0], "device_to_host": clock[2] - clock[1]}


def _saving(times: Mapping[str, list[float]], size: int) -> dict[str, Any]:
    allowed = [1.2 * copy + 0.02 for copy in times["memcpy"]]
    fetched = [1.2 * copy + 0.02 for copy in times["device_to_host"]]
    blocking, total = times["blocking"], times["total"]
    return {
        "results": [
            common.speedup("blocking part of a save over 1.2 × memcpy + 20 ms", blocking, allowed, "< 1.0"),
            common.speedup("blocking part of a save over 1.2 × device to host + 20 ms", blocking, fetched),
            common.speedup("blocking part of a save over the entire save", blocking, total, "< 0.1"),
        ],
        "figures": {"bytes": size, "ms": common.medians(times, 1e3)},
    }
