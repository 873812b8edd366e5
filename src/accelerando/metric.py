"""Quality, per sample.

A metric is a matrix of per-sample statistics (n, k) and a function of their means: accuracy is the mean of
right-or-wrong, macro F1 is a function of the mean (tp, fp, fn) of every class, R2 of four means.  So one
paired bootstrap over samples serves them all, and set-level metrics cost no more than sample-level ones.
"""

from __future__ import annotations

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
    """

    name: str
    higher_is_better: bool
    of_original: bool
    statistics: Callable[[Any, Any], Floats]
    value: Value

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
    """A user's function (outputs, targets) -> per-sample scores (n,); its mean is the metric."""
    name = getattr(function, "__name__", type(function).__name__)
    higher = bool(getattr(function, "higher_is_better", higher_is_better))
    return Metric(
        name, higher, False, lambda answer, targets: np.asarray(to_numpy(function(answer, targets))), _mean
    )


def guess(answer: Any, targets: Array | None) -> Metric:
    """The obvious metric for these outputs and targets.

    Raises:
        DataError: nothing is obvious; the message says what may be asked for.
    """
    outputs = primary(answer)
    if targets is None:
        return METRICS["agreement" if outputs.ndim == 2 and 2 <= outputs.shape[1] <= 1000 else "cosine"]
    whole = targets.dtype.kind in "iub"
    if whole and targets.ndim == 1 and outputs.ndim == 2 and outputs.shape[1] > 1:
        return METRICS["accuracy"]
    if whole and targets.ndim == 3 and outputs.ndim == 4:
        return METRICS["mean-iou"]
    if whole and targets.ndim == 2 and outputs.ndim == 3:
        return METRICS["perplexity"]
    if targets.dtype.kind == "f" and targets.size == outputs.size:
        return METRICS["mae"]
    raise DataError(
        f"no metric is obvious for outputs {outputs.dtype}{outputs.shape} and targets {targets.dtype}{targets.shape}; "
        f"pass metric= one of {', '.join(METRICS)}, or a function"
    )


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


def _classes(name: str, outputs: Array, targets: Array) -> tuple[Array, Array]:
    """Predicted and true class of every sample, or of every position of it: (n, ...) each."""
    targets = targets[:, 0] if targets.ndim == 2 and targets.shape[1] == 1 else targets
    must = "targets must be whole numbers (n, ...) and outputs (n, classes, ...) or predicted classes"
    _needs(targets.dtype.kind in "iub", name, outputs, targets, must)
    if outputs.shape == targets.shape and outputs.dtype.kind in "iub":
        return outputs, targets
    if (
        outputs.ndim == targets.ndim and outputs.ndim >= 1 and outputs.shape[-1] == 1
    ) or outputs.shape == targets.shape:
        return (outputs.reshape(targets.shape) > 0).astype(np.int64), targets  # one logit: the sign decides
    if outputs.ndim == targets.ndim + 1 and outputs.shape[:-1] == targets.shape and targets.ndim > 1:
        return outputs.argmax(-1), targets  # (n, positions, classes), as language models answer
    _needs(
        outputs.ndim == targets.ndim + 1 and outputs.shape[2:] == targets.shape[1:], name, outputs, targets, must
    )
    return outputs.argmax(1), targets


def _per_sample(values: Array) -> Floats:
    """(n, ...) -> (n, 1): each sample's own mean."""
    return values.reshape(len(values), -1).mean(axis=1, dtype=np.float64)[:, None]


def _accuracy(outputs: Array, targets: Array) -> Floats:
    predicted, true = _classes("accuracy", outputs, targets)
    return _per_sample(predicted == true)


def _top5(outputs: Array, targets: Array) -> Floats:
    _needs(
        outputs.ndim == 2 and outputs.shape[1] > 5,
        "top-5",
        outputs,
        targets,
        "outputs must be (n, more than 5 classes)",
    )
    best = np.argpartition(outputs, -5, axis=1)[:, -5:]
    return (best == targets.reshape(-1, 1)).any(axis=1)[:, None].astype(np.float64)


def _counts(name: str, outputs: Array, targets: Array) -> Floats:
    """Per sample and class: true positives, false positives, false negatives: (n, 3 * classes)."""
    predicted, true = _classes(name, outputs, targets)
    classes = (
        int(
            max(
                predicted.max(initial=0),
                true.max(initial=0),
                outputs.shape[1] - 1 if outputs.ndim > true.ndim else 1,
            )
        )
        + 1
    )
    n = len(true)
    row = np.repeat(np.arange(n), true[0].size if true.ndim > 1 else 1)
    p, t = predicted.reshape(-1), true.reshape(-1)
    inside = (t >= 0) & (t < classes)  # a negative target means: do not judge this position
    counts = np.zeros((3, n, classes))
    hit = inside & (p == t)
    np.add.at(counts[0], (row[hit], t[hit]), 1)
    miss = inside & (p != t)
    np.add.at(counts[1], (row[miss], p[miss]), 1)
    np.add.at(counts[2], (row[miss], t[miss]), 1)
    return counts.transpose(1, 0, 2).reshape(n, 3 * classes)


def _f1_value(means: Floats) -> Floats:
    tp, fp, fn = np.split(means, 3, axis=-1)
    there = (tp + fp + fn) > 0  # classes that are neither true nor predicted do not count, as in scikit-learn
    f1 = 2 * tp / np.where(there, 2 * tp + fp + fn, 1)
    return f1.sum(-1) / np.maximum(there.sum(-1), 1)


