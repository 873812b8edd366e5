"""Scores of every sample of a split, by the model as it was loaded from disk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from accelerando.errors import Reason, RefusalError
from accelerando.interval import Floats
from accelerando.metric import Metric
from accelerando.recipe import Runner
from accelerando.signature import Array, Signature
from accelerando.workload import EVAL_ROWS, Samples, filled


def answers(run: Runner, signature: Signature, samples: Samples) -> list[tuple[list[Array], Array | None]]:
    """The flat outputs and targets of every batch, checked against the signature.

    Where the model takes one batch size only, the last batch is filled up with its own rows.

    Raises:
        RefusalError: WRONG_OUTPUT or NOT_FINITE.
    """
    fixed = signature.fixed_batch
    found = []
    for batch in samples.batches(fixed or EVAL_ROWS):
        count = len(batch)
        inputs = filled(batch.inputs, fixed)
        outputs = run(inputs)
        check(outputs, signature, len(inputs[0]))
        found.append(([o[:count] for o in outputs], batch.targets))
    return found


def check(outputs: Sequence[Array], signature: Signature, rows: int) -> None:
    """Whether the outputs of `rows` samples are what the original would give, in shape, type and finiteness.

    Raises:
        RefusalError: WRONG_OUTPUT or NOT_FINITE.
    """
    if len(outputs) != len(signature.outputs):
        raise RefusalError(
            Reason.WRONG_OUTPUT, f"{len(outputs)} outputs, where the original gives {len(signature.outputs)}"
        )
    for port, out in zip(signature.outputs, outputs, strict=True):
        if not isinstance(out, np.ndarray) or not port.fits(out) or len(out) != rows:
            what = f"{out.dtype}{out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
            raise RefusalError(Reason.WRONG_OUTPUT, f"{what} for {rows} samples, where the original gives {port}")
        if out.dtype.kind == "f" and not np.isfinite(out).all():
            raise RefusalError(Reason.NOT_FINITE, f"{port.name} is not finite for {_bad_rows(out)} of {rows} samples")


def score(run: Runner, signature: Signature, samples: Samples, metric: Metric) -> Floats:
    """Per-sample statistics (n, k) of a loaded model.

    Raises:
        RefusalError: WRONG_OUTPUT or NOT_FINITE.
        DataError: the metric does not fit.
    """
    parts = []
    for outputs, targets in answers(run, signature, samples):
        assert targets is not None
        parts.append(metric.scores(signature.answer(outputs), targets))
    widest = max(p.shape[1] for p in parts)
    if any(p.shape[1] != widest for p in parts):
        raise RefusalError(
            Reason.WRONG_OUTPUT,
            f"the metric {metric.name} gave {widest} columns for some batches and fewer for others",
        )
    return np.concatenate(parts)


def _bad_rows(out: Array) -> int:
    return int((~np.isfinite(out.reshape(len(out), -1))).any(axis=1).sum())
