"""A long convolution by FFT against the direct form of every runtime."""

from __future__ import annotations

import numpy as np

from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.backends.openvino import Openvino
from accelerando.recipe import Recipe
from accelerando.techniques._fft_layer import exact_convolution
from accelerando.techniques.export_onnx import ExportOnnx
from accelerando.techniques.fft_convolution import FftConvolution
from benchmarks.recipes import compare, lines_table, normal_rows, plain_model, str_of
from benchmarks.results import record

CHANNELS, KERNEL, LENGTH = 8, 4096, 16384
DIRECT = ("ONNX Runtime", "ONNX Runtime, 1 thread", "OpenVINO")  # torch's own takes most of a minute for a row
ASKED, OFF = 5.0, 1e-4
ROUNDS = 15


def run(name: str, rounds: int = ROUNDS) -> None:
    import torch

    torch.manual_seed(0)
    conv = torch.nn.Conv1d(CHANNELS, CHANNELS, KERNEL, padding="same").eval().requires_grad_(False)
    model = plain_model(conv, (CHANNELS, LENGTH), (CHANNELS, LENGTH))
    rows = normal_rows(4, CHANNELS, LENGTH)
    exact = exact_convolution(conv, torch.from_numpy(rows.chunks[0].inputs[0])).numpy()
    parts = []
    for backend in (Onnxruntime(), Onnxruntime(batch=1), Openvino()):
        recipe = Recipe((FftConvolution(), ExportOnnx()), backend)
        lines = compare(model, recipe, rows, np.asarray(exact), DIRECT, rounds)
        ours, best = lines[0], min(lines[1:], key=lambda x: x.seconds)
        met = best.ours_over_it.low >= ASKED and ours.off <= OFF
        parts.append(
            f"`{recipe}`:\n\n{lines_table(lines)}\n\nOurs over the fastest direct form ({best.name}): "
            f"**{str_of(best.ours_over_it)}**, off by {ours.off:.1e}; asked for: at least {ASKED:.0f}, "
            f"within {OFF:.0e}, {'reached' if met else 'not reached'}."
        )
    record(name, f"A convolution of {CHANNELS} channels, kernel {KERNEL}, length {LENGTH}, batch 1", "\n\n".join(parts))
