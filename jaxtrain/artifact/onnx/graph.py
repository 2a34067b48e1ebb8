"""An ONNX graph under construction: values, constants, nodes, and the one symbolic dimension."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BATCH = "batch"
OPSET = 17
"""Inside the range that TensorRT documents (9 to 20, onnx-tensorrt ``docs/operators.md``)."""
IR_VERSION = 8  # the one that belongs to opset 17

Dim = Any  # an int, or JAX's symbolic expression in ``batch``
Shape = tuple[Dim, ...]

TYPES = {
    np.dtype(name): getattr(TensorProto, name.upper())
    for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
} | {np.dtype("float32"): TensorProto.FLOAT, np.dtype("float64"): TensorProto.DOUBLE}
HALF = (np.dtype(jnp.bfloat16), np.dtype(np.float16))
_AFFINE = re.compile(rf"(?:(-?\d+)\*)?{BATCH}(?: ([+-]) (\d+))?")


class UnsupportedError(Exception):
    """An equation has no equivalent within the operators of this export; the message says why."""


def onnx_dtype(dtype: Any) -> Any:
    """Return the dtype in the graph: bfloat16 and float16 are computed in float32.

    >>> onnx_dtype(jnp.bfloat16)
    dtype('float32')
    """
    if jnp.issubdtype(dtype, jax.dtypes.extended):  # keys of random numbers
        return dtype
    dtype = np.dtype(dtype)
    return np.dtype(np.float32) if dtype in HALF else dtype


def element_type(dtype: Any) -> int:
    """Return ONNX's number of a dtype."""
    dtype = onnx_dtype(dtype)
    if dtype not in TYPES:
        raise UnsupportedError(f"{dtype} is not a type of this export")
    return TYPES[dtype]


def affine(dim: Dim) -> tuple[int, int]:
    """Return ``(a, c)`` of a dimension ``a * batch + c``.

    >>> affine(7)
    (0, 7)
    """
    if is_fixed(dim):
        return 0, dim
    found = _AFFINE.fullmatch(str(dim))
    if found is None:
        raise UnsupportedError(f"a dimension is {dim}: only multiples of the batch size plus a constant are")
    factor, sign, offset = found.groups()
    return int(factor or 1), int((sign or "+") + (offset or "0"))


def is_fixed(dim: Dim) -> bool:
    """Whether a dimension does not depend on the batch size."""
    return isinstance(dim, int | np.integer)


def is_static(shape: Iterable[Dim]) -> bool:
    """Whether no dimension depends on the batch size."""
    return all(is_fixed(dim) for dim in shape)


def broadcast_shapes(*shapes: Shape) -> Shape:
    """Return the common shape by NumPy's rules, with symbolic dimensions.

    >>> broadcast_shapes((3, 1), (), (1, 4))
    (3, 4)
    """
    rank = max(map(len, shapes))
    columns = zip(*([1] * (rank - len(shape)) + list(shape) for shape in shapes), strict=True)
    return tuple(next((dim for dim in column if str(dim) != "1"), 1) for column in columns)


@dataclasses.dataclass(frozen=True)
class Value:
    """An array of the jaxpr: a constant (``data``), or the output ``name`` of a node.

    Attributes:
      shape: its shape in the jaxpr.
      dtype: its dtype in the graph.
      stored: shape of ``data`` or of the tensor ``name``. It broadcasts to ``shape``: ONNX's elementwise
        operators broadcast, so most ``broadcast_in_dim`` of a jaxpr need no node, and no batch size.
      name: of the tensor; None for a constant.
      data: of a constant; None for a tensor.
      label: path of the weight that a constant was computed from, for the initializer's name.
    """

    shape: Shape
    dtype: Any
    stored: Shape
    name: str | None = None
    data: Any = None
    label: str = ""

    @property
    def is_constant(self) -> bool:
        return self.data is not None

    @property
    def rank(self) -> int:
        return len(self.shape)


def constant(data: Any, label: str = "", shape: Shape | None = None) -> Value:
    """Return a constant; ``shape`` is what it broadcasts to, by default its own."""
    if not (isinstance(data, jax.Array) and jnp.issubdtype(data.dtype, jax.dtypes.extended)):
        data = np.asarray(data)
        data = data.astype(onnx_dtype(data.dtype), copy=False)
    return Value(tuple(data.shape) if shape is None else shape, data.dtype, data.shape, None, data, label)


def _no_interpreter(*_: Any) -> list[Value]:
    raise AssertionError("this graph was made without an interpreter of jaxprs")


Input = Value | str | np.ndarray | None


