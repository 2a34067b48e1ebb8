"""What ``python -m jaxtrain.run`` does: a thin shell around ``jaxtrain.loop.fit``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxtrain import (
    checkpoint,
    cli,
    devices,
    flags,
    loading,
    plan,
    preflight,
    profile,
    redact,
    sharding,
    workdir,
)
from jaxtrain.data import Order, Subset, holdout
from jaxtrain.dispatch import decide
from jaxtrain.errors import InputError, RunError
from jaxtrain.experiment import Experiment
from jaxtrain.loop import fit
from jaxtrain.program import Program, assemble
from jaxtrain.recorder import Console, describe, make_console
from jaxtrain.sharding import processes
from jaxtrain.stop import Stopped


def run(args: argparse.Namespace) -> int:
    """Train, or go on, as the arguments of ``run`` say; returns the exit code."""
    for flag in ("grace", "hang_after"):
        seconds = getattr(args, flag)
        if seconds is not None and not 0 < seconds < float("inf"):
            raise InputError(f"--{flag.replace('_', '-')} {seconds:g}: give seconds above 0")
    profile.window(args.profile)  # before anything is loaded
    name, origin, experiment = loading.load(args.experiment, args.set)
    mesh = devices.make(args, cli.warn)
    console = make_console(quiet=not processes.is_first())
    if not args.smoke:  # before data is fetched or read
        processes.first(lambda: preflight.check_folder(Path(args.workdir or "runs")))
    loading.ensure_prepared(experiment, console)
    if args.smoke and (args.init_from or args.init_map):
        raise InputError("--smoke tries the experiment alone: leave --init-from and --init-map out")
    if args.smoke and args.profile:
        raise InputError("--smoke tries the experiment alone: leave --profile out")
    if args.smoke:
        return _smoke(name, experiment, mesh, console)
    if args.overfit is not None:
        experiment = loading.overfit(experiment, args.overfit)
    folder = _folder(name, experiment, args)
    return _fit(name, origin, experiment, mesh, folder, args, console)


def _fit(
    name: str,
    origin: str,
    experiment: Experiment,
    mesh: Mesh,
    folder: Path,
    args: argparse.Namespace,
    console: Console,
) -> int:
    began = time.perf_counter()
    record: dict[str, Any] = {
        "origin": origin,
        "file": workdir.file_digest(origin),
        "overrides": [redact.setting(pair) for pair in args.set],
        "overfit": args.overfit,
        "devices": [d.device_kind for d in mesh.devices.flat],
        "mesh": dict(mesh.shape),
        "bits": devices.bits(args, mesh),
    }
    notes = _bits(args, record["bits"], folder) + workdir.changes(folder, record)  # before it is claimed
    source = processes.first(lambda: workdir.init_from(folder, args.init_from, args.init_map))
    record |= {"init_from": source} if source else {}
    sharding.check_batch(experiment.batch, mesh, accumulate=experiment.accumulate)
    begun = processes.first(lambda: _begun(folder))
    if begun is not None:  # another run is refused before any data is opened
        processes.first(lambda: workdir.claim(folder, name, experiment, record, args.extend))
    program = assemble(experiment, mesh)
    updates = profile.window(args.profile, program.steps)
    found = processes.first(lambda: workdir.result(folder, program.steps))
    console.note(f"{name} in {folder} on {devices.describe(mesh)}, batch {_batch(experiment, mesh)}")
    for note in (*program.notes, *(notes if found is None else ())):
        console.note(note)
    if found is None:
        program = _ready(program, name, folder, args, console, record, source, begun)
        found = _trained(program, name, folder, args, console, began, source, updates)
    else:
        console.note(f"this run is finished{_where(folder)}; --new starts another, --extend a longer one")
        if updates:
            console.note(f"--profile {args.profile}: nothing to profile, no update is left")
    _summary(name, found, folder, console)
    return 0


def _ready(
    program: Program,
    name: str,
    folder: Path,
    args: argparse.Namespace,
    console: Console,
    record: dict[str, Any],
    source: Sequence[Any] | None,
    begun: dict[str, Any] | None,
) -> Program:
    """``program`` with its choices made, once all that can be checked was; ``folder`` is its own then."""
    processes.first(lambda: plan.check_disk(program, folder))
    plan.check_memory(program)
    if source and begun is None:  # so that what cannot begin leaves no folder
        checkpoint.check_init_from(source[0], source[1], program.like)
    with plan.explained(program, name, folder, console):
        choice = decide(program, begun, args.deterministic)
    if choice.count > 1:
        console.note(f"{choice.count} updates a dispatch: {choice.why}")
    record = record | program.choices | choice.record()
    processes.first(lambda: workdir.claim(folder, name, program.experiment, record, args.extend))
    return dataclasses.replace(program, per_dispatch=choice.count)


def _trained(
    program: Program,
    name: str,
    folder: Path,
    args: argparse.Namespace,
    console: Console,
    began: float,
    source: Sequence[Any] | None,
    updates: tuple[int, int] | None,
) -> dict[str, Any]:
    """The result of ``loop.fit``, for which the folder is locked."""
    try:
        with contextlib.ExitStack() as held:
            processes.first(lambda: held.enter_context(workdir.locked(folder)))
            return fit(
                program,
                folder,
                console,
                name,
                began,
                resume=args.resume,
                init_from=source,
                grace=args.grace,
                hang_after=args.hang_after,
                strict=args.strict,
                updates=updates,
            )
    except Stopped as stopped:
        raise Stopped(f"{stopped}; go on with: {_again(args, folder)}", stopped.signum) from None
    finally:
        console.end()
        program.close()


def _folder(name: str, experiment: Experiment, args: argparse.Namespace) -> Path:
    if args.extend and not args.workdir:
        raise InputError("--extend goes on with a run of another length: name it with --workdir")
    suffix = "" if args.overfit is None else f"-overfit{args.overfit}"
    folder = cli.run_folder(args.workdir) if args.workdir else workdir.default(name + suffix, experiment)
    return Path(processes.agree(str(workdir.beside(folder)), "folder")) if args.new else folder


def _begun(folder: Path) -> dict[str, Any] | None:
    """The record of the run in ``folder``, None where none has begun."""
    return workdir.load(folder) if (folder / "config.json").exists() else None


def _smoke(name: str, experiment: Experiment, mesh: Mesh, console: Console) -> int:
    """Two steps, an evaluation, a save; then the same again, which must restore and change nothing."""
    if processes.count() > 1:
        raise InputError("--smoke is for one process: leave --processes out, or use --simulate-devices")
    batch, n = experiment.batch, len(experiment.train)
    Order(experiment.seed, n, batch, experiment.remainder).steps(experiment.epochs)
    if experiment.holdout:
        holdout(n, experiment.holdout)
    if batch > 2 * n:
        raise InputError(f"batch {batch} is more than twice the training set of {n} examples")
    test = Subset(experiment.test, np.arange(min(len(experiment.test), batch + 1)))
    chosen = experiment.valid is not None or experiment.holdout > 0
    short = dataclasses.replace(
        experiment,
        train=Subset(experiment.train, np.arange(2 * batch) % len(experiment.train)),
        test=test,
        valid=test if chosen else None,
        holdout=0,
        epochs=1,
        log_every=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        programs = [assemble(short, mesh) for _ in range(2)]
        for note in programs[0].notes:
            console.note(note)
        first, again = (fit(program, Path(folder), console, name) for program in programs)
        for program in programs:
            program.close()
    console.end()
    if again["resumed_from"] != 2 or first["test"] != again["test"]:
        raise RunError(f"smoke test of {name}: restored {again} after {first}")
    console.note(f"smoke test of {name} passed: 2 steps, evaluation, save, restore, same evaluation")
    return 0


def _summary(name: str, found: dict[str, Any], folder: Path, console: Console) -> None:
    rows = {"test, last step": describe(found["test"], None)}
    if "best" in found:
        best = found["best"]
        rows["best on valid"] = f"step {best['step']}, score {best['valid']:.4f}"
        rows["test, best step"] = describe(best["test"], None)
    speed = _speed(found)
    rows |= {
        "steps": f"{found['steps']:,}",
        "wall time": f"{found['seconds']:.1f} s"
        + (f" (from step {found['resumed_from']})" if found["resumed_from"] else ""),
        "speed": speed or "not measured",
        "folder": str(folder),
    }
    console.summary(name, rows)


def _speed(found: dict[str, Any]) -> str:
    """``1,234 examples/s, 56,789 tokens/s, MFU 41.2 % (peak from the table)``, as much of it as is known."""
    parts = [
        f"{found[f'{what}_per_second']:,.0f} {what}/s"
        for what in ("examples", "tokens")
        if found.get(f"{what}_per_second")
    ]
    if parts and found.get("mfu"):
        parts.append(
            f"MFU {100 * found['mfu']:.1f} % of {found['peak_flops'] / 1e12:.3g} TFLOP/s ({found['peak_by']})"
        )
    return ", ".join(parts)


def _batch(experiment: Experiment, mesh: Mesh) -> str:
    each = experiment.batch // sharding.batch_parts(mesh)
    parts = f", in {experiment.accumulate} parts" if experiment.accumulate > 1 else ""
    return f"{experiment.batch} ({each} a device{parts})"


def _where(folder: Path) -> str:
    """The mesh that a run was begun on, where its record tells."""

    sizes = workdir.load(folder).get("mesh")
    return f" (it began on {sharding.mesh_text(sizes)})" if isinstance(sizes, dict) else ""


def _bits(args: argparse.Namespace, now: dict[str, Any], folder: Path) -> list[str]:
    """What ``--deterministic`` has done, and whether the run began in other circumstances."""

    begun = (folder / "config.json").exists()
    notes = list(devices.other_bits(workdir.load(folder).get("bits") if begun else None, now))
    if args.deterministic:
        done = f"nothing to set on a CPU, {now['cores']} cores" if "cores" in now else devices.DETERMINISTIC
        words = ["python", "-m", "jaxtrain", "bench", "--deterministic", "--experiment", args.experiment]
        words += [word for setting in args.set for word in ("--set", setting)]
        notes.append(f"deterministic: {done}; what it costs here: {shlex.join(words)}")
    return notes


def _again(args: argparse.Namespace, folder: Path) -> str:
    """The command that goes on with this run, or what to do where it was more than one."""
    if processes.count() > 1:
        return f"the same command in each of the {processes.count()} processes, with --workdir {folder}"
    return _command(args, folder)


def _command(args: argparse.Namespace, folder: Path) -> str:
    words = ["python", "-m", "jaxtrain.run", "--experiment", args.experiment]
    for setting in args.set:
        words += ["--set", redact.setting(setting)]
    if args.overfit is not None:
        words += ["--overfit", str(args.overfit)]
    words += flags.words(args)
    words += [] if args.profile is None else ["--profile", args.profile]
    words += [flag for flag, on in (("--extend", args.extend), ("--strict", args.strict)) if on]
    return shlex.join([*words, "--workdir", str(folder)])
