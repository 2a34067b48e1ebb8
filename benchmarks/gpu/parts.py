"""The parts of ``scripts/gpu_check.py`` that check and measure on the GPU, each within its time.

A part returns ``results`` (lines of ``benchmarks.common.result``, with goals) and ``figures``, or raises
``Skipped`` or ``Failed``. A goal that is missed is a result. Nothing here imports JAX, which would take the
GPU's memory from the processes that are measured.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.gpu.session import Failed, Session, Side, Skipped, TimedOut, missing

ROOT = Path(__file__).resolve().parents[2]
OWN_PARTS = (
    "resume or two_runs or plan_says"  # tests of what other parts show: each takes minutes of processes
)


def doctor(session: Session) -> dict[str, Any]:
    """``python -m jaxtrain doctor`` finds nothing wrong."""
    return {"output": session.run("-m", "jaxtrain", "doctor").splitlines()}


def tests(session: Session) -> dict[str, Any]:
    """The tests that need a GPU, without those that ``exact`` and the figures of memory stand for."""
    if session.cpu:
        raise Skipped("these need a GPU")
    if why := missing("pytest"):
        raise Skipped(why)
    files = sorted(p for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text())
    where = ["--rootdir", ROOT, "-c", ROOT / "pyproject.toml", *files]
    env = {"JAXTRAIN_TEST_GPU": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    # Versions of JAX that warn of what is to come are measured all the same; -vv names every test.
    words = ("-vv", "-W", "default", "-m", "gpu", "-k", f"not ({OWN_PARTS})", "-rfs")
    cut = None
    try:
        output = session.run("-m", "pytest", *words, *where, **env)
    except TimedOut as why:
        output, cut = why.output, f"not finished in {session.limit:.0f} s"
    found = {
        name.lower(): len(re.findall(rf"^\S+::.* {name}\b", output, re.M))
        for name in ("PASSED", "SKIPPED", "FAILED")
    }
    if cut and (found["failed"] or not found["passed"]):
        raise Failed(f"{cut}: {found}")
    reasons = re.findall(r"^SKIPPED \[\d+\] (.*)$", output, re.M)
    return {**found, "left_out": OWN_PARTS, "skips": reasons, **({"cut": cut} if cut else {})}


def exact(session: Session) -> dict[str, Any]:
    """Resume bit for bit with deterministic operations; NaN behind ReLUs ends the run."""
    if why := missing("tensorboardX"):
        raise Skipped(why)
    found = session.child("exact", *session.tiny)
    if found["nan"]["stopped"] is None or not found["nan"]["parameters_kept"]:
        raise Failed(f"the guard did not stop a batch of NaN: {found['nan']}")
    for name in ("resume", "resume_8_at_once"):
        if name not in found:  # cut off, which is reported
            continue
        one = found[name]
        if not one["stopped"] or not 0 < one["resumed_from"] < one["steps"]:
            raise Failed(f"{name}: the run was not resumed half-way: {one}")
        if one["different"]:
            raise Failed(f"{name}: not the same bits in {', '.join(one['different'][:5])}")
    return found


def peak(session: Session) -> dict[str, Any]:
    """Matrix products: what model FLOPs are a share of."""
    found = session.child("peak", *session.tiny)
    session.facts["peak"] = found["figures"]["bfloat16"]["measured_flops"]
    return found


def airbench(session: Session) -> dict[str, Any]:
    """CIFAR-10 to 94 %: accuracy and time over seeds."""
    if session.data is None:
        raise Skipped("no CIFAR-10: give --data")
    found = session.child("airbench", session.data, *session.tiny)
    session.facts["airbench"] = found["figures"]["runs"]
    return found


def airbench_torch(session: Session) -> dict[str, Any]:
    """The same recipe in PyTorch, half precision, on the same card, after ours."""
    if session.data is None:
        raise Skipped("no CIFAR-10: give --data")
    if why := missing("torch"):
        raise Skipped(why)
    module = "benchmarks.gpu.torch_airbench"
    found = session.child(session.data, *session.tiny, module=module)
    theirs = {name: [run["seconds"] for run in runs] for name, runs in found["figures"]["runs"].items()}
    ours = session.facts.get("airbench", {})
    for name, runs in ours.items():
        for other, seconds in theirs.items():
            n = min(len(runs), len(seconds))
            goal = ">= 1.0" if name.startswith("bfloat16, one") else None
            label = f"airbench94: speed of ours ({name}) over PyTorch ({other}), one after the other"
            mine = [run["seconds"] for run in runs]
            found["results"].append(common.speedup(label, seconds[:n], mine[:n], goal))
    return found


def throughput(name: str, batch: Callable[[Session], int], session: Session) -> dict[str, Any]:
    """Steps in jaxtrain and under ``torch.compile``, in turns on one card; memory against ``plan``."""
    size = batch(session)
    try:
        return _throughput(name, size, session)
    except TimedOut:
        raise
    except Failed as error:
        if "RESOURCE_EXHAUSTED" not in error.output:
            raise
        return {**_throughput(name, size // 2, session), "note": f"a batch of {size} does not fit: {error}"}


def _throughput(name: str, size: int, session: Session) -> dict[str, Any]:
    why = missing("torch")
    with contextlib.ExitStack() as stack:
        # Both compile at once, which is work for the host.
        ours = stack.enter_context(session.side("jaxtrain", name, size, *session.tiny))
        sides = {"jaxtrain": (ours, "default")}
        if why is None:
            theirs = stack.enter_context(session.side("torch", name, size, *session.tiny))
            sides["torch"] = (theirs, "default")
        about = {"jaxtrain": ours.answer()}
        try:
            if why is None:
                about["torch"] = theirs.answer(reserve=30)
                if about["torch"]["parameters"] != about["jaxtrain"]["parameters"]:
                    raise Failed("PyTorch's network is not ours: it has other parameters")
            times = in_turn(session, sides)
        except Failed as error:
            if "torch" not in sides:
                raise
            why = str(error)  # which takes nothing from ours
            sides.pop("torch")
            theirs.close()
            times = in_turn(session, sides)
        results = _rates(name, about["jaxtrain"], times["jaxtrain"], session.facts.get("peak"))
        if "torch" in times:
            what = f"{name}: speed over torch.compile"
            results.append(common.speedup(what, times["torch"], times["jaxtrain"], ">= 1.1"))
        figures = {**about, "step_ms": common.medians(times, 1e3)}
        if name == "gpt" and session.left() > (10 if session.cpu else 45):
            with contextlib.suppress(Failed):  # which takes nothing from what there is
                pair = {kind: (ours, kind) for kind in ("default", "xla attention")}
                times = in_turn(session, pair)
                figures["step_ms in turn"] = common.medians(times, 1e3)
                what = "gpt: speed of a step with attention as chosen (cuDNN's on a GPU) over XLA's"
                results.append(common.speedup(what, times["xla attention"], times["default"]))
    found = {"results": results, "figures": figures}
    return {**found, "skipped": {"torch.compile": why}} if why else found


def in_turn(session: Session, sides: dict[str, tuple[Side, str]], most: int = 10) -> dict[str, list[float]]:
    """Seconds of an update of each, in turns (A B B A); about half a second of each in a round."""

    def timed(kind: str, updates: int) -> float:
        side, variant = sides[kind]
        return float(side.ask(variant, updates)["seconds"])

    updates = {kind: max(1, int(0.5 / timed(kind, 2))) for kind in sides}
    began = time.monotonic()
    for kind in sides:
        timed(kind, updates[kind])
    once = time.monotonic() - began
    rounds = 2 if session.cpu else max(2, min(most, int(session.left() / 2 / once)))
    return common.interleave({kind: functools.partial(timed, kind, n) for kind, n in updates.items()}, rounds)


def _rates(name: str, about: dict[str, Any], times: list[float], most: float | None) -> list[dict[str, Any]]:
    unit, count = ("tokens/s", about["tokens"]) if about["tokens"] else ("images/s", about["batch"])
    found = [common.result(f"{name}: {unit}", [count / seconds for seconds in times], unit)]
    if most is not None:
        share = [about["flops"] / seconds / most for seconds in times]
        goal = ">= 0.6" if name == "gpt" else None
        found.append(
            common.result(f"{name}: share of the measured bfloat16 matrix peak (MFU)", share, "", goal)
        )
    if about["peak_bytes"]:
        ratio = about["planned_bytes"] / about["peak_bytes"]
        found.append(common.result(f"{name}: memory, plan over what two steps took", [ratio], "×"))
    return found


def gpt_batch(session: Session) -> int:
    """Sequences of 1,024 tokens: a power of two, for both sides and XLA's attention on one card."""
    return 4 if session.cpu else 1 << max(1, session.memory // 2**30 // 3).bit_length() - 1


def resnet_batch(session: Session) -> int:
    """256 where there is memory for two of them."""
    return 8 if session.cpu else 256 if session.memory > 60 * 2**30 else 64


def child_part(
    name: str, *more: Callable[[Session], Any], needs: tuple[str, ...] = ()
) -> Callable[[Session], Any]:
    """The part that is a function of ``benchmarks.gpu.child``."""

    def part(session: Session) -> dict[str, Any]:
        if why := missing(*needs):
            raise Skipped(why)
        return session.child(name, *(argument(session) for argument in more), *session.tiny)

    return part


gpt = functools.partial(throughput, "gpt", gpt_batch)
resnet50 = functools.partial(throughput, "resnet50", resnet_batch)
