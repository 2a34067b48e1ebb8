"""Time of ``import jaxtrain`` against that of its dependencies, and of ``--list``.

Every import is timed inside a fresh interpreter, so the interpreter's own start is not counted; ``--list`` is
timed from outside, interpreter included. Files are in the page cache after the first round, which is thrown
away.

  python -m benchmarks.imports [--rounds N] [--out FILE]
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from benchmarks import common

IMPORTS = {
    "jaxtrain": "import jaxtrain",
    "parts": "from jaxtrain import data, losses, metrics, models, optim, step",
    "loop": "import jaxtrain.train.loop",
    "libraries": "import jax, flax, optax",
}
TIMED = """
import time
began = time.perf_counter()
{}
print(time.perf_counter() - began)
"""


def fresh(code: str) -> Callable[[], float]:
    """A side: seconds that ``code`` takes in a fresh interpreter."""

    def side() -> float:
        command = [sys.executable, "-c", TIMED.format(code)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    return side


def listing() -> None:
    """``python -m jaxtrain.run --list``."""
    subprocess.run([sys.executable, "-m", "jaxtrain.run", "--list"], capture_output=True, check=True)


def main() -> None:
    """All imports interleaved, one JSON object."""
    args = common.arguments(__doc__, rounds=9).parse_args()
    sides = {name: fresh(code) for name, code in IMPORTS.items()}
    times = common.interleave({**sides, "--list": common.each(listing, 1)}, args.rounds)
    base = times["libraries"]
    results = [
        common.speedup("time of import jaxtrain over jax, flax, optax", times["jaxtrain"], base, "< 1.2"),
        common.speedup("time of jaxtrain's importable parts over jax, flax, optax", times["parts"], base),
        common.speedup("time of import jaxtrain.train.loop over jax, flax, optax", times["loop"], base),
        common.result("wall time of python -m jaxtrain.run --list", times["--list"], "s"),
    ]
    figures = {"seconds": common.medians(times), "code": IMPORTS}
    common.finish(args, "imports", results, figures)


if __name__ == "__main__":
    main()
