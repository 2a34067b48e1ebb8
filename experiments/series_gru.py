"""Forecasting the seven variables of ETTh1 24 hours ahead from the last four days, with a GRU.

Run:       python -m jaxtrain.run --experiment series_gru
Measured:  not yet
"""

from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment

EXPERIMENT = Experiment(
    model=models.GRUForecaster(width=64, horizon=24, variables=7, dropout=0.2),
    train=data.Series(window=96, horizon=24, split="train", rows=14_400),
    valid=data.Series(window=96, horizon=24, split="validation", rows=14_400),
    test=data.Series(window=96, horizon=24, split="test", rows=14_400),
    loss=losses.Forecast(),
    optimizer=optim.AdamW(lr=optim.Cosine(peak=1e-3, warmup=0.1), weight_decay=0.01, clip=1.0),
    batch=64,
    epochs=10,
    select="-loss",
)
