"""CIFAR-10, data-parallel: the two-convolution network of an article on PyTorch's DistributedDataParallel.

Run:       python -m jaxtrain.run --experiment cifar_ddp_net
Measured:  not measured at full length. 20 steps (--set epochs=0.1): 33.23 % test accuracy (n = 1 seed), 224 s
           on two cores of an AMD EPYC CPU with other work on them, 2026-11-21.

The article's dense layer takes 128·28·28 inputs, which does not fit 32×32 images with padding 1; here it
takes 128·32·32. The global batch of 256 is the article's 8 replicas of 32 examples; the result is the same,
up to rounding, on any number of devices that divides 256.
"""

from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment

EXPERIMENT = Experiment(
    model=models.ConvNet(widths=(64, 128), kernel=3, padding="SAME", pool=1, classes=10),
    train=data.TFDS("cifar10", "train"),
    test=data.TFDS("cifar10", "test"),
    loss=losses.CrossEntropy(),
    optimizer=optim.SGD(lr=0.01, momentum=0.9),
    preprocess=(data.Normalise(mean=(0.5,), std=(0.5,)),),
    batch=256,
    epochs=10,
)
