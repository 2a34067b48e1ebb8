"""``python -m jaxtrain bench --scaling N,...``: throughput of a training step by number of devices."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import io
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtrain import __version__
from jaxtrain.cli import SUMMARIES, command_line, devices, experiments, flags
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.process import cores

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def make_parser() -> command_line.Parser:
    """Make the parser of this command."""
    parser = command_line.Parser("jaxtrain bench", f"{SUMMARIES['bench']}, in this process")
    parser.add_argument(
        "--scaling", required=True, metavar="N,...", help="numbers of devices, such as 1,2,4,8"
    )
    parser.add_argument(
        "--experiment",
        default="digits_cnn",
        metavar="NAME",
        help="a name from run --list, or a path to a .py file; default: %(default)s, which needs no download",
    )
    flags.add_settings(parser)
    parser.add_argument(
        "--mesh",
        default="data=*",
        metavar="AXIS=N,...",
        help="mesh axes and sizes as in run, with * for the size that grows; default: %(default)s",
    )
    parser.add_argument(
        "--weak",
        action="store_true",
        help="weak scaling: n devices get n times the experiment's batch, the same work for each; without "
        "it the global batch is the experiment's (strong scaling)",
    )
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="training steps per round; default: %(default)s"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=10,
        metavar="N",
        help="rounds of each number of devices; default: %(default)s",
    )
    flags.add_simulate_devices(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and every round's time")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="plot the figures as a PNG (pip install 'jaxtrain[plot]')"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return command_line.main(lambda args: _run(args, words), make_parser(), argv)


def _run(args: argparse.Namespace, words: Sequence[str]) -> int:
    for name in ("steps", "rounds"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: give at least 1")
    counts = _parse_counts(args.scaling)
    _check_files(args)

    from jaxtrain.experiment import config_hash
    from jaxtrain.monitor import make_console
    from jaxtrain.train import scaling

    load = os.getloadavg()[0]  # before this process loads the machine itself
    name, _, experiment = experiments.load_experiment(args.experiment, args.set)
    layouts = scaling.layouts(experiment, counts, args.mesh, args.weak)
    devices.simulate_devices(args.simulate_devices)
    console = make_console()
    experiments.ensure_prepared(experiment, console)
    measured = scaling.measure(layouts, steps=args.steps, rounds=args.rounds, console=console)
    record = {
        "command": shlex.join(["python", "-m", "jaxtrain", "bench", *words]),
        **_environment(max(counts), load),
        "experiment": name,
        "hash": config_hash(experiment),
        "scaling": "weak" if args.weak else "strong",
        "rounds": args.rounds,
        **scaling.record(measured),
    }
    if record["simulated"]:
        console.note(
            f"WARNING: simulated devices share the {record['cores']} cores of this host: the figures show "
            "the cost of splitting the work, not the speed-up of real devices"
        )
    console.summary(_title(record, args.steps), _rows(record))
    _write(args, record)
    return 0


def _parse_counts(text: str) -> tuple[int, ...]:
    """Parse ``"1,2,8"``; returns the numbers in ascending order."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise InputError(f"--scaling {text}: give numbers of devices, each at least 1, such as 1,2,4,8")
    counts = sorted(map(int, words))
    for count in counts:
        if counts.count(count) > 1:
            raise InputError(f"--scaling {text} names {count} twice")
    return tuple(counts)


def _check_files(args: argparse.Namespace) -> None:
    """Check before measuring that ``--json`` and ``--plot`` can be written."""
    for flag, path in (("--json", args.json), ("--plot", args.plot)):
        if path is None:
            continue
        if path.is_dir():
            raise InputError(f"{flag} {path} is a folder: give a file")
        if not path.parent.is_dir():
            raise InputError(f"{flag} {path}: folder {path.parent} does not exist: create it first")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise InputError(f"{flag} {path} is not writable: give another file")
    if args.plot is None:
        return
    if args.plot.suffix.lower() != ".png":
        raise InputError(f"--plot {args.plot}: give a name that ends in .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install 'jaxtrain[plot]', or use --json instead")


def _environment(max_devices: int, load: float) -> dict[str, Any]:
    """Return date, device, cores, load and versions: what a figure depends on."""
    import jax

    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "platform": device.platform,
        "simulated": device.platform == "cpu" and max_devices > 1,
        "cores": cores(),
        "load_before": load,
        "versions": {"python": platform.python_version(), "jaxtrain": __version__, **versions},
    }


def _title(record: dict[str, Any], steps: int) -> str:
    return (
        f"{record['experiment']}, {record['scaling']} scaling on {record['device']}, medians (and quartiles) "
        f"of {record['rounds']} rounds of {steps} steps"
    )


def _rows(record: dict[str, Any]) -> dict[str, str]:
    """Format the table: a row for each number of devices."""
    lines = [("mesh", "batch", "step ms", "examples/s", "speed-up", "efficiency")]
    for point in record["points"]:
        time = point["step_ms"]
        lines.append(
            (
                point["mesh"],
                str(point["batch"]),
                f"{time['median']:.2f} ({time['q1']:.2f}–{time['q3']:.2f})",
                f"{point['examples_per_second']:,.0f}",
                f"{point['speedup']:.2f}",
                f"{100 * point['efficiency']:.1f} %",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    names = ["devices", *(str(point["devices"]) for point in record["points"])]
    return {
        name: "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for name, line in zip(names, lines, strict=True)
    }


def _write(args: argparse.Namespace, record: dict[str, Any]) -> None:
    from jaxtrain.core.files import not_finite, null_line, write_json

    image = io.BytesIO()
    if args.plot is not None:  # drawn before anything is written
        _figure(record).savefig(image, format="png", dpi=120)
    try:
        if args.json is not None:
            write_json(args.json, record)
            if names := not_finite(record):
                command_line.warn(null_line(str(args.json), names))
        if args.plot is not None:
            args.plot.write_bytes(image.getvalue())
    except OSError as error:
        raise RunError(
            f"{error.filename} cannot be written ({error.strerror}): the figures are printed above"
        ) from error


def _figure(record: dict[str, Any]) -> Any:
    """Plot examples per second by number of devices, measured and ideal, with matplotlib."""
    from matplotlib.figure import Figure

    points = record["points"]
    counts = [point["devices"] for point in points]
    speeds = [point["examples_per_second"] for point in points]
    quartiles = [
        # The third quartile of the time is the first quartile of the speed.
        sorted(1e3 * point["batch"] / point["step_ms"][name] for name in ("q1", "q3"))
        for point in points
    ]
    bars = [
        [speed - low for speed, (low, _) in zip(speeds, quartiles, strict=True)],
        [high - speed for speed, (_, high) in zip(speeds, quartiles, strict=True)],
    ]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(counts, [speeds[0] * n / counts[0] for n in counts], "--", color="grey", label="ideal")
    axis.errorbar(counts, speeds, bars, marker="o", capsize=3, label="measured, with quartiles")
    axis.set_xticks(counts)
    axis.set(xlabel="devices", ylabel="examples per second", ylim=(0, None))
    simulated = " (simulated devices)" if record["simulated"] else ""
    axis.set_title(f"{record['experiment']}, {record['scaling']} scaling, {record['device']}{simulated}")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
