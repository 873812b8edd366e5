"""Weight-only int8 for ONNX Runtime: a quarter of the memory traffic, which is what one row at a time waits for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.techniques._onnx_graph import counted, layers_of, prepared, refuse_onnx, save
from accelerando.techniques._parity import first_lines
from accelerando.techniques._quiet import quiet
from accelerando.workload import Form, Model, Samples

KINDS = ("MatMul", "Gemm")
BITS = 8
# Compute in int8 too: 0, "as exact as the model", unpacks the weights at each call (12 times slower than float on a
# 768-3072 MLP, where 4 is 5 times faster; the error is 0.5 % of the largest output, against 0.3 %).
ACCURACY_LEVEL = 4
BLOCKS = (32, 64, 128, 256)


@dataclass(frozen=True)
class QuantizeWeights(Technique):
    """Products with constant weights become MatMulNBits: 8-bit weights in blocks, each with a scale and an offset.

    Needs no calibration.

    Args:
        block: weights that share a scale; fewer are more accurate, and slower.
    """

    block: int = 128

    takes: ClassVar[Form] = Form.ONNX
    gives: ClassVar[Form] = Form.ONNX
    stage: ClassVar[Stage] = Stage.QUANTIZE
    needs: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise ValueError(f"block must be one of {', '.join(map(str, BLOCKS))}, but is {self.block}")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[QuantizeWeights]:
        return [cls(), cls(block=32)]

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        return refuse_onnx(model, KINDS, self.name)

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
        from onnxruntime.quantization.onnx_model import ONNXModel

        ready = prepared(Path(model.content))
        layers = layers_of(ready, KINDS, constant=True)
        if not layers:
            raise RefusalError(Reason.NOTHING_TO_DO, f"no {' or '.join(KINDS)} has float32 weights of its own")
        del ready.graph.value_info[:]
        graph = ONNXModel(ready)
        try:
            with quiet():
                graph.replace_gemm_with_matmul()
                quantizer = MatMulNBitsQuantizer(
                    graph.model, bits=BITS, block_size=self.block, is_symmetric=False, accuracy_level=ACCURACY_LEVEL
                )
                quantizer.process()
        except Exception as error:
            raise RefusalError(Reason.UNSUPPORTED, f"ONNX Runtime's quantizer: {first_lines(error)}") from error
        result = quantizer.model.model
        done = sum(node.op_type == "MatMulNBits" for node in result.graph.node)
        if not done:
            raise RefusalError(Reason.NOTHING_TO_DO, f"ONNX Runtime's quantizer left all {len(layers)} layers alone")
        left = f", {len(layers) - done} left in float" if done < len(layers) else ""
        line = counted(done, [], self.name, f"weights only, blocks of {self.block}{left}")
        return model.changed(Form.ONNX, save(result, folder), line)
