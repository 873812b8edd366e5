"""Static int8 quantization by ONNX Runtime's own quantizer: weights and activations, ranges from calibration."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.signature import Signature
from accelerando.techniques._calibration import RANKING_ROWS, ROWS, feeds
from accelerando.techniques._onnx_graph import HEAVY, counted, layers_of, not_native, prepared, refuse_onnx, save
from accelerando.techniques._parity import first_lines
from accelerando.techniques._quiet import quiet
from accelerando.techniques._sensitivity import Answers, kept_layers
from accelerando.workload import Form, Model, Samples

METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
# The operators for which ONNX Runtime's CPU provider has int8 kernels, or that move bytes about.  Its quantizer
# would take more by default (LayerNormalization, ConvTranspose, ...), which only costs: they run in float, between
# conversions.  (ViT, 2 cores with VNNI: 1.17 x float with this list, 1.02 to 1.11 x with the default one.)
OPS = {
    "all": (
        *HEAVY, "Add", "Mul", "Relu", "Clip", "LeakyRelu", "Sigmoid", "Softmax", "MaxPool", "AveragePool",
        "GlobalAveragePool", "Concat", "Split", "Slice", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten",
        "Resize", "Pad", "Gather", "Where",
    ),
    "heavy": HEAVY,
}  # fmt: skip


@dataclass(frozen=True)
class QuantizeStatic(Technique):
    """Insert quantize/dequantize pairs that ONNX Runtime fuses into int8 kernels; weights per channel.

    The model's outputs are not quantized: they keep full resolution.

    Args:
        calibration: `minmax`, `percentile` (99.999 % of the values) or `entropy` (least information lost).
        ops: `all` that have int8 kernels, or the `heavy` ones alone: convolutions and matrix products.
        keep: the share of the heavy layers to keep in float, the most sensitive ones by measurement.
        activations: `uint8` (asymmetric: the fast one with VNNI), or `int8` (symmetric: the fast one on ARM).
        narrow: weights of 7 bits, so that 16-bit sums can't overflow on x86 processors without VNNI.
    """

    calibration: str = "minmax"
    ops: str = "all"
    keep: float = 0.0
    activations: str = "uint8"
    narrow: bool = False

    takes: ClassVar[Form] = Form.ONNX
    gives: ClassVar[Form] = Form.ONNX
    stage: ClassVar[Stage] = Stage.QUANTIZE
    needs: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")

    def __post_init__(self) -> None:
        for knob, known in (("calibration", METHODS), ("ops", OPS), ("activations", ("uint8", "int8"))):
            if getattr(self, knob) not in known:
                raise ValueError(f"{knob} must be one of {', '.join(known)}, but is {getattr(self, knob)!r}")
        if not 0 <= self.keep < 1:
            raise ValueError(f"keep must be a share of the layers, from 0 up to but not 1, but is {self.keep}")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[QuantizeStatic]:
        arm = machine.has("neon")
        make = partial(cls, activations="int8" if arm else "uint8", narrow=not arm and not machine.int8)
        # First the fastest, then what gives quality back at no cost in speed, then what costs some of it.
        return [
            make(),
            make(calibration="percentile"),
            make(calibration="percentile", keep=0.05),
            make(calibration="entropy"),
            make(calibration="percentile", keep=0.15),
            make(calibration="percentile", ops="heavy"),
            make(calibration="percentile", keep=0.3),
        ]

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        return refuse_onnx(model, HEAVY, self.name)

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        ready = prepared(Path(model.content))
        layers = layers_of(ready)
        if not layers:
            raise RefusalError(Reason.NOTHING_TO_DO, "no float32 convolution or matrix product is left")
        try:
            with quiet():
                ranges = self._calibrate(ready, data.take(ROWS), model.signature)
                rows = data.take(RANKING_ROWS)
                kept = kept_layers(
                    layers,
                    self.keep,
                    lambda: _answers(ready, rows, model.signature),
                    lambda layer: _answers(self._quantized(ready, ranges, only=layer), rows, model.signature),
                )
                result = self._quantized(ready, ranges, kept=kept)
        except RefusalError:
            raise
        except Exception as error:
            raise RefusalError(Reason.UNSUPPORTED, f"ONNX Runtime's quantizer: {first_lines(error)}") from error
        detail = f"{self.calibration} of {min(len(data), ROWS)} rows, {self.activations} activations"
        lines = (counted(len(layers), kept, self.name, detail), *not_native(Machine.look(), self.name))
        return model.changed(Form.ONNX, save(result, folder), *lines)

    def _calibrate(self, ready: Any, rows: Samples, signature: Signature) -> Any:
        """The range of every activation, by ONNX Runtime's calibrators, fed batch by batch to bound the memory."""
        import onnx
        from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

        with tempfile.TemporaryDirectory(prefix="accelerando-") as folder:
            source = Path(folder, "float.onnx")
            onnx.save(ready, source)
            calibrator = create_calibrator(
                source,
                list(OPS[self.ops]),
                augmented_model_path=str(Path(folder, "augmented.onnx")),
                calibrate_method=CalibrationMethod[METHODS[self.calibration]],
                extra_options={"symmetric": self.activations == "int8"},
            )
            for feed in feeds(rows, signature):
                calibrator.collect_data(_Once(feed))
            return calibrator.compute_data()

    def _quantized(self, ready: Any, ranges: Any, kept: Iterable[str] = (), only: str | None = None) -> Any:
        """A quantized copy: all but the `kept` layers, or one layer only."""
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
        from onnxruntime.quantization.quant_utils import add_infer_metadata

        source = copy.deepcopy(ready)
        add_infer_metadata(source)  # its types are inferred: not once more for every layer that is ranked
        quantizer = QDQQuantizer(
            source,
            per_channel=True,
            reduce_range=self.narrow,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8 if self.activations == "uint8" else QuantType.QInt8,
            tensors_range=ranges,
            nodes_to_quantize=[] if only is None else [only],
            nodes_to_exclude=list(kept),
            op_types_to_quantize=list(OPS[self.ops]),
            extra_options={"ActivationSymmetric": self.activations == "int8"},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        result = quantizer.model.model
        _free_outputs(result.graph)
        del result.graph.value_info[:]  # the new tensors are not in it
        return result


class _Once:
    """A data reader of one batch, as ONNX Runtime's calibrators want it."""

    def __init__(self, feed: dict[str, Any]) -> None:
        self.feed: dict[str, Any] | None = feed

    def get_next(self) -> dict[str, Any] | None:
        feed, self.feed = self.feed, None
        return feed


def _free_outputs(graph: Any) -> None:
    """Take the pairs off the graph's outputs: int8 kernels give float as well, and 256 steps are few for an answer."""
    makers = {name: node for node in graph.node for name in node.output}
    for output in graph.output:
        back = makers.get(output.name)
        there = makers.get(back.input[0]) if back is not None and back.op_type == "DequantizeLinear" else None
        if back is None or there is None or there.op_type != "QuantizeLinear":
            continue
        inner = there.input[0]
        if inner not in makers or any(there.output[0] in n.input for n in graph.node if n is not back):
            continue
        for node in graph.node:
            for names in (node.input, node.output):
                for slot, name in enumerate(names):
                    if name == inner:
                        names[slot] = output.name
        graph.node.remove(back)
        graph.node.remove(there)


def _answers(graph: Any, rows: Samples, signature: Signature) -> Answers:
    """The outputs of a model in memory, batch by batch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # sessions come and go, one per layer
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [session.run(None, feed) for feed in feeds(rows, signature)]
