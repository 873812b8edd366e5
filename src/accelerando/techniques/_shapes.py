"""Does a reshaped model still answer in the shapes and types that it must?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from accelerando.errors import Reason, RefusalError
from accelerando.techniques._parity import answer_torch, batch, first_lines
from accelerando.workload import Model, Samples, flat_module

ROWS = (1, 3)
FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AttributeError, AssertionError)  # of a user's code
SAME = 1e-4  # of the largest answer: sums in another order differ by less


def ensure_shaped(model: Model, module: Any, data: Samples) -> None:
    """Run a module that is to take the model's place on one row and on three.

    Raises:
        RefusalError: it does not run (UNSUPPORTED), or answers in other shapes or types (UNSUPPORTED) or with NaN.
    """
    before, after = flat_module(model), flat_module(replace(model, content=module))
    for chunk, rows in zip((data.chunks[0], data.chunks[-1]), ROWS, strict=True):
        leaves = batch(model.signature, chunk.inputs, rows)
        try:
            answers = answer_torch(after, leaves)
        except Exception as error:
            raise RefusalError(
                Reason.UNSUPPORTED, f"its code does not run with other parts: {first_lines(error)}"
            ) from error
        for port, want, have in zip(model.signature.outputs, answer_torch(before, leaves), answers, strict=True):
            if want.shape != have.shape or want.dtype != have.dtype:
                raise RefusalError(
                    Reason.UNSUPPORTED,
                    f"{port.name} would be {have.dtype}{have.shape}, but must be {want.dtype}{want.shape}",
                )
            if np.isfinite(want).all() and not np.isfinite(have).all():
                raise RefusalError(Reason.NOT_FINITE, f"{port.name} of {rows} rows")


def with_first(args: Any, kwargs: Any, first: Any) -> tuple[Any, Any]:
    """A call's arguments with another first one, by position or by name."""
    if args:
        return (first, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): first}


def close(want: Any, have: Any) -> bool:
    """Whether two tensors are the same but for the noise of float32."""
    if want.shape != have.shape:
        return False
    if not want.is_floating_point():
        return bool((want == have).all())
    return bool((want - have).abs().max() <= SAME * want.abs().max().clamp_min(1e-6))
