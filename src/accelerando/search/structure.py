"""How a model is built, whatever its weights, as a hash: what a refresh compares."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from accelerando.recipe import key_of
from accelerando.workload import Form, Model, Workload

VERSION = "2:"  # of what is hashed; what begins otherwise, by another version of this package, can't be compared
ROWS = 2
# Of torch's own layers: what matters in training alone, and may be another whenever a model is trained again.
OF_TRAINING = frozenset({"training", "p", "dropout", "momentum", "inplace"})
FEW = 64  # numbers in a tensor of an ONNX file that says how, such as a shape or axes, rather than being a weight


def structure_of(load: Workload) -> str:
    """A hash of the original's structure.

    Of a torch module: classes by name, tensors by shape and type, and settings such as dilation or heads.  Of an ONNX
    file: operators with their attributes and what they are applied to, and tensors by shape and type; no names.
    """
    model = load.model
    built = _of_module(model, load) if model.form is Form.TORCH else _of_file(model)
    return VERSION + key_of(built)


def differs(was: object, now: str) -> bool:
    """Whether two structures are known not to be the same."""
    return isinstance(was, str) and was.startswith(VERSION) and was != now


# --- torch ------------------------------------------------------------------------------------------------------


def _of_module(model: Model, load: Workload) -> dict[str, Any]:
    module = model.content
    tensors = {k: [str(t.dtype), *t.shape] for k, t in module.state_dict().items() if hasattr(t, "dtype")}
    modules = {name: type(m).__name__ for name, m in module.named_modules()}
    before, after = _settings(module), _settings(_called(model, load))
    kept = [[*key, value] for key, value in before.items() if after.get(key) == value]  # else it counts something
    return {"modules": modules, "tensors": tensors, "settings": kept}


def _settings(module: Any) -> dict[tuple[str, str], Any]:
    """The plain attributes of modules that say how they are built, by the module's name and their own.

    Of torch's own layers these are all but those of training.  Of other classes only whole numbers count, such as
    heads: flags, other numbers and texts may well be states of training, shares of dropout or paths.
    """
    return {
        (name, key): value
        for name, part in module.named_modules()
        for key, value in sorted(vars(part).items())
        if not key.startswith("_") and _tells(value, key, type(part).__module__.startswith("torch."))
    }


def _tells(value: Any, key: str, torchs_own: bool) -> bool:
    if isinstance(value, tuple):
        return all(_tells(x, key, torchs_own) for x in value)
    if torchs_own:
        return key not in OF_TRAINING and isinstance(value, (int, float, str))
    return isinstance(value, int) and not isinstance(value, bool)


def _called(model: Model, load: Workload) -> Any:
    """A copy of the module after a call in training mode: what it counts is another number now."""
    import torch

    module = copy.deepcopy(model.content).train()
    leaves = [torch.from_numpy(x[: load.fixed_batch or ROWS].copy()) for x in load.calibrate.chunks[0].inputs]
    args, kwargs = model.signature.call(leaves)
    with torch.random.fork_rng(devices=()), torch.no_grad(), suppress(Exception):
        module(*args, **kwargs)  # whatever it raises in training: then it has only counted less
    return module


# --- ONNX -------------------------------------------------------------------------------------------------------


def _of_file(model: Model) -> list[Any]:
    import onnx

    file = onnx.load(str(model.content), load_external_data=False)
    numbers: dict[str, int] = {}  # of values, in the order in which they are met: their names are the exporter's
    return [*_graph(file.graph, numbers), *([f.name, *_nodes(f.node, numbers)] for f in file.functions)]


def _graph(graph: Any, numbers: dict[str, int]) -> list[Any]:
    made = {t.name: _tensor(t) for t in graph.initializer}
    inputs = [numbers.setdefault(port.name, len(numbers)) for port in graph.input if port.name not in made]
    nodes = _nodes(graph.node, numbers)
    outputs = [numbers.setdefault(port.name, len(numbers)) for port in graph.output]
    constants = sorted([numbers[name], tensor] for name, tensor in made.items() if name in numbers)
    return [inputs, nodes, outputs, constants]


def _nodes(nodes: Iterable[Any], numbers: dict[str, int]) -> list[Any]:
    return [
        [
            node.domain, node.op_type, sorted([a.name, _attribute(a, numbers)] for a in node.attribute),
            [numbers.setdefault(name, len(numbers)) for name in (*node.input, *node.output)],
        ]
        for node in nodes
    ]  # fmt: skip


def _attribute(attribute: Any, numbers: dict[str, int]) -> Any:
    import onnx

    value = onnx.helper.get_attribute_value(attribute)
    if attribute.type == onnx.AttributeProto.TENSOR:
        return _tensor(value)
    if attribute.type == onnx.AttributeProto.GRAPH:
        return _graph(value, numbers)
    return value if isinstance(value, (int, float)) else str(value)


def _tensor(tensor: Any) -> list[Any]:
    """Its type and shape; its numbers too where they are few and whole, for these are no weights."""
    import onnx

    whole = tensor.data_type in (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
    here = tensor.data_location != onnx.TensorProto.EXTERNAL
    found = [tensor.data_type, *tensor.dims]
    numbers = onnx.numpy_helper.to_array(tensor) if whole and here else None
    return [*found, numbers.tolist()] if numbers is not None and numbers.size <= FEW else found
