"""Half precision: an exported program that computes in bfloat16 or float16, and takes and gives what it did."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.signature import Array
from accelerando.techniques._capture import capture
from accelerando.techniques._parity import answer_torch, example, first_lines, probes
from accelerando.techniques._quiet import quiet
from accelerando.workload import Form, Model, Samples

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Half(Technique):
    """Weights and activations of 16 bits; inputs are cast on the way in, outputs back on the way out.

    Args:
        dtype: `bf16` (range of float32, 8 bits of precision) or `fp16` (range up to 65504, 11 bits).
    """

    dtype: str = "bf16"

    takes: ClassVar[Form] = Form.EXPORTED
    gives: ClassVar[Form] = Form.EXPORTED  # not of a module: ONNX Runtime has no such kernels on CPUs
    stage: ClassVar[Stage] = Stage.QUANTIZE
    needs: ClassVar[tuple[str, ...]] = ("torch",)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, but is {self.dtype!r}")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Half]:
        return [cls(), cls(dtype="fp16")] if machine.fp16 else [cls()]

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        if not (machine.bf16 if self.dtype == "bf16" else machine.fp16):
            return RefusalError(Reason.NOT_NATIVE, f"{machine.cpu} has no {self.dtype} products: it would be slower")
        if model.form is not Form.EXPORTED:
            return None
        floats = {str(t.dtype) for t in model.content.state_dict.values() if t.dtype.is_floating_point}
        if floats and floats <= {f"torch.{DTYPES[self.dtype]}"}:
            return RefusalError(Reason.NOTHING_TO_DO, f"every weight is {self.dtype} already")
        return None

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        import torch

        signature = model.signature
        try:
            with quiet():
                halved = _halved(model, getattr(torch, DTYPES[self.dtype]))
                for leaves in probes(signature, data):
                    _check(model, answer_torch(halved, leaves))
        except RefusalError:
            raise
        except Exception as error:
            raise RefusalError(Reason.UNSUPPORTED, f"it does not run in {self.dtype}: {first_lines(error)}") from error
        program = capture(halved, signature, example(signature, data))
        return model.changed(Form.EXPORTED, program, f"half: computes in {self.dtype}")


def _check(model: Model, answers: list[Array]) -> None:
    """Refuse answers of another type, or that overflowed."""
    for port, answer in zip(model.signature.outputs, answers, strict=True):
        if str(answer.dtype) != port.dtype:
            raise RefusalError(Reason.WRONG_OUTPUT, f"{port.name} is {answer.dtype}, but must be {port.dtype}")
        if answer.dtype.kind == "f" and not np.isfinite(answer).all():
            raise RefusalError(Reason.NOT_FINITE, f"{port.name} overflows")


def _halved(model: Model, dtype: Any) -> Any:
    """A module of the program in 16 bits, that takes and gives the signature's types."""
    import torch

    outputs = [getattr(torch, port.dtype) for port in model.signature.outputs]
    inner = copy.deepcopy(model.content.module(check_guards=False)).to(dtype)
    for graph in (m for m in inner.modules() if isinstance(m, torch.fx.GraphModule)):
        _narrow(graph, dtype)

    class Halved(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *leaves: Any) -> tuple[Any, ...]:
            answers = self.inner(*(x.to(dtype) if x.is_floating_point() else x for x in leaves))
            return tuple(x.to(wanted) for x, wanted in zip(answers, outputs, strict=True))

    return Halved().eval().requires_grad_(False)


def _narrow(graph: Any, dtype: Any) -> None:
    """What the program makes in float32 on its way, it makes in 16 bits; what it asserts of types is dropped."""
    import torch
    from torch.fx.node import map_aggregate

    def other(value: Any) -> Any:
        return dtype if value in (torch.float32, torch.float64) else value

    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.graph.erase_node(node)
        elif node.op == "call_function":
            node.args, node.kwargs = map_aggregate(node.args, other), map_aggregate(node.kwargs, other)
    graph.recompile()
