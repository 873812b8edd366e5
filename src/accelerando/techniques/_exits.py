"""Where an ONNX graph can be cut in two, and the two parts.

A cut is a single tensor that all work on the inputs passes through: everything after it needs what was before it by
this tensor alone.  Light work that depends on no layer, such as the expansion of a mask, may be needed on both
sides, and is then done on both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from accelerando.errors import Reason, RefusalError
from accelerando.signature import Array, Port, Signature
from accelerando.techniques._onnx_graph import HEAVY
from accelerando.techniques._parity import batch, first_lines
from accelerando.workload import Samples

LAYERS = frozenset({
    *HEAVY, "Attention", "ConvInteger", "ConvTranspose", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "Einsum",
    "FusedConv", "FusedMatMul", "GRU", "LSTM", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits",
    "MultiHeadAttention", "QLinearConv", "QLinearMatMul", "RNN",
})  # fmt: skip
ROWS = (2, 3)  # to look at tensors with: an axis that goes with them is the batch's
FAR = 0.25  # of the layers: a cut that is this far from where it was wanted is no exit half way
MOST_FEATURES = 8192
RANKS = range(2, 6)

Run = Callable[[Sequence[Array]], list[Array]]


class Cut(NamedTuple):
    """A tensor that all work passes through, and the share of the layers that lies behind it."""

    tensor: str
    behind: float


def cuts_of(graph: Any) -> list[Cut]:
    """All cuts with layers on both sides, in the graph's order.

    A tensor is one if, when it is there, nothing else that a layer has touched is still needed: found in one pass,
    for whatever does not lead to a cut comes after it.

    Raises:
        RefusalError: the graph branches at run time, so that what is needed is not known.
    """
    branching = sorted({n.op_type for n in graph.node for a in n.attribute if a.HasField("g") or a.graphs})
    if branching:
        raise RefusalError(Reason.UNSUPPORTED, f"its graph branches or loops at run time ({', '.join(branching)})")
    last = {name: i for i, node in enumerate(graph.node) for name in node.input}
    last |= {port.name: len(graph.node) for port in graph.output}
    total = sum(node.op_type in LAYERS for node in graph.node)
    touched, needed, done, found = set[str](), set[str](), 0, dict[str, Cut]()
    for i, node in enumerate(graph.node):
        done += node.op_type in LAYERS
        if node.op_type in LAYERS or touched.intersection(node.input):
            given = set(filter(None, node.output))  # one that is left out has no name
            touched |= given
            needed |= given
        needed = {name for name in needed if last.get(name, -1) > i}
        if len(needed) == 1 and 0 < done < total:
            (tensor,) = needed
            found.setdefault(tensor, Cut(tensor, 1 - done / total))
    return list(found.values())


def choose(
    model: Any, cuts: Sequence[Cut], share: float, signature: Signature, data: Samples, name: str
) -> tuple[Cut, Port]:
    """The cut that leaves about a share of the layers behind it, and its tensor as a port of this name.

    Of several with the same layers behind them it is the last, which has most of the work before it.

    Raises:
        RefusalError: none is near, or is a float32 tensor whose first axis is the batch.
    """
    cuts = [cut for cut in cuts if abs(cut.behind - share) <= FAR]
    if not cuts:
        raise RefusalError(
            Reason.NOTHING_TO_DO,
            f"it is no chain of blocks: no single tensor has all work before it, and about {share:.0%} of the layers "
            "behind it",
        )
    run = session(model, [cut.tensor for cut in cuts], signature)
    seen = [
        run(batch(signature, chunk.inputs, rows))
        for rows, chunk in zip(ROWS, (data.chunks[0], data.chunks[-1]), strict=True)
    ]
    sizes = [signature.fixed_batch or rows for rows in ROWS]
    ports = {cut: _port(name, arrays, sizes) for cut, *arrays in zip(cuts, *seen, strict=True)}
    fit = [cut for cut in reversed(cuts) if (port := ports[cut]) is not None and pools(port.shape)]
    if not fit:
        raise RefusalError(
            Reason.UNSUPPORTED,
            f"where it can be cut, at {', '.join(cut.tensor for cut in cuts[:5])}, the state is no float32 tensor "
            f"(batch, ...) of at most {MOST_FEATURES} features",
        )
    cut = min(fit, key=lambda cut: abs(cut.behind - share))
    port = ports[cut]
    assert port is not None
    return cut, port


def _port(name: str, arrays: Sequence[Array], sizes: Sequence[int]) -> Port | None:
    """The port of a tensor from two looks at it; None where it is no float32 whose first axis is the batch."""
    if any(x.dtype != np.float32 or x.ndim not in RANKS for x in arrays) or arrays[0].ndim != arrays[1].ndim:
        return None
    if [len(x) for x in arrays] != list(sizes):
        return None
    pairs = list(zip(*(x.shape for x in arrays), strict=True))[1:]
    axes = [a if a == b else f"{name}_{i}" for i, (a, b) in enumerate(pairs, 1)]
    return Port(name, "float32", (sizes[0] if sizes[0] == sizes[1] else "batch", *axes))


class Pool(NamedTuple):
    """How a tensor (n, ...) becomes features (n, d): the mean over all axes but the batch's and one; tokens also
    give their first, which may be the one that all others were gathered in."""

    axis: int
    first: bool

    def __call__(self, x: Array) -> Array:
        others = tuple(i for i in range(1, x.ndim) if i != self.axis)
        mean = x.mean(axis=others) if others else x
        return np.concatenate([x[:, 0], mean], axis=1) if self.first else mean


def pools(shape: Sequence[int | str]) -> list[Pool]:
    """The ways in which a tensor can be pooled: channels first, and channels last."""
    rank = len(shape)
    found = [Pool(axis, rank == 3 and axis == 2) for axis in dict.fromkeys((1, rank - 1))]
    sizes = {pool: shape[pool.axis] for pool in found}
    return [p for p, size in sizes.items() if isinstance(size, int) and size * (1 + p.first) <= MOST_FEATURES]


def session(model: Any, tensors: Sequence[str], signature: Signature) -> Run:
    """Runs a graph up to some of its tensors: flat inputs to their arrays.

    Raises:
        RefusalError: ONNX Runtime does not take it; also from a run.
    """
    import onnx
    import onnxruntime

    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    known = {port.name for port in copied.graph.output}
    copied.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in known)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    names = [port.name for port in signature.inputs]
    try:
        made = onnxruntime.InferenceSession(copied.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RefusalError(Reason.UNSUPPORTED, f"ONNX Runtime does not take it: {first_lines(error)}") from error
    taken = {node.name for node in made.get_inputs()}

    def run(leaves: Sequence[Array]) -> list[Array]:
        feed = {name: x for name, x in zip(names, leaves, strict=True) if name in taken}
        try:
            return list(made.run(list(tensors), feed))
        except Exception as error:
            raise RefusalError(Reason.UNSUPPORTED, f"ONNX Runtime stops: {first_lines(error)}") from error

    return run


def front_of(model: Any, cut: Cut, state: Port) -> Any:
    """What is before the cut: the model's inputs to the tensor, under the state's name."""
    inputs = [port.name for port in model.graph.input]
    return _renamed(_part(model, inputs, [cut.tensor], cut.tensor, state), cut.tensor, state.name)


def rest_of(model: Any, cut: Cut, state: Port) -> Any:
    """What is behind the cut: the state, and those of the model's inputs that it needs too, to the model's outputs.

    A state that was quantized is quantized again, to the same whole numbers, for kernels of int8 begin with that.
    """
    inputs, tensor = [port.name for port in model.graph.input], _before_quantizing(model.graph, cut.tensor)
    made = _part(model, [*inputs, tensor], [port.name for port in model.graph.output], tensor, state)
    used = {name for node in made.graph.node for name in node.input}
    kept = [port for port in made.graph.input if port.name in used]
    del made.graph.input[:]
    made.graph.input.extend(kept)
    return _renamed(made, tensor, state.name)


def _before_quantizing(graph: Any, tensor: str) -> str:
    """What a tensor was before it was quantized and dequantized; itself where it was not."""
    makers = {name: node for node in graph.node for name in node.output}
    back = makers[tensor]
    there = makers.get(back.input[0]) if back.op_type == "DequantizeLinear" else None
    return str(there.input[0]) if there is not None and there.op_type == "QuantizeLinear" else tensor


def _part(model: Any, inputs: list[str], outputs: list[str], tensor: str, state: Port) -> Any:
    """The nodes between some tensors, by ONNX's own extractor.

    Raises:
        RefusalError: it does not take the graph.
    """
    from onnx import ModelProto
    from onnx.helper import make_tensor_value_info, np_dtype_to_tensor_dtype
    from onnx.utils import Extractor

    copied = ModelProto()
    copied.CopyFrom(model)
    del copied.graph.value_info[:]
    kind = np_dtype_to_tensor_dtype(np.dtype(state.dtype))
    copied.graph.value_info.append(make_tensor_value_info(tensor, kind, state.shape))
    try:
        part = Extractor(copied).extract_model(inputs, outputs)
    except (ValueError, AssertionError) as error:
        raise RefusalError(Reason.UNSUPPORTED, f"it can't be cut: {first_lines(error)}") from error
    del part.graph.value_info[:]
    return part


def _renamed(model: Any, old: str, new: str) -> Any:
    for node in model.graph.node:
        for names in (node.input, node.output):
            for slot, name in enumerate(names):
                if name == old:
                    names[slot] = new
    for port in (*model.graph.input, *model.graph.output):
        if port.name == old:
            port.name = new
    return model
