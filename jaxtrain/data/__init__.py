"""Data: sources of raw examples, the order they are visited in, loaders, augmentations, preparation."""

from jaxtrain.data.augment import Crop, Cutout, Flip, Normalise, compose
from jaxtrain.data.order import Order, Sequential, holdout
from jaxtrain.data.sources import Arrays, Digits, Source, Subset, Synthetic, in_memory
from jaxtrain.data.tfds import TFDS

__all__ = [
    "TFDS",
    "Arrays",
    "Crop",
    "Cutout",
    "Digits",
    "Flip",
    "Normalise",
    "Order",
    "Sequential",
    "Source",
    "Subset",
    "Synthetic",
    "compose",
    "holdout",
    "in_memory",
]
