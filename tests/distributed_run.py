"""An experiment for runs on several processes: streamed, and it writes down who has read which examples."""

import os
import signal
from pathlib import Path

import numpy as np

from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment


class Noted(data.Arrays):
    """Examples that leave a trace of every batch they are read for in ``reads-PROCESS.txt``."""

    def gather(self, indices):
        import jax

        if len(indices) > 1 and jax.distributed.is_initialized():
            reads = Path(f"reads-{jax.process_index()}.txt")
            with reads.open("a") as file:
                file.write(" ".join(map(str, indices)) + "\n")
            late = len(reads.read_text().splitlines()) > 40  # training has begun
            if jax.process_index() == 1 and Path("stop").exists() and late:
                Path("stop").unlink()
                os.kill(os.getpid(), signal.SIGTERM)
            if jax.process_index() == 1 and Path("bug").exists() and late:
                raise ValueError("a bug of process 1")
            if jax.process_index() == 1 and Path("kill").exists() and late:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().gather(indices)


def split(n: int, seed: int) -> Noted:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, n).astype(np.int32)
    image = rng.integers(0, 100, (n, 8, 8, 1)).astype(np.uint8)
    for k in range(4):
        image[label == k, 4 * (k // 2) :, 4 * (k % 2) :] += 100
    return Noted({"image": image, "label": label})


EXPERIMENT = Experiment(
    model=models.MLP(widths=(64,), classes=4, dropout=0.1),
    train=split(160, 0),
    test=split(50, 1),
    loss=losses.CrossEntropy(),
    optimizer=optim.Adam(lr=1e-3),
    augment=(data.Crop(pad=1),),
    preprocess=(data.Normalise(),),
    post_update=(optim.EMA(decay=0.9),),
    batch=16,
    epochs=1,
    log_every=5,
    placement="stream",
)
