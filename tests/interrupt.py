"""Stop a run in the middle."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from jax.sharding import Mesh

import jaxtrain
from jaxtrain.core.signals import Stopped
from jaxtrain.experiment import Experiment
from jaxtrain.train.dispatch import Dispatch


def interrupted(experiment: Experiment, folder: Path, mesh: Mesh, at: int) -> None:
    """Start a run that a SIGINT stops after update ``at``, or the next one at which the host has control."""
    with pytest.MonkeyPatch.context() as patch:
        real = Dispatch.__call__

        def call(self: Any, state: Any, step: int, count: int) -> Any:
            if step + count >= at:
                os.kill(os.getpid(), signal.SIGINT)
            return real(self, state, step, count)

        patch.setattr(Dispatch, "__call__", call)
        with pytest.raises(Stopped):
            jaxtrain.fit(experiment, folder=folder, mesh=mesh)
