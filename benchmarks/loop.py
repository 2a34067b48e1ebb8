"""What ``train.loop.fit`` adds to a step, against a loop written by hand.

Loops over the same model, the same resident data, the same augmentation and the same order:

  fit      the loop of ``train.loop.fit``: JSONL and TensorBoard records every 50 steps, bounded
           queue, checkpoint polling, plain console (to /dev/null). Evaluations and saves are left out.
  no log, log 1    the same without records, and with one of every step
  queue K  the same with ``max_in_flight=K``
  scan K   the same with ``steps_per_execution=K``
  library  a bare ``for`` around jaxtrain's compiled step
  hand     the same, around a step written by hand with flax, optax and ``jax.jit(donate_argnums=0)``

The hand-written loop logs nothing and never waits, so everything else that fit does counts as its cost.

  python -m benchmarks.loop [--rounds N] [--out FILE]
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common
from benchmarks.sides import TOTAL, Case, Fit, Hand, Library, assemble_without_saves, cases, rows_from
from jaxtrain import sharding
from jaxtrain.program import Cadence, Program
from jaxtrain.train.bad_updates import BadUpdateMonitor

WINDOWS = 20  # records written for the breakdown
QUEUES = (1, 2, 3, 4, 8)
SCANNED = 32
GOALS = {"lenet": (">= 0.98", None), "mlp": (None, "< 100")}

Times = dict[str, list[float]]


def sides_of(name: str, case: Case, stack: contextlib.ExitStack) -> dict[str, Any]:
    """What is compared for the case ``name``: objects with ``steps(count)``."""
    program = assemble_without_saves(case.experiment)
    sides = {"fit": Fit(program, stack), "library": Library(program), "hand": Hand(case, program)}
    if name == "lenet":
        every = {"no log": TOTAL, "log 1": 1}
        sides |= {label: Fit(program, stack, log_every=steps) for label, steps in every.items()}
    sides |= {f"queue {k}": Fit(program, stack, max_in_flight=k) for k in QUEUES}
    if name == "mlp":
        sides["scan"] = Fit(program, stack, together=SCANNED)
    return sides


def ratios(name: str, times: Times) -> list[dict[str, Any]]:
    """The lines of the table for the case ``name``."""
    fit, hand = times["fit"], times["hand"]
    added = [1e6 * (a - b) for a, b in zip(fit, hand, strict=True)]
    ratio, extra = GOALS[name]
    found = [
        common.speedup(f"{name}: steps/s, fit over hand-written", hand, fit, ratio),
        common.speedup(f"{name}: steps/s, fit over a bare loop", times["library"], fit),
        common.result(f"{name}: added to a step by fit", added, "µs", extra),
    ]
    if "log 1" in times:
        label = f"{name}: steps/s, a record of every step over none"
        found.append(common.speedup(label, times["no log"], times["log 1"], ">= 0.98"))
    for side in (side for side in times if side.startswith("queue") and side != "queue 2"):
        label = f"{name}: steps/s, max_in_flight={side.split()[1]} over 2"
        found.append(common.speedup(label, times["queue 2"], times[side]))
    if "scan" in times:
        label = f"{name}: steps/s, steps_per_execution={SCANNED} over 1"
        found.append(common.speedup(label, fit, times["scan"], ">= 2"))
        label = f"{name}: added to a step by fit, steps_per_execution={SCANNED}"
        more = [1e6 * (a - b) for a, b in zip(times["scan"], hand, strict=True)]
        found.append(common.result(label, more, "µs", "< 100"))
    return found


def breakdown(fit: Fit, repeats: int = 2000) -> dict[str, float]:
    """Microseconds a step of each thing that fit does on the host, one at a time on an idle device."""
    program, record, watch = fit.program, fit.record, BadUpdateMonitor(fit.program, None, print)
    state, metrics = program.train_step(program.init(), program.train.batch(0), program.key)
    (taken,) = metrics.rows()
    cadence = program.cadence
    every, at = program.experiment.log_every, 0
    copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    # Arrays that were never read: the host keeps a copy of those that were.
    fresh = iter(jax.block_until_ready([copied(metrics) for _ in range(2 * repeats)]))

    def window() -> None:
        nonlocal at
        with contextlib.redirect_stdout(fit.null):
            for _ in range(every):
                at += 1
                record.step(at, [taken])

    parts: dict[str, tuple[Callable[[], Any], int]] = {
        "row numbers (train.batch)": (lambda: program.train.batch(7), 1),
        "row numbers, by hand": (lambda: list(rows_from(program.order, 7, 100)), 100),
        "read finished metrics": (lambda: next(fresh).rows(), 1),
        "judge them": (lambda: watch.judge(7, dict(taken)), 1),
        "record them, every 50th written (Recorder.step)": (window, every),
        "is it time to evaluate": (lambda: Cadence.evaluates_after(cadence, 7), 1),
        "is it time to save": (lambda: Cadence.saves_after(cadence, 7), 1),
        "how many to dispatch": (lambda: cadence.updates_per_call(7), 1),
        "checkpoint poll": (fit.saved.poll, 1),
        "console advance": (lambda: fit.console.advance(1), 1),
        **_dispatch(program, state),
    }
    found = {}
    for name, (work, units) in parts.items():
        count = (WINDOWS if units > 1 else repeats) // 5
        work()
        laps = []
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(count):
                work()
            laps.append((time.perf_counter() - began) / count / units)
        found[name] = 1e6 * sorted(laps)[2]
    return found


def _dispatch(program: Program, state: Any) -> dict[str, tuple[Callable[[], Any], int]]:
    """Calling a compiled function of the step's arguments and metrics that computes next to nothing."""

    def nothing(state: Any, batch: Any, key: jax.Array) -> Any:
        return state.step + 1

    replicated = sharding.replicated(sharding.make_mesh(jax.devices()[:1]))
    compiled = sharding.compile(
        nothing, args=(replicated, program.train.shardings, replicated), out=replicated
    )
    plain, batch = jax.jit(nothing), program.train.batch(0)
    return {
        "call of an empty step, shardings given": (lambda: compiled(state, batch, program.key), 1),
        "call of an empty step, plain jit": (lambda: plain(state, batch, program.key), 1),
    }


def main() -> None:
    """Both cases, one JSON object."""
    args = common.arguments(__doc__, rounds=20).parse_args()
    results, figures = [], {}
    for name in GOALS:
        case = cases()[name]
        with contextlib.ExitStack() as stack:
            sides = sides_of(name, case, stack)
            chunk = case.chunk
            timed = {
                label: common.each(lambda side=side, chunk=chunk: side.steps(chunk), chunk)
                for label, side in sides.items()
            }
            times = common.interleave(timed, args.rounds)
            results += ratios(name, times)
            figures[name] = {
                "batch": case.experiment.batch,
                "steps a round": chunk,
                "step_us": common.medians(times, 1e6),
                "host_us_by_part": breakdown(sides["fit"]),
            }
    common.finish(args, "loop", results, figures)


if __name__ == "__main__":
    main()
