"""Plot the learning curve of a run: ``python scripts/learning_curve.py RUN OUT.png`` (needs matplotlib)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt


def main(run: Path, out: Path) -> None:
    """Plot loss and accuracy by epoch, of training and of every recorded evaluation."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epoch = {r["step"]: r["epoch"] for r in records if "epoch" in r}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, metric in zip(axes, ("loss", "accuracy"), strict=True):
        for split, style in (("train", "-"), ("valid", "o-"), ("test", "o-")):
            points = sorted(
                {epoch[r["step"]]: r[key] for r in records if (key := f"{split}/{metric}") in r}.items()
            )
            if points:
                axis.plot(*zip(*points, strict=True), style, label=split, markersize=4)
        axis.set(xlabel="epoch", ylabel=metric)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(json.loads((run / "config.json").read_text())["name"])
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
