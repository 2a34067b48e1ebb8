"""jaxtrain: train JAX models from one declarative file, on one device or many."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("jaxtrain")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+source"
