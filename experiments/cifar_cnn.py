"""CIFAR-10 baseline: a small convolutional network with a residual connection per stage.

Run:       python -m jaxtrain.run --experiment cifar_cnn
Measured:  with --set epochs=3: 83.06 ± 0.10 % test accuracy (n = 3 seeds: 82.97, 83.04, 83.17); 259 s for the
           whole command on two cores of an AMD EPYC CPU, nothing else running (seed 0), 2026-11-20,
           before max_pool's gradient rule changed (docs/decisions/max-pool-gradient.md).
           At full length (60 epochs, meant for a GPU, aim 93 %): not measured on any device.
"""

from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment

EXPERIMENT = Experiment(
    model=models.CNN(widths=(32, 96, 192), convs=2, classes=10),
    train=data.TFDS("cifar10", "train"),
    test=data.TFDS("cifar10", "test"),
    loss=losses.CrossEntropy(smoothing=0.1),
    optimizer=optim.SGD(lr=optim.OneCycle(peak=0.3), momentum=0.9, nesterov=True, weight_decay=5e-4),
    augment=(data.Flip(), data.Crop(pad=2, mode="reflect")),
    preprocess=(data.Normalise(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),),
    batch=256,
    epochs=60,
)
