"""FLOPs of ONNX operators from the shapes of what goes in and comes out: two per multiplication with addition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Shape = tuple[int, ...]
Shapes = Sequence[Shape | None]

CONVOLUTIONS = ("Conv", "FusedConv", "NhwcFusedConv", "ConvInteger", "QLinearConv")
MATMULS = ("MatMul", "FusedMatMul", "TransposeMatMul", "MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat",
           "DynamicQuantizeMatMul", "QGemm", "MatMulNBits")  # fmt: skip
RECURRENT = ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")
ATTENTIONS = ("Attention", "MultiHeadAttention", "QAttention", "GroupQueryAttention")
INT8 = ("ConvInteger", "QLinearConv", "MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
        "QGemm", "DynamicQuantizeLSTM", "QAttention")  # fmt: skip
VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
GATHERS = ("Gather", "GatherElements", "GatherND", "EmbedLayerNormalization")
NORMALIZATIONS = ("BatchNormalization", "LayerNormalization", "SkipLayerNormalization", "InstanceNormalization",
                  "GroupNorm", "GroupNormalization", "SimplifiedLayerNormalization", "RMSNormalization")  # fmt: skip
FAMILIES = {
    **dict.fromkeys((*CONVOLUTIONS, "ConvTranspose"), "convolution"),
    **dict.fromkeys((*MATMULS, "Gemm", "FusedGemm", "Einsum"), "linear"),
    **dict.fromkeys(RECURRENT, "recurrent"),
    **dict.fromkeys(ATTENTIONS, "attention"),
    **dict.fromkeys(GATHERS, "embedding"),
    **dict.fromkeys(NORMALIZATIONS, "normalization"),
    "DFT": "fft",
}
# Where the weights lie among the inputs; the first input is the activations.
WEIGHTS_AT = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}


def node_flops(operator: str, inputs: Shapes, outputs: Shapes, attributes: Mapping[str, Any]) -> int:
    """FLOPs of one node; 0 for operators without products.

    Args:
        inputs, outputs: shapes in the operator's own order; None where one is not given or not known.
        attributes: the node's plain attributes.
    """
    left = inputs[0] if inputs else None
    right = _at(inputs, WEIGHTS_AT.get(operator, 1))
    out = _at(outputs, 0)
    if left is None or out is None:
        return 0
    if operator in CONVOLUTIONS and right:
        return 2 * math.prod(out) * math.prod(right[1:])  # right: (out, in / groups, *kernel)
    if operator == "ConvTranspose" and right:
        return 2 * math.prod(left) * math.prod(right[1:])  # right: (in, out / groups, *kernel)
    if operator in MATMULS:
        transposed = attributes.get("transA", 0) and len(left) > 1
        return 2 * math.prod(out) * (left[-2] if transposed else left[-1])
    if operator in ("Gemm", "FusedGemm"):
        return 2 * math.prod(out) * left[0 if attributes.get("transA", 0) else 1]
    if operator in RECURRENT and right:
        steps, rows = (left[1], left[0]) if attributes.get("layout", 0) else (left[0], left[1])
        return 2 * steps * rows * (math.prod(right) + math.prod(_at(inputs, 2) or (0,)))
    if operator in ATTENTIONS:
        return _attention(operator, left, right, inputs)
    if operator == "Einsum":
        return _einsum(attributes.get("equation", b""), inputs)
    if operator == "DFT":
        length = out[int(attributes.get("axis", 1))] if out else 2
        return round(5.0 * math.prod(out) / 2 * math.log2(max(length, 2)))
    return 0


def _attention(operator: str, query: Shape, second: Shape | None, inputs: Shapes) -> int:
    """Scores and weighted values; `Attention` of com.microsoft multiplies by its input weights before."""
    if operator in ("Attention", "QAttention") and second and len(second) == 2 and len(query) == 3:
        rows, length, width = query  # second: weights (width, 3 * hidden)
        hidden = second[1] // 3
        return 2 * rows * length * width * second[1] + 4 * rows * length * length * hidden
    if second is None:
        return 0
    value = _at(inputs, 2) or second
    if len(query) == 4:  # (rows, heads, length, width), keys alike
        return 2 * math.prod(query[:3]) * second[2] * (query[3] + value[3])
    keys = second[2] if len(second) == 4 else second[1]
    hidden = value[-1] if len(value) == 3 else query[2]
    return 2 * query[0] * query[1] * keys * (query[2] + hidden)


def _einsum(equation: bytes | str, inputs: Shapes) -> int:
    """Two operands: every combination of letters is one multiplication with addition."""
    text = (equation.decode() if isinstance(equation, bytes) else equation).replace(" ", "")
    terms = text.split("->")[0].split(",")
    if "..." in text or len(terms) != 2:
        return 0
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, inputs, strict=False):
        sizes.update(zip(term, shape or (), strict=False))
    return 2 * math.prod(sizes.values())


def _at(shapes: Shapes, index: int) -> Shape | None:
    return shapes[index] if index < len(shapes) else None
