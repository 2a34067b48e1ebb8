"""Make the graph shorter: transposes cancel, BatchNorm and bias become part of the convolution."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from jaxtrain.artifact.onnx.graph import Graph

AFFINE = frozenset({"Add", "Div", "Mul", "Sub"})
ELEMENTWISE = AFFINE | frozenset(
    {"Abs", "And", "Cast", "Ceil", "Clip", "Cos", "Equal", "Erf", "Exp", "Floor", "Greater", "GreaterOrEqual"}
    | {"Less", "LessOrEqual", "Log", "Max", "Min", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Round"}
    | {"Sigmoid", "Sign", "Sin", "Sqrt", "Tanh", "Where"}
)
REDUCTIONS = frozenset({"ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum"})


def simplify(g: Graph, outputs: Sequence[str]) -> None:
    """Rewrite the nodes of the main graph; bodies of loops and branches stay as they are."""
    _move_transposes(g)
    _remove_unused(g, outputs)
    _fold_into_convolutions(g, outputs)
    _remove_unused(g, outputs)


@dataclasses.dataclass(frozen=True)
class _Transposed:
    source: str
    permutation: tuple[int, ...]


def _move_transposes(g: Graph) -> None:
    """Move transposes behind elementwise operators, where they meet their inverses.

    The model computes in ``[batch, h, w, channel]``; afterwards ``Conv``, ``Relu``, ``MaxPool`` follow each
    other in ``[batch, channel, h, w]``.
    """
    nodes, g.nodes = g.nodes, []
    known: dict[str, _Transposed] = {}
    for node in nodes:
        moved = _moved(g, node, known)
        if moved is None:
            g.nodes.append(node)
        else:
            g.nodes.extend(moved)
        last = g.nodes[-1]
        if last.op_type == "Transpose":
            known[last.output[0]] = _Transposed(last.input[0], tuple(last.attribute[0].ints))


def _moved(g: Graph, node: onnx.NodeProto, known: dict[str, _Transposed]) -> list[onnx.NodeProto] | None:
    """Return the nodes in place of one that reads a transpose; None if it stays."""
    first = next((known[name] for name in node.input if name in known), None)
    if first is None or len(node.output) != 1:
        return None
    out, permutation = node.output[0], first.permutation
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Transpose":
        composed = [permutation[axis] for axis in attributes["perm"]]
        kind, kept = ("Identity", {}) if composed == sorted(composed) else ("Transpose", {"perm": composed})
        return [helper.make_node(kind, [first.source], [out], name=node.name, **kept)]
    if node.op_type in REDUCTIONS:
        return _reduction(g, node, first, attributes)
    if node.op_type == "Concat":
        attributes["axis"] = permutation[attributes["axis"]]
    inputs = [_before(g, name, known, permutation) for name in node.input]
    if node.op_type not in ELEMENTWISE | {"Concat"} or None in inputs:
        return None
    inner = g.fresh(node.op_type)
    return [
        helper.make_node(node.op_type, inputs, [inner], name=node.name, **attributes),
        helper.make_node("Transpose", [inner], [out], name=f"{node.name}_transpose", perm=list(permutation)),
    ]


def _before(g: Graph, name: str, known: dict[str, _Transposed], permutation: tuple[int, ...]) -> str | None:
    """Return what an input is before the transpose; None if nothing is known of it."""
    if name in known:
        return known[name].source if known[name].permutation == permutation else None
    if not name:
        return name
    data = g.initializers.get(name)
    if data is None or data.ndim > len(permutation):
        return None
    if data.size == 1:
        return name if data.ndim == 0 else g.const(data.reshape(()))
    data = data.reshape((1,) * (len(permutation) - data.ndim) + data.shape)
    return g.const(np.transpose(data, np.argsort(permutation)), name)


def _reduction(
    g: Graph, node: onnx.NodeProto, first: _Transposed, attributes: dict[str, Any]
) -> list[onnx.NodeProto] | None:
    """Reduce the axes before the transpose, if those that remain are in order."""
    axes = attributes.get("axes")
    if axes is None:
        axes = g.initializers[node.input[1]].tolist()
    rest = [p for k, p in enumerate(first.permutation) if k not in axes]
    if rest != sorted(rest) or attributes["keepdims"]:
        return None
    axes = sorted(first.permutation[axis] for axis in axes)
    inputs = [first.source]
    if "axes" in attributes:
        attributes["axes"] = axes
    else:
        inputs.append(g.const(np.array(axes, np.int64)))
    return [helper.make_node(node.op_type, inputs, list(node.output), name=node.name, **attributes)]


def _fold_into_convolutions(g: Graph, outputs: Sequence[str]) -> None:
    """Multiply kernels by the factors per channel that follow a convolution, and add the terms to its bias.

    ``MaxPool`` in between is no obstacle for a term, or for positive factors. Convolutions that share a
    kernel share the new one too: equal arrays are stored once.
    """
    uses = Counter([*_reads(g.nodes), *outputs])
    readers = {name: node for node in g.nodes for name in node.input}
    folded: set[str] = set()
    for conv in g.nodes:
        kernel = g.initializers.get(conv.input[1]) if conv.op_type == "Conv" else None
        if kernel is None or kernel.dtype != np.float32:
            continue
        scale, shift = np.ones(len(kernel)), np.zeros(len(kernel))
        if len(conv.input) > 2:
            shift = g.initializers[conv.input[2]].astype(np.float64)
        last, pooled, term = conv, False, ""
        while uses[last.output[0]] == 1 and last.output[0] in readers:
            node = readers[last.output[0]]
            if node.op_type == "MaxPool":
                last, pooled = node, True
                continue
            step = _per_channel(g, node, last.output[0], kernel)
            if step is None or (pooled and (step[0] <= 0).any()):
                break
            scale, shift, term = scale * step[0], shift * step[0] + step[1], step[2]
            folded.add(node.output[0])
            last.output[0] = node.output[0]  # its readers read the convolution, or the pool
        if term:
            if (scale != 1).any():
                product = kernel * scale.reshape(-1, *[1] * (kernel.ndim - 1))
                conv.input[1] = g.const(product.astype(np.float32), f"{conv.input[1]}/folded")
            del conv.input[2:]
            conv.input.append(g.const(shift.astype(np.float32), f"{term}/folded"))
    g.nodes = [node for node in g.nodes if node.op_type not in AFFINE or node.output[0] not in folded]


def _per_channel(
    g: Graph, node: onnx.NodeProto, source: str, kernel: np.ndarray
) -> tuple[np.ndarray, np.ndarray, str] | None:
    """Return factor and term per channel, and the constant's name, of ``source * factor + term``."""
    if node.op_type not in AFFINE or len(node.input) != 2:
        return None
    first = node.input[0] == source
    name = node.input[1] if first else node.input[0]
    data = g.initializers.get(name)
    if data is None or data.dtype != np.float32 or (not first and node.op_type in ("Div", "Sub")):
        return None
    full = (1,) * (kernel.ndim - data.ndim) + data.shape
    if len(full) != kernel.ndim or not np.isfinite(data).all():
        return None
    if data.size != 1 and full != (1, len(kernel), *[1] * (kernel.ndim - 2)):
        return None
    values = np.broadcast_to(data.reshape(-1).astype(np.float64), len(kernel))
    one, zero = np.ones(len(kernel)), np.zeros(len(kernel))
    if node.op_type == "Div" and not values.all():
        return None
    return {
        "Add": lambda: (one, values, name),
        "Sub": lambda: (one, -values, name),
        "Mul": lambda: (values, zero, name),
        "Div": lambda: (1 / values, zero, name),
    }[node.op_type]()


def _reads(nodes: Sequence[onnx.NodeProto]) -> Iterator[str]:
    """Yield every tensor that is read, in bodies and branches too."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _reads(attribute.g.node)
                yield from (output.name for output in attribute.g.output)


def _remove_unused(g: Graph, outputs: Sequence[str]) -> None:
    """Remove nodes and initializers that no output depends on, and read behind ``Identity``."""
    aliases = {node.output[0]: node.input[0] for node in g.nodes if node.op_type == "Identity"}
    needed, kept = set(outputs), []
    for node in g.nodes:
        for k, name in enumerate(node.input):
            source = name
            while source in aliases and node.op_type != "Identity":
                source = aliases[source]
            node.input[k] = source
    for node in reversed(g.nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(_reads([node]))
    g.nodes = kept[::-1]
    g.initializers = {name: data for name, data in g.initializers.items() if name in needed}
