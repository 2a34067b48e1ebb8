"""The model of an experiment as its steps compute it: precision, int8, remat, gathered parameters, GPU."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.compress.fake_quantize import compressed
from jaxtrain.core.types import Model, State
from jaxtrain.experiment import Experiment
from jaxtrain.models import as_model, compute_in
from jaxtrain.models.target_gpu import trace_for
from jaxtrain.sharding import described


def compute_model(exp: Experiment, mesh: Mesh, abstract: State | None = None) -> Model:
    """Return the model with ``exp.remat``, ``exp.precision`` and ``exp.compress``.

    Given the state, it gathers parameters that ``fsdp`` splits.
    """
    card = described.card_of(mesh)
    model = as_model(exp.model, exp.remat)
    if abstract is not None:
        model = sharding.gather_params(
            model, jax.tree.map(lambda x: x.sharding, abstract.params), regather=exp.remat != "none"
        )
    model = compressed(compute_in(model, exp.precision), exp.compress)
    return model if card is None else trace_for(model, card.capability)


def eval_model(exp: Experiment) -> Model:
    """Return the model as evaluations compute it, for one device."""
    return compressed(compute_in(as_model(exp.model), exp.precision), exp.compress)
