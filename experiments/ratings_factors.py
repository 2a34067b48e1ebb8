"""MovieLens 100K ratings with matrix factorisation: a vector and a bias per user and per film.

Run:       python -m jaxtrain.run --experiment ratings_factors
Measured:  not measured: the data set could not be downloaded here. Tested on a small synthetic
           set in the original layout. ``--set train.file=u.data --set test.file=u.data`` reads the original.
"""

from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment

EXPERIMENT = Experiment(
    model=models.Factors(users=943, items=1682, width=32, dropout=0.2),
    train=data.Ratings("train"),
    test=data.Ratings("test"),
    loss=losses.MSE(),
    optimizer=optim.AdamW(lr=optim.Linear(peak=5e-3), weight_decay=0.1),
    batch=512,
    epochs=20,
    holdout=0.1,
    select="-rmse",
)
