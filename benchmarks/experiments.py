"""Run a shipped experiment over several seeds and record its figures; or print the records as a table.

python -m benchmarks.experiments NAME [--seeds 0 1 2] [--set PATH=VALUE ...] [--out FILE]
python -m benchmarks.experiments --table [FOLDER]

Every seed is a separate run of ``python -m jaxtrain.run``, from an empty folder to the result; its wall time
counts reading the data, compiling and every evaluation.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import environment

RESULTS = Path(__file__).parent / "results" / "experiments"
# The figures that a table shows, in this order, where a result has them.
SHOWN = ("accuracy", "mean_iou", "rmse", "mae", "repeat_last_mae", "loss", "repeat_last_mse")
HEAD = """\
| command (`python -m jaxtrain.run --experiment …`) | test figures | n | steps | wall time | device, date |
|---|---|---|---|---|---|"""


def main() -> None:
    """Parse and dispatch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: results/experiments/NAME.json")
    parser.add_argument("--table", nargs="?", type=Path, const=RESULTS, metavar="FOLDER")
    args = parser.parse_args()
    if args.table is not None:
        print(table(args.table))
    elif args.name is None:
        parser.error("give the name of an experiment, or --table")
    else:
        measure(args.name, args.seeds, args.set, args.out or RESULTS / f"{args.name}.json")


def measure(name: str, seeds: list[int], settings: list[str], out: Path) -> None:
    """Run the seeds one after the other; the file is written after each of them."""
    flags = [word for setting in settings for word in ("--set", setting)]
    # A separate process finds out the device: a GPU taken by this one would be missing in the runs.
    record: dict[str, Any] = {
        "experiment": name,
        "command": shlex.join(["--experiment", name, *flags]),
        **environment(),
        "runs": [],
    }
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "jaxtrain.run", "--experiment", name, *flags]
            command += ["--set", f"seed={seed}", "--workdir", folder]
            subprocess.run(command, check=True)
            found = json.loads((Path(folder) / "result.json").read_text())
        record["runs"].append({"seed": seed, **{k: v for k, v in found.items() if k != "folder"}})
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")


def table(folder: Path) -> str:
    """A row for each file of the folder, by name."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return "\n".join([HEAD, *map(row, records)])


def row(record: dict[str, Any]) -> str:
    """Means and standard deviations over the seeds of what counts: the best checkpoint's test figures where a
    validation set chose one, else the last step's."""
    runs = record["runs"]
    tests = [run["best"]["test"] if "best" in run else run["test"] for run in runs]
    figures = [
        describe(name, [test[name] for test in tests]) for name in SHOWN if tests[0].get(name) is not None
    ]
    seconds = [run["seconds"] for run in runs]
    where = f"{record['device']}, {record['cores']} cores, jax {record['versions']['jax']}, {record['date']}"
    command = record["command"].removeprefix("--experiment ")
    cells = (
        f"`{command}`",
        ", ".join(figures),
        str(len(runs)),
        f"{runs[0]['steps']:,}",
        f"{statistics.median(seconds):,.0f} s",
        where,
    )
    return f"| {' | '.join(cells)} |"


def describe(name: str, values: list[float]) -> str:
    """``accuracy 83.06 ± 0.10 %``; the standard deviation is of a sample, and absent for one seed."""
    scale, unit, digits = (100, " %", 2) if name in ("accuracy", "mean_iou") else (1, "", 4)
    mean = scale * statistics.fmean(values)
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{name} {mean:.{digits}f}{spread}{unit}"


if __name__ == "__main__":
    main()
