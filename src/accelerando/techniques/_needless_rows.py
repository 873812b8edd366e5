"""Rows that are thrown away later, thrown away before the work on them.

A classifier that reads only the first token computes the last block's feed-forward part for all of them.  Picking
rows along an axis commutes with every operator that treats these rows alike and apart:

    Gather(f(x), rows) = f(Gather(x, rows))

with f elementwise, a normalisation over other axes, or a product with a constant matrix.  The pick moves towards
the inputs as long as every operator that it passes has no other reader than what is picked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from accelerando.techniques._linear_maps import constant

UNARY = frozenset(["Abs", "Cast", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Mish"])
UNARY |= {"Neg", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Sqrt", "Swish", "Tanh"}
BINARY = frozenset(["Add", "Div", "Mul", "Pow", "Sub"])
LAST_AXIS = frozenset(["LayerNormalization", "RMSNormalization", "Softmax"])


@dataclass(frozen=True)
class _Pick:
    """One row of one axis of values of this rank; axis 0 and the last are never picked from."""

    index: int
    axis: int
    rank: int

    @property
    def behind(self) -> int:
        """The axis counted from the end, which broadcasting does not shift."""
        return self.axis - self.rank

    def slots(self, node: Any) -> list[int]:
        """Which inputs hold rows of this axis."""
        if node.op_type not in BINARY:
            return [0]
        return [i for i, v in enumerate(node.inputs) if len(v.shape) >= -self.behind and v.shape[self.behind] != 1]

    def commutes(self, node: Any) -> bool:
        """Whether the operator treats the rows of this axis alike and apart."""
        out = node.outputs[0]
        if node.domain != "" or len(node.outputs) != 1 or out.shape is None or len(out.shape) != self.rank:
            return False
        if node.op_type in BINARY:
            return all(self._alike(v.shape, out.shape) for v in node.inputs)
        if node.op_type in LAST_AXIS:
            over = node.attributes["axis"].value if "axis" in node.attributes else -1
            return over in (-1, self.rank - 1)
        if node.op_type == "MatMul":
            matrix = node.inputs[1]
            return matrix.const_value is not None and len(matrix.const_value.shape) == 2
        return node.op_type in UNARY

    def _alike(self, shape: Any, out: Any) -> bool:
        """Whether picking from an operand gives its row: it has all rows of the output, or one for all of them."""
        if shape is None:
            return False
        if len(shape) < -self.behind or self.index in (0, -1):
            return True  # the first or last row of an axis of length 1 is that row
        own = shape[self.behind]
        return own == 1 or (isinstance(own, int) and own == out[self.behind])


def drop_needless_rows(graph: Any) -> list[str]:
    """Move picks of one row towards the inputs, in place; says where."""
    said = []
    for node in list(graph):
        pick = _pick_of(node)
        region = _region(graph, node.inputs[0], pick) if pick else []
        if pick and any(n.op_type == "MatMul" for n in region):
            _move(graph, node, region, pick)
            said.append(f"{len(region)} operators before {node.outputs[0].name} work on the one row that is read")
    return said


def _pick_of(node: Any) -> _Pick | None:
    """What a Gather picks, where it is one row of an inner axis."""
    if node.op_type != "Gather" or node.domain != "" or node.inputs[0].shape is None:
        return None
    index, rank = node.inputs[1].const_value, len(node.inputs[0].shape)
    axis = node.attributes["axis"].value % rank if "axis" in node.attributes else 0
    if index is None or node.inputs[1].is_graph_input() or index.numpy().ndim != 0 or not 0 < axis < rank - 1:
        return None
    return _Pick(int(index.numpy()), axis, rank)


def _region(graph: Any, source: Any, pick: _Pick) -> list[Any]:
    """The operators back from the picked value whose every reader is inside; in the graph's order."""
    inside: set[Any] = set()
    frontier, grown = [source], True
    while grown:
        grown, waiting = False, []
        for value in frontier:
            node = value.producer()
            if node is None or node in inside:
                continue
            readers = {user for user, _ in value.uses()}
            alone = readers <= inside or (value is source and len(readers) == 1)
            if alone and not value.is_graph_output() and pick.commutes(node):
                inside.add(node)
                waiting += [node.inputs[slot] for slot in pick.slots(node)]
                grown = True
            else:
                waiting.append(value)
        frontier = waiting
    return [n for n in graph if n in inside]


def _move(graph: Any, gather: Any, region: list[Any], pick: _Pick) -> None:
    """Pick where rows enter the region, with the axis kept, and drop the axis where the pick was."""
    import onnx_ir as ir

    out, source, inside = gather.outputs[0], gather.inputs[0], set(region)
    row = constant(graph, f"{out.name}_row", np.array([pick.index], np.int64))
    picked: dict[Any, Any] = {}
    for node in region:
        for slot in pick.slots(node):
            value = node.inputs[slot]
            if value.producer() in inside:
                continue
            if value not in picked:
                early = ir.node("Gather", [value, row], {"axis": pick.axis - pick.rank + len(value.shape)})
                early.outputs[0].type, early.outputs[0].shape = value.type, _one_row(value.shape, pick)
                graph.insert_before(node, early)
                picked[value] = early.outputs[0]
            node.replace_input_with(slot, picked[value])
        node.outputs[0].shape = _one_row(node.outputs[0].shape, pick)
    squeeze = ir.node("Squeeze", [source, constant(graph, f"{out.name}_axis", np.array([pick.axis], np.int64))])
    squeeze.outputs[0].type, squeeze.outputs[0].shape, squeeze.outputs[0].name = out.type, out.shape, out.name
    ir.convenience.replace_nodes_and_values(graph, gather, [gather], [squeeze], [out], [squeeze.outputs[0]])


def _one_row(shape: Any, pick: _Pick) -> Any:
    """The shape with one row along the axis."""
    import onnx_ir as ir

    return ir.Shape([1 if i == len(shape) + pick.behind else d for i, d in enumerate(shape)])
