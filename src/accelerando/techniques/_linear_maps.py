"""Consecutive linear maps of an ONNX graph, merged into one where that costs less.

    (x W1 + b1) W2 + b2  =  x (W1 W2) + (b1 W2 + b2)

Dense: `Gemm`, `MatMul` by a constant, and `Add` of a constant behind it.  Convolution: a pointwise one behind any
other, or before one without padding.  Products are taken in float64 and rounded once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from accelerando.interval import Floats

FLOATS = ("float32", "float64")


@dataclass(frozen=True)
class LinearMap:
    """y = map(x).  `weight` is (out, in, *kernel) in float64, `bias` (out,); `nodes` are those that compute y."""

    x: Any
    weight: Floats
    bias: Floats | None
    nodes: tuple[Any, ...]

    @property
    def head(self) -> Any:
        """The node that holds the weight."""
        return self.nodes[0]

    @property
    def y(self) -> Any:
        return self.nodes[-1].outputs[0]


def merge_linear_maps(graph: Any) -> list[str]:
    """Merge in place until nothing is left to merge; says what was merged."""
    said: list[str] = []
    merged = True
    while merged:
        merged = False
        for node in list(graph):
            for read, merge in ((_dense, _merge_dense), (_convolution, _merge_convolution)):
                if node.graph is graph and (note := _merge(graph, node, read, merge)):
                    said.append(note)
                    merged = True
    return said


def _merge(
    graph: Any,
    node: Any,
    read: Callable[[Any], LinearMap | None],
    merge: Callable[[LinearMap, LinearMap], tuple[Floats, Floats | None, Any] | None],
) -> str | None:
    """Merge the map that begins at this node with the one before it, if both are and it pays."""
    import onnx_ir as ir

    second = read(node)
    before = second.x.producer() if second else None
    first = read(before) if before is not None else None
    if first is None and before is not None and before.op_type == "Add":
        first = _with_bias(before, read)
    if first is None or second is None or not _only_feeds(first, second) or (new := merge(first, second)) is None:
        return None
    weight, bias, emit = new
    if weight.size >= first.weight.size + second.weight.size:
        return None
    dtype = second.head.inputs[1].dtype.numpy()
    name = second.y.name
    constants = [constant(graph, f"{name}_merged_weight", emit.layout(weight).astype(dtype))]
    if bias is not None:
        constants.append(constant(graph, f"{name}_merged_bias", bias.astype(dtype)))
    nodes = emit.nodes(first.x, constants)
    nodes[-1].outputs[0].name, nodes[-1].outputs[0].dtype = name, second.y.dtype
    nodes[-1].outputs[0].shape = second.y.shape
    ir.convenience.replace_nodes_and_values(
        graph, second.nodes[-1], [*first.nodes, *second.nodes], nodes, [second.y], [nodes[-1].outputs[0]]
    )
    middle = first.weight.shape[0]
    return f"{first.head.op_type} and {second.head.op_type} through {middle} features became one ({name})"


@dataclass(frozen=True)
class _Emit:
    """How a merged map is written: its operator, its attributes, and the weight's layout."""

    kind: str
    attributes: dict[str, Any]
    layout: Callable[[Floats], Floats]

    def nodes(self, x: Any, constants: list[Any]) -> list[Any]:
        import onnx_ir as ir

        if self.kind != "MatMul":
            return [ir.node(self.kind, [x, *constants], self.attributes)]
        product = ir.node("MatMul", [x, constants[0]])
        return [product, *(ir.node("Add", [product.outputs[0], bias]) for bias in constants[1:])]


# --- dense ------------------------------------------------------------------------------------------------------


def _dense(node: Any) -> LinearMap | None:
    """A Gemm or a MatMul by a constant."""
    weight = _value(node.inputs[1]) if node.op_type in ("Gemm", "MatMul") and node.domain == "" else None
    if weight is None or weight.ndim != 2:
        return None
    if node.op_type == "MatMul":
        return LinearMap(node.inputs[0], weight.T, None, (node,))
    attribute = {k: a.value for k, a in node.attributes.items()}
    if attribute.get("transA", 0):
        return None
    weight = attribute.get("alpha", 1.0) * (weight if attribute.get("transB", 0) else weight.T)
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return LinearMap(node.inputs[0], weight, None, (node,))
    bias = _value(node.inputs[2])
    if bias is None or bias.size not in (1, len(weight)) or bias.shape[-1:] not in ((), (1,), (len(weight),)):
        return None
    bias = np.broadcast_to(attribute.get("beta", 1.0) * bias.reshape(-1), (len(weight),))
    return LinearMap(node.inputs[0], weight, bias, (node,))


