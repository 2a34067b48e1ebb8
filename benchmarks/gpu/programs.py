"""The part of ``scripts/gpu_check.py`` that checks what ``plan --for`` says of a program that is run here.

Shipped experiments are compiled twice: for the described card, by ``plan --for``, and on the device. The same
functions read both. Then steps are timed and compared with the lower bound, which no step may beat.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks import common
from benchmarks.gpu import compare
from benchmarks.gpu.parts import in_turn
from benchmarks.gpu.session import Failed, Session, Skipped, TimedOut, said, tail

CASE_SECONDS = 100.0  # most that one case may take of the part's time
TIMING_SECONDS = 8.0  # reserved for timing in each case
CPU_LABEL = "the program of a CPU: figures mean nothing"


@dataclasses.dataclass(frozen=True)
class Case:
    """An experiment to compile both ways.

    Attributes:
      experiment: its name.
      settings: as for ``--set``.
      tiny: instead of ``settings`` on a CPU; None leaves the case out there.
      several: on all GPUs together, ``data=N``, instead of one.
    """

    experiment: str
    settings: tuple[str, ...] = ()
    tiny: tuple[str, ...] | None = None
    several: bool = False

    def label(self, devices: int) -> str:
        """Its name in the record."""
        return f"{self.experiment}, data={devices}" if self.several else self.experiment


HALF = ("precision=bfloat16",)
TINY_GPT = ("batch=8", "model.depth=1", "model.width=64", "model.heads=2", "precision=bfloat16")
CASES = (
    Case("digits_cnn", (), ("batch=32",)),
    Case("shakespeare_gpt", HALF, TINY_GPT),
    Case("digits_cnn", ("batch=512",), ("batch=32",), several=True),
    Case("cifar_cnn", HALF, ("batch=32", "model.widths=(8,8)")),
    Case("cifar_resnet18"),
    Case("imagenet_vit_s16", ("batch=256",)),
    Case("shakespeare_gpt", HALF, several=True),
    Case("imagenet_resnet50", ("batch=128", *HALF)),
)
"""In the order of their worth: what there is no time for is left out."""


def programs(session: Session) -> dict[str, Any]:
    """Compile experiments for the described card and on the device, compare them, and time steps.

    Each case fails alone. The part fails if a step was faster than its lower bound, or if something of a case
    went wrong that was not for want of time.
    """
    card = _card(session)
    record: dict[str, Any] = {"card": card, "cases": {}}
    notes, skipped, wrong, results = list[str](), dict[str, str](), list[str](), list[dict[str, Any]]()
    notes += [card[key] for key in ("why", "no_compiler") if key in card]
    if session.cpu:
        notes.append(CPU_LABEL)
        record["label"] = CPU_LABEL
    devices = _device_count(session)
    longest = 0.0
    for case in CASES:
        label = case.label(devices)
        why = _left_out(case, session, devices, longest)
        if label in session.facts.get("compared", ()):
            why = "compared in the earlier record"
        if why is not None:
            skipped |= {} if why == "" else {label: why}
            continue
        began = time.monotonic()
        found = run_case(session, case, card, devices)
        longest = max(longest, time.monotonic() - began)
        record["cases"][label] = found
        results += _results(label, found, session.cpu)
        notes += [f"{label}: {line}" for line in _notes(found)]
        skipped |= {f"{label}: {what}": text for what, text in found["skipped"].items()}
        wrong += [f"{label}: {what}: {text}" for what, text in found["errors"].items()]
    if not record["cases"]:
        raise Skipped("no time left for the first program")
    failed = {"status": "failed", "why": "; ".join(wrong)} if wrong else {}
    return {"results": results, "figures": record, "skipped": skipped, "notes": notes, **failed}


def run_case(session: Session, case: Case, card: Mapping[str, Any], devices: int) -> dict[str, Any]:
    """Compile both ways at once, compare, and time steps while nothing else runs.

    Returns:
      What there is: both plans (``described``, ``here``), their ``comparison``, ``step``
      (``compare.check_bound`` for each plan); and the reasons of what went wrong (``errors``) or was left out
      (``skipped``).
    """
    limit = session.left() if session.cpu else min(session.left(), CASE_SECONDS)
    own = dataclasses.replace(session, began=time.monotonic(), limit=limit)
    count, env = (devices, _several_env(session, devices)) if case.several else (1, {})
    mesh = f"data={devices}" if case.several else "-"
    settings = case.tiny if session.cpu and case.tiny is not None else case.settings
    errors, skipped, found = dict[str, str](), dict[str, str](), dict[str, Any]()

    def attempt(what: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Skipped as why:
            skipped[what] = str(why)
        except TimedOut as why:  # an error only if the case had all of its time
            (errors if limit == CASE_SECONDS else skipped)[what] = str(why)
        except Exception as why:  # the other side and the other cases still count
            errors[what] = str(why) if isinstance(why, Failed) else repr(why)
        return None

    words = (case.experiment, card.get("for", "-"), mesh, count, *settings)
    module = "benchmarks.gpu.program_side"
    with own.side(*words, module=module, JAX_ENABLE_COMPILATION_CACHE="false", **env) as side:
        described = attempt("described", lambda: describe(own, case.experiment, card, mesh, count, settings))
        here = attempt("here", lambda: side.answer(reserve=TIMING_SECONDS))
        if described is not None and here is not None:
            found["comparison"] = attempt("comparison", lambda: compare.compare(described, here))
        if here is not None:
            times = attempt("timing", lambda: in_turn(own, {"step": (side, "step")}, most=6)["step"])
            if times is not None:
                found["step"] = attempt("bound", lambda: _bounds(described, here, times, session.cpu))
    if found.get("step") and not session.cpu:
        errors |= {f"{name} lower bound": text for name, text in _beaten(found["step"])}
    for name, plan in (("described", described), ("here", here)):
        found[name] = None if plan is None else _kept(plan)
    return found | {"settings": list(settings), "errors": errors, "skipped": skipped}


def describe(
    session: Session,
    experiment: str,
    card: Mapping[str, Any],
    mesh: str,
    devices: int,
    settings: tuple[str, ...],
) -> dict[str, Any]:
    """Run ``plan --for``, the command that a user types; returns its JSON."""
    for reason in ("why", "no_compiler"):
        if reason in card:
            raise Skipped(card[reason])
    words = [word for setting in settings for word in ("--set", setting)]
    words += ["--devices", str(devices), *(() if mesh == "-" else ("--mesh", mesh))]
    command = ["-m", "jaxtrain", "plan", "--experiment", experiment, "--for", card["for"], *words, "--json"]
    output = session.run(*command, JAX_PLATFORMS="cpu")  # the GPU's plugin is used as a compiler only
    found = said(output)
    if found is None:
        raise Failed(f"plan printed no JSON: {tail(output)}")
    return found


def _card(session: Session) -> dict[str, Any]:
    """What describes the device (``card_file.find``), or why nothing does."""
    try:
        return session.child("card", session.scratch)
    except Failed as error:
        return {"why": str(error)}


def _device_count(session: Session) -> int:
    """GPUs to use together; MIG slices cannot be."""
    return 2 if session.cpu else int(session.facts.get("gpus", 1))


def _several_env(session: Session, devices: int) -> dict[str, str]:
    """Environment of a process that uses ``devices`` devices; the other parts see one GPU."""
    if session.cpu:
        return {"JAX_NUM_CPU_DEVICES": str(devices)}
    return {"CUDA_VISIBLE_DEVICES": session.facts["visible"]} if "visible" in session.facts else {}


def _left_out(case: Case, session: Session, devices: int, longest: float) -> str | None:
    """Why a case is not run; "" where it does not apply here, None where it is run."""
    if session.cpu and case.tiny is None:
        return ""
    if case.several and devices < 2:
        return ""
    need = max(longest, 20.0)
    return f"no time left: {session.left():.0f} s of {need:.0f} s" if session.left() < need else None


def _bounds(
    described: Mapping[str, Any] | None, here: Mapping[str, Any], times: list[float], cpu: bool
) -> dict[str, Any]:
    """Compare the measured times with the lower bound of each program."""
    sides = {"described": described, "here": here}
    found = {
        name: compare.check_bound((plan["gpu"] or {}).get("lower_bound"), times)
        for name, plan in sides.items()
        if plan is not None
    }
    return {**found, "label": CPU_LABEL} if cpu else found


def _beaten(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, one in step.items():
        if one.get("holds") is False:
            fastest = min(one["rounds_ms"])
            text = f"wrong: {one['bound_ms']:.4g} ms ({one['limit']}), and a step took {fastest:.4g} ms"
            yield name, text


def _results(label: str, found: Mapping[str, Any], cpu: bool) -> Iterator[dict[str, Any]]:
    """Lines of the table: ratios of described to real, the step, and its share of the bound."""
    label = f"{label} (on a CPU: no figure)" if cpu else label
    for name, ratio in ((found.get("comparison") or {}).get("ratios") or {}).items():
        yield common.result(f"{label}: {name}, described over compiled here", [ratio], "×")
    step = found.get("step") or {}
    one = step.get("here")
    if one is not None:
        yield common.result(f"{label}: a step", one["rounds_ms"], "ms")
    for name in ("described", "here"):
        one = step.get(name) or {}
        if "bound_ms" in one:
            what = f"{label}: lower bound ({name}, {one['limit']}) over the step"
            ratios = [one["bound_ms"] / each for each in one["rounds_ms"]]
            yield common.result(what, ratios, "", None if cpu else "< 1.0")
    if "mfu" in (step.get("here") or {}):
        yield common.result(f"{label}: MFU", step["here"]["mfu"], "")


def _notes(found: Mapping[str, Any]) -> list[str]:
    comparison = found.get("comparison")
    lines = [] if comparison is None else comparison["differences"] or ["both programs have the same figures"]
    return [*lines, *(f"{what} failed: {text}" for what, text in found["errors"].items())]


def _kept(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What the record keeps of a plan: everything but the list of large arrays."""
    return {name: value for name, value in json.loads(json.dumps(plan)).items() if name != "largest"}
