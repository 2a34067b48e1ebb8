"""Models as Flax Linen modules, and ``as_model``, which turns any Linen module into a pure ``Model`` pair."""

from jaxtrain.models.adapter import as_model
from jaxtrain.models.airbench import Airbench, TestTimeViews, Whiten
from jaxtrain.models.batch_norm import BatchNorm
from jaxtrain.models.cnn import CNN
from jaxtrain.models.dropout import Dropout
from jaxtrain.models.gpt import GPT
from jaxtrain.models.lenet import ConvNet
from jaxtrain.models.matrix_factorization import Factors
from jaxtrain.models.mlp import MLP
from jaxtrain.models.pooling import max_pool
from jaxtrain.models.precision import Precision, check_precision, compute_in
from jaxtrain.models.recurrent import GRUForecaster, LSTMClassifier
from jaxtrain.models.remat import Remat, check_remat, remat_block
from jaxtrain.models.resnet import ResNet
from jaxtrain.models.sampling import generate
from jaxtrain.models.unet import UNet
from jaxtrain.models.vit import ViT

__all__ = [
    "CNN",
    "GPT",
    "MLP",
    "Airbench",
    "BatchNorm",
    "ConvNet",
    "Dropout",
    "Factors",
    "GRUForecaster",
    "LSTMClassifier",
    "Precision",
    "Remat",
    "ResNet",
    "TestTimeViews",
    "UNet",
    "ViT",
    "Whiten",
    "as_model",
    "check_precision",
    "check_remat",
    "compute_in",
    "generate",
    "max_pool",
    "remat_block",
]
