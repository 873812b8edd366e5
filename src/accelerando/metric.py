"""Quality, per sample.

A metric is a matrix of per-sample statistics (n, k) and a function of their means: accuracy is the mean of
right-or-wrong, macro F1 is a function of the mean (tp, fp, fn) of every class, R2 of four means.  So one
paired bootstrap over samples serves them all, and set-level metrics cost no more than sample-level ones.
A sample's statistics never depend on which other samples share its batch, so batches may be scored one by one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accelerando.errors import DataError
from accelerando.signature import Array, flatten, to_numpy

Floats = NDArray[np.float64]
Statistics = Callable[[Array, Array], Floats]  # outputs (n, ...), targets (n, ...) -> (n, k)
Value = Callable[[Floats], Floats]  # means (..., k) -> (...)


@dataclass(frozen=True)
class Metric:
    """How good answers are.

    Args:
        name: as the user writes it; a function's own name where the user gave one.
        higher_is_better: the direction of quality.
        of_original: judged against the original's own outputs, so no labels are needed.
        statistics: outputs and targets to per-sample statistics (n, k).
        value: means (..., k) to the metric's value (...).
        source: the text of a user's own function, by which another one of the same name is told from it.
    """

    name: str
    higher_is_better: bool
    of_original: bool
    statistics: Callable[[Any, Any], Floats]
    value: Value
    source: str = ""

    def scores(self, answer: Any, targets: Array) -> Floats:
        """Per-sample statistics (n, k) of a model's answer to n samples.

        Raises:
            DataError: the metric does not fit the answer and the targets.
        """
        try:
            found = np.asarray(self.statistics(answer, targets), dtype=np.float64)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"the metric {self.name!r} failed on the model's outputs: {error}") from error
        found = found[:, None] if found.ndim == 1 else found
        if found.ndim != 2 or len(found) != len(targets):
            raise DataError(
                f"the metric {self.name!r} must give one score per sample, ({len(targets)},), but gave {found.shape}"
            )
        if not np.isfinite(found).all():
            raise DataError(
                f"the metric {self.name!r} gave NaN or infinity for {int((~np.isfinite(found)).any(1).sum())} samples"
            )
        return found


def named(name: str) -> Metric:
    """The metric of this name.

    Raises:
        DataError: there is none; the message lists those there are.
    """
    key = ALIASES.get(name.strip().lower().replace("_", "-"), name.strip().lower().replace("_", "-"))
    if key not in METRICS:
        raise DataError(f"there is no metric {name!r}; there are {', '.join(METRICS)}; or give a function")
    return METRICS[key]


def of_function(function: Callable[[Any, Any], Any], higher_is_better: bool = True) -> Metric:
    """A user's function (outputs, targets) -> per-sample scores (n,); its mean is the metric.

    An attribute `higher_is_better` of the function counts more than the argument.
    """
    name = getattr(function, "__name__", type(function).__name__)
    if name in METRICS or name in ALIASES:
        name = f"own {name}"  # evidence finds a metric's value by its name, and ours may not be the user's
    higher = bool(getattr(function, "higher_is_better", higher_is_better))
    statistics = lambda answer, targets: np.asarray(to_numpy(function(answer, targets)))  # noqa: E731
    return Metric(name, higher, False, statistics, _mean, source_of(function))


def source_of(thing: Any) -> str:
    """The source text of a function or a class, or what comes nearest to it where there is none."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        code = getattr(thing, "__code__", None)
        return f"{code.co_code!r}{code.co_consts!r}" if code else repr(type(thing))


def guess(answer: Any, targets: Array | None) -> Metric:
    """The obvious metric for these outputs and targets.

    Raises:
        DataError: nothing is obvious; the message says what may be asked for.
    """
    outputs = primary(answer)
    if targets is None:
        return METRICS["agreement" if outputs.ndim == 2 and 2 <= outputs.shape[1] <= 1000 else "cosine"]
    whole = targets.dtype.kind in "iub"
    column = targets.ndim == 1 or targets.shape[1:] == (1,)
    if whole and column and outputs.ndim == 2 and outputs.shape[1] > 1:
        return METRICS["accuracy"]
    if whole and outputs.dtype.kind in "iub" and outputs.shape == targets.shape:
        return METRICS["accuracy"]
    if whole and column and outputs.size == len(targets) and np.isin(targets, (0, 1)).all():
        chances = outputs.min(initial=0) >= 0 and outputs.max(initial=1) <= 1
        return METRICS["accuracy-at-half" if chances else "accuracy"]
    if whole and targets.ndim == 3 and outputs.ndim == 4:
        return METRICS["mean-iou"]
    if whole and targets.ndim == 2 and outputs.ndim == 3:
        return METRICS["perplexity"]
    if targets.dtype.kind == "f" and targets.size == outputs.size and not _one_hot(targets):
        return METRICS["mae"]
    raise DataError(
        f"no metric is obvious for outputs {outputs.dtype}{outputs.shape} and targets {targets.dtype}{targets.shape}; "
        + ("the targets look one-hot: give class numbers, targets.argmax(1); or " if _one_hot(targets) else "")
        + f"pass metric= one of {', '.join(METRICS)}, or a function"
    )


