"""Many runs: seeds and settings, trained one after the other or together, and their table."""

from jaxtrain.sweep.run import fit

__all__ = ["fit"]
