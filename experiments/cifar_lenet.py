"""CIFAR-10 with LeNet and the settings of PyTorch's CIFAR-10 tutorial: batch 4, two epochs.

Run:       python -m jaxtrain.run --experiment cifar_lenet --devices 1
Measured:  55.10 ± 0.73 % test accuracy (n = 3 seeds, 0 to 2); 102 s (median) on two cores of an AMD EPYC CPU
           with other work on them, 2026-11-21.

The original claims 91.7 %; this network reaches about 55 % in two epochs, as in PyTorch's own tutorial. A
batch of 4 can be split over 1, 2 or 4 devices only, hence ``--devices``.
"""

from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment

EXPERIMENT = Experiment(
    model=models.ConvNet(widths=(6, 16), kernel=5, padding="VALID", hidden=(120, 84), classes=10),
    train=data.TFDS("cifar10", "train"),
    test=data.TFDS("cifar10", "test"),
    loss=losses.CrossEntropy(),
    optimizer=optim.SGD(lr=0.001, momentum=0.9),
    preprocess=(data.Normalise(mean=(0.5,), std=(0.5,)),),
    batch=4,
    epochs=2,
    eval_batch=1000,
    log_every=2000,
)
