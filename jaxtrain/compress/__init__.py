"""Smaller models: magnitude pruning, distillation, and int8 after training or in training.

Each wraps a part of a run, a post-update stage, a loss, a model or an inference function, and adds no
branch to the train step.
"""

from jaxtrain.compress.distil import Distil, DistilOutputs, with_teacher
from jaxtrain.compress.fake_quantize import fake_quantize
from jaxtrain.compress.prune import Prune, sparsity
from jaxtrain.compress.quantize import Quantized, quantize

__all__ = [
    "Distil",
    "DistilOutputs",
    "Prune",
    "Quantized",
    "fake_quantize",
    "quantize",
    "sparsity",
    "with_teacher",
]
