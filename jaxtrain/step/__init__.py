"""The pure update: factories of the init, train and eval steps, which the caller jits.

>>> from jaxtrain.step import make_eval_step, make_init, make_train_step
"""

from jaxtrain.step.factories import make_eval_step, make_init, make_train_step, scan_steps

__all__ = ["make_eval_step", "make_init", "make_train_step", "scan_steps"]
