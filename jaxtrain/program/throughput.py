"""What a run's speed is told in: operations and tokens of an update, and the peak that MFU is a share of."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxtrain.data import compose
from jaxtrain.models import as_model
from jaxtrain.monitor import peak_flops
from jaxtrain.program import Program
from jaxtrain.program.flops import model_flops
from jaxtrain.program.memory import abstract_examples, mesh_of


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Of a run, the same at every update.

    Attributes:
      flops: floating-point operations of an update, of all devices together; those of the model, not what
        recomputation adds.
      tokens: of an update, for batches with ``tokens: [batch, length]``; else None.
      peak: operations a second of all devices together at the run's precision; None where it is unknown.
      source: where the peak is from: ``table``, ``measured 2026-11-22``.
      counted_by: ``formula`` (the model's ``flops``) or ``program``.
    """

    flops: float
    tokens: int | None
    peak: float | None
    source: str | None
    counted_by: str

    def record(self) -> dict[str, Any]:
        """For the run's record: what the rates are made of."""
        return {
            "flops_per_update": self.flops,
            "flops_by": self.counted_by,
            "peak_flops": self.peak,
            "peak_by": self.source,
        }

    def rates(self, seconds: float) -> dict[str, float]:
        """Of updates that take ``seconds`` each: figures for the records.

        ``tokens_per_second`` where there are tokens, ``flops_per_second``, and ``mfu``, a share in [0, 1],
        where the peak is known.

        >>> told = Throughput(2e9, tokens=None, peak=1e10, source="table", counted_by="formula")
        >>> told.rates(seconds=0.5)
        {'flops_per_second': 4000000000.0, 'mfu': 0.4}
        """
        found = {}
        if self.tokens is not None:
            found["tokens_per_second"] = self.tokens / seconds
        found["flops_per_second"] = self.flops / seconds
        if self.peak is not None:
            found["mfu"] = self.flops / seconds / self.peak
        return found


def throughput(program: Program) -> Throughput:
    """What ``program`` computes in an update; nothing is compiled.

    Without a formula the step is traced, as its first call does and then finds done; with ``remat`` it is
    that of the same experiment without, which is made for this.

    Args:
      program: of ``jaxtrain.program.assemble``.
    """
    exp, batch = program.experiment, _prepared(program)
    formula = as_model(exp.model).flops
    flops = None if formula is None else formula(batch)
    tokens = batch.get("tokens")
    most = peak_flops.total_peak_flops(mesh_of(program).devices.reshape(-1), exp.precision)
    return Throughput(
        flops=model_flops(program) if flops is None else flops,
        tokens=tokens.shape[0] * tokens.shape[1] if tokens is not None and len(tokens.shape) == 2 else None,
        peak=None if most is None else most.flops,
        source=None if most is None else most.source,
        counted_by="program" if flops is None else "formula",
    )


def update_flops(program: Program) -> float:
    """Operations of an update: by the model's formula where it has one, else counted in the program."""
    formula = as_model(program.experiment.model).flops
    flops = None if formula is None else formula(_prepared(program))
    return model_flops(program) if flops is None else flops


def _prepared(program: Program) -> dict[str, Any]:
    """Shapes of the batch that the model is given."""
    exp = program.experiment
    prepare = compose(*exp.augment, *exp.preprocess)
    found: dict[str, Any] = jax.eval_shape(
        prepare, abstract_examples(exp.train, exp.batch), jax.random.key(0)
    )
    return found
