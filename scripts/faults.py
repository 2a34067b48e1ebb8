"""The fault suite: kills, damaged bytes, full disks, two writers, signals; the table says what survives.

A case is lost when the run cannot resume from its last complete checkpoint, and silently wrong when the
resumed run ends with other parameters than an undisturbed one. Both must be 0.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from faults_bench import SOME, Bench, Case
from faults_files import damage, fallback, full_disk, unplugged
from faults_processes import kills, one_of_two, signals, writers

SUITES: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "kills": kills,
    "damage": damage,
    "fallback": fallback,
    "signals": signals,
    "writers": writers,
    "full_disk": full_disk,
    "one_of_two": one_of_two,
    "unplugged": unplugged,
}


@contextlib.contextmanager
def silence_stderr() -> Iterator[None]:
    """Discard stderr, where Orbax's threads report the damaged files."""
    stderr = os.dup(2)
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 2)
        try:
            yield
            gc.collect()  # abandoned coroutines warn when they are collected
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def run_silently(cases: Iterator[Case]) -> Iterator[Case]:
    """Run the cases with stderr discarded."""
    while True:
        with silence_stderr():
            case = next(cases, None)
        if case is None:
            return
        yield case


def main() -> int:
    """The command line; 0 when nothing was lost or silently wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", metavar="NAME,...", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--quick", action="store_true", help="kills, damage and fallback, a few of each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else list(SUITES)[: 3 if args.quick else None]
    if unknown := [name for name in chosen if name not in SUITES]:
        parser.error(f"{unknown[0]} is none of {', '.join(SUITES)}")
    found, began = list[Case](), time.monotonic()
    print(f"{'fault':<52}{'tried':>7}{'survived':>10}{'lost':>6}{'silently wrong':>16}")
    with tempfile.TemporaryDirectory(prefix="jaxtrain-faults-") as folder:
        bench = Bench(Path(folder), args.quick)
        bench.truth(SOME)
        for name in chosen:
            for case in run_silently(SUITES[name](bench)):
                found.append(case)
                print(f"{case.name:<52}{case.tried:>7}{case.survived:>10}{case.lost:>6}{case.wrong:>16}")
                for note in case.notes:
                    print(f"  {note}")
    if args.json:
        about = {"date": datetime.date.today().isoformat(), "seconds": round(time.monotonic() - began)}
        rows = [vars(case) for case in found]
        args.json.write_text(
            json.dumps({**about, "command": "scripts/faults", "cases": rows}, indent=1) + "\n"
        )
    return 1 if any(case.lost or case.wrong for case in found if case.ours) else 0


if __name__ == "__main__":
    sys.exit(main())
