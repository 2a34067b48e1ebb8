"""Turn the arguments of ``python -m jaxtrain.run`` into a ``Session``, and run it."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from jaxtrain import monitor
from jaxtrain.cli import command_line, devices, experiments, flags
from jaxtrain.core import redact
from jaxtrain.core.errors import InputError
from jaxtrain.core.process import cores
from jaxtrain.core.signals import GRACE
from jaxtrain.experiment import Experiment, code, find
from jaxtrain.monitor import make_console
from jaxtrain.monitor.trackers import make_tracker
from jaxtrain.sharding import multihost
from jaxtrain.train import capacity, environment, run_record, session
from jaxtrain.train.run_folder import RunFolder, default_folder
from jaxtrain.train.session import Session
from jaxtrain.train.smoke import smoke_test


def run(args: argparse.Namespace) -> int:
    """Train or resume; returns the exit code."""
    _check_flags(args)
    started_in = run_record.started_in(Path(args.workdir)) if args.workdir and not args.new else None
    trackers = [make_tracker(spec) for spec in args.track]
    name, origin, experiment = experiments.load_experiment(args.experiment, args.set, started_in)
    mesh = devices.make_mesh(args, command_line.warn)
    console = make_console(quiet=not multihost.is_process_0())
    if not args.smoke:  # before data is downloaded or read
        multihost.on_process_0(lambda: capacity.check_folder(Path(args.workdir or "runs")), "folder")
    experiments.ensure_prepared(experiment, console)
    if args.smoke:
        smoke_test(name, experiment, mesh, console)
        return 0
    if args.overfit is not None:
        experiment = experiments.overfit(experiment, args.overfit)
    module = find(args.experiment).module()
    folder = _folder(name, experiment, args)
    if args.deterministic:
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        cpu_note = f"nothing to set on a CPU, {cores()} cores"
        console.note(f"deterministic: {cpu_note if on_cpu else environment.DETERMINISTIC_FLAG}")
    record = {
        "origin": origin,
        "overrides": [redact.redact_setting(pair) for pair in args.set],
        "overfit": args.overfit,
    }
    settings = Session(
        name=name,
        folder=folder,
        mesh=mesh,
        console=console,
        record=record,
        deterministic=args.deterministic,
        extend=args.extend,
        accept_changed_data=args.accept_changed_data,
        file=experiments.module_file(module),
        code=code.digests(module, experiment),
        resume=args.resume,
        init_from=args.init_from,
        init_map=args.init_map,
        grace=args.grace,
        hang_after=args.hang_after,
        strict=args.strict,
        profile=args.profile,
        monitor_layers=args.monitor_layers,
        trackers=trackers,
        resume_command=_resume_command(args, folder.path),
    )
    session.run(settings, experiment)
    return 0


def _check_flags(args: argparse.Namespace) -> None:
    """Check the flags before anything is loaded."""
    for flag in ("grace", "hang_after"):
        seconds = getattr(args, flag)
        if seconds is not None and not 0 < seconds < float("inf"):
            raise InputError(f"--{flag.replace('_', '-')} {seconds:g}: give seconds above 0")
    monitor.parse_window(args.profile)
    if args.smoke and (args.init_from or args.init_map):
        raise InputError("--smoke does not load parameters: leave out --init-from and --init-map")
    if args.smoke and args.profile:
        raise InputError("--smoke does not profile: leave out --profile")
    if args.smoke and args.monitor_layers:
        raise InputError("--smoke writes no records: leave out --monitor-layers")
    if args.smoke and args.track:
        raise InputError("--smoke writes no records: leave out --track")
    if args.extend and not args.workdir and not args.smoke:
        raise InputError(
            "--extend needs --workdir: the default folder's name changes with the number of epochs"
        )


def _folder(name: str, experiment: Experiment, args: argparse.Namespace) -> RunFolder:
    suffix = "" if args.overfit is None else f"-overfit{args.overfit}"
    if args.workdir:
        folder = RunFolder(command_line.workdir_path(args.workdir))
    else:
        folder = RunFolder(default_folder(name + suffix, experiment))
    return RunFolder(folder.next_free()) if args.new else folder


def _resume_command(args: argparse.Namespace, folder: Path) -> str:
    """Return the command that resumes this run, or an instruction if several processes train it."""
    if multihost.process_count() > 1:
        return (
            f"the same command in each of the {multihost.process_count()} processes, with --workdir {folder}"
        )
    return resume_command(args, folder)


def resume_command(args: argparse.Namespace, folder: Path) -> str:
    """Return the command line that resumes the run in ``folder``, without secrets."""
    words = ["python", "-m", "jaxtrain.run", "--experiment", args.experiment]
    for setting in args.set:
        words += ["--set", redact.redact_setting(setting)]
    if args.overfit is not None:
        words += ["--overfit", str(args.overfit)]
    words += flags.typed_flags(args)
    words += [] if args.hang_after is None else ["--hang-after", f"{args.hang_after:g}"]
    words += [] if args.grace == GRACE else ["--grace", f"{args.grace:g}"]
    words += [] if args.profile is None else ["--profile", args.profile]
    for spec in args.track:
        words += ["--track", redact.redact_urls(spec)]
    on = (
        ("--extend", args.extend),
        ("--monitor-layers", args.monitor_layers),
        ("--strict", args.strict),
    )
    words += [flag for flag, given in on if given]
    return shlex.join([*words, "--workdir", str(folder)])
