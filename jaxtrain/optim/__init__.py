"""Optimizers, learning rate schedules and weight averages, as frozen dataclasses.

An optimizer's ``build(steps)`` returns an optax transformation for a run of ``steps`` updates.

>>> import optax
>>> tx = SGD(lr=OneCycle(peak=0.4), momentum=0.9, nesterov=True).build(steps=1000)
>>> isinstance(tx, optax.GradientTransformation)
True
"""

from jaxtrain.optim.averages import EMA, Lookahead
from jaxtrain.optim.groups import Group
from jaxtrain.optim.loss_scale import LossScale
from jaxtrain.optim.optimizers import SGD, Adam, AdamW
from jaxtrain.optim.schedules import Constant, Cosine, Linear, OneCycle, Rate, Schedule, rate

__all__ = [
    "EMA",
    "SGD",
    "Adam",
    "AdamW",
    "Constant",
    "Cosine",
    "Group",
    "Linear",
    "Lookahead",
    "LossScale",
    "OneCycle",
    "Rate",
    "Schedule",
    "rate",
]