def _with_bias(add: Any, read: Callable[[Any], LinearMap | None]) -> LinearMap | None:
    """A MatMul and the constant vector that is added to it."""
    for product, vector in (add.inputs, reversed(add.inputs)):
        bias, source = _value(vector), product.producer()
        if bias is None or source is None or source.op_type != "MatMul" or len(product.uses()) != 1:
            continue
        found = read(source)
        if found and not product.is_graph_output() and bias.ndim <= 1 and bias.size == len(found.weight):
            return LinearMap(found.x, found.weight, bias.reshape(-1), (source, add))
    return None


def _merge_dense(first: LinearMap, second: LinearMap) -> tuple[Floats, Floats | None, _Emit] | None:
    if second.weight.shape[1] != first.weight.shape[0]:
        return None
    flat = "Gemm" in (first.head.op_type, second.head.op_type)  # then x is a matrix
    emit = _Emit("Gemm", {"transB": 1}, lambda w: w) if flat else _Emit("MatMul", {}, lambda w: w.T)
    return second.weight @ first.weight, _bias(first, second, second.weight), emit


# --- convolution ------------------------------------------------------------------------------------------------


def _convolution(node: Any) -> LinearMap | None:
    """A Conv of one group with constant weights."""
    weight = _value(node.inputs[1]) if node.op_type == "Conv" and node.domain == "" else None
    if weight is None or _attribute(node, "group", 1) != 1:
        return None
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return LinearMap(node.inputs[0], weight, None, (node,))
    bias = _value(node.inputs[2])
    return None if bias is None else LinearMap(node.inputs[0], weight, bias, (node,))


def _merge_convolution(first: LinearMap, second: LinearMap) -> tuple[Floats, Floats | None, _Emit] | None:
    if _pointwise(second):
        mixing = second.weight.reshape(second.weight.shape[:2])
        weight, kept = np.einsum("om,mi...->oi...", mixing, first.weight), first.head
    elif _pointwise(first) and _unpadded(second.head):  # padding would see the bias of the first
        mixing = first.weight.reshape(first.weight.shape[:2])
        weight, kept = np.einsum("om...,mi->oi...", second.weight, mixing), second.head
    else:
        return None
    summed = second.weight.sum(axis=tuple(range(2, second.weight.ndim)))
    attributes = {k: a.value for k, a in kept.attributes.items()}
    return weight, _bias(first, second, summed), _Emit("Conv", attributes, lambda w: w)


def _pointwise(conv: LinearMap) -> bool:
    """Whether it is a matrix at every place: a kernel of 1, no stride, no padding."""
    ones = all(k == 1 for k in conv.weight.shape[2:]) and all(s == 1 for s in _attribute(conv.head, "strides", ()))
    return ones and _unpadded(conv.head)


def _unpadded(node: Any) -> bool:
    automatic = _attribute(node, "auto_pad", "NOTSET")
    return not any(_attribute(node, "pads", ())) and automatic in ("NOTSET", "VALID")


# --- graphs -----------------------------------------------------------------------------------------------------


def _bias(first: LinearMap, second: LinearMap, mixing: Floats) -> Floats | None:
    if first.bias is None:
        return second.bias
    moved = mixing @ first.bias
    return moved if second.bias is None else moved + second.bias


def _only_feeds(first: LinearMap, second: LinearMap) -> bool:
    """Whether nobody else reads what lies between."""
    return len(first.y.uses()) == 1 and not first.y.is_graph_output() and second.x is first.y


def _attribute(node: Any, name: str, default: Any) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _value(value: Any) -> Floats | None:
    """A constant's value in float64, or None where it is no floating-point constant."""
    tensor = value.const_value if value is not None and not value.is_graph_input() else None
    if tensor is None:
        return None
    array = tensor.numpy()
    return array.astype(np.float64) if str(array.dtype) in FLOATS else None


def constant(graph: Any, name: str, array: Any) -> Any:
    """A new constant of the graph, under this name or, where it is taken, the next."""
    import onnx_ir as ir

    if name in graph.initializers:
        name = next(new for i in itertools.count(2) if (new := f"{name}_{i}") not in graph.initializers)
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
