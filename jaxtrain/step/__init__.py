"""The pure update: functions that make the initial state, the train step and the eval step, not jitted.

>>> from jaxtrain.step import make_eval_step, make_init, make_train_step
"""

from jaxtrain.step.factories import make_eval_step, make_init, make_train_step, scan_steps

__all__ = ["make_eval_step", "make_init", "make_train_step", "scan_steps"]
