"""Static int8 quantization by NNCF, of an OpenVINO model: what OpenVINO's own kernels like best."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.signature import Signature
from accelerando.techniques._calibration import RANKING_ROWS, ROWS
from accelerando.techniques._nncf import dataset, load_nncf, read_openvino, refuse_quantized, save_openvino
from accelerando.techniques._onnx_graph import counted, not_native
from accelerando.techniques._openvino_layers import Switchboard, heavy, quantizers_of
from accelerando.techniques._parity import first_lines
from accelerando.techniques._quiet import quiet
from accelerando.techniques._sensitivity import keep_count, kept_layers
from accelerando.workload import Form, Model, Samples

PRESETS = ("performance", "mixed")


@dataclass(frozen=True)
class QuantizeNncf(Technique):
    """Insert FakeQuantize operators, which OpenVINO turns into int8 kernels; correct the biases for the error.

    Args:
        preset: `performance` (symmetric activations) or `mixed` (asymmetric ones).  Neither won on speed or quality
            for a ResNet-56 and a ViT here, so the first is NNCF's own default.
        keep: the share of the heavy layers to keep in float, the most sensitive ones by measurement.
        smooth: move the outliers of a transformer's activations into its weights first (SmoothQuant).  It is for
            large models with outliers: on small ones without, its own error is larger than what it saves.
        fast_bias_correction: estimate the shift of each output from a few rows; off: from all, in many minutes.
        narrow: weights of 7 bits, so that 16-bit sums can't overflow on x86 processors without VNNI.
    """

    preset: str = "performance"
    keep: float = 0.0
    smooth: bool = False
    fast_bias_correction: bool = True
    narrow: bool = False

    takes: ClassVar[Form] = Form.OPENVINO
    gives: ClassVar[Form] = Form.OPENVINO
    stage: ClassVar[Stage] = Stage.QUANTIZE
    needs: ClassVar[tuple[str, ...]] = ("openvino", "nncf")

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, but is {self.preset!r}")
        if not 0 <= self.keep < 1:
            raise ValueError(f"keep must be a share of the layers, from 0 up to but not 1, but is {self.keep}")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[QuantizeNncf]:
        torch_modules = model.content.modules() if model.form is Form.TORCH else ()
        attentive = model.form is not Form.TORCH or any("Attention" in type(m).__name__ for m in torch_modules)
        make = partial(cls, narrow=not machine.int8 and not machine.has("neon"))
        smooth = [make(smooth=True)] if attentive else []
        return [make(), make(preset="mixed"), make(keep=0.05), *smooth, make(keep=0.15), make(keep=0.3)]

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        if self.smooth and model.form is Form.OPENVINO and not attends(read_openvino(Path(model.content))):
            return RefusalError(Reason.NOTHING_TO_DO, "SmoothQuant is for transformers, and there is no attention")
        return None

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        path = Path(model.content)
        source = read_openvino(path)
        refuse_quantized(node.get_type_name() for node in source.get_ops())
        if not heavy(source):
            raise RefusalError(Reason.NOTHING_TO_DO, "there is no convolution or matrix product to quantize")
        rows = data.take(ROWS)
        try:
            kept = self._kept(path, data.take(RANKING_ROWS), model.signature)
            result = self._quantized(source, rows, model.signature, kept)
        except RefusalError:
            raise
        except Exception as error:
            raise RefusalError(Reason.UNSUPPORTED, f"NNCF: {first_lines(error)}") from error
        done = [n.get_friendly_name() for n in heavy(result) if quantizers_of(n)]
        if not done:
            raise RefusalError(Reason.NOTHING_TO_DO, "NNCF found no layer that it can quantize")
        line = counted(len(done) + len(kept), kept, self.name, f"{self.preset} preset, {len(rows)} rows")
        return model.changed(Form.OPENVINO, save_openvino(result, folder), line, *not_native(Machine.look(), self.name))

    def _kept(self, path: Path, rows: Samples, signature: Signature) -> list[str]:
        """The layers to leave in float.  Biases stay as they are: their correction would blur the layers' errors."""
        if not self.keep:
            return []
        switchboard = Switchboard(self._quantized(read_openvino(path), rows, signature, (), ranking=True))
        layers = list(switchboard.layers)
        if keep_count(self.keep, len(layers)) >= len(layers):
            raise RefusalError(Reason.NOTHING_TO_DO, f"keep={self.keep} leaves none of {len(layers)} layers")
        return kept_layers(
            layers,
            self.keep,
            lambda: switchboard.answers(rows, signature),
            lambda layer: switchboard.answers(rows, signature, only=layer),
        )

    def _quantized(
        self, source: Any, rows: Samples, signature: Signature, kept: Iterable[str], ranking: bool = False
    ) -> Any:
        """A quantized model; for a ranking, with the float weights still in it and no bias changed."""
        nncf = load_nncf()
        items, count = dataset(nncf, rows, signature)
        alpha = 0.95 if self.smooth else -1  # NNCF's own default for products, or off
        advanced = nncf.AdvancedQuantizationParameters(
            disable_bias_correction=ranking,
            overflow_fix=nncf.OverflowFix.ENABLE if self.narrow else nncf.OverflowFix.FIRST_LAYER,
            backend_params={"compress_weights": not ranking},
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=alpha),
        )
        with quiet():
            return nncf.quantize(
                source,
                items,
                preset=nncf.QuantizationPreset(self.preset),
                subset_size=count,
                fast_bias_correction=self.fast_bias_correction,
                model_type=nncf.ModelType.TRANSFORMER if attends(source) else None,
                ignored_scope=nncf.IgnoredScope(names=list(kept)) if kept else None,
                advanced_parameters=advanced,
            )


def attends(model: Any) -> bool:
    """Whether a model holds attention: one operator for it, or a softmax that feeds a matrix product."""
    for node in model.get_ops():
        if node.get_type_name() == "ScaledDotProductAttention":
            return True
        if node.get_type_name() == "Softmax":
            readers = [t.get_node().get_type_name() for t in node.output(0).get_target_inputs()]
            if "MatMul" in readers:
                return True
    return False
