"""Time from the start of a run to its first step, with cold and warm caches.

Each side is ``python -m jaxtrain.run`` in a fresh process, timed until it records its first step, which is
when the second has been dispatched; then it is stopped. ``cold`` has an empty cache folder, ``warm`` the one
that the cold run of the round filled: compiled programs and the decoded data set. The page cache of the
system is warm in both. Needs CIFAR-10 prepared
(``python -m jaxtrain prepare cifar10``).

``--help`` and ``--list`` are timed too.

  python -m benchmarks.startup [--rounds N] [--experiment NAME] [--out FILE]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import common

RUN = (sys.executable, "-u", "-m", "jaxtrain.run")
SHORT = ("epochs=0.02", "log_every=1", "eval_every=None", "save_every=100")


def environment(caches: Path) -> dict[str, str]:
    """The environment of a user, with a separate cache folder."""
    return {**{k: v for k, v in os.environ.items() if "CACHE" not in k}, "XDG_CACHE_HOME": str(caches)}


def first_step(experiment: str, caches: Path) -> float:
    """Seconds from the start of the process to the record of its first step."""
    settings = [word for setting in SHORT for word in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        command = [*RUN, "--experiment", experiment, *settings, "--workdir", f"{folder}/run"]
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment(caches), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 1/"):
                seconds = time.perf_counter() - began
                break
        else:
            raise SystemExit(f"{experiment} did not reach its first step: see above")
        process.kill()
        process.wait()
    return seconds


def command(words: tuple[str, ...], caches: Path) -> float:
    """Seconds of a command, from start to exit."""
    began = time.perf_counter()
    subprocess.run([*RUN, *words], env=environment(caches), stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def main() -> None:
    """All rounds, and the JSON."""
    parser = common.arguments(__doc__ or "", rounds=5)
    parser.add_argument("--experiment", default="cifar_cnn")
    args = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in ("cold", "warm", "help", "list")}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            caches = Path(folder)
            times["cold"].append(first_step(args.experiment, caches))
            times["warm"].append(first_step(args.experiment, caches))
            times["list"].append(command(("--list",), caches))
            times["help"].append(command(("--help",), caches))
    ratios = [warm / cold for warm, cold in zip(times["warm"], times["cold"], strict=True)]
    results = [
        common.result(f"{args.experiment}: time to the first step, warm over cold", ratios, "×", "< 0.4"),
        common.result("python -m jaxtrain.run --help", times["help"], "s", "< 1.0"),
        common.result("python -m jaxtrain.run --list", times["list"], "s", "< 1.0"),
    ]
    common.finish(args, "startup", results, {"seconds": common.medians(times)})


if __name__ == "__main__":
    main()
