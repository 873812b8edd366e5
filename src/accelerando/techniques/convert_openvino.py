"""ONNX to OpenVINO's own format, in full precision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.techniques._parity import answer_onnx, ensure_same, first_lines, probes, session_of
from accelerando.techniques._quiet import quiet
from accelerando.workload import Form, Model, Samples


@dataclass(frozen=True)
class ConvertOpenvino(Technique):
    """Convert to an .xml file with its .bin beside it; inputs and outputs keep their names and order."""

    takes: ClassVar[Form] = Form.ONNX
    gives: ClassVar[Form] = Form.OPENVINO
    stage: ClassVar[Stage] = Stage.LOWER
    exact: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("openvino", "onnxruntime")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[ConvertOpenvino]:
        return [cls()]

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        path = folder / "model.xml"
        try:
            with quiet():
                import openvino

                converted = openvino.convert_model(str(model.content))
                openvino.save_model(converted, str(path), compress_to_fp16=False)
        except Exception as error:
            raise RefusalError(Reason.UNSUPPORTED, f"OpenVINO does not take it: {first_lines(error)}") from error
        worst = _ensure_same(model, path, data)
        return model.changed(Form.OPENVINO, path, f"convert_openvino: within {worst:.1e} of the ONNX file")


def _ensure_same(model: Model, path: Path, data: Samples) -> float:
    """How far the file at `path` is from the ONNX model, in float32, as a share of the largest answer.

    Raises:
        RefusalError: it is not the same function, or OpenVINO can't run it.
    """
    import openvino

    signature, before, worst = model.signature, session_of(model.content), 0.0
    compiled = _compile(openvino, path)
    for leaves in probes(signature, data):
        feed = {p.name: x for p, x in zip(signature.inputs, leaves, strict=True)}
        try:
            answers = compiled(feed)
        except Exception as error:
            raise RefusalError(Reason.NOT_SAME, f"OpenVINO fails on it: {first_lines(error)}") from error
        got = [answers[p.name] for p in signature.outputs]
        worst = max(worst, ensure_same(signature, answer_onnx(before, signature, leaves), got))
    return worst


def _compile(openvino: Any, path: Path) -> Any:
    """In float32, whatever this processor would rather use: the comparison is of functions, not of precisions."""
    try:
        return openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except Exception as error:
        raise RefusalError(Reason.UNSUPPORTED, f"OpenVINO does not compile it: {first_lines(error)}") from error
