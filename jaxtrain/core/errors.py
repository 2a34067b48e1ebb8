"""The two errors for users; the command line prints each as one line and exits with its code."""


class InputError(ValueError):
    """The user's input cannot work: exit code 2.

    The message is one line that says what is wrong, where, and what to do about it.

    >>> raise InputError("batch 100 does not divide over 8 devices: try --set batch=96")
    Traceback (most recent call last):
        ...
    jaxtrain.core.errors.InputError: batch 100 does not divide over 8 devices: try --set batch=96
    """

    exit_code = 2


class RunError(RuntimeError):
    """The input was valid and the run failed (NaN, disk, data): exit code 3."""

    exit_code = 3
