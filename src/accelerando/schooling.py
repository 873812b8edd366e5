"""What the owner gives for retraining (labels, a loss, a way to vary rows), tried on a few rows before any work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from accelerando import metric as metrics
from accelerando.errors import DataError, UsageError
from accelerando.metric import Metric
from accelerando.signature import Array, flatten, to_numpy
from accelerando.workload import Chunk, Form, Model, Samples

FEW = 8  # rows to try things on


def schooled(
    rows: Samples,
    model: Model,
    metric: Metric,
    like: Array | None,
    loss: Callable[[Any, Any], Any] | None,
    augment: Callable[[Any], Any] | None,
) -> Samples:
    """The training rows, their labels as lessons take them: class numbers that are floats become whole numbers.

    Args:
        model: the original.
        like: the labels that it is judged by.
        loss, augment: as `adopt` takes them.

    Raises:
        DataError: the labels do not fit the model's outputs, and there is no loss of the owner's that they might fit.
        UsageError: the loss or the augmentation fails, or gives something else than it must.
    """
    if model.form is not Form.TORCH:
        return rows
    rows = Samples(tuple(replace(chunk, targets=_signed(chunk.targets)) for chunk in rows.chunks))
    used = rows.chunks[0].targets is not None and not metric.of_original
    if used and loss is None and metric.name in metrics.METRICS and like is not None and like.dtype.kind in "iub":
        rows = Samples(tuple(_whole(chunk, like) for chunk in rows.chunks))
    few = _telling(rows)
    if augment is not None:
        _on_a_side(lambda: varied_by(augment, _tensors(few.inputs)))
    if loss is not None:
        if few.targets is None:
            raise UsageError(
                "loss= compares answers with labels, and train= has none; give labels too, or leave it out"
            )
        _try_loss(model, few, loss)
    elif used:
        _check_labels(model, metric, few)
    return rows


def loss_of(loss: Callable[[Any, Any], Any], answer: Any, targets: Any) -> Any:
    """The owner's loss: a scalar tensor.

    Raises:
        UsageError: it raised, or what it gave is no scalar tensor.
    """
    try:
        found = loss(answer, targets)
    except Exception as error:
        raise UsageError(
            f"loss= failed: {_said(error)}; it is given the model's answer{_shape(answer)} and the targets"
            f"{_shape(targets)}, and must give a scalar tensor"
        ) from error
    if not hasattr(found, "backward") or found.numel() != 1:
        raise UsageError(f"loss= gave a {type(found).__name__}{_shape(found)}, but must give a scalar tensor")
    return found.reshape(())


def varied_by(augment: Callable[[Any], Any], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Flat inputs in the owner's variation.

    Raises:
        UsageError: it raised, or gave something else than tensors of the same shapes and types.
    """
    try:
        varied = tuple(augment(inputs))
        wanted, got = ([(str(x.dtype), tuple(x.shape)) for x in some] for some in (inputs, varied))
    except Exception as error:
        raise UsageError(
            f"augment= failed: {_said(error)}; it must take a tuple of tensors and give another"
        ) from error
    if wanted != got:
        raise UsageError(f"augment= was given {wanted} and gave {got}, but must keep them")
    return varied


def _signed(targets: Array | None) -> Array | None:
    """Labels of a type that torch computes with."""
    if targets is None or targets.dtype.kind != "u" or targets.dtype == np.uint8:
        return targets
    return targets.astype(np.int64)


def _whole(chunk: Chunk, like: Array) -> Chunk:
    """Rows whose labels are whole numbers, as those are that the model is judged by.

    Raises:
        DataError: they have another number of axes.
    """
    targets = chunk.targets
    assert targets is not None
    if targets[0].size != like[0].size and targets.ndim != like.ndim:
        raise DataError(
            f"train: the labels are {targets.dtype}{targets.shape}, but those of data are {like.dtype}{like.shape}; "
            "give class numbers in both (of one-hot labels, targets.argmax(1))"
        )
    if targets.dtype.kind == "f" and bool((targets == np.floor(targets)).all()):
        return replace(chunk, targets=targets.astype(np.int64))
    return chunk


def _telling(rows: Samples) -> Chunk:
    """A few rows of one shape, the one with the greatest label among them."""

    def greatest(chunk: Chunk) -> float:
        return -np.inf if chunk.targets is None or not chunk.targets.size else float(chunk.targets.max())

    chunk = max(rows.chunks, key=greatest)
    some = np.linspace(0, len(chunk) - 1, min(FEW, len(chunk))).astype(int)
    if chunk.targets is not None and chunk.targets.size:
        some = np.union1d(some, [chunk.targets.reshape(len(chunk), -1).max(1).argmax()])
    return chunk.rows(some)


def _check_labels(model: Model, metric: Metric, few: Chunk) -> None:
    """Labels must be such as the metric takes for these outputs, and the obvious one, if there is one."""
    if few.targets is not None and few.targets[0].size == 1 and few.targets.dtype.kind == "i":
        few = few.rows(few.targets.reshape(-1) >= 0)  # no lesson learns from the others
    if few.targets is None or not len(few):
        return
    with _torch().no_grad():
        leaves, _ = flatten(_answer(model, few))
    answer = model.signature.answer([to_numpy(x) for x in leaves])
    judges = [metric] if metric.name in metrics.METRICS else []
    with contextlib.suppress(DataError):  # nothing is obvious: lessons will say that they learn without labels
        judges.append(metrics.guess(answer, few.targets))
    for judge in judges:
        try:
            judge.scores(answer, few.targets)
        except DataError as error:
            raise DataError(f"train: {error}; give labels as data has them, or loss=, or none at all") from error


def _try_loss(model: Model, few: Chunk, loss: Callable[[Any, Any], Any]) -> None:
    assert few.targets is not None
    torch, (targets,) = _torch(), _tensors([few.targets])
    learning = [p for p in model.content.parameters() if p.is_floating_point() and not p.requires_grad]

    def attempt() -> tuple[Any, bool]:
        answer = _answer(model, few)
        learns = any(getattr(x, "requires_grad", False) for x in flatten(answer)[0])
        return loss_of(loss, answer, targets), learns

    for parameter in learning:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            found, learns = _on_a_side(attempt)
    finally:
        for parameter in learning:
            parameter.requires_grad_(False)
    if not bool(torch.isfinite(found)):
        raise UsageError(f"loss= gave {float(found.detach())} for the original's own answers; it must be finite")
    if learns and not found.requires_grad:
        raise UsageError(
            "loss= gave a tensor that does not depend on the model's answer; compute it from the answer by torch "
            "alone, without detach(), item() or numpy"
        )


def _answer(model: Model, few: Chunk) -> Any:
    args, kwargs = model.signature.call(_tensors(few.inputs))
    return model.content(*args, **kwargs)


def _on_a_side(work: Callable[[], Any]) -> Any:
    """Do work that may draw random numbers, of which none are missing afterwards."""
    with _torch().random.fork_rng(devices=()):
        return work()


def _tensors(arrays: Sequence[Array]) -> tuple[Any, ...]:
    return tuple(_torch().from_numpy(np.array(x)) for x in arrays)


def _torch() -> Any:
    import torch

    return torch


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def _shape(value: Any) -> str:
    return f" {str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}" if hasattr(value, "shape") else ""
