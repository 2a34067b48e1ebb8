"""Oxford-IIIT Pet segmentation with a U-Net: each pixel is pet, background or border.

Run:       python -m jaxtrain.run --experiment pets_unet
Measured:  not measured: the data set could not be downloaded here. Tested on a small synthetic
           set in the original layout.
"""

from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment

EXPERIMENT = Experiment(
    model=models.UNet(widths=(32, 64, 128, 256), classes=3),
    train=data.RandomCrops(
        data.TFDS("oxford_iiit_pet", "train[:90%]"),
        area=(0.3, 1.0),
        crop=1.0,
        size=128,
        mask="segmentation_mask",
    ),
    valid=data.Images(
        data.TFDS("oxford_iiit_pet", "train[90%:]"), crop=1.0, size=128, mask="segmentation_mask"
    ),
    test=data.Images(data.TFDS("oxford_iiit_pet", "test"), crop=1.0, size=128, mask="segmentation_mask"),
    loss=losses.CrossEntropy(iou=True, task="segmentation"),
    optimizer=optim.AdamW(lr=optim.OneCycle(peak=2e-3), weight_decay=0.01),
    preprocess=(data.Normalise(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),),
    batch=32,
    epochs=50,
    select="mean_iou",
    workers=2,
)
