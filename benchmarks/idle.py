"""The share of time in which the device is idle, in a run over resident data.

A run of a small convolutional network (batch 128, crop and flip, a record every 50 updates) is profiled as
``--profile 20:59`` does; ``jaxtrain.monitor.idle`` computes the share (docs/profiling.md). Every round is a
run.

  python -m benchmarks.idle [--rounds N] [--out FILE]
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from benchmarks import common
from benchmarks.sides import short
from jaxtrain import monitor
from jaxtrain.monitor.console import Plain
from jaxtrain.train import loop

STEPS, UPDATES = 60, (20, 59)


def main() -> None:
    """One JSON object."""
    args = common.arguments(__doc__, rounds=5).parse_args()
    ready, shares = short(STEPS), []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as null:
            with contextlib.redirect_stdout(null):
                loop.fit(ready, Path(folder), Plain(), updates=UPDATES)
            shares.append(100 * monitor.idle(Path(folder) / "profile"))
    results = [common.result("device idle in a run over resident data", shares, "%", "<= 3")]
    common.finish(args, "idle", results, {"updates": list(UPDATES), "batch": ready.experiment.batch})


if __name__ == "__main__":
    main()
