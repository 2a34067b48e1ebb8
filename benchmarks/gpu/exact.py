"""Exactness on a GPU, in a separate process: resuming bit for bit, and stopping at NaN that a ReLU hides."""

from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import workloads
from jaxtrain import checkpoint, models, sharding
from jaxtrain.cli import devices
from jaxtrain.core.errors import RunError
from jaxtrain.core.signals import Stopped
from jaxtrain.monitor.console import Plain
from jaxtrain.program import Program, assemble
from jaxtrain.train import loop

STEPS, AT = 40, 10


class StopAt(Plain):
    """Asks for the end of the run after update ``AT``, as a scheduler does."""

    def advance(self, step: int) -> None:
        if step >= AT:  # several at once may go past it
            signal.raise_signal(signal.SIGTERM)


@dataclasses.dataclass(frozen=True)
class Nans:
    """Makes every pixel NaN, as a stage with a mistake in it does."""

    def __call__(self, batch: dict[str, Any], key: Any) -> dict[str, Any]:
        return {**batch, "image": jnp.full(batch["image"].shape, jnp.nan)}


def small(tiny: bool, steps_per_execution: int = 1) -> Any:
    """``digits_cnn`` on made-up images, for 40 updates with a checkpoint at the end."""
    exp = workloads.digits(tiny)
    epochs = STEPS * exp.batch / len(exp.train)
    return dataclasses.replace(exp, epochs=epochs, save_every=epochs, steps_per_execution=steps_per_execution)


def check_resume(folder: Path, tiny: bool, steps_per_execution: int = 1) -> dict[str, Any]:
    """Compare an uninterrupted run with one that is stopped after update 10 and resumed, bit for bit."""
    program = assemble(small(tiny, steps_per_execution), sharding.make_mesh(jax.devices()[:1]))
    loop.fit(program, folder / "straight", Plain())
    stopped = False
    try:
        loop.fit(program, folder / "broken", StopAt())
    except Stopped:
        stopped = True
    result = loop.fit(program, folder / "broken", Plain())
    states = [jax.device_get(_last(program, folder / name)) for name in ("straight", "broken")]
    different = jax.tree.map(lambda a, b: np.asarray(a).tobytes() != np.asarray(b).tobytes(), *states)
    return {
        "stopped": stopped,
        "resumed_from": result["resumed_from"],
        "steps": result["steps"],
        "arrays": len(jax.tree.leaves(states[0])),
        "different": [
            jax.tree_util.keystr(path) for path, bad in jax.tree_util.tree_leaves_with_path(different) if bad
        ],
    }


def _last(program: Program, folder: Path) -> Any:
    with checkpoint.open(folder) as saved:
        newest = saved.latest()
        assert newest is not None
        return saved.restore(newest, program.abstract_state)


def check_nan(folder: Path, tiny: bool) -> dict[str, Any]:
    """Images of NaN into a network of ReLUs, whose loss is then finite: does the guard end the run?

    The parameters must be those before the bad update. Which ReLU hides NaN depends on the backend: where
    its maximum keeps it, the loss is NaN and the guard sees that.
    """
    model = models.MLP(widths=(32,), classes=10)  # no BatchNorm, whose statistics would show NaN
    exp = dataclasses.replace(small(tiny), model=model, augment=(Nans(),))
    program = assemble(exp, sharding.make_mesh(jax.devices()[:1]))
    state, metrics = program.train_step(program.init(), program.train.batch(0), program.key)
    before = program.init()
    equal = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), state.params, before.params)
    found = {"figures": {k: str(v) for k, v in metrics["guard"].by_name().items()}}
    try:
        loop.fit(program, folder, Plain())
    except RunError as error:
        return {**found, "stopped": str(error), "parameters_kept": all(jax.tree.leaves(equal))}
    return {**found, "stopped": None, "parameters_kept": all(jax.tree.leaves(equal))}


def exact(tiny: bool) -> Iterator[dict[str, Any]]:
    """Resuming with single steps and with eight at once, and NaN; all that there is after each."""
    devices.set_deterministic()
    found: dict[str, Any] = {"xla_flags": os.environ.get("XLA_FLAGS", "")}
    with tempfile.TemporaryDirectory() as folder:
        found["nan"] = check_nan(Path(folder, "nan"), tiny)
        yield found
        for name, count in (("resume", 1), ("resume_8_at_once", 8)):
            found[name] = check_resume(Path(folder, name), tiny, count)
            yield found
