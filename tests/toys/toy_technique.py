"""A toy technique in one file: it keeps fewer bits of every weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.workload import Form, Model, Samples


@dataclass(frozen=True)
class ToyTechnique(Technique):
    bits: int = 12  # of the mantissa's 23

    takes = gives = Form.ONNX
    stage = Stage.QUANTIZE
    needs = ("onnx",)

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Technique]:
        return [cls(), cls(4)]

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        import onnx
        from onnx import numpy_helper

        proto = onnx.load(str(model.content))
        count = 0
        for tensor in proto.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.dtype == np.float32:
                mask = np.uint32(0xFFFFFFFF << (23 - self.bits) & 0xFFFFFFFF)
                rounded = (array.view(np.uint32) & mask).view(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
                count += 1
        onnx.save(proto, str(folder / "model.onnx"))
        return model.changed(Form.ONNX, folder / "model.onnx", f"{count} tensors keep {self.bits} bits")
