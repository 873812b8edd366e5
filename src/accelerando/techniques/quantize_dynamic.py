"""Dynamic int8 quantization by ONNX Runtime: weights beforehand, activations by their range at each call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.techniques._onnx_graph import counted, layers_of, not_native, prepared, refuse_onnx, save
from accelerando.techniques._parity import first_lines
from accelerando.techniques._quiet import quiet
from accelerando.workload import Form, Model, Samples

# Convolutions are left out: ConvInteger has no fast kernel on CPUs, and static quantization serves them better.
KINDS = ("MatMul", "Gemm", "LSTM")
INTEGER = ("MatMulInteger", "DynamicQuantizeLSTM")  # what they become; ONNX Runtime fuses them further


@dataclass(frozen=True)
class QuantizeDynamic(Technique):
    """Integer products with constant weights, and LSTMs.  Needs no calibration, so nothing can be out of range.

    Args:
        per_channel: one scale for each output of a layer, or one for the whole layer.
        narrow: weights of 7 bits, so that 16-bit sums can't overflow on x86 processors without VNNI.
    """

    per_channel: bool = True
    narrow: bool = False

    takes: ClassVar[Form] = Form.ONNX
    gives: ClassVar[Form] = Form.ONNX
    stage: ClassVar[Stage] = Stage.QUANTIZE
    needs: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[QuantizeDynamic]:
        narrow = not machine.int8 and not machine.has("neon")
        return [cls(narrow=narrow), cls(per_channel=False, narrow=narrow)]  # the second is a little faster for some

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        return refuse_onnx(model, KINDS, self.name)

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        ready, path = prepared(Path(model.content)), folder / "model.onnx"
        layers = layers_of(ready, KINDS, constant=True)
        if not layers:
            raise RefusalError(Reason.NOTHING_TO_DO, f"no {', '.join(KINDS)} has float32 weights of its own")
        del ready.graph.value_info[:]  # the quantizer turns each Gemm's weights about, and would find stale shapes
        try:
            with quiet():
                quantize_dynamic(
                    ready,
                    path,
                    op_types_to_quantize=["MatMul", "LSTM"],  # it turns every Gemm into a MatMul and an Add first
                    per_channel=self.per_channel,
                    reduce_range=self.narrow,
                    weight_type=QuantType.QInt8,
                    extra_options={"MatMulConstBOnly": True},
                )
        except Exception as error:
            raise RefusalError(Reason.UNSUPPORTED, f"ONNX Runtime's quantizer: {first_lines(error)}") from error
        return self._finished(model, layers, path, folder)

    def _finished(self, model: Model, layers: list[str], path: Path, folder: Path) -> Model:
        """The model as the quantizer left it, counted."""
        import onnx

        result = onnx.load(path)
        done = sum(node.op_type in INTEGER for node in result.graph.node)
        if not done:
            raise RefusalError(Reason.NOTHING_TO_DO, f"ONNX Runtime's quantizer left all {len(layers)} layers alone")
        del result.graph.value_info[:]
        scales = "a scale per channel" if self.per_channel else "a scale per layer"
        left = f", {len(layers) - done} left in float" if done < len(layers) else ""
        line = counted(done, [], self.name, f"ranges at each call, {scales}{left}")
        return model.changed(Form.ONNX, save(result, folder), line, *not_native(Machine.look(), self.name))
