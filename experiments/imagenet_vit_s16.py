"""ImageNet with ViT-S/16: the 90-epoch recipe of Beyer, Zhai & Kolesnikov 2022 (arXiv:2205.01580).

Run:       python -m jaxtrain.run --experiment imagenet_vit_s16
Measured:  not measured on any device; the paper reports 76.5 %. Its data path and training are tested on a
           small synthetic set in ImageNet's layout. Validation is the last 1 % of the training set.
"""

from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment

EXPERIMENT = Experiment(
    model=models.ViT(patch=16, width=384, depth=12, heads=6, classes=1000),
    train=data.RandomCrops(
        data.TFDS("imagenet2012", "train[:99%]"),
        size=224,
        area=(0.05, 1.0),
        stages=(data.RandAugment(2, 10),),
    ),
    valid=data.Images(data.TFDS("imagenet2012", "train[99%:]"), size=224),
    test=data.Images(data.TFDS("imagenet2012", "validation"), size=224),
    loss=losses.CrossEntropy(top=5),
    optimizer=optim.AdamW(
        lr=optim.Cosine(peak=1e-3, warmup=0.09), weight_decay=0.1, decay="kernel", clip=1.0
    ),
    augment=(data.Mixup(alpha=0.2),),
    preprocess=(data.Normalise(mean=(0.5,), std=(0.5,)),),
    batch=1024,
    epochs=90,
    precision="bfloat16",
    drop_remainder=True,
    workers=8,
)
