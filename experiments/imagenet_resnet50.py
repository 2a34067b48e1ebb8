"""ImageNet with ResNet-50 v1.5: the standard 90-epoch recipe, in bfloat16.

Run:       python -m jaxtrain.run --experiment imagenet_resnet50
Measured:  not measured on any device; aim 76 to 77 % (arXiv:1706.02677, and label smoothing). Its data path,
           training and exact resume are tested on a small synthetic set in ImageNet's layout.
"""

from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment

EXPERIMENT = Experiment(
    model=models.ResNet(stages=(3, 4, 6, 3), block="bottleneck", classes=1000),
    train=data.RandomCrops(data.TFDS("imagenet2012", "train"), size=224),
    test=data.Images(data.TFDS("imagenet2012", "validation"), size=224),
    loss=losses.CrossEntropy(smoothing=0.1, top=5),
    optimizer=optim.SGD(
        lr=optim.Cosine(peak=0.4, warmup=5 / 90), momentum=0.9, nesterov=True, weight_decay=1e-4
    ),
    preprocess=(data.Normalise(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),),
    batch=1024,
    epochs=90,
    precision="bfloat16",
    drop_remainder=True,
    workers=8,
)
