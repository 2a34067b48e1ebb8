"""``--monitor-layers``: what the layers of a model return for one example, as pictures in TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line
from jaxtrain.core.types import Batch, State, split_extra
from jaxtrain.data import compose
from jaxtrain.data.checked import CheckedSource
from jaxtrain.models import as_model, compute_in
from jaxtrain.models.layer_outputs import Layer, edit_layers, list_layers
from jaxtrain.monitor import pictures
from jaxtrain.program import Program
from jaxtrain.program.loader import EXAMPLE_ID
from jaxtrain.step.factories import eval_state

CHANNELS = 64
"""Most feature maps, or kernels, that are drawn of a layer."""


class LayerPictures:
    """Draws the activations of a model for the first test example, and the kernels of its first layer.

    It evaluates, with the average of the weights where the run has one and without the rounding of
    ``compress``, and draws no random numbers of the training; so the run computes the same with it and
    without it. Every process must call it.

    Args:
      program: of the run.

    Raises:
      InputError: the model is not made of Flax layers whose outputs can be read.
    """

    def __init__(self, program: Program) -> None:
        exp = program.experiment
        self._example = {**CheckedSource("test", exp.test).gather(np.zeros(1, np.int64))}
        self._example[EXAMPLE_ID] = np.zeros(1, np.int32)
        model, prepare = compute_in(as_model(exp.model), exp.precision), compose(*exp.preprocess)

        def forward(state: State, batch: Batch) -> Any:
            params, extra = eval_state(state)
            return model.apply(params, split_extra(extra)[0], prepare(batch, None), train=False, key=None)[0]

        def read(state: State, batch: Batch) -> tuple[dict[str, jax.Array], Any]:
            found: dict[str, jax.Array] = {}
            with edit_layers({layer.path: _keep(found, layer.path) for layer in self._layers}):
                forward(state, batch)
            kernel = None if self._kernel is None else _at(eval_state(state)[0], self._kernel)
            return jax.tree.map(lambda x: x.astype(jnp.float32), (found, kernel))

        try:
            layers = list_layers(forward, program.abstract_state, self._example)
            self._layers = [x for x in layers if x.shape[:1] == (1,) and 2 <= len(x.shape) <= 4]
            self._kernel = _first_kernel(layers, program.abstract_state.params)
            self._read = jax.jit(read, out_shardings=program.key.sharding)
            jax.eval_shape(read, program.abstract_state, self._example)
        except Exception as error:  # a user's model: anything may come out of it
            raise InputError(
                f"--monitor-layers: the layers of this model cannot be read ({type(error).__name__}: "
                f"{first_line(error)[:200]}); leave it out"
            ) from error
        if not self._layers:
            raise InputError("--monitor-layers: the model has no Flax layers: leave it out")

    def __call__(self, state: State) -> dict[str, bytes]:
        """Return PNGs by name, ``activations/PATH`` and ``kernels/PATH``."""
        found, kernel = jax.device_get(self._read(state, self._example))
        drawn = {f"activations/{layer.path}": _activations(found[layer.path][0]) for layer in self._layers}
        if kernel is not None and self._kernel is not None:
            shapes = {np.shape(x)[1:] for x in self._example.values()}
            drawn[f"kernels/{self._kernel}"] = _kernels(kernel, shapes)
        return {name: pictures.png(pictures.enlarge(pixels)) for name, pixels in drawn.items()}


def _keep(found: dict[str, jax.Array], path: str) -> Callable[[jax.Array], jax.Array]:
    def keep(output: jax.Array) -> jax.Array:
        found[path] = output
        return output

    return keep


def _activations(array: np.ndarray) -> np.ndarray:
    """Return the picture of one layer: tiles of ``[height, width, channel]``, or the array itself."""
    scale: pictures.Scale = "diverging" if array.min() < 0 else "sequential"
    colours = pictures.colour(array, scale, pictures.limit(array)[0])
    if array.ndim == 3:
        return pictures.tiles(np.moveaxis(colours, 2, 0), CHANNELS)
    return colours if array.ndim == 2 else colours[None].repeat(max(1, len(array) // 8), 0)  # a strip


def _kernels(kernel: np.ndarray, shapes: set[tuple[int, ...]]) -> np.ndarray:
    """Return the kernels of the first layer, one for each output: as images where the input is one.

    Args:
      kernel: ``[rows, columns, channel, outputs]`` of a convolution, ``[inputs, outputs]`` of a dense layer.
      shapes: of the fields of an example.
    """
    if kernel.ndim == 2:
        image = [shape for shape in shapes if len(shape) == 3 and np.prod(shape) == len(kernel)]
        kernel = kernel.reshape(*(image[0] if image else (1, len(kernel), 1)), -1)
    each = np.moveaxis(kernel, -1, 0)[:CHANNELS]
    if each.shape[-1] == 3:
        largest = np.abs(each).max()
        return pictures.tiles(np.stack([pictures.grey_or_rgb(one, -largest, largest) for one in each]))
    summed = each.sum(-1)
    return pictures.tiles(pictures.colour(summed, "diverging", pictures.limit(summed)[0]))


def _first_kernel(layers: list[Layer], params: Any) -> str | None:
    """Return the path of the first layer with a kernel that can be drawn."""
    for layer in layers:
        kernel = _at(params, layer.path)
        if kernel is not None and len(kernel.shape) in (2, 4):
            return layer.path
    return None


def _at(params: Any, path: str) -> Any:
    """Return the kernel of a layer; None where it has none."""
    for name in (*path.split("/"), "kernel"):
        if not isinstance(params, dict) or name not in params:
            return None
        params = params[name]
    return params
