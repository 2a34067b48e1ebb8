"""The peers' networks in Keras 3 on JAX, trained by ``model.fit``. Imported only where keras is installed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"  # Keras reads it once, while it is imported

import keras
import numpy as np
from keras import layers


def lenet() -> Any:
    """The network of ``experiments/cifar_lenet.py``."""
    found: list[Any] = [keras.Input((32, 32, 3))]
    for k, width in enumerate((6, 16)):
        found.append(layers.Conv2D(width, 5, activation="relu", name=f"conv{k}"))
        found.append(layers.MaxPooling2D(2))
    found.append(layers.Flatten())
    found += [layers.Dense(width, activation="relu", name=f"dense{k}") for k, width in enumerate((120, 84))]
    return keras.Sequential([*found, layers.Dense(10, name="head")])


def mlp(shape: tuple[int, ...], widths: tuple[int, ...]) -> Any:
    """``jaxtrain.models.MLP``."""
    hidden = [layers.Dense(width, activation="relu", name=f"dense{k}") for k, width in enumerate(widths)]
    return keras.Sequential([keras.Input(shape), layers.Flatten(), *hidden, layers.Dense(10, name="head")])


def cifar_cnn(widths: tuple[int, ...], convs: int) -> Any:
    """``jaxtrain.models.CNN`` with BatchNorm, ReLU and residual stages."""
    inputs = x = keras.Input((32, 32, 3))
    for stage, width in enumerate(widths):
        for number in range(convs):
            name = f"stage{stage}_conv{number}"
            x = layers.Conv2D(width, 3, padding="same", use_bias=False, name=name)(x)
            if number == 0:
                x = layers.MaxPooling2D(2)(x)
            x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_norm")(x)
            x = layers.Activation("relu")(x)
            if number == 0:
                first = x
        if convs > 1:
            x = layers.Add()([x, first])
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, name="head")(x))


class Loop:
    """``model.fit`` over the set, shuffled; one call of it for each chunk of steps.

    Args:
      case: "lenet...", "cifar_cnn" or "mlp".
      exp: the experiment, for its data and its optimizer's settings.
      params: initial parameters, of the Linen network.
    """

    def __init__(self, case: str, exp: Any, params: Mapping[str, Any]) -> None:
        self._exp = exp
        self._image, self._label = (exp.train.fields[name] for name in ("image", "label"))
        self._model = self._begin(case, params)

    def steps(self, count: int) -> None:
        """Run ``count`` updates to the end: ``fit`` returns its figures on the host."""
        n = count * self._exp.batch
        self._model.fit(
            self._image[:n], self._label[:n], batch_size=self._exp.batch, epochs=1, verbose=0, shuffle=True
        )

    def losses(self, count: int) -> list[float]:
        """Of the first ``count`` updates, all on the first examples of the set; only before ``steps``."""
        model, n = self._model, self._exp.batch
        found = []
        for _ in range(count):
            model.reset_metrics()  # Keras reports the mean since then
            logs = model.train_on_batch(self._image[:n], self._label[:n], return_dict=True)
            found.append(float(logs["loss"]))
        return found

    def _begin(self, case: str, params: Mapping[str, Any]) -> Any:
        exp = self._exp
        if case.startswith("lenet"):
            model = lenet()
        elif case == "mlp":
            model = mlp(self._image.shape[1:], exp.model.widths)
        else:
            model = cifar_cnn(exp.model.widths, exp.model.convs)
        _load(model, params)
        model.compile(
            optimizer=keras.optimizers.SGD(exp.optimizer.lr, momentum=exp.optimizer.momentum),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        return model


def _load(model: Any, params: Mapping[str, Any]) -> None:
    """Kernels have Linen's shapes; BatchNorm's running statistics stay as they begin."""
    for name, values in params.items():
        layer = model.get_layer(name)
        if "scale" in values:
            layer.gamma.assign(np.asarray(values["scale"]))
            layer.beta.assign(np.asarray(values["bias"]))
            continue
        layer.kernel.assign(np.asarray(values["kernel"]))
        if "bias" in values:
            layer.bias.assign(np.asarray(values["bias"]))
