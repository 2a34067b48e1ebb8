"""A tiny experiment for tests of the training loop, written like a user's experiment file."""

import numpy as np

from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment


def split(n: int, seed: int) -> data.Arrays:
    """Return images whose class is the brightest of four corners."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, n).astype(np.int32)
    image = rng.integers(0, 100, (n, 8, 8, 1)).astype(np.uint8)
    for k, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        image[label == k, row : row + 4, column : column + 4] += 100
    return data.Arrays({"image": image, "label": label})


EXPERIMENT = Experiment(
    model=models.CNN(widths=(8,), convs=1, classes=4, dropout=0.1),
    train=split(200, 0),
    test=split(50, 1),
    loss=losses.CrossEntropy(),
    optimizer=optim.SGD(lr=optim.OneCycle(peak=0.1), momentum=0.9, nesterov=True, weight_decay=1e-4),
    augment=(data.Crop(pad=1),),
    preprocess=(data.Normalise(),),
    post_update=(optim.EMA(decay=0.9),),
    batch=16,
    epochs=1,
    log_every=5,
)
