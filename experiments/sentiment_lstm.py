"""Sentiment of film reviews with a bidirectional LSTM over words, and over bytes for rare words.

Run:       python -m jaxtrain.run --experiment sentiment_lstm
Measured:  on rt-polarity (train.files and test.files set, train.length=64, test.length=64): 77.11 % test
           accuracy (n = 1 seed), 185 s on two cores of an AMD EPYC CPU with other work on them, 2026-11-21.
           On imdb_reviews: not measured; tested on a small synthetic set in the original layout.
"""

from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment

EXPERIMENT = Experiment(
    model=models.LSTMClassifier(vocab=10_256, width=128, embedding=128, bidirectional=True, dropout=0.5),
    train=data.LabelledText(length=256, split="train", words=10_000),
    test=data.LabelledText(length=256, split="test", words=10_000),
    loss=losses.CrossEntropy(),
    optimizer=optim.AdamW(lr=optim.Linear(peak=2e-3, warmup=0.1), weight_decay=0.01, clip=1.0),
    batch=64,
    epochs=5,
    holdout=0.1,
)
