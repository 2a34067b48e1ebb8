"""``python -m jaxtrain plan --experiment NAME``: compile a run and print what it needs."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.cli import SUMMARIES, command_line, devices, experiments, flags
from jaxtrain.core.errors import InputError
from jaxtrain.core.files import not_finite, null_line, to_json
from jaxtrain.sharding import cards, described
from jaxtrain.sharding.cards import Card
from jaxtrain.sharding.initialize import in_use

CPU_NOTE = (
    "compiled for CPUs, whose temporaries are 1.4 to 4 times those of a GPU: --for h100 compiles for a GPU, "
    "which need not be here"
)


def make_parser() -> command_line.Parser:
    """Make the parser of this command."""
    parser = command_line.Parser("jaxtrain plan", SUMMARIES["plan"])
    flags.add_experiment(parser)
    flags.add(parser)
    parser.add_argument(
        "--for",
        dest="card",
        metavar="CARD",
        help="compile for this GPU, which need not be here: a100, h100, h200, b200, l40s, rtx4090, or a TOML "
        "file with the figures of another; needs the extra gpu-compile",
    )
    parser.add_argument(
        "--hosts", type=int, metavar="N", help="with --for: the devices are on N hosts; default: 1"
    )
    parser.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="memory of one device, such as 80GB or 24GiB; default: what the device reports",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="compile every mesh, also with other batches and rematerialization",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, which is 0 also if the run does not fit."""
    return command_line.main(_run, make_parser(), argv)


def _run(args: argparse.Namespace) -> int:
    out = sys.stdout  # with --json, what a model prints while it is traced goes to stderr
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        return _plan(args, out)


def _plan(args: argparse.Namespace, out: TextIO) -> int:
    from jaxtrain import plan
    from jaxtrain.monitor import make_console
    from jaxtrain.plan import measure, report
    from jaxtrain.program import assemble, device_limits

    card = _card(args)
    name, _, experiment = experiments.load_experiment(args.experiment, args.set)
    if args.device_memory is not None:
        device_limits.parse_size(args.device_memory, "--device-memory")
    mesh, simulated = _mesh(args) if card is None else (_described_mesh(args, card), False)
    limit, console = device_limits.limit_of(mesh, args.device_memory), make_console(quiet=args.json)
    absent: tuple[str, ...] = ()
    if card is None:
        experiments.ensure_prepared(experiment, console)
    else:
        experiment, absent = plan.describe_absent(experiment)
    experiment, resident = plan.for_device_memory(experiment, limit)
    experiment = plan.with_open_data(experiment, mesh)
    program = assemble(experiment, mesh)
    try:
        found, steps = measure(program, resident), program.steps
    finally:
        program.close()
        del program  # frees its data on the devices
    notes = [*_notes(mesh, simulated, experiment, limit), *absent, *found.notes]
    title = f"{name} on {sharding.describe_mesh(mesh)}, batch {found.batch:,}, {steps:,} steps"
    console.note("\n".join([title, *(f"  {note}" for note in notes)]))
    console.note(f"\n{report.as_text(found)}\n\n{report.verdict_text(found, limit)}")

    variant, more = plan.variant_of(experiment, mesh), dict[str, Any]()
    trial = plan.make_trial(experiment, list(mesh.devices.flat), resident, _progress(variant))
    if args.search:
        with console.task("compile", plan.attempts(variant)) as advance:
            searched = plan.search_all(variant, limit.bytes if limit else None, trial, advance)
        more = report.search_json(searched, variant, limit)
        console.note(f"\n{report.search_text(searched, limit)}")
    elif limit is not None and found.total > limit.bytes:
        with console.task("search for what fits", 0):
            nearest = plan.find_nearest(variant, found, limit.bytes, trial)
        more = report.nearest_json(nearest, variant)
        console.note(f"\n{report.nearest_text(nearest, variant)}")
    if args.json:
        kind = {"count": mesh.size, "kind": mesh.devices.flat[0].device_kind, "simulated": simulated}
        about = {"experiment": name, "devices": kind, "steps": steps}
        if card is not None:
            about["for"] = _for_json(args, card, mesh)
        body = about | report.as_json(found, limit) | {"notes": notes} | more
        if names := not_finite(body):
            command_line.warn(null_line("this JSON", names))
        print(to_json(body), file=out)
    return 0


