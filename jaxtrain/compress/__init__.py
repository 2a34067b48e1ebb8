"""Smaller models: magnitude pruning and distillation.

Each wraps what a run has already, a post-update stage, a loss or a model, and adds no branch to the step.
"""

from jaxtrain.compress.distil import Distil, DistilOutputs, with_teacher
from jaxtrain.compress.prune import Prune, sparsity

__all__ = ["Distil", "DistilOutputs", "Prune", "sparsity", "with_teacher"]
