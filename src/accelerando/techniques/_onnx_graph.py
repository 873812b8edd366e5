"""An ONNX file made ready for ONNX Runtime's quantizers, and the layers in it that are worth quantizing."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.techniques._parity import first_lines
from accelerando.techniques._quiet import quiet
from accelerando.workload import Form, Model

HEAVY = ("Conv", "Gemm", "MatMul")  # nearly all of a model's arithmetic, and those with int8 kernels on CPUs
QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulNBits", "MatMulInteger")
MOST_BYTES = 2**31 - 1  # a protobuf's, and ONNX Runtime's quantizers take no larger one


def refuse_onnx(model: Model, kinds: tuple[str, ...], name: str) -> RefusalError | None:
    """Why an ONNX model has nothing for a quantizer of these operators; None in any other form.

    Reads the graph without its weights.
    """
    if model.form is not Form.ONNX:
        return None
    import onnx

    found = Counter(node.op_type for node in onnx.load(model.content, load_external_data=False).graph.node)
    if done := [kind for kind in QUANTIZED if found[kind]]:
        return RefusalError(Reason.NOTHING_TO_DO, f"it is quantized already ({found[done[0]]} x {done[0]})")
    if not any(found[kind] for kind in kinds):
        return RefusalError(Reason.NOTHING_TO_DO, f"{name} is for {', '.join(kinds)}, and the graph has none")
    return None


def prepared(path: Path) -> Any:
    """The model with its batch norms folded, its nodes named and the types of its tensors inferred.

    ONNX Runtime's own preprocessing (`quant_pre_process`: its basic, exact rewrites, then ONNX's shape inference).
    Its symbolic shape inference is left out: it takes seconds and brings shapes, while quantizing needs only
    types.  What an exporter wrote about shapes is dropped first: where it disagrees with what is inferred after
    the rewrites, inference fails.

    Raises:
        RefusalError: the model is too large, or inference fails.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = onnx.load(path)
    if model.ByteSize() > MOST_BYTES:
        raise RefusalError(
            Reason.UNSUPPORTED, f"the model has {model.ByteSize():,} bytes; the quantizer takes 2 GiB at most"
        )
    del model.graph.value_info[:]
    with tempfile.TemporaryDirectory(prefix="accelerando-") as folder:
        before, after = Path(folder, "before.onnx"), Path(folder, "after.onnx")
        onnx.save(model, before)
        try:
            with quiet():
                quant_pre_process(str(before), str(after), skip_symbolic_shape=True)
            ready = onnx.load(after)
        except Exception as error:
            raise RefusalError(Reason.UNSUPPORTED, f"shape inference fails: {first_lines(error)}") from error
    _own_weights(ready.graph)
    _name_nodes(ready.graph)
    return ready


def layers_of(model: Any, kinds: tuple[str, ...] = HEAVY, constant: bool = False) -> list[str]:
    """Names of the float32 nodes of these kinds, in the graph's order.

    Args:
        constant: only those whose second input is a weight.
    """
    import onnx

    float_ = onnx.TensorProto.FLOAT
    weights = {w.name for w in model.graph.initializer if w.data_type == float_}
    ports = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    activations = {v.name for v in ports if v.type.tensor_type.elem_type == float_}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in kinds
        and (node.input[1] in weights or (not constant and node.input[1] in activations))
        and node.output[0] in activations
    ]


def save(model: Any, folder: Path) -> Path:
    """Write a model into a folder, in one file."""
    import onnx

    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def counted(total: int, kept: list[str], name: str, detail: str) -> str:
    """The log line of a quantizer: how many layers it changed, and which it left."""
    line = f"{name}: {total - len(kept)} of {total} layers in int8 ({detail})"
    return f"{line}; kept in float, the most sensitive first: {', '.join(kept)}" if kept else line


def not_native(machine: Machine, name: str) -> tuple[str, ...]:
    """A line of log where int8 dot products are emulated: it may still win by its smaller memory traffic."""
    return () if machine.int8 else (f"{name}: {machine.cpu} has no int8 dot products; int8 is emulated here",)


def _own_weights(graph: Any) -> None:
    """Give each heavy layer a weight of its own: the quantizers change a shared one twice."""
    weights, seen = {w.name: w for w in graph.initializer}, set[str]()
    for node in graph.node:
        for slot, name in enumerate(node.input):
            if slot == 0 or node.op_type not in HEAVY or name not in weights:
                continue
            if name in seen:
                copy = graph.initializer.add()
                copy.CopyFrom(weights[name])
                copy.name = f"{name}_{len(seen)}"
                while copy.name in weights or copy.name in seen:
                    copy.name += "_"
                node.input[slot] = name = copy.name
            seen.add(name)


def _name_nodes(graph: Any) -> None:
    """Unique names for all nodes, for layers are chosen by name."""
    taken: set[str] = set()
    for number, node in enumerate(graph.node):
        name = node.name or f"{node.op_type}_{number}"
        while name in taken:
            name += "_"
        node.name = name
        taken.add(name)
