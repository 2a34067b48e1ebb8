"""Byte-level Shakespeare with a small GPT; ``python -m jaxtrain sample --workdir RUN`` generates text.

Run:       python -m jaxtrain.run --experiment shakespeare_gpt
Measured:  1.840 nats a byte on the test text (n = 1 seed), 488 s on two cores of an AMD EPYC CPU, 2026-11-21,
           with a smaller model: --set model.width=128 --set model.depth=4 --set model.heads=4
           --set model.dropout=0 --set batch=16 --set epochs=0.3 --set eval_every=0.1
           --set optimizer.lr.peak=2e-3
           At the size below (10.7 M parameters, meant for a GPU): not measured on any device.
"""

from jaxtrain import data, losses, metrics, models, optim
from jaxtrain.experiment import Experiment

EXPERIMENT = Experiment(
    model=models.GPT(vocab=256, context=256, width=384, depth=6, heads=6, dropout=0.2),
    train=data.TextWindows(context=256, split="train", stride=32),
    valid=data.TextWindows(context=256, split="validation"),
    test=data.TextWindows(context=256, split="test"),
    loss=losses.CrossEntropy(task="language_model"),
    optimizer=optim.AdamW(
        lr=optim.Cosine(peak=1e-3, end=1e-4, warmup=0.02), b2=0.99, weight_decay=0.1, clip=1.0
    ),
    batch=64,
    epochs=10,
    eval_every=0.5,
    select="-loss",
    report=metrics.LanguageModel(unit="byte"),
)
