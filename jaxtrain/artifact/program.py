"""The compiled form of a model: a StableHLO program from ``jax.export``, and what it may contain."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax import export

from jaxtrain.artifact.manifest import BATCH
from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line

PLATFORMS = ("cpu", "cuda")

ALLOWED_CALLS = frozenset(
    {"shape_assertion", "stablehlo.dynamic_reduce_window", "stablehlo.dynamic_top_k", "mhlo.topk"}
)
"""Custom calls that a program may contain: the check of a batch's shape, and operations that StableHLO has
only in this form. All others, such as calls into Python or into libraries, are refused."""

_CALL = re.compile(r'stablehlo\.custom_call"?\s*(?:@"([^"]*)"|@([\w.$-]+))?')
_TARGET = re.compile(r'call_target_name\s*=\s*"([^"]*)"')
_TRANSFER = re.compile(r"\bstablehlo\.(infeed|outfeed|send|recv)\b")

Weights = Mapping[str, Any]
Apply = Callable[[Any, Any], Any]


def export_program(
    apply: Apply,
    weights: Weights,
    inputs: Mapping[str, jax.ShapeDtypeStruct],
    sizes: Mapping[str, int],
    axes: Mapping[str, tuple[int | str, ...]],
    platforms: tuple[str, ...] = PLATFORMS,
) -> export.Exported:
    """Trace ``apply`` for any batch size and every platform.

    Args:
      apply: pure ``(weights, inputs) -> outputs``, dicts of arrays.
      weights: arrays, or their shapes, by name.
      inputs: shape and dtype of one example of each input, without the batch axis.
      sizes: the largest size of each named axis.
      axes: the shape of one example of each input, with a name for an axis of any size.
      platforms: names of JAX's platforms.

    Raises:
      InputError: the model cannot be exported, with JAX's reason.
    """
    scope = export.SymbolicScope([f"{name} <= {size}" for name, size in sizes.items()])
    shapes = {}
    for name, spec in inputs.items():
        text = ", ".join([BATCH, *map(str, axes[name])])
        shapes[name] = jax.ShapeDtypeStruct(export.symbolic_shape(text, scope=scope), spec.dtype)
    return _export(apply, weights, shapes, platforms)


def used_arguments(apply: Apply, weights: Weights, inputs: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the weights and of the inputs that the outputs depend on.

    Args:
      apply, weights: as for ``export_program``.
      inputs: shapes of a batch, all sizes fixed: where they are free, all inputs are used to check them.

    Raises: as ``export_program``.
    """
    exported = _export(apply, weights, inputs, ("cpu",))
    names = [*sorted(weights), *sorted(inputs)]
    return frozenset(names[index] for index in exported.module_kept_var_idx)


def export_fixed(
    apply: Apply, weights: Weights, inputs: Mapping[str, jax.ShapeDtypeStruct], batch: int
) -> export.Exported:
    """Trace ``apply`` for one batch size, as plain StableHLO: the program for GPUs, which may run anywhere.

    Args, raises: as ``export_program``.
    """
    shapes = {name: jax.ShapeDtypeStruct((batch, *x.shape), x.dtype) for name, x in inputs.items()}
    exported = _export(apply, weights, shapes, ("cuda",))
    return dataclasses.replace(exported, disabled_safety_checks=(export.DisabledSafetyCheck.platform(),))


def _export(
    apply: Apply, weights: Weights, inputs: Mapping[str, Any], platforms: tuple[str, ...]
) -> export.Exported:
    params = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}

    def fn(weights: Any, inputs: Any) -> Any:  # new, so that nothing traced elsewhere is used again
        return apply(weights, inputs)

    try:
        with _without_source_locations():
            return export.export(jax.jit(fn), platforms=platforms)(params, inputs)
    except InputError:
        raise
    except Exception as error:  # the model's code is traced again, for a batch of any size
        raise InputError(
            f"the model cannot be exported for {' and '.join(platforms)}: {type(error).__name__}: "
            f"{first_line(error)[:300]}"
        ) from error


@contextlib.contextmanager
def _without_source_locations() -> Iterator[None]:
    """Leave the paths of source files out of the program: the same model gives the same bytes anywhere."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def serialize(exported: export.Exported) -> bytes:
    """Return the program as bytes, for ``load_program``.

    Raises:
      InputError: the program may not be loaded again, or the package flatbuffers is missing.
    """
    check_calls(exported, "the model")
    with _needs_flatbuffers():
        return bytes(exported.serialize(vjp_order=0))


def load_program(data: bytes, where: str) -> export.Exported:
    """Return the program of bytes whose checksum was compared.

    Raises:
      InputError: JAX cannot read it, or it contains a call that is not allowed.
    """
    with _needs_flatbuffers():
        try:
            exported = export.deserialize(bytearray(data))
        except ImportError:
            raise
        except Exception as error:  # of the parser
            raise InputError(
                f"{where}: JAX {jax.__version__} cannot read its program ({type(error).__name__}: "
                f"{first_line(error)[:200]}): export it again with this version of jaxtrain"
            ) from error
    check_calls(exported, where)
    return exported


def check_calls(exported: export.Exported, where: str) -> None:
    """Raise InputError if the program calls code outside itself that ``ALLOWED_CALLS`` does not name."""
    refused = sorted(outside_calls(exported.mlir_module()) - ALLOWED_CALLS)
    if refused:
        raise InputError(
            f"{where} calls {', '.join(refused[:3])}, code outside its program, which an artifact may not: "
            "leave callbacks and library calls out of the model"
        )


def outside_calls(text: str) -> set[str]:
    """Return the targets of all custom calls and host transfers in the text of a StableHLO module.

    >>> sorted(outside_calls('%0 = stablehlo.custom_call @shape_assertion(%1)\\n%2 = stablehlo.infeed %3'))
    ['infeed', 'shape_assertion']
    """
    calls = {match[1] or match[2] or "an unnamed target" for match in _CALL.finditer(text)}
    if "an unnamed target" in calls:  # MLIR's general form, which has the name among the attributes
        calls.discard("an unnamed target")
        calls.update(_TARGET.findall(text) or ["an unnamed target"])
    return calls | {match[1] for match in _TRANSFER.finditer(text)}


@contextlib.contextmanager
def _needs_flatbuffers() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"JAX needs the package flatbuffers for artifacts ({first_line(error)}): pip install flatbuffers"
        ) from error
