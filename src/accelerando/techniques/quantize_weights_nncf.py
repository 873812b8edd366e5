"""Weight-only int8 by NNCF, of an OpenVINO model: smaller files and less memory traffic, activations in float."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.techniques._nncf import load_nncf, read_openvino, refuse_quantized, save_openvino
from accelerando.techniques._onnx_graph import counted
from accelerando.techniques._parity import first_lines
from accelerando.techniques._quiet import quiet
from accelerando.workload import Form, Model, Samples

MODES = {"asymmetric": "int8_asym", "symmetric": "int8_sym"}


@dataclass(frozen=True)
class QuantizeWeightsNncf(Technique):
    """Weights in 8 bits with a scale per channel, unpacked by the kernels that use them.  Needs no calibration.

    Args:
        mode: `asymmetric` (with an offset: more accurate) or `symmetric`.
    """

    mode: str = "asymmetric"

    takes: ClassVar[Form] = Form.OPENVINO
    gives: ClassVar[Form] = Form.OPENVINO
    stage: ClassVar[Stage] = Stage.QUANTIZE
    needs: ClassVar[tuple[str, ...]] = ("openvino", "nncf")

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, but is {self.mode!r}")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[QuantizeWeightsNncf]:
        return [cls()]

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        source = read_openvino(Path(model.content))
        refuse_quantized(node.get_type_name() for node in source.get_ops())
        products = sum(node.get_type_name() == "MatMul" for node in source.get_ops())
        if not products:
            raise RefusalError(Reason.NOTHING_TO_DO, "only matrix products gain by smaller weights, and it has none")
        nncf = load_nncf()
        try:
            with quiet():
                result = nncf.compress_weights(source, mode=nncf.CompressWeightsMode(MODES[self.mode]))
        except Exception as error:
            raise RefusalError(Reason.UNSUPPORTED, f"NNCF: {first_lines(error)}") from error
        done = sum(_is_weight(node) for node in result.get_ops())
        if not done:
            raise RefusalError(Reason.NOTHING_TO_DO, "NNCF found no weights that it can compress")
        line = counted(done, [], self.name, f"weights only, {self.mode}, a scale per channel")
        return model.changed(Form.OPENVINO, save_openvino(result, folder), line)


def _is_weight(node: Any) -> bool:
    """Whether a node is a weight of 8 bits, and not the offset beside one."""
    if node.get_type_name() != "Constant" or "zero_point" in node.get_friendly_name():
        return False
    return node.get_element_type().to_dtype() in ("int8", "uint8")
