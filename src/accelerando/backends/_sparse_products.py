"""Products of an ONNX graph whose weight is mostly zeros, made sparse ones.

`x (..., k) @ w (k, n)` becomes `transpose(a @ transpose(x))`, where `a`, w transposed and compressed, is one more input
of the graph: ONNX Runtime has the operator (SparseToDenseMatMul), but takes no sparse matrix as an initializer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.signature import Array

DOMAIN = "com.microsoft"
FILES = ("values", "columns", "starts")


@dataclass(frozen=True)
class Compressed:
    """A matrix by its rows (CSR): the numbers that are not zero, their columns, and where each row starts."""

    shape: tuple[int, int]
    values: Array
    columns: Array
    starts: Array

    @classmethod
    def of(cls, matrix: Array) -> Compressed:
        rows, columns = np.nonzero(matrix)
        if not len(rows):  # ONNX Runtime takes no matrix without numbers
            rows = columns = np.zeros(1, np.int64)
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=matrix.shape[0]))])
        shape = matrix.shape[0], matrix.shape[1]
        return cls(shape, matrix[rows, columns], columns.astype(np.int32), starts.astype(np.int64))

    def save(self, folder: Path, name: str) -> None:
        for part in FILES:
            np.save(folder / f"{name}-{part}.npy", getattr(self, part), allow_pickle=False)

    @classmethod
    def open(cls, folder: Path, name: str, shape: tuple[int, int]) -> Compressed:
        """What `save` wrote.

        Raises:
            ValueError: the arrays are no such matrix; a runtime that believed them would read outside its memory.
        """
        values, columns, starts = (np.load(folder / f"{name}-{part}.npy", allow_pickle=False) for part in FILES)
        sound = (
            (values.dtype, columns.dtype, starts.dtype) == (np.float32, np.int32, np.int64)
            and values.shape == columns.shape == (len(values),)
            and starts.shape == (shape[0] + 1,)
            and starts[0] == 0
            and starts[-1] == len(values)
            and bool((np.diff(starts) >= 0).all())
            and bool(((columns >= 0) & (columns < shape[1])).all())
        )
        if not sound:
            raise ValueError(f"{name} is no compressed matrix of {shape[0]} x {shape[1]} numbers")
        return cls(shape, values, columns, starts)


@dataclass(frozen=True)
class Product:
    """A node that multiplies by a constant matrix from the right, (..., k) by (k, n)."""

    node: Any
    weight: str
    matrix: Array
    zeros: float

    def __str__(self) -> str:
        return f"{' x '.join(map(str, self.matrix.shape))} with {self.zeros:.1%} zeros"


def products(graph: Any) -> Iterator[Product]:
    """Every MatMul and plain Gemm by a constant float32 matrix, also by one that is transposed first."""
    import onnx

    found = {w.name: w for w in graph.initializer if w.data_type == onnx.TensorProto.FLOAT and len(w.dims) == 2}
    turned = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Transpose" and n.input[0] in found}
    for node in graph.node:
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        plain = not given.get("transA") and given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0
        if node.op_type not in ("MatMul", "Gemm") or node.domain or not plain:
            continue
        source = turned.get(node.input[1], node.input[1])
        if source in found:
            matrix = onnx.numpy_helper.to_array(found[source])
            flipped = bool(given.get("transB")) != (node.input[1] in turned)
            weight, zeros = f"{source}{' turned' * flipped}", 1 - np.count_nonzero(matrix) / matrix.size
            yield Product(node, weight, matrix.T if flipped else matrix, zeros)


def make_sparse(model: Any, chosen: Sequence[Product]) -> dict[str, Compressed]:
    """Put sparse products in the place of these, in the model itself; the matrices by the names of its new inputs."""
    import onnx

    graph, ranks, matrices = model.graph, _ranks(model), dict[str, Compressed]()
    nodes: list[Any] = []
    by_output, names = {p.node.output[0]: p for p in chosen}, dict[str, str]()
    for number, node in enumerate(graph.node):
        product = by_output.get(node.output[0]) if node.output else None
        if product is None:
            nodes.append(node)
            continue
        if product.weight not in names:
            name = names[product.weight] = f"accelerando_sparse_{len(names)}"
            matrices[name] = Compressed.of(np.ascontiguousarray(product.matrix.T))
            graph.input.append(
                onnx.helper.make_sparse_tensor_value_info(name, onnx.TensorProto.FLOAT, matrices[name].shape)
            )
            graph.initializer.extend(_shapes(name, product.matrix.shape))
        nodes += _nodes(
            node,
            names[product.weight],
            f"accelerando_{number}",
            flat=node.op_type == "Gemm" or ranks.get(node.input[0]) == 2,
        )
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph)
    if all(o.domain != DOMAIN for o in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return matrices


def _nodes(node: Any, matrix: str, name: str, flat: bool) -> list[Any]:
    """The nodes that compute what `node` did, from a sparse matrix.

    Args:
        name: with which the names of new values start.
        flat: the input has rank 2, so that it needs no reshaping.
    """
    from onnx.helper import make_node

    x, y, bias = node.input[0], node.output[0], [n for n in node.input[2:] if n]
    rows = x if flat else f"{name}_rows"
    made = [] if flat else [make_node("Reshape", [x, f"{matrix}_flat"], [rows])]
    made.append(make_node("SparseToDenseMatMul", [matrix, rows], [f"{name}_turned"], domain=DOMAIN, transB=1))
    last = y if flat and not bias else f"{name}_product"
    made.append(make_node("Transpose", [f"{name}_turned"], [last], perm=[1, 0]))
    if bias:  # a Gemm, whose input has rank 2
        made.append(make_node("Add", [last, bias[0]], [y]))
    elif not flat:
        made += [
            make_node("Shape", [x], [f"{name}_lead"], end=-1),
            make_node("Concat", [f"{name}_lead", f"{matrix}_wide"], [f"{name}_shape"], axis=0),
            make_node("Reshape", [last, f"{name}_shape"], [y]),
        ]
    return made


def _shapes(name: str, shape: tuple[int, ...]) -> list[Any]:
    from onnx.numpy_helper import from_array

    return [
        from_array(np.array([-1, shape[0]], np.int64), f"{name}_flat"),
        from_array(np.array([shape[1]], np.int64), f"{name}_wide"),
    ]


def _ranks(model: Any) -> dict[str, int]:
    """How many axes the graph's values have, where that can be told."""
    import onnx

    known = onnx.shape_inference.infer_shapes(model).graph
    ports = (*known.input, *known.value_info, *known.output)
    return {v.name: len(v.type.tensor_type.shape.dim) for v in ports if v.type.tensor_type.HasField("shape")}


def _drop_unused(graph: Any) -> None:
    """Drop the weights that nobody reads any more, and the transpositions of them."""
    for _ in range(2):
        read = {name for node in graph.node for name in node.input} | {v.name for v in graph.output}
        inner = {n for node in graph.node for a in node.attribute if a.HasField("g") for n in _reads(a.g)}
        nodes = [n for n in graph.node if n.op_type != "Transpose" or n.output[0] in read | inner]
        weights = [w for w in graph.initializer if w.name in read | inner]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(nodes)
        graph.initializer.extend(weights)


def _reads(graph: Any) -> set[str]:
    """Every name that an inner graph reads, its own and those around it."""
    names = {name for node in graph.node for name in node.input} | {v.name for v in graph.output}
    return names.union(*(_reads(a.g) for node in graph.node for a in node.attribute if a.HasField("g")))
