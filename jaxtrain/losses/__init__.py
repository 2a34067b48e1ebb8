"""Losses: functions ``(outputs, batch) -> (loss, metrics)``; ``loss`` is a scalar, the mean over examples.

Any function with this signature works as ``Experiment.loss``. The losses here are frozen dataclasses, so that
the config records their settings. Rows where ``batch["mask"]`` is false are excluded from loss and metrics.

A loss may also have:

- ``report``: the task report of its evaluations (``jaxtrain.metrics``);
- ``eval_metrics(outputs, batch) -> metrics``: the metrics of evaluations, where they differ from training's;
- ``check(outputs, batch, ids)``: checks host data, after ``preprocess``, before anything is compiled;
- ``outside(outputs, batch)``: counts bad labels inside the compiled step, after augmentation
  (``step.guard``).
"""

from jaxtrain.losses.binary import BinaryCrossEntropy
from jaxtrain.losses.cross_entropy import CrossEntropy
from jaxtrain.losses.regression import MAE, MSE, Forecast, Huber

__all__ = ["MAE", "MSE", "BinaryCrossEntropy", "CrossEntropy", "Forecast", "Huber"]
