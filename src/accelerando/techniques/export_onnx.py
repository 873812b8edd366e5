"""Torch to ONNX, with every axis dynamic that the signature says may change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.signature import Array, Port
from accelerando.techniques._parity import ensure_same_onnx, example, first_lines
from accelerando.techniques._quiet import quiet
from accelerando.workload import Form, Model, Samples, flat_module

MOST_IR = 13  # what ONNX Runtime 1.31 reads
INLINE_BYTES = 1_500_000_000  # a protobuf holds at most 2 GiB
TORCHSCRIPT_OPSET = 20  # the last one that the TorchScript exporter writes
ATTENTION_OPSET = 23  # attention as one operator: faster for some models and runtimes, slower for others
FLOATS = ("torch.float32", "torch.float64")
ROUTES = {"auto": ("dynamo", "torchscript"), "dynamo": ("dynamo",), "torchscript": ("torchscript",)}


@dataclass(frozen=True)
class ExportOnnx(Technique):
    """Export to one .onnx file (weights beside it from 1.5 GB on), checked against the torch module.

    Args:
        opset: version of ONNX's operators.
        exporter: `dynamo`, `torchscript`, or `auto`: the first, and where it fails the second.
        optimize: fold constants and remove dead nodes with onnxscript's optimizer (dynamo only).
    """

    opset: int = 20
    exporter: str = "auto"
    optimize: bool = True

    takes: ClassVar[Form] = Form.TORCH
    gives: ClassVar[Form] = Form.ONNX
    stage: ClassVar[Stage] = Stage.LOWER
    exact: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxscript", "onnxruntime")

    def __post_init__(self) -> None:
        if self.exporter not in ROUTES:
            raise ValueError(f"exporter must be one of {', '.join(ROUTES)}, but is {self.exporter!r}")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[ExportOnnx]:
        attends = model.form is Form.TORCH and any("Attention" in type(m).__name__ for m in model.content.modules())
        return [cls(), cls(opset=ATTENTION_OPSET)] if attends else [cls()]

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        if model.form is not Form.TORCH:
            return None
        for name, tensor in model.content.state_dict().items():
            if tensor.dtype.is_floating_point and str(tensor.dtype) not in FLOATS:
                return RefusalError(
                    Reason.UNSUPPORTED,
                    f"{name} is {tensor.dtype}, for which ONNX Runtime has no CPU kernels; export it in float32",
                )
        return None

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        path, refusals = folder / "model.onnx", []
        for route in ROUTES[self.exporter]:
            try:
                self._write(route, model, example(model.signature, data), path)
                worst = ensure_same_onnx(model, path, data)
            except RefusalError as refusal:
                refusals.append(RefusalError(refusal.reason, f"{route}: {refusal.detail}"))
                for file in folder.iterdir():
                    file.unlink()
                continue
            notes = [f"export_onnx: the {r.detail}" for r in refusals]
            notes.append(f"export_onnx: by {route}, opset {self._opset(route)}, within {worst:.1e} of the original")
            return model.changed(Form.ONNX, path, *notes)
        raise RefusalError(refusals[0].reason, "; ".join(r.detail for r in refusals))

    def _opset(self, route: str) -> int:
        return self.opset if route == "dynamo" else min(self.opset, TORCHSCRIPT_OPSET)

    def _write(self, route: str, model: Model, leaves: list[Array], path: Path) -> None:
        """Export by one route, and clean what it wrote.

        Raises:
            RefusalError: the exporter fails, or an axis that must be dynamic came out fixed.
        """
        import torch

        tensors = tuple(torch.from_numpy(x) for x in leaves)
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # fused attention has no translation
        try:
            with quiet(), torch.no_grad():
                (self._dynamo if route == "dynamo" else self._torchscript)(model, tensors, path)
                _clean(path, model)
        except RefusalError:
            raise
        except Exception as error:
            raise RefusalError(Reason.EXPORT_FAILED, first_lines(error)) from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def _dynamo(self, model: Model, tensors: tuple[Any, ...], path: Path) -> None:
        import torch

        shapes = tuple({i: a for i, a in enumerate(p.shape) if isinstance(a, str)} for p in model.signature.inputs)
        program = torch.onnx.export(
            _own_copy(model),
            tensors,
            None,
            dynamo=True,
            dynamic_shapes=(shapes,),  # one entry: all leaves are in the variadic parameter
            input_names=[p.name for p in model.signature.inputs],
            output_names=[p.name for p in model.signature.outputs],
            opset_version=self.opset,
            optimize=self.optimize,
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=_bytes(model) >= INLINE_BYTES)

    def _torchscript(self, model: Model, tensors: tuple[Any, ...], path: Path) -> None:
        import torch

        ports = (*model.signature.inputs, *model.signature.outputs)
        torch._C._jit_set_onnx_log_enabled(False)  # else it prints the graph of a failure
        torch.onnx.export(
            _own_copy(model),
            tensors,
            str(path),
            dynamo=False,
            input_names=[p.name for p in model.signature.inputs],
            output_names=[p.name for p in model.signature.outputs],
            dynamic_axes={p.name: {i: a for i, a in enumerate(p.shape) if isinstance(a, str)} for p in ports},
            opset_version=self._opset("torchscript"),
            verbose=False,
        )


def _own_copy(model: Model) -> Any:
    """The flat module to trace; tracing assigns to the weight lists of recurrent layers, so those are copied."""
    import copy

    import torch

    flat = flat_module(model)
    recurrent = any(isinstance(m, torch.nn.RNNBase) for m in flat.modules())
    return copy.deepcopy(flat) if recurrent else flat


def _bytes(model: Model) -> int:
    return sum(t.numel() * t.element_size() for t in model.content.state_dict().values())


def _clean(path: Path, model: Model) -> None:
    """Give the file the signature's ports, and drop what is stale or private.

    Shapes of inner values go, for quantizers trust them; stack traces go, for they hold paths.

    Raises:
        RefusalError: the ports are others, or one is fixed where it must be dynamic.
    """
    import onnx

    proto = onnx.load(path, load_external_data=False)
    for found, ports in ((proto.graph.input, model.signature.inputs), (proto.graph.output, model.signature.outputs)):
        names, wanted = [v.name for v in found], [p.name for p in ports]
        if names != wanted:
            raise RefusalError(Reason.EXPORT_FAILED, f"its ports are {names}, but must be {wanted}")
        for value, port in zip(found, ports, strict=True):
            if found is proto.graph.input:
                _ensure_dynamic(value, port)
            value.CopyFrom(onnx.helper.make_tensor_value_info(port.name, _elem_type(value), port.shape))
    for holder in (proto, proto.graph, *proto.graph.node, *proto.graph.initializer, *proto.functions):
        holder.ClearField("doc_string")
        del holder.metadata_props[:]
    for graph in (proto.graph, *proto.functions):
        del graph.value_info[:]
    proto.ir_version = min(proto.ir_version, MOST_IR)
    onnx.save(proto, path)
    onnx.checker.check_model(str(path))


def _elem_type(value: Any) -> int:
    return int(value.type.tensor_type.elem_type)


def _ensure_dynamic(value: Any, port: Port) -> None:
    """Refuse an input whose axis the exporter fixed, though it must be dynamic."""
    for dim, axis in zip(value.type.tensor_type.shape.dim, port.shape, strict=True):
        if isinstance(axis, str) and dim.HasField("dim_value"):
            raise RefusalError(
                Reason.EXPORT_FAILED,
                f"axis {axis!r} of {port.name} came out fixed at {dim.dim_value}: the model's code uses its length "
                "as a Python number, or branches on it",
            )
