"""CIFAR-10 with ResNet-18 and a 3×3 stem: the usual strong baseline.

Run:       python -m jaxtrain.run --experiment cifar_resnet18
Measured:  not measured at full length (60 epochs, meant for a GPU; aim 94 to 95 %). A quarter as wide and for
           98 steps (--set model.width=16 --set epochs=0.25): 31.10 % test accuracy (n = 1 seed), 195 s on two
           cores of an AMD EPYC CPU with other work on them, 2026-11-21.
"""

from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment

EXPERIMENT = Experiment(
    model=models.ResNet(stages=(2, 2, 2, 2), block="basic", stem="cifar", classes=10),
    train=data.TFDS("cifar10", "train"),
    test=data.TFDS("cifar10", "test"),
    loss=losses.CrossEntropy(),
    optimizer=optim.SGD(
        lr=optim.Cosine(peak=0.1, warmup=0.05), momentum=0.9, nesterov=True, weight_decay=5e-4
    ),
    augment=(data.Flip(), data.Crop(pad=4)),
    preprocess=(data.Normalise(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),),
    batch=128,
    epochs=60,
)