class Graph:
    """Nodes of the model, or of the body of a loop, or of a branch.

    A node that depends on nothing inside a loop's body is placed outside the loop, and equal nodes are one.

    Args:
      parent: the graph around a body or branch.
      is_branch: nodes are not moved out of a branch, which may not be taken.
    """

    def __init__(self, parent: Graph | None = None, is_branch: bool = False) -> None:
        self.parent, self.is_branch = parent, is_branch
        self.root: Graph = parent.root if parent else self
        self.depth: int = parent.depth + 1 if parent else 0
        self.nodes: list[onnx.NodeProto] = []
        self.known: dict[Any, tuple[str, ...]] = {}
        if parent is None:
            self.initializers: dict[str, np.ndarray] = {}
            self.depths: dict[str, int] = {}
            self.digests: dict[Any, str] = {}
            self.evaluate: Callable[..., list[Value]] = _no_interpreter
            self.layer = ""
            self.batch_source = ""
            self.count = 0

    def fresh(self, kind: str) -> str:
        """Return a new name for a tensor."""
        root = self.root
        root.count += 1
        while f"{kind.lower()}_{root.count}" in root.depths:
            root.count += 1
        return f"{kind.lower()}_{root.count}"

    def declare(self, name: str, shape: Shape, dtype: Any) -> Value:
        """Return an input of this graph."""
        self.root.depths[name] = self.depth
        return Value(tuple(shape), onnx_dtype(dtype), tuple(shape), name)

    def const(self, data: Any, label: str = "") -> str:
        """Return the name of an initializer; equal arrays share one."""
        root, data = self.root, np.asarray(data)
        data = data.astype(onnx_dtype(data.dtype), copy=False)
        element_type(data.dtype)
        key = data.dtype.str, data.shape, hashlib.blake2b(data.tobytes()).digest()
        if key not in root.digests:
            name = label or self.fresh("const")
            if name in root.depths:
                name = self.fresh(name)
            root.digests[key], root.initializers[name], root.depths[name] = name, data, 0
        return root.digests[key]

    def stored(self, value: Value) -> str:
        """Return the tensor of ``value`` as it is stored, perhaps smaller than its shape."""
        return self.const(value.data, value.label) if value.name is None else value.name

    def full(self, value: Value) -> str:
        """Return the tensor of ``value`` in its own shape."""
        if tuple(map(str, value.stored)) == tuple(map(str, value.shape)):
            return self.stored(value)
        if value.is_constant and is_static(value.shape):
            return self.const(np.broadcast_to(value.data, value.shape), value.label)
        stored = (1,) * (value.rank - len(value.stored)) + value.stored
        # Expand keeps a dimension where 1 is asked for.
        asked = [1 if str(a) == str(b) else b for a, b in zip(stored, value.shape, strict=True)]
        return self.node("Expand", self.stored(value), self.dims(asked))

    def node(self, kind: str, *inputs: Input, outputs: int = 1, here: bool = False, **attributes: Any) -> str:
        """Add a node with one output, and return the output's name; see ``nodes_out``."""
        return self.multi(kind, *inputs, outputs=outputs, here=here, **attributes)[0]

    def multi(
        self, kind: str, *inputs: Input, outputs: int = 1, here: bool = False, **attributes: Any
    ) -> tuple[str, ...]:
        """Add a node and return the names of its outputs.

        Args:
          kind: ONNX operator.
          *inputs: values in their full shape, names, arrays (constants), or None for an input left out.
          outputs: how many.
          here: neither moved out of this graph nor merged with an equal node.
          **attributes: of the operator.
        """
        names = tuple(self._input(value) for value in inputs)
        home = self if here else self._home(names)
        key = kind, names, outputs, repr(sorted(attributes.items()))
        graph: Graph | None = None if here else home
        while graph is not None:
            if key in graph.known:
                return graph.known[key]
            graph = graph.parent
        out = tuple(self.fresh(kind) for _ in range(outputs))
        label = f"{self.root.layer}/{out[0]}" if self.root.layer else out[0]
        home.nodes.append(helper.make_node(kind, names, out, name=label, **attributes))
        self.root.depths.update(dict.fromkeys(out, home.depth))
        if not here:
            home.known[key] = out
        return out

    def _input(self, value: Input) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        return self.full(value) if isinstance(value, Value) else self.const(value)

    def _home(self, names: Sequence[str]) -> Graph:
        """Return the outermost graph in which all inputs exist, not outside a branch."""
        deepest = max((self.root.depths[name] for name in names if name), default=0)
        graph = self
        while graph.depth > deepest and not graph.is_branch and graph.parent is not None:
            graph = graph.parent
        return graph

    def dims(self, shape: Sequence[Dim]) -> Input:
        """Return a shape as int64 vector: a constant, or computed from the batch size."""
        if is_static(shape):
            return np.array(shape, np.int64)
        parts: list[Input] = []
        for dim in shape:
            if is_fixed(dim) and parts and isinstance(parts[-1], np.ndarray):
                parts[-1] = np.append(parts[-1], np.int64(dim))
            else:
                parts.append(np.array([dim], np.int64) if is_fixed(dim) else self.size(dim))
        return parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=0)

    def size(self, dim: Dim) -> str:
        """Return a dimension as int64 vector of one element, computed from the batch size."""
        factor, offset = affine(dim)
        if not self.root.batch_source:
            raise UnsupportedError("the batch size is needed, and the model has no inputs")
        shape = self.node("Shape", self.root.batch_source)
        size = self.node("Slice", shape, np.array([0]), np.array([1]), np.array([0]))
        if factor != 1:
            size = self.node("Mul", size, np.array([factor], np.int64))
        return self.node("Add", size, np.array([offset], np.int64)) if offset else size


def value_info(name: str, shape: Shape, dtype: Any) -> onnx.ValueInfoProto:
    """Return ONNX's declaration of a tensor, with symbolic dimensions by name."""
    dims = [int(dim) if is_fixed(dim) else str(dim) for dim in shape]
    return helper.make_tensor_value_info(name, element_type(dtype), dims)


def tensors(initializers: dict[str, np.ndarray]) -> list[onnx.TensorProto]:
    """Return initializers as ONNX's messages."""
    return [numpy_helper.from_array(np.asarray(data, order="C"), name) for name, data in initializers.items()]