def _one_hot(targets: Array) -> bool:
    if targets.ndim != 2 or targets.shape[1] < 2:
        return False
    return bool(np.isin(targets, (0, 1)).all() and (targets.sum(axis=1) == 1).all())


def primary(answer: Any) -> Array:
    """The array that a named metric looks at: the field `logits` where there is one, else the first."""
    if isinstance(answer, dict) and "logits" in answer:
        return to_numpy(answer["logits"])
    leaves, _ = flatten(answer)
    if not leaves:
        raise DataError("the model's answer holds no array to judge")
    return to_numpy(leaves[0])


# --- the named metrics ------------------------------------------------------------------------------------------


def _mean(means: Floats) -> Floats:
    return means[..., 0]


def _needs(good: bool, name: str, outputs: Array, targets: Array, must: str) -> None:
    if not good:
        raise DataError(
            f"the metric {name!r} does not fit outputs {outputs.dtype}{outputs.shape} "
            f"and targets {targets.dtype}{targets.shape}: {must}"
        )


def _classes(name: str, outputs: Array, targets: Array, threshold: float = 0.0) -> tuple[Array, Array, int]:
    """Predicted and true class of every sample, or of every position of it, (n, ...) each; how many classes.

    The number of classes is 0 where it can't be told from the outputs' shape.
    """
    targets = targets[:, 0] if targets.ndim == 2 and targets.shape[1] == 1 else targets
    must = "targets must be whole numbers (n, ...) and outputs (n, classes, ...) or predicted classes"
    _needs(targets.dtype.kind in "iub" and targets.ndim > 0, name, outputs, targets, must)
    if outputs.dtype.kind in "iub" and outputs.size == targets.size and len(outputs) == len(targets):
        return outputs.reshape(targets.shape), targets, 0
    if outputs.size == targets.size and len(outputs) == len(targets):  # one logit: the sign decides
        binary = "with one output per target, targets must be 0 or 1"
        _needs(bool(np.isin(targets, (0, 1)).all()), name, outputs, targets, binary)
        return (outputs.reshape(targets.shape) > threshold).astype(np.int64), targets, 2
    logits = _classes_last(name, outputs, targets, must)
    classes = logits.shape[-1]
    few = f"the targets hold class {targets.max(initial=0)}, but the outputs have {classes}, counted from 0"
    _needs(int(targets.max(initial=0)) < classes, name, outputs, targets, few)
    return logits.argmax(-1), targets, classes


def _classes_last(name: str, outputs: Array, targets: Array, must: str) -> Array:
    """Logits as (n, ..., classes).

    Where both could be: language models have their classes last, (n, positions, classes); images have them first.
    """
    last = outputs.shape[:-1] == targets.shape
    first = outputs.ndim == targets.ndim + 1 and outputs.shape[:1] + outputs.shape[2:] == targets.shape
    _needs(last or first, name, outputs, targets, must)
    return outputs if last and not (first and targets.ndim > 2) else np.moveaxis(outputs, 1, -1)


def _per_sample(values: Array) -> Floats:
    """(n, ...) -> (n, 1): each sample's own mean."""
    return values.reshape(len(values), -1).mean(axis=1, dtype=np.float64)[:, None]


def _accuracy(outputs: Array, targets: Array, threshold: float = 0.0, name: str = "accuracy") -> Floats:
    """Right or wrong, (n, 1); where a sample has several positions, how many are right and are judged, (n, 2)."""
    predicted, true, _ = _classes(name, outputs, targets, threshold)
    if true.ndim == 1:
        _needs(bool((true >= 0).all()), name, outputs, targets, "a class can't be negative; drop those samples")
        return (predicted == true).astype(np.float64)[:, None]
    judged = (true >= 0).reshape(len(true), -1)  # -100 and its like mean: do not judge this position
    right = (predicted == true).reshape(len(true), -1) & judged
    return np.stack([right.sum(1), judged.sum(1)], axis=1).astype(np.float64)


def _share(means: Floats) -> Floats:
    """The mean, or the ratio of two means."""
    if means.shape[-1] == 1:
        return means[..., 0]
    return means[..., 0] / np.where(means[..., 1] > 0, means[..., 1], 1)