def _card(args: argparse.Namespace) -> Card | None:
    """Return the card of ``--for``, and keep JAX on the CPU where it is given; None without the flag.

    Raises:
      InputError: there is no such card, or another flag does not go with it.
    """
    import jax

    if args.card is None:
        if args.hosts is not None:
            raise InputError(f"--hosts {args.hosts} needs --for: without it plan describes one host")
        return None
    if args.simulate_devices is not None:
        raise InputError(
            f"--simulate-devices {args.simulate_devices} and --for {args.card}: --for compiles for described "
            f"GPUs, so use --devices {args.simulate_devices}"
        )
    card = cards.load_card(args.card)
    if not in_use():
        jax.config.update("jax_platforms", "cpu")  # the GPU's plugin is used as a compiler only
    return card


def _described_mesh(args: argparse.Namespace, card: Card) -> Mesh:
    """Make the mesh of ``--devices``, ``--hosts`` and ``--mesh`` from described devices."""
    hosts = 1 if args.hosts is None else args.hosts
    count = _device_count(args) or hosts
    if hosts < 1 or count % hosts:
        raise InputError(f"--hosts {hosts} does not divide {count} devices: each host has the same number")
    if count > devices.MAX_SIMULATED:
        raise InputError(f"--devices {count}: plan describes at most {devices.MAX_SIMULATED}")
    sizes = None if args.mesh is None else sharding.parse_mesh(args.mesh, count)
    return sharding.make_mesh(described.described_devices(card, hosts, count // hosts), sizes)


def _for_json(args: argparse.Namespace, card: Card, mesh: Mesh) -> dict[str, Any]:
    hosts = args.hosts or 1
    return {
        "card": card.name,
        "device_kind": card.device_kind,
        "memory": card.memory,
        "compute_capability": list(card.capability),
        "hosts": hosts,
        "devices_per_host": mesh.size // hosts,
    }


def _device_count(args: argparse.Namespace) -> int | None:
    """Return the number of devices that ``--devices`` or ``--mesh`` says; None where neither does."""
    count: int | None = args.devices
    if count is not None and count < 1:
        raise InputError(f"--devices {count}: give at least 1")
    sizes = re.findall(r"=\s*(\d+)\s*(?:,|$)", args.mesh or "")
    return math.prod(map(int, sizes)) if count is None and sizes and "*" not in args.mesh else count


def _mesh(args: argparse.Namespace) -> tuple[Mesh, bool]:
    """Make the mesh, simulated if it needs more devices than there are; returns it and whether it is."""
    import jax
    from jax.extend.backend import clear_backends

    if args.simulate_devices is not None:
        return devices.make_mesh(args), True
    count = _device_count(args)
    if count is None or count <= len(jax.devices()):
        return devices.make_mesh(args), False
    if count > devices.MAX_SIMULATED:
        raise InputError(
            f"this machine has no {count} devices, and plan simulates at most {devices.MAX_SIMULATED}: give "
            "fewer, and extrapolate"
        )
    clear_backends()
    devices.simulate_devices(count)
    return devices.make_mesh(args), True


def _notes(mesh: Mesh, simulated: bool, experiment: Any, limit: Any) -> list[str]:
    if mesh.devices.flat[0].platform != "cpu":
        return []
    lines = [CPU_NOTE]
    if not simulated:
        return lines
    lines += [f"simulated: {mesh.size} CPU devices stand for the real ones"]
    if experiment.placement == "auto" and limit is None:
        lines.append(
            "this machine's memory decides whether data is resident on the devices; give that of the real "
            "ones with --device-memory"
        )
    return lines


def _progress(base: Any) -> Callable[[Any], None]:
    """Make a callback that prints each result where no progress bar is shown."""
    from jaxtrain.core.text import size_text

    def report(trial: Any) -> None:
        if not sys.stdout.isatty():
            words = " ".join(trial.variant.flags(base)) or "the run as typed"
            command_line.warn(f"tried {words}: {size_text(trial.plan.total) if trial.plan else trial.reason}")

    return report
