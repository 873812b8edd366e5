"""Which layers suffer most from fewer bits: the ranking behind every `keep` knob.

One layer at a time is quantized, all others stay in float, and the error of the model's outputs on a few
calibration rows is the layer's sensitivity; the worst are kept in float.  This is the sensitivity analysis of
H. Wu et al., "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation"
(arXiv:2004.09602, under partial quantization).  Two changes: the error is the normalized mean squared
error of the outputs (as NNCF's accuracy control ranks) instead of the accuracy, for it needs no labels and is
far less noisy on 24 rows; and the ranges are calibrated once for all layers.

A cheaper proxy, comparing each activation of the float model with that of the wholly quantized one
(`onnxruntime.quantization.qdq_loss_debug`), was not taken: there the error of a late layer holds the errors of
all before it, so it ranks by depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from accelerando.signature import Array

Answers = Sequence[Sequence[Array]]  # [batch][output]


def kept_layers(
    layers: Sequence[str], keep: float, reference: Callable[[], Answers], only: Callable[[str], Answers]
) -> list[str]:
    """The layers to leave in float, the most sensitive first.

    Args:
        layers: the names of the layers that would be quantized.
        keep: the share of them to leave in float, rounded up; at 0 nothing is measured.
        reference: the float model's answers on the ranking rows.
        only: the answers with this layer alone quantized, on the same rows.
    """
    count = keep_count(keep, len(layers))
    if count == 0 or count >= len(layers):
        return list(layers[:count])
    expected = reference()
    errors = {layer: output_error(expected, only(layer)) for layer in layers}
    return sorted(layers, key=lambda layer: -errors[layer])[:count]  # a stable sort: ties keep the graph's order


def keep_count(keep: float, layers: int) -> int:
    """How many of so many layers a share is, rounded up."""
    return min(layers, math.ceil(round(keep * layers, 9)))


def output_error(expected: Answers, got: Answers) -> float:
    """The mean squared error over the mean square of what was expected, summed over the float outputs.

    NaN or infinity in an answer is an infinite error.
    """
    total = 0.0
    for column in range(len(expected[0])):
        if expected[0][column].dtype.kind != "f":
            continue
        wanted = [np.asarray(batch[column], np.float64) for batch in expected]
        found = [np.asarray(batch[column], np.float64) for batch in got]
        squares = sum(float(np.square(a - b).sum()) for a, b in zip(wanted, found, strict=True))
        total += squares / max(sum(float(np.square(a).sum()) for a in wanted), 1e-30)
    return total if math.isfinite(total) else math.inf
