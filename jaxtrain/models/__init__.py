"""Models: Flax Linen modules, and the adapter that makes any of them a pure ``Model`` pair."""

from jaxtrain.models.cnn import CNN
from jaxtrain.models.layers import max_pool
from jaxtrain.models.linen import as_model
from jaxtrain.models.mlp import MLP

__all__ = ["CNN", "MLP", "as_model", "max_pool"]
