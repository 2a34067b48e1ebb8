"""Shakespeare, byte by byte, with a small GPT; ``python -m jaxtrain sample --workdir RUN`` writes more of it.

Run:       python -m jaxtrain.run --experiment shakespeare_gpt
Measured:  not yet
"""

from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment

EXPERIMENT = Experiment(
    model=models.GPT(vocab=256, context=256, width=384, depth=6, heads=6, dropout=0.2),
    train=data.TextWindows(context=256, split="train", stride=32),
    valid=data.TextWindows(context=256, split="validation"),
    test=data.TextWindows(context=256, split="test"),
    loss=losses.CrossEntropy(),
    optimizer=optim.AdamW(
        lr=optim.Cosine(peak=1e-3, end=1e-4, warmup=0.02), b2=0.99, weight_decay=0.1, clip=1.0
    ),
    batch=64,
    epochs=10,
    eval_every=0.5,
    select="-loss",
)