def _top5(outputs: Array, targets: Array) -> Floats:
    good = outputs.ndim == 2 and outputs.shape[1] > 5 and targets.size == len(targets) == len(outputs)
    must = "outputs must be (n, more than 5 classes), targets whole numbers (n,)"
    _needs(good and targets.dtype.kind in "iub", "top-5", outputs, targets, must)
    best = np.argpartition(outputs, -5, axis=1)[:, -5:]
    return (best == targets.reshape(-1, 1)).any(axis=1)[:, None].astype(np.float64)


def _counts(name: str, outputs: Array, targets: Array) -> Floats:
    """Per sample and class: true positives, false positives, false negatives: (n, 3 * classes), class by class."""
    predicted, true, classes = _classes(name, outputs, targets)
    if not classes:  # a width that hardly ever depends on the batch; empty classes do not count
        most = int(max(predicted.max(initial=0), true.max(initial=0), 31))
        classes = 1 << most.bit_length()
    n = len(true)
    row = np.repeat(np.arange(n), true[0].size if true.ndim > 1 and n else 1)
    p, t = predicted.reshape(-1), true.reshape(-1)
    inside = t >= 0  # a negative target means: do not judge this position
    _needs(bool((p >= 0).all()), name, outputs, targets, "a predicted class can't be negative")
    counts = np.zeros((n, classes, 3))
    hit, miss = inside & (p == t), inside & (p != t)
    np.add.at(counts, (row[hit], t[hit].astype(np.int64), 0), 1)
    np.add.at(counts, (row[miss], p[miss].astype(np.int64), 1), 1)
    np.add.at(counts, (row[miss], t[miss].astype(np.int64), 2), 1)
    return counts.reshape(n, 3 * classes)


def _f1_value(means: Floats) -> Floats:
    return _macro(means, lambda tp, wrong: 2 * tp / (2 * tp + wrong))


def _iou_value(means: Floats) -> Floats:
    return _macro(means, lambda tp, wrong: tp / (tp + wrong))


def _macro(means: Floats, figure: Callable[[Floats, Floats], Floats]) -> Floats:
    """The mean over classes; those that are neither true nor predicted do not count, as in scikit-learn."""
    counts = means.reshape(*means.shape[:-1], -1, 3)
    tp, wrong = counts[..., 0], counts[..., 1] + counts[..., 2]
    there = tp + wrong > 0
    values = np.where(there, figure(tp, np.where(there, wrong, 1.0)), 0.0)
    return values.sum(-1) / np.maximum(there.sum(-1), 1)


def _same_shape(name: str, outputs: Array, targets: Array) -> Floats:
    """Differences (n, numbers per sample)."""
    good = outputs.size == targets.size and outputs.shape[:1] == targets.shape[:1] and targets.size > 0
    _needs(good, name, outputs, targets, "outputs and targets must hold equally many numbers per sample")
    n = len(targets)
    return outputs.reshape(n, -1).astype(np.float64) - targets.reshape(n, -1).astype(np.float64)


def _mae(outputs: Array, targets: Array) -> Floats:
    return np.abs(_same_shape("mae", outputs, targets)).mean(axis=1)[:, None]


def _mse(outputs: Array, targets: Array) -> Floats:
    return (_same_shape("mse", outputs, targets) ** 2).mean(axis=1)[:, None]


def _r2(outputs: Array, targets: Array) -> Floats:
    """Per sample and output: squared error, target, squared target: (n, 3 * outputs), output by output.

    Targets of more axes, such as images, are pooled into one output.
    """
    error, y = _same_shape("r2", outputs, targets), targets.reshape(len(targets), -1).astype(np.float64)
    columns = np.stack([error**2, y, y**2], axis=2)
    if targets.ndim > 2 or y.shape[1] > 64:
        columns = columns.mean(axis=1, keepdims=True)
    return columns.reshape(len(y), -1)


def _r2_value(means: Floats) -> Floats:
    """The mean over outputs, as in scikit-learn; an output that never changes counts 1 if exact, else 0."""
    parts = means.reshape(*means.shape[:-1], -1, 3)
    error, y, y2 = (parts[..., i] for i in range(3))
    spread = y2 - y**2
    there = spread > 1e-12 * y2
    values = np.where(there, 1 - error / np.where(there, spread, 1), error == 0)
    return values.mean(-1)


