"""MNIST with the Keras documentation's small network, as an article trains it with Keras on JAX.

Run:       python -m jaxtrain.run --experiment mnist_keras_cnn
Measured:  not yet
"""

from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment

EXPERIMENT = Experiment(
    model=models.ConvNet(widths=(32, 64), kernel=3, padding="VALID", hidden=(128,), classes=10),
    train=data.TFDS("mnist", "train"),
    test=data.TFDS("mnist", "test"),
    loss=losses.CrossEntropy(),
    optimizer=optim.Adam(lr=1e-3),
    preprocess=(data.Normalise(),),
    batch=64,
    epochs=10,
)
