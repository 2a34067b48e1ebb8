"""How long ``python -m jaxtrain runs`` takes for many folders.

    python -m benchmarks.runs --run RUN --folders 10000

copies the records of a finished run (no arrays) to that many folders, one of ten without its result, and
times the command as a process of its own: all runs, and two filters.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMANDS = {"all": [], "filters": ["best.accuracy>0.8", "steps>0"]}


def main() -> None:
    """Make the folders, and print the seconds of each command as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="the folder of a finished run")
    parser.add_argument("--folders", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxtrain-runs-") as folder:
        files = {name: (args.run / name).read_bytes() for name in ("config.json", "metrics.jsonl")}
        result = json.loads((args.run / "result.json").read_bytes())
        for number in range(args.folders):
            path = Path(folder, f"experiment{number % 20}", f"{number:08x}-seed0")
            (path / "checkpoints" / "000001").mkdir(parents=True)
            (path / ".lock").touch()
            for name, content in files.items():
                (path / name).write_bytes(content)
            if number % 10:
                result["test"]["accuracy"] = number % 1000 / 1000
                (path / "result.json").write_text(json.dumps(result))
        found = {name: _times(folder, words, args.repeats) for name, words in COMMANDS.items()}
    print(json.dumps({"folders": args.folders, "load": os.getloadavg()[0], **found}, indent=1))


def _times(folder: str, words: list[str], repeats: int) -> dict[str, list[float]]:
    """Return the wall and CPU seconds of a command, median, min and max; a first one is not counted."""
    wall, cpu = [], []
    for _ in range(repeats + 1):
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "jaxtrain", "runs", "--root", folder, *words],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        wall.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {
        name: [round(one, 2) for one in (statistics.median(kept), min(kept), max(kept))]
        for name, kept in (("wall", wall[1:]), ("cpu", cpu[1:]))
    }


if __name__ == "__main__":
    main()