def _iou_value(means: Floats) -> Floats:
    tp, fp, fn = np.split(means, 3, axis=-1)
    there = (tp + fp + fn) > 0
    iou = tp / np.where(there, tp + fp + fn, 1)
    return iou.sum(-1) / np.maximum(there.sum(-1), 1)


def _same_shape(name: str, outputs: Array, targets: Array) -> Floats:
    _needs(
        outputs.size == targets.size, name, outputs, targets, "outputs and targets must hold equally many numbers"
    )
    n = len(targets)
    return outputs.reshape(n, -1).astype(np.float64) - targets.reshape(n, -1).astype(np.float64)


def _mae(outputs: Array, targets: Array) -> Floats:
    return np.abs(_same_shape("mae", outputs, targets)).mean(axis=1)[:, None]


def _mse(outputs: Array, targets: Array) -> Floats:
    return (_same_shape("mse", outputs, targets) ** 2).mean(axis=1)[:, None]


def _r2(outputs: Array, targets: Array) -> Floats:
    """Per sample: squared error, target, squared target, summed over the sample's numbers, and their count."""
    error, y = _same_shape("r2", outputs, targets), targets.reshape(len(targets), -1).astype(np.float64)
    columns = [(error**2).sum(1), y.sum(1), (y**2).sum(1), np.full(len(y), float(y.shape[1]))]
    return np.stack(columns, axis=1)


def _r2_value(means: Floats) -> Floats:
    error, y, y2, count = (means[..., i] for i in range(4))
    spread = y2 - y**2 / count
    return 1 - error / np.where(spread > 0, spread, np.inf)


def _cross_entropy(outputs: Array, targets: Array) -> Floats:
    must = "outputs must be logits (n, classes) or (n, positions, classes), targets whole numbers"
    _needs(targets.dtype.kind in "iu" and outputs.ndim == targets.ndim + 1, "cross-entropy", outputs, targets, must)
    last = outputs.shape[:-1] == targets.shape
    logits = (outputs if last else np.moveaxis(outputs, 1, -1)).astype(np.float64)
    _needs(logits.shape[:-1] == targets.shape, "cross-entropy", outputs, targets, must)
    peak = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - peak).sum(-1)) + peak[..., 0]
    judged = targets >= 0  # -100 and its like mean: do not judge this position
    picked = np.take_along_axis(logits, np.where(judged, targets, 0)[..., None], axis=-1)[..., 0]
    loss = np.where(judged, log_sum - picked, 0.0).reshape(len(targets), -1).sum(1)
    return np.stack([loss, judged.reshape(len(targets), -1).sum(1).astype(np.float64)], axis=1)


def _loss_value(means: Floats) -> Floats:
    return means[..., 0] / np.where(means[..., 1] > 0, means[..., 1], 1)


def _psnr(outputs: Array, targets: Array) -> Floats:
    error = (_same_shape("psnr", outputs, targets) ** 2).mean(axis=1)
    peak = 255.0 if targets.dtype == np.uint8 else float(np.ptp(targets)) or 1.0
    return (10 * np.log10(peak**2 / np.maximum(error, 1e-12)))[:, None]


def _cosine(outputs: Array, targets: Array) -> Floats:
    n = len(targets)
    a, b = outputs.reshape(n, -1).astype(np.float64), targets.reshape(n, -1).astype(np.float64)
    _needs(a.shape == b.shape, "cosine", outputs, targets, "outputs and targets must have one shape")
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.where(norms > 0, (a * b).sum(1) / np.where(norms > 0, norms, 1), (a == b).all(1))[:, None]


def _agreement(outputs: Array, targets: Array) -> Floats:
    """The same answer: the same class where there are classes, else equal within 1 % of the output's spread."""
    if outputs.ndim >= 2 and outputs.shape[1] > 1 and outputs.dtype.kind == "f":
        return _per_sample(outputs.argmax(1) == targets.argmax(1))
    if outputs.dtype.kind in "iub":
        return _per_sample(outputs == targets)
    close = np.abs(outputs.astype(np.float64) - targets) <= 0.01 * (float(np.std(targets)) or 1.0)
    return _per_sample(close)


def _metric(
    name: str, higher: bool, statistics: Statistics, value: Value = _mean, of_original: bool = False
) -> Metric:
    return Metric(name, higher, of_original, lambda answer, targets: statistics(primary(answer), targets), value)


METRICS = {
    m.name: m
    for m in (
        _metric("accuracy", True, _accuracy),
        _metric("top-5", True, _top5),
        _metric("f1", True, lambda o, t: _counts("f1", o, t), _f1_value),
        _metric("mean-iou", True, lambda o, t: _counts("mean-iou", o, t), _iou_value),
        _metric("mae", False, _mae),
        _metric("mse", False, _mse),
        _metric("rmse", False, _mse, lambda means: np.sqrt(means[..., 0])),
        _metric("r2", True, _r2, _r2_value),
        _metric("cross-entropy", False, _cross_entropy, _loss_value),
        _metric(
            "perplexity",
            False,
            _cross_entropy,
            lambda means: np.exp(np.minimum(_loss_value(means), math.log(1e300))),
        ),
        _metric("psnr", True, _psnr),
        _metric("cosine", True, _cosine, of_original=True),
        _metric("agreement", True, _agreement, of_original=True),
    )
}
ALIASES = {"acc": "accuracy", "top5": "top-5", "miou": "mean-iou", "iou": "mean-iou", "macro-f1": "f1", "f1-macro": "f1",
           "loss": "cross-entropy", "fidelity": "cosine", "cosine-fidelity": "cosine", "r-squared": "r2"}  # fmt: skip
