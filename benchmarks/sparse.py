"""Products that skip zeros against dense ones, at the shares of zeros that magnitude pruning leaves."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np

from accelerando.backends.onnxruntime_sparse import OnnxruntimeSparse
from accelerando.recipe import Recipe
from accelerando.techniques.export_onnx import ExportOnnx
from accelerando.techniques.sparsify import Sparsify
from accelerando.workload import Model, Samples, flat_module
from benchmarks.recipes import compare, normal_rows, plain_model, str_of
from benchmarks.results import record, table

WIDTH, LAYERS = 2048, 3
DENSE = ("ONNX Runtime", "ONNX Runtime, 1 thread", "OpenVINO")
ROUNDS = 40


def run(name: str, rounds: int = ROUNDS) -> None:
    import torch

    torch.manual_seed(0)
    parts: list[torch.nn.Module] = []
    for _ in range(LAYERS):
        parts += [torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU()]
    module = torch.nn.Sequential(*parts, torch.nn.Linear(WIDTH, 10)).eval().requires_grad_(False)
    model, rows = plain_model(module, (WIDTH,), (10,)), normal_rows(64, WIDTH)
    found = []
    for share in (0.9, 0.95, 0.99):
        zeroed = Sparsify(share).apply(model, rows, Path())  # it writes no files
        lines = compare(zeroed, Recipe((ExportOnnx(),), OnnxruntimeSparse()), rows, exact(zeroed, rows), DENSE, rounds)
        found += [
            [f"{share:.0%}", x.name, f"{x.seconds * 1e6:,.0f} us", str_of(x.ours_over_it), f"{x.off:.1e}"]
            for x in lines
        ]
    head = ["zeros", "contestant", "p50", "ours over it", "off by, of the largest answer"]
    text = (
        f"{LAYERS} linear layers of {WIDTH} x {WIDTH} and one of {WIDTH} x 10, untrained; the dense contestants run "
        f"the same zeros. Ours is `{Recipe((Sparsify(0.95), ExportOnnx()), OnnxruntimeSparse())}` and its like."
    )
    record(name, f"A network of {WIDTH}-wide layers with zeros, batch 1", f"{text}\n\n{table(head, found)}")


def exact(model: Model, rows: Samples) -> np.ndarray:
    """The answers in float64."""
    import torch

    (chunk,) = rows.chunks
    with torch.no_grad():
        flat = copy.deepcopy(flat_module(model)).double()
        return flat(torch.from_numpy(chunk.inputs[0]).double())[0].numpy()
