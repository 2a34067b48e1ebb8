"""The two errors a run may end with; the command line turns each into one line and an exit code."""


class InputError(ValueError):
    """The user gave something that cannot work: exit code 2.

    The message is one line that says what is wrong, where, and what to do about it.

    >>> raise InputError("batch 100 does not divide over 8 devices: try --set batch=96")
    Traceback (most recent call last):
        ...
    jaxtrain.core.errors.InputError: batch 100 does not divide over 8 devices: try --set batch=96
    """

    exit_code = 2


class RunError(RuntimeError):
    """The input was fine and the run failed all the same (NaN, disk, data): exit code 3."""

    exit_code = 3
