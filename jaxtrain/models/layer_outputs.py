"""Read and replace the outputs of a model's layers, by path, without a change of the model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
from flax import linen as nn

Kind = Literal["convolution", "embedding", "other"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A call of a Linen layer.

    Attributes:
      path: names of its modules, such as ``block0/qkv``; later calls of a layer end in ``:1``, ``:2``, ...
      kind: ``convolution``, ``embedding`` or ``other``.
      shape: of its output.
      dtype: of its output.
    """

    path: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: Any


@contextlib.contextmanager
def edit_layers(edits: Mapping[str, Callable[[jax.Array], jax.Array]]) -> Iterator[None]:
    """Replace the outputs of Linen layers in what this thread traces in the block.

    With ``lambda x: x + shift`` the gradient with respect to ``shift`` is that with respect to the output,
    as with Flax's ``Module.perturb``. The layers are those whose output is one array, found by the
    interception of ``__call__`` (``flax.linen.intercept_methods``). It has an effect while a function is
    traced, not while a compiled one runs.

    Args:
      edits: by path (``Layer.path``), a function of the output.

    >>> import jax.numpy as jnp
    >>> net, x = nn.Sequential([nn.Dense(2), nn.Dense(3)]), jnp.ones((1, 4))
    >>> variables = net.init(jax.random.key(0), x)
    >>> with edit_layers({"layers_1": jnp.ones_like}):
    ...     net.apply(variables, x).tolist()
    [[1.0, 1.0, 1.0]]
    """

    def edit(layer: Layer, output: jax.Array) -> jax.Array:
        return edits[layer.path](output) if layer.path in edits else output

    with _intercept(edit):
        yield


def list_layers(function: Callable[..., Any], *args: Any) -> list[Layer]:
    """Return the layers that ``function`` calls, in the order in which they return; nothing is computed.

    A model that is not made of Linen modules has none.

    Args:
      function: applies a model.
      args: arrays, or their shapes.

    >>> import jax.numpy as jnp
    >>> net = nn.Sequential([nn.Embed(10, 4), nn.Dense(3)])
    >>> tokens = jnp.zeros((1, 5), jnp.int32)
    >>> variables = net.init(jax.random.key(0), tokens)
    >>> [(layer.path, layer.kind, layer.shape) for layer in list_layers(net.apply, variables, tokens)]
    [('layers_0', 'embedding', (1, 5, 4)), ('layers_1', 'other', (1, 5, 3))]
    """
    layers: list[Layer] = []

    def add(layer: Layer, output: jax.Array) -> jax.Array:
        layers.append(layer)
        return output

    def fresh(*args: Any) -> Any:  # JAX caches traces by function
        return function(*args)

    with _intercept(add):
        jax.eval_shape(fresh, *args)
    return layers


@contextlib.contextmanager
def _intercept(visit: Callable[[Layer, jax.Array], jax.Array]) -> Iterator[None]:
    """Call ``visit`` with the output of each layer; what it returns takes its place."""
    calls: dict[str, int] = {}
    active: list[str] = []
    scans: set[str] = set()

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        path = "/".join(module.path or ())
        outer = path in ("", *active)  # the model, or a layer that calls super().__call__
        if context.method_name != "__call__" or outer or scans.intersection(active):
            return call(*args, **kwargs)
        if isinstance(module, nn.RNN):  # no value can be taken out of its scan
            scans.add(path)
        active.append(path)
        try:
            output = call(*args, **kwargs)
        finally:
            active.pop()
        if not isinstance(output, jax.Array):
            return output
        number = calls[path] = calls.get(path, -1) + 1
        name = f"{path}:{number}" if number else path
        return visit(Layer(name, _kind(module), output.shape, output.dtype), output)

    with nn.intercept_methods(interceptor):
        yield


def _kind(module: nn.Module) -> Kind:
    if isinstance(module, nn.Conv | nn.ConvLocal | nn.ConvTranspose):
        return "convolution"
    return "embedding" if isinstance(module, nn.Embed) else "other"
