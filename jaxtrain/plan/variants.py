"""Variants of a run: another mesh, batch, accumulation or recomputation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax

from jaxtrain import sharding
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.experiment import Experiment
from jaxtrain.models import Remat
from jaxtrain.plan.measure import Plan, measure
from jaxtrain.program import assemble


@dataclasses.dataclass(frozen=True)
class Variant:
    """Settings that may differ from the run that was asked for.

    Attributes:
      mesh: sizes of ``sharding.AXES``.
      batch, accumulate, remat: as in ``Experiment``.
    """

    mesh: tuple[int, ...]
    batch: int
    accumulate: int
    remat: Remat

    @property
    def mesh_text(self) -> str:
        """The mesh as ``--mesh`` takes it."""
        return sharding.mesh_text(dict(zip(sharding.AXES, self.mesh, strict=True)))

    @property
    def parts(self) -> int:
        """The number of parts into which the mesh splits a batch."""
        return math.prod(size for axis, size in zip(sharding.AXES, self.mesh, strict=True) if axis != "model")

    def flags(self, given: Variant) -> tuple[str, ...]:
        """Return the flags that turn a command for ``given`` into one for this variant.

        >>> given = Variant((8, 1, 1), 64, 1, "none")
        >>> " ".join(Variant((1, 8, 1), 64, 4, "none").flags(given))
        '--mesh fsdp=8 --set accumulate=4'
        """
        words = [] if self.mesh == given.mesh else ["--mesh", self.mesh_text]
        for name in ("batch", "accumulate", "remat"):
            if getattr(self, name) != getattr(given, name):
                words += ["--set", f"{name}={getattr(self, name)}"]
        return tuple(words)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A variant and what it needs, or the reason why it is impossible (``plan`` is None)."""

    variant: Variant
    plan: Plan | None
    reason: str = ""


TrialFn = Callable[[Variant], Trial]


def variant_of(experiment: Experiment, mesh: jax.sharding.Mesh) -> Variant:
    """Return the settings of ``experiment`` on ``mesh`` as a variant."""
    sizes = tuple(mesh.shape[axis] for axis in sharding.AXES)
    return Variant(sizes, experiment.batch, experiment.accumulate, experiment.remat)


def make_trial(
    experiment: Experiment,
    devices: Sequence[jax.Device],
    resident: Mapping[str, bool] | None,
    report: Callable[[Trial], None] = lambda tried: None,
) -> TrialFn:
    """Make a function that compiles a variant of ``experiment``.

    Args:
      experiment: with open data (``with_open_data``).
      devices: the devices of every variant's mesh.
      resident: as for ``measure``.
      report: called with each result.
    """

    def trial(variant: Variant) -> Trial:
        try:
            changed = dataclasses.replace(
                experiment, batch=variant.batch, accumulate=variant.accumulate, remat=variant.remat
            )
            mesh = sharding.make_mesh(devices, dict(zip(sharding.AXES, variant.mesh, strict=True)))
            program = assemble(changed, mesh)
            try:
                tried = Trial(variant, measure(program, resident, count=False))
            finally:
                program.close()
        except (InputError, RunError) as error:
            tried = Trial(variant, None, str(error))
        report(tried)
        return tried

    return trial
