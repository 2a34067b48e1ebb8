"""Figures to report a run's speed in: FLOPs and tokens per update, and the peak that MFU is relative to."""

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
    """The constants that turn seconds per update into rates.

    Attributes:
      flops: floating-point operations of an update, summed over devices; model FLOPs, without recomputation.
      tokens: tokens of an update, for batches with ``tokens: [batch, length]``; else None.
      peak: peak operations per second at the run's precision, summed over devices; None where it is unknown.
      source: where the peak is from: ``table``, ``measured 2026-11-22``.
      counted_by: ``formula`` (the model's ``flops``) or ``program``.
    """

    flops: float
    tokens: int | None
    peak: float | None
    source: str | None
    counted_by: str

    def record(self) -> dict[str, Any]:
        """These constants, for the run's record."""
        return {
            "flops_per_update": self.flops,
            "flops_by": self.counted_by,
            "peak_flops": self.peak,
            "peak_by": self.source,
        }

    def rates(self, seconds: float) -> dict[str, float]:
        """Rates of updates that take ``seconds`` each.

        ``tokens_per_second`` where there are tokens, ``flops_per_second``, and ``mfu``, a fraction in [0, 1],
        where the peak is known.

        >>> speed = Throughput(2e9, tokens=None, peak=1e10, source="table", counted_by="formula")
        >>> speed.rates(seconds=0.5)
        {'flops_per_second': 4000000000.0, 'mfu': 0.4}
        """
        rates = {}
        if self.tokens is not None:
            rates["tokens_per_second"] = self.tokens / seconds
        rates["flops_per_second"] = self.flops / seconds
        if self.peak is not None:
            rates["mfu"] = self.flops / seconds / self.peak
        return rates


def throughput(program: Program) -> Throughput:
    """Work out the throughput constants of ``program``; nothing is compiled.

    Without a formula the train step is traced, which its first call reuses; with ``remat`` the same
    experiment without it is assembled and traced.

    Args:
      program: from ``jaxtrain.program.assemble``.
    """
    exp, batch = program.experiment, _abstract_inputs(program)
    formula = as_model(exp.model).flops
    flops = None if formula is None else formula(batch)
    tokens = batch.get("tokens")
    peak = peak_flops.total_peak_flops(mesh_of(program).devices.reshape(-1), exp.precision)
    return Throughput(
        flops=model_flops(program) if flops is None else flops,
        tokens=tokens.shape[0] * tokens.shape[1] if tokens is not None and len(tokens.shape) == 2 else None,
        peak=None if peak is None else peak.flops,
        source=None if peak is None else peak.source,
        counted_by="program" if flops is None else "formula",
    )


def update_flops(program: Program) -> float:
    """FLOPs of an update: by the model's formula where it has one, else counted in the program."""
    formula = as_model(program.experiment.model).flops
    flops = None if formula is None else formula(_abstract_inputs(program))
    return model_flops(program) if flops is None else flops


def _abstract_inputs(program: Program) -> dict[str, Any]:
    """Shapes of the prepared batch, the input of the model."""
    exp = program.experiment
    prepare = compose(*exp.augment, *exp.preprocess)
    batch: dict[str, Any] = jax.eval_shape(
        prepare, abstract_examples(exp.train, exp.batch), jax.random.key(0)
    )
    return batch
