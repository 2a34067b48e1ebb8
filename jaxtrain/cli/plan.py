"""``python -m jaxtrain plan --experiment NAME``: what a run needs, compiled and not run."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.cli import SUMMARIES, command_line, devices, experiments, flags
from jaxtrain.core.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, which is 0 too where the run does not fit."""
    parser = argparse.ArgumentParser(prog="jaxtrain plan", description=SUMMARIES["plan"])
    parser.add_argument(
        "--experiment", required=True, metavar="NAME", help="a name from run --list, or a path to a .py"
    )
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a setting")
    flags.add(parser)
    parser.add_argument(
        "--device-memory", metavar="SIZE", help="of one device, such as 80GB or 24GiB; default: ask it"
    )
    parser.add_argument(
        "--search", action="store_true", help="compile every mesh, with other batches and recomputation too"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return command_line.main(_run, parser, argv)


def _run(args: argparse.Namespace) -> int:
    """What a model prints while it is traced must not come between JSON."""
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        return _plan(args, out)


def _plan(args: argparse.Namespace, out: TextIO) -> int:
    from jaxtrain import plan
    from jaxtrain.monitor import make_console
    from jaxtrain.plan import measure, report
    from jaxtrain.program import assemble, device_limits

    name, _, experiment = experiments.load_experiment(args.experiment, args.set)
    if args.device_memory is not None:
        device_limits.parse_size(args.device_memory, "--device-memory")
    mesh, simulated = _mesh(args)
    limit, console = device_limits.limit_of(mesh, args.device_memory), make_console(quiet=args.json)
    experiments.ensure_prepared(experiment, console)
    experiment, resident = plan.for_device_memory(experiment, limit)
    experiment = plan.with_open_data(experiment, mesh)
    program = assemble(experiment, mesh)
    try:
        found, steps = measure(program, resident), program.steps
    finally:
        program.close()
        del program  # and with it the data that it keeps on the devices
    notes = [*_notes(mesh, simulated, experiment, limit), *found.notes]
    on = f"{name} on {sharding.describe_mesh(mesh)}, batch {found.batch:,}, {steps:,} steps"
    console.note("\n".join([on, *(f"  {note}" for note in notes)]))
    console.note(f"\n{report.as_text(found)}\n\n{report.verdict_text(found, limit)}")

    variant, more = plan.variant_of(experiment, mesh), dict[str, Any]()
    trial = plan.make_trial(experiment, list(mesh.devices.flat), resident, _progress(variant))
    if args.search:
        with console.task("compile", plan.attempts(variant)) as advance:
            searched = plan.search_all(variant, limit.bytes if limit else None, trial, advance)
        more = report.search_json(searched, variant, limit)
        console.note(f"\n{report.search_text(searched, limit)}")
    elif limit is not None and found.total > limit.bytes:
        with console.task("look for what fits", 0):
            nearest = plan.find_nearest(variant, found, limit.bytes, trial)
        more = report.nearest_json(nearest, variant)
        console.note(f"\n{report.nearest_text(nearest, variant)}")
    if args.json:
        kind = {"count": mesh.size, "kind": mesh.devices.flat[0].device_kind, "simulated": simulated}
        about = {"experiment": name, "devices": kind, "steps": steps}
        body = about | report.as_json(found, limit) | {"notes": notes} | more
        print(json.dumps(body), file=out)
    return 0


def _mesh(args: argparse.Namespace) -> tuple[Mesh, bool]:
    """The mesh that the flags ask for, simulated where there are fewer devices; and whether it is."""
    import jax
    from jax.extend.backend import clear_backends

    if args.simulate_devices is not None:
        return devices.make_mesh(args), True
    wanted = args.devices
    if wanted is not None and wanted < 1:
        raise InputError(f"--devices {wanted}: give at least 1")
    sizes = re.findall(r"=\s*(\d+)\s*(?:,|$)", args.mesh or "")
    if wanted is None and sizes and "*" not in args.mesh:
        wanted = math.prod(map(int, sizes))
    if wanted is None or wanted <= len(jax.devices()):
        return devices.make_mesh(args), False
    if wanted > devices.MOST_SIMULATED:
        raise InputError(
            f"{wanted} devices are not here, and plan simulates at most {devices.MOST_SIMULATED}: give "
            "fewer, and scale what it says"
        )
    clear_backends()
    devices.simulate_devices(wanted)
    return devices.make_mesh(args), True


def _notes(mesh: Mesh, simulated: bool, experiment: Any, limit: Any) -> list[str]:
    if not simulated:
        return []
    lines = [f"simulated: {mesh.size} CPU devices stand for those that are meant"]
    if experiment.placement == "auto" and limit is None:
        lines.append(
            "data is kept on the devices or not by this machine's memory; give theirs with --device-memory"
        )
    return lines


def _progress(given: Any) -> Callable[[Any], None]:
    """Tells each result as it comes, where no bar moves."""
    from jaxtrain.core.text import size_text

    def told(tried: Any) -> None:
        if not sys.stdout.isatty():
            what = " ".join(tried.variant.flags(given)) or "as given"
            command_line.warn(f"tried {what}: {size_text(tried.plan.total) if tried.plan else tried.reason}")

    return told
