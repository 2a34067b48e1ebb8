"""``python -m jaxtrain bench``: how throughput grows with the number of devices, or what exact bits cost."""

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
from jaxtrain.cli import SUMMARIES, bench_deterministic, command_line, devices, experiments
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.process import cores

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="jaxtrain bench", description=f"{SUMMARIES['bench']}, on the devices of this one process"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--scaling", metavar="N,...", help="numbers of devices, such as 1,2,4,8")
    what.add_argument(
        "--deterministic",
        action="store_true",
        help="compare two fresh processes on all devices, one as with run --deterministic and one without",
    )
    parser.add_argument(
        "--experiment",
        default="digits_cnn",
        metavar="NAME",
        help="default: digits_cnn, which needs no download",
    )
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a setting")
    parser.add_argument(
        "--mesh",
        default="data=*",
        metavar="AXIS=N,...",
        help="how the devices share the work, as in a run, with * for the size that grows; default: data=*",
    )
    parser.add_argument(
        "--weak",
        action="store_true",
        help="n devices get n times the experiment's batch, so that each has the same work; without it the "
        "global batch stays that of the experiment (strong scaling)",
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="training steps of a round")
    parser.add_argument(
        "--rounds", type=int, default=10, metavar="N", help="rounds of each number of devices"
    )
    parser.add_argument(
        "--simulate-devices", type=int, metavar="N", help="run the same programs on N simulated CPU devices"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and every round's time")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw them as a PNG (pip install 'jaxtrain[plot]')"
    )
    parser.add_argument(
        "--child", choices=bench_deterministic.WAYS, help=argparse.SUPPRESS
    )  # what this command starts
    return command_line.main(lambda args: _run(args, words), parser, argv)


def _run(args: argparse.Namespace, words: Sequence[str]) -> int:
    for name in ("steps", "rounds"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: give at least 1")
    if args.deterministic:
        return _deterministic(args, words)
    counts = _counts(args.scaling)
    _check_files(args)

    from jaxtrain.experiment import config_hash
    from jaxtrain.monitor import make_console
    from jaxtrain.train import scaling

    load = os.getloadavg()[0]  # before this loads the machine itself
    name, _, experiment = experiments.load_experiment(args.experiment, args.set)
    given = scaling.layouts(experiment, counts, args.mesh, args.weak)
    devices.simulate_devices(args.simulate_devices)
    console = make_console()
    experiments.ensure_prepared(experiment, console)
    found = scaling.measure(given, steps=args.steps, rounds=args.rounds, console=console)
    about = {
        "command": shlex.join(["python", "-m", "jaxtrain", "bench", *words]),
        **_environment(max(counts), load),
        "experiment": name,
        "hash": config_hash(experiment),
        "scaling": "weak" if args.weak else "strong",
        "rounds": args.rounds,
        **scaling.record(found),
    }
    if about["simulated"]:
        console.note(
            f"WARNING: these are simulated devices, which share the {about['cores']} cores of this host: the "
            "figures show what splitting the work costs, not what real devices gain"
        )
    console.summary(_title(about, args.steps), _rows(about))
    _write(args, about)
    return 0


def _deterministic(args: argparse.Namespace, words: Sequence[str]) -> int:
    """What ``--deterministic`` costs here."""
    if args.child is not None:
        bench_deterministic.serve(args, lambda: _environment(1, os.getloadavg()[0]))
        return 0
    if args.weak or args.plot:
        raise InputError("--weak and --plot belong to --scaling: leave them out")
    _check_files(args)

    from jaxtrain.monitor import make_console

    console = make_console()
    found = bench_deterministic.measure(args, console)
    about = {"command": shlex.join(["python", "-m", "jaxtrain", "bench", *words]), **found}
    console.summary(
        f"{about['experiment']}, medians of {args.rounds} rounds each", bench_deterministic.rows(about)
    )
    console.note(bench_deterministic.told(about))
    _write(args, about)
    return 0


def _counts(text: str) -> tuple[int, ...]:
    """``"1,2,8"`` as numbers, in order of size."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise InputError(f"--scaling {text}: give numbers of devices, each at least 1, such as 1,2,4,8")
    counts = sorted(map(int, words))
    for count in counts:
        if counts.count(count) > 1:
            raise InputError(f"--scaling {text} names {count} twice")
    return tuple(counts)


def _check_files(args: argparse.Namespace) -> None:
    """Refuse before measuring what could not be written after it."""
    for flag, path in (("--json", args.json), ("--plot", args.plot)):
        if path is None:
            continue
        if path.is_dir():
            raise InputError(f"{flag} {path} is a folder: give a file")
        if not path.parent.is_dir():
            raise InputError(f"{flag} {path}: there is no folder {path.parent}: make it first")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise InputError(f"{flag} {path} cannot be written: choose another place")
    if args.plot is None:
        return
    if args.plot.suffix.lower() != ".png":
        raise InputError(f"--plot {args.plot}: give a name that ends in .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "--plot needs matplotlib: pip install 'jaxtrain[plot]', or leave it out and use --json"
        )


def _environment(most: int, load: float) -> dict[str, Any]:
    """What a figure is worth nothing without."""
    import jax

    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "platform": device.platform,
        "simulated": device.platform == "cpu" and most > 1,
        "cores": cores(),
        "load_before": load,
        "versions": {"python": platform.python_version(), "jaxtrain": __version__, **versions},
    }


def _title(about: dict[str, Any], steps: int) -> str:
    return (
        f"{about['experiment']}, {about['scaling']} scaling on {about['device']}, medians (and quartiles) of "
        f"{about['rounds']} rounds of {steps} steps"
    )


def _rows(about: dict[str, Any]) -> dict[str, str]:
    """The table: a line for each number of devices."""
    lines = [("mesh", "batch", "step ms", "examples/s", "speed-up", "efficiency")]
    for point in about["points"]:
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
    names = ["devices", *(str(point["devices"]) for point in about["points"])]
    return {
        name: "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for name, line in zip(names, lines, strict=True)
    }


def _write(args: argparse.Namespace, about: dict[str, Any]) -> None:
    from jaxtrain.core.files import write_json

    picture = io.BytesIO()
    if args.plot is not None:  # drawn before anything is written
        _figure(about).savefig(picture, format="png", dpi=120)
    try:
        if args.json is not None:
            write_json(args.json, about)
        if args.plot is not None:
            args.plot.write_bytes(picture.getvalue())
    except OSError as error:
        raise RunError(
            f"{error.filename} cannot be written ({error.strerror}): the figures are above"
        ) from error


def _figure(about: dict[str, Any]) -> Any:
    """A matplotlib figure of examples a second by devices, measured and ideal."""
    from matplotlib.figure import Figure

    points = about["points"]
    counts = [point["devices"] for point in points]
    speeds = [point["examples_per_second"] for point in points]
    quartiles = [
        # The time's third quartile is the speed's first.
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
    axis.set(xlabel="devices", ylabel="examples a second", ylim=(0, None))
    simulated = " (simulated devices)" if about["simulated"] else ""
    axis.set_title(f"{about['experiment']}, {about['scaling']} scaling, {about['device']}{simulated}")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
