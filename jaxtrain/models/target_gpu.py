"""Trace a model for a GPU that this process does not have, to compile it only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from jaxtrain.core.types import Model

CUDNN = 91_000
"""The version of cuDNN that is assumed: that of the target that ``sharding.described`` gives to XLA."""

_TARGET: ContextVar[tuple[int, int] | None] = ContextVar("compute capability to trace for", default=None)


def target_capability() -> tuple[int, int] | None:
    """Return the compute capability that is traced for; None where that is the devices of this process."""
    return _TARGET.get()


def trace_for(model: Model, capability: tuple[int, int]) -> Model:
    """Return ``model`` with functions that choose kernels for a GPU of this compute capability.

    The choice (``models.attention``) is made while they are traced, whenever that is.

    >>> from jaxtrain.models import MLP, as_model
    >>> model = as_model(MLP(widths=(8,), classes=3))
    >>> trace_for(model, (9, 0)).check is model.check
    True
    """

    def traced(fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            token = _TARGET.set(capability)
            try:
                with _jax_checks_for(capability):
                    return fn(*args, **kwargs)
            finally:
                _TARGET.reset(token)

        return call

    return model._replace(init=traced(model.init), apply=traced(model.apply))


@contextlib.contextmanager
def _jax_checks_for(capability: tuple[int, int]) -> Iterator[None]:
    """Let JAX's own checks of cuDNN's attention answer for the target, in the block.

    They ask the cuDNN library and the GPU of this process. Compiling needs neither
    (docs/decisions/compile-without-a-gpu.md). In a JAX without these functions nothing is replaced.
    """
    try:
        from jax._src.cudnn import fused_attention_stablehlo as checks
    except ImportError:
        yield
        return
    answers: dict[str, Callable[..., Any]] = {
        "check_cudnn_version": lambda: CUDNN,
        "check_compute_capability": lambda text: capability >= _parse(text),
        "is_cuda_compute_capability_equal": lambda text: capability == _parse(text),
    }
    before = {name: getattr(checks, name) for name in answers if hasattr(checks, name)}
    for name in before:
        setattr(checks, name, answers[name])
    try:
        yield
    finally:
        for name, check in before.items():
            setattr(checks, name, check)


def _parse(text: str) -> tuple[int, int]:
    major, minor = map(int, text.split("."))
    return major, minor
