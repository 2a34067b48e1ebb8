"""What step times, telemetry and profiling cost: per update, per record, and while a trace is taken.

python -m benchmarks.telemetry [--rounds N] [--out FILE]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import common
from benchmarks.sides import cases
from jaxtrain import monitor, sharding
from jaxtrain.monitor.step_times import StepTimes
from jaxtrain.program import assemble

STEPS = 200  # of one side of a round, while traced or not


def calls() -> dict[str, tuple[Callable[[], Any], int]]:
    """What is timed by itself, and how many calls are timed at once."""
    step_times, meter = StepTimes(), monitor.Meter(jax.local_devices()[:1])
    nothing: Any = None
    function = monitor.mark("a mark")(lambda: None)
    meter.record(0)

    def lap() -> None:
        step_times._reported = -1.0
        step_times._times, step_times._counts = [0.01] * 50, [1] * 50
        step_times.window()

    return {
        "update, no trace asked for (Trace.step)": (
            lambda: monitor.OFF.step(5, 1, nothing, nothing, nothing),
            5000,
        ),
        "update, its time (StepTimes.tick)": (step_times.tick, 5000),
        "call of a marked function, none traced": (function, 5000),
        "record within a second of the last (Meter.record)": (lambda: meter.record(100), 1000),
        "once a second: percentiles of 50 times (StepTimes.window)": (lap, 100),
        "once a second: memory (Meter.result)": (lambda: meter.result(100), 100),
    }


def time_traced(rounds: int) -> dict[str, list[float]]:
    """Seconds a step of the small MLP of ``benchmarks.loop``, with and without a trace."""
    program = assemble(cases()["mlp"].experiment, sharding.make_mesh(jax.devices()[:1]))
    states = [program.init()]

    def steps() -> float:
        began = time.perf_counter()
        for number in range(STEPS):
            states[0], _ = program.train_step(states[0], program.train.batch(number), program.key)
            if number % 2:
                jax.block_until_ready(states[0])
        return (time.perf_counter() - began) / STEPS

    def under() -> float:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # as ``monitor.Trace`` has it
        with tempfile.TemporaryDirectory() as folder, jax.profiler.trace(folder, profiler_options=options):
            return steps()

    return common.interleave({"plain": steps, "traced": under}, rounds)


def main() -> None:
    """One JSON object."""
    args = common.arguments(__doc__, rounds=15).parse_args()
    sides = {}
    for name, (work, count) in calls().items():
        sides[name] = common.each(lambda work=work, count=count: [work() for _ in range(count)], count)
    times = common.interleave(sides, args.rounds)
    results = [common.result(name, [1e6 * t for t in values], "µs") for name, values in times.items()]
    both = time_traced(args.rounds)
    results.append(common.speedup("a step while traced, over one that is not", both["traced"], both["plain"]))
    common.finish(args, "telemetry", results, {"step_ms": common.medians(both, 1e3)})


if __name__ == "__main__":
    main()