def _cross_entropy(outputs: Array, targets: Array) -> Floats:
    """Per sample: the loss summed over its positions, and how many were judged: (n, 2).  Outputs are logits."""
    must = "outputs must be logits (n, classes) or (n, positions, classes), targets whole numbers"
    targets = targets[:, 0] if targets.ndim == 2 and targets.shape[1] == 1 else targets
    _needs(targets.dtype.kind in "iu" and targets.ndim > 0, "cross-entropy", outputs, targets, must)
    if outputs.size == targets.size and len(outputs) == len(targets):  # one logit: its rival is 0
        outputs = np.stack([np.zeros(targets.shape), outputs.reshape(targets.shape)], axis=-1)
    logits = _classes_last("cross-entropy", outputs, targets, must).astype(np.float64)
    few = f"the targets hold class {targets.max(initial=0)}, but there are {logits.shape[-1]}, counted from 0"
    _needs(int(targets.max(initial=0)) < logits.shape[-1], "cross-entropy", outputs, targets, few)
    peak = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - peak).sum(-1)) + peak[..., 0]
    judged = targets >= 0  # -100 and its like mean: do not judge this position
    picked = np.take_along_axis(logits, np.where(judged, targets, 0)[..., None], axis=-1)[..., 0]
    loss = np.where(judged, log_sum - picked, 0.0).reshape(len(targets), -1).sum(1)
    return np.stack([loss, judged.reshape(len(targets), -1).sum(1).astype(np.float64)], axis=1)


def _psnr(outputs: Array, targets: Array) -> Floats:
    """Decibels of each sample; the peak is 255 for uint8 targets, else the range of the sample's own target."""
    error = (_same_shape("psnr", outputs, targets) ** 2).mean(axis=1)
    flat = targets.reshape(len(targets), -1).astype(np.float64)
    peak = np.full(len(flat), 255.0) if targets.dtype == np.uint8 else np.ptp(flat, axis=1)
    peak = np.where(peak > 0, peak, 1.0)
    return (10 * np.log10(peak**2 / np.maximum(error, 1e-12 * peak**2)))[:, None]


def _cosine(outputs: Array, targets: Array) -> Floats:
    _same_shape("cosine", outputs, targets)
    n = len(targets)
    a, b = outputs.reshape(n, -1).astype(np.float64), targets.reshape(n, -1).astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.where(norms > 0, (a * b).sum(1) / np.where(norms > 0, norms, 1), (a == b).all(1))[:, None]


def _agreement(outputs: Array, targets: Array) -> Floats:
    """The share of a sample's answers that are the same.

    The same class where there are classes (last, or after the batch for images); whole numbers must be equal, and
    one number per sample within 1 % of the size of such numbers in the batch.
    """
    _needs(outputs.shape == targets.shape, "agreement", outputs, targets, "both must have one shape")
    if outputs.dtype.kind in "iub":
        return _per_sample(outputs == targets)
    if outputs.ndim >= 2 and outputs.shape[1] > 1:
        axis = -1 if outputs.ndim == 3 else 1
        return _per_sample(outputs.argmax(axis) == targets.argmax(axis))
    size = float(np.sqrt(np.mean(targets.astype(np.float64) ** 2)))
    return _per_sample(np.abs(outputs.astype(np.float64) - targets) <= 0.01 * size)


def _metric(name: str, higher: bool, statistics: Statistics, value: Value = _mean, of_original: bool = False) -> Metric:
    return Metric(name, higher, of_original, lambda answer, targets: statistics(primary(answer), targets), value)


METRICS = {
    m.name: m
    for m in (
        _metric("accuracy", True, _accuracy, _share),
        _metric("accuracy-at-half", True, lambda o, t: _accuracy(o, t, threshold=0.5, name="accuracy-at-half"), _share),
        _metric("top-5", True, _top5),
        _metric("f1", True, lambda o, t: _counts("f1", o, t), _f1_value),
        _metric("mean-iou", True, lambda o, t: _counts("mean-iou", o, t), _iou_value),
        _metric("mae", False, _mae),
        _metric("mse", False, _mse),
        _metric("rmse", False, _mse, lambda means: np.sqrt(means[..., 0])),
        _metric("r2", True, _r2, _r2_value),
        _metric("cross-entropy", False, _cross_entropy, _share),
        _metric(
            "perplexity",
            False,
            _cross_entropy,
            lambda means: np.exp(np.minimum(_share(means), math.log(1e300))),
        ),
        _metric("psnr", True, _psnr),
        _metric("cosine", True, _cosine, of_original=True),
        _metric("agreement", True, _agreement, of_original=True),
    )
}
ALIASES = {
    "acc": "accuracy",
    "accuracy-at-0.5": "accuracy-at-half",
    "top5": "top-5",
    "macro-f1": "f1",
    "f1-macro": "f1",
    "miou": "mean-iou",
    "iou": "mean-iou",
    "loss": "cross-entropy",
    "fidelity": "cosine",
    "cosine-fidelity": "cosine",
    "r-squared": "r2",
}
