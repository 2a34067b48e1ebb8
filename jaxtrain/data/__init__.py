"""Data: sources of raw examples, their order, augmentation, and preparation on disk."""

from jaxtrain.data.augment import AlternatingFlip, Crop, Cutout, Flip, Normalise, compose
from jaxtrain.data.images import Images, RandomCrops
from jaxtrain.data.mixup import Mixup
from jaxtrain.data.order import Order, Sequential, holdout
from jaxtrain.data.randaugment import RandAugment
from jaxtrain.data.ratings import Ratings
from jaxtrain.data.series import Series
from jaxtrain.data.sources import Arrays, Digits, Source, Subset, Synthetic, in_memory
from jaxtrain.data.text import LabelledText, TextWindows
from jaxtrain.data.tfds import TFDS

__all__ = [
    "TFDS",
    "AlternatingFlip",
    "Arrays",
    "Crop",
    "Cutout",
    "Digits",
    "Flip",
    "Images",
    "LabelledText",
    "Mixup",
    "Normalise",
    "Order",
    "RandAugment",
    "RandomCrops",
    "Ratings",
    "Sequential",
    "Series",
    "Source",
    "Subset",
    "Synthetic",
    "TextWindows",
    "compose",
    "holdout",
    "in_memory",
]
