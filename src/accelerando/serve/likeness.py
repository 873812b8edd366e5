"""How alike two rungs' answers are, row by row, and how alike a certificate promises them to be.

At run time nobody knows the right answers, so a rung is compared with the best one.  What that comparison must give
follows from the triangle inequality: two answers to a sample are no further apart than their distances to its target
together, and those distances are in the evidence.  `docs/why/quality-watch.md` has the derivation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from accelerando.bundle import Bundle
from accelerando.interval import Floats
from accelerando.metric import primary
from accelerando.parity import Parity
from accelerando.serve.anytime import least_mean
from accelerando.signature import Array
from accelerando.trial import Evidence

RIGHT_OR_WRONG = ("accuracy", "accuracy-at-half", "f1", "mean-iou")
ERRORS = ("mae", "mse", "rmse", "r2")
SPREADS = 2.0  # standard deviations of the stored answers: errors as large as that count as nothing alike
MANY_ROWS = 30  # so many stored answers are asked even where the scores promise something
SAME_SAMPLES = 0.99  # of the original's scores must be the same in two duels, or their samples are not the same


@dataclass(frozen=True)
class Promise:
    """The least mean likeness that a certificate promises, and what that rests on, in words."""

    least: float
    grounds: str


class Likeness:
    """Compares answers as a bundle's metric would.

    Args:
        bundle: whose rungs are compared.
        parity: its stored rows, where there are any.
    """

    def __init__(self, bundle: Bundle, parity: Parity | None) -> None:
        self._bundle, self._parity = bundle, parity
        self._metric = str(bundle.workload["metric"])
        self._positions = _positions(self._metric, bundle.ladder.original.evidence.scores)
        self._size = self._stored_size()
        self._alike = self._comparison()

    def __call__(self, ours: Sequence[Array], theirs: Sequence[Array]) -> Floats:
        """(rows,) in [0, 1] of two flat answers to the same rows; 1 is the same, 0 is nothing alike or not finite."""
        a, b = self._primary(ours), self._primary(theirs)
        if a.shape != b.shape or not len(a):
            return np.zeros(len(a))
        found = np.clip(np.nan_to_num(self._alike(a, b)), 0.0, 1.0)
        if a.dtype.kind == "f":
            found[~np.isfinite(a.reshape(len(a), -1)).all(axis=1)] = 0.0
        return found

    def promised(self, rung: int, reference: int, miss: float) -> Promise | None:
        """What the evidence promises of a rung's mean likeness to the reference; None where it promises nothing.

        Args:
            miss: the chance that the promise is too high.
        """
        seen, stored = self._by_scores(rung, reference), self._by_stored_rows(rung, reference)
        many = stored is not None and len(stored) >= MANY_ROWS
        if seen is not None and many:
            miss /= 2  # the greater of two bounds counts
        split = self._bundle.ladder.rungs[rung].evidence.split
        bounds = [
            Promise(least_mean(values, miss), grounds)
            for values, grounds, wanted in (
                (seen, f"{0 if seen is None else len(seen)} samples of the {split} split", True),
                (stored, f"{0 if stored is None else len(stored)} stored answers", many or seen is None),
            )
            if values is not None and len(values) and wanted
        ]
        best = max(bounds, key=lambda promise: promise.least, default=None)
        return best if best and best.least > 0 else None

    def _by_scores(self, rung: int, reference: int) -> Floats | None:
        """How alike the answers to each certified sample were at least, (n,)."""
        rungs = self._bundle.ladder.rungs
        mine, other = rungs[rung].evidence, rungs[reference].evidence
        if not _same_samples(mine, other):
            return None
        ours, theirs = self._distances(mine.scores), self._distances(other.scores)
        return None if ours is None or theirs is None else np.clip(1 - ours - theirs, 0.0, 1.0)

    def _by_stored_rows(self, rung: int, reference: int) -> Floats | None:
        """How alike the stored answers are, (n,)."""
        ours, theirs = self._stored(rung), self._stored(reference)
        return None if ours is None or theirs is None else self(ours, theirs)

    def _stored(self, rung: int) -> list[Array] | None:
        """A rung's stored answers to different rows: those that are stored too, and those that are not."""
        key = self._bundle.ladder.rungs[rung].recipe.key
        if self._parity is None or key not in self._parity.rungs:
            return None
        distinct = _distinct(self._parity.inputs)
        first, further = [x[distinct] for x in self._parity.rungs[key]], self._parity.further.get(key)
        return first if further is None else [np.concatenate(pair) for pair in zip(first, further, strict=True)]

    def _primary(self, leaves: Sequence[Array]) -> Array:
        return primary(self._bundle.signature.answer(leaves))

    def _stored_size(self) -> float:
        """How much the original's stored answers vary; 0 where that is not known."""
        if self._metric not in ERRORS or (answers := self._stored(0)) is None:
            return 0.0
        stored = self._primary(answers).astype(np.float64)
        return SPREADS * float(np.sqrt(((stored - stored.mean(axis=0)) ** 2).mean()))

    def _comparison(self) -> Callable[[Array, Array], Floats]:
        if self._metric in (*RIGHT_OR_WRONG, "agreement", "cross-entropy", "perplexity", "top-5"):
            return self._same_classes
        if self._metric == "cosine":
            return lambda a, b: 1 - _chord(_cosines(a, b))
        if self._metric in ERRORS and self._size > 0:
            return lambda a, b: 1 - np.minimum(_error(self._metric, a, b) / self._size, 1)
        return _close

    def _same_classes(self, a: Array, b: Array) -> Floats:
        """The share of a row's positions at which both name one class."""
        if a.dtype.kind in "iub":
            same = a == b
        elif self._positions == a[0].size:  # one logit for each position: its side of the threshold decides
            threshold = 0.5 if self._metric == "accuracy-at-half" else 0.0
            same = (a > threshold) == (b > threshold)
        elif a.ndim >= 2 and a.shape[1] > 1:
            axis = -1 if a.ndim <= 3 else 1  # images have their classes after the batch
            same = a.argmax(axis) == b.argmax(axis)
        else:
            return _close(a, b)
        return same.reshape(len(a), -1).mean(axis=1)

    def _distances(self, scores: Floats) -> Floats | None:
        """How far, at most, each sample's answer is from its target (n,), in [0, 1]; None where scores can't tell."""
        n = len(scores)
        if self._metric == "agreement":
            return 1 - scores[:, 0] if self._names_classes() else None
        if self._metric == "cosine":
            return _chord(scores[:, 0])
        if self._metric in ("cross-entropy", "perplexity"):  # who gives the target more than half has it as first
            return (scores[:, 0] >= math.log(2)).astype(np.float64) if self._positions == 1 else None
        if self._metric in RIGHT_OR_WRONG and self._positions is not None and self._judges_all():
            right = scores.reshape(n, -1, 3)[:, :, 0].sum(1) if scores.shape[1] > 2 else scores[:, 0]
            return 1 - right / self._positions
        if self._metric in ERRORS and self._size > 0:
            error = scores[:, 0] if self._metric != "r2" else scores.reshape(n, -1, 3)[:, :, 0].mean(1)
            return np.minimum((error if self._metric == "mae" else np.sqrt(error)) / self._size, 1)
        return None

    def _names_classes(self) -> bool:
        """Whether the metric `agreement` compares classes or whole numbers; of single numbers it has a rule of its
        own, which depends on a batch."""
        if self._parity is None or not self._parity.original:
            return False
        answer = self._primary(self._parity.original)
        return answer.dtype.kind in "iub" or (answer.ndim >= 2 and answer.shape[1] > 1)

    def _judges_all(self) -> bool:
        """Whether every position of an answer is judged: those that are not may differ as they like."""
        if self._positions == 1:
            return True
        if self._parity is None or not self._parity.original:
            return False
        row = self._primary(self._parity.original)[:1]
        logits = row.dtype.kind == "f" and row.size != self._positions
        return (row.size // row.shape[-1 if row.ndim <= 3 else 1] if logits else row.size) == self._positions


def _positions(metric: str, scores: Floats) -> int | None:
    """How many classes a sample's answer names, where that is the same for all samples; else None."""
    if metric not in (*RIGHT_OR_WRONG, "cross-entropy", "perplexity"):
        return None
    width = scores.shape[1]
    if width == 1:
        return 1
    judged = scores[:, 1] if width == 2 else scores.reshape(len(scores), -1, 3)[:, :, :2].sum(axis=(1, 2))
    return int(judged[0]) if len(judged) and judged[0] > 0 and (judged == judged[0]).all() else None


def _same_samples(a: Evidence, b: Evidence) -> bool:
    """Whether two evidences are of the same samples in the same order, by what the original scored on them."""
    if (a.split, a.metric) != (b.split, b.metric) or a.original_scores.shape != b.original_scores.shape:
        return False
    same = np.isclose(a.original_scores, b.original_scores, rtol=1e-3, atol=1e-6).all(axis=1)
    return bool(same.mean() >= SAME_SAMPLES)


def _distinct(inputs: Sequence[Array]) -> list[int]:
    """Numbers of rows that differ; stored rows are taken round and round where a model's batch is fixed."""
    seen: dict[bytes, int] = {}
    for row in range(len(inputs[0])):
        seen.setdefault(b"".join(np.ascontiguousarray(x[row]).tobytes() for x in inputs), row)
    return list(seen.values())


def _error(metric: str, a: Array, b: Array) -> Floats:
    """Mean absolute, or root mean square difference of each row, (n,)."""
    difference = a.reshape(len(a), -1).astype(np.float64) - b.reshape(len(b), -1)
    if metric == "mae":
        return np.abs(difference).mean(axis=1)
    return np.sqrt((difference**2).mean(axis=1))


def _cosines(a: Array, b: Array) -> Floats:
    """As the metric of that name has them: two rows of zeros are the same."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.where(norms > 0, (a * b).sum(1) / np.where(norms > 0, norms, 1), (a == b).all(1))


def _chord(cosines: Floats) -> Floats:
    """Half the distance of two points on the unit sphere, in [0, 1]: a distance, which the cosine itself is not."""
    return np.sqrt(np.clip((1 - cosines) / 2, 0.0, 1.0))


def _close(a: Array, b: Array) -> Floats:
    """1 - the distance over the sum of the sizes; of whole numbers the share that is the same."""
    a, b = (x.reshape(len(x), -1) for x in (a, b))
    if a.dtype.kind in "iub":
        return (a == b).mean(axis=1)
    a, b = a.astype(np.float64), b.astype(np.float64)
    sizes = np.linalg.norm(a, axis=1) + np.linalg.norm(b, axis=1)
    return 1 - np.where(sizes > 0, np.linalg.norm(a - b, axis=1) / np.where(sizes > 0, sizes, 1), 0.0)
