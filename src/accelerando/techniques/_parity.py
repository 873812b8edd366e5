"""Is it still the same function?  What every exact technique asks before it hands its model on.

The answers are compared on rows of the calibration split, at more than one batch size, because an exporter that
baked a size into the graph is right at that size only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.errors import Reason, RefusalError
from accelerando.signature import Array, Signature, to_numpy
from accelerando.workload import Form, Model, Samples, flat_module

TOLERANCE = 1e-3  # of the largest answer; float32 kernels that add in another order stay a hundred times below


def example(signature: Signature, data: Samples) -> list[Array]:
    """Inputs to trace with: the longest rows, and a batch size of at least 2 that no other axis has.

    A tracer may take an axis of length 1 for a constant, and two axes of one length for the same axis.
    """
    chunk = max(data.chunks, key=lambda c: sum(x[0].size for x in c.inputs))
    taken = {length for x in chunk.inputs for length in x.shape[1:]}
    size = next(n for n in (2, 3, 5, 7, 11, 13, 17) if n not in taken or n == 17)
    return batch(signature, list(chunk.inputs), size)


def probes(signature: Signature, data: Samples) -> Iterator[list[Array]]:
    """Inputs to compare answers on: two batch sizes, and up to two lengths of the other dynamic axes."""
    chunks = sorted(data.chunks, key=lambda c: sum(x[0].size for x in c.inputs))
    for chunk, size in zip({0: chunks[0], 1: chunks[-1]}.values(), (1, 4), strict=True):
        yield batch(signature, list(chunk.inputs), size)


def batch(signature: Signature, inputs: Sequence[Array], size: int) -> list[Array]:
    """`size` rows, repeated where there are too few; as many as the signature says where its batch is fixed."""
    fixed = signature.inputs[0].shape[0]
    rows = np.arange(fixed if isinstance(fixed, int) else size)
    return [np.ascontiguousarray(x[rows % len(x)]) for x in inputs]


def answer_torch(module: Any, leaves: Sequence[Array]) -> list[Array]:
    """The flat outputs of a flat torch module (or of an exported one)."""
    import torch

    with torch.no_grad():
        return [to_numpy(y) for y in module(*(torch.from_numpy(np.array(x)) for x in leaves))]


def session_of(path: Path | str) -> Any:
    """An ONNX Runtime session that is in no hurry and says nothing.

    Raises:
        RefusalError: ONNX Runtime does not load the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RefusalError(Reason.UNSUPPORTED, f"ONNX Runtime does not load it: {first_lines(error)}") from error


def answer_onnx(session: Any, signature: Signature, leaves: Sequence[Array]) -> list[Array]:
    """The flat outputs of an ONNX Runtime session whose inputs are the signature's.

    Raises:
        RefusalError: ONNX Runtime stops, as it does where a size was baked into the graph.
    """
    feed = {port.name: x for port, x in zip(signature.inputs, leaves, strict=True)}
    try:
        return list(session.run([port.name for port in signature.outputs], feed))
    except Exception as error:
        shapes = ", ".join(f"{k} {v.shape}" for k, v in feed.items())
        raise RefusalError(Reason.NOT_SAME, f"it fails on inputs of {shapes}: {first_lines(error)}") from error


def ensure_same(signature: Signature, expected: Sequence[Array], got: Sequence[Array]) -> float:
    """The largest difference, as a share of the largest answer of its output.

    Raises:
        RefusalError: a shape or type differs (WRONG_OUTPUT), or a value by more than `TOLERANCE` (NOT_SAME).
    """
    worst = 0.0
    for port, want, have in zip(signature.outputs, expected, got, strict=True):
        if want.shape != have.shape or want.dtype != have.dtype:
            raise RefusalError(
                Reason.WRONG_OUTPUT,
                f"{port.name} is {have.dtype}{have.shape}, but the original gives {want.dtype}{want.shape}",
            )
        if want.dtype.kind != "f":
            if not np.array_equal(want, have):
                raise RefusalError(
                    Reason.NOT_SAME, f"{port.name} differs in {np.mean(want != have):.1%} of its entries"
                )
            continue
        scale = max(float(np.nanmax(np.abs(want), initial=0.0)), 1e-6)
        off = np.abs(want.astype(np.float64) - have.astype(np.float64)) / scale
        share = float(np.max(np.where(np.isnan(want) & np.isnan(have), 0.0, off), initial=0.0))
        if not share <= TOLERANCE:  # a NaN is not the same either
            raise RefusalError(
                Reason.NOT_SAME,
                f"{port.name} is off by {share:.2g} of its largest value for inputs of {len(want)} rows; "
                f"at most {TOLERANCE} is the noise of float32",
            )
        worst = max(worst, share)
    return worst


def ensure_same_onnx(model: Model, path: Path, data: Samples) -> float:
    """How far the ONNX file at `path` is from `model` (TORCH or ONNX), as a share of the largest answer.

    Raises:
        RefusalError: it is not the same function, or ONNX Runtime can't run it.
    """
    signature, after = model.signature, session_of(path)
    if model.form is Form.TORCH:
        before = partial(answer_torch, flat_module(model))
    else:
        before = partial(answer_onnx, session_of(model.content), signature)
    worst = 0.0
    for leaves in probes(signature, data):
        worst = max(worst, ensure_same(signature, before(leaves), answer_onnx(after, signature, leaves)))
    return worst


def first_lines(error: BaseException, most: int = 300) -> str:
    """What a library said, in at most a few lines: the type and message of its first error, without its advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    message = str(error)
    for advice in ("For more information", "(Size-like symbols", "Caused by:", "To fix the error", "from user code"):
        message = message.partition(advice)[0] or message
    text = " ".join(f"{type(error).__name__}: {message}".split()).rstrip(" :!")
    return text if len(text) <= most else f"{text[: most - 3]}..."
