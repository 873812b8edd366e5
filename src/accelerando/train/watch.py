"""Looking how good the student is, and keeping the best that was seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from accelerando.errors import Reason, RefusalError
from accelerando.metric import Metric, primary
from accelerando.signature import Signature, flatten, to_numpy
from accelerando.train.room import fitted
from accelerando.train.weights import Weights
from accelerando.workload import EVAL_ROWS, Chunk, Samples

MOST_ROWS, LEAST_ROWS = 1000, 256  # fewer would tell little


class Watch:
    """The judge of early stopping: the metric on some of the watch rows, always the same ones.

    Args:
        samples: the watch rows; where they have no targets, the teacher's answers are what counts.
        seconds: what a look may take; fewer rows are looked at where it would take longer.
    """

    def __init__(
        self,
        samples: Samples,
        metric: Metric,
        signature: Signature,
        teacher: Any,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metric, self._signature = metric, signature
        self._samples, self._seconds = samples.take(MOST_ROWS), seconds
        self._teacher, self._clock = teacher, clock
        self.batch = EVAL_ROWS  # fewer where they do not fit into memory
        self.took = 0.0  # seconds of the last look

    @property
    def name(self) -> str:
        return self._metric.name

    @property
    def rows(self) -> int:
        return len(self._samples)

    def look(self, module: Any) -> float:
        """The metric's value of a module in eval mode; NaN where its answers are not finite."""
        start = self._clock()
        value = fitted(lambda: self._value(module), self._halve_batch)
        self.took = self._clock() - start
        return value

    def _value(self, module: Any) -> float:
        scores = []
        for batch in self._samples.batches(self.batch):
            answer = self._answer(module, batch)
            if answer is None:
                return math.nan
            scores.append(self._metric.scores(answer, self._targets(batch)))
        return float(self._metric.value(np.concatenate(scores).mean(0)))

    def _halve_batch(self) -> None:
        if self.batch == 1:
            raise RefusalError(Reason.OUT_OF_MEMORY, "an answer to 1 row does not fit into the rest")
        self.batch //= 2

    def fit_into_time(self, module: Any) -> None:
        """Choose as many rows as a look may take."""
        each = fitted(lambda: self._seconds_of_row(module), self._halve_batch)
        self._samples = self._samples.take(int(min(MOST_ROWS, max(LEAST_ROWS, self._seconds / max(each, 1e-9)))))

    def _seconds_of_row(self, module: Any) -> float:
        first, took = next(self._samples.batches(self.batch)), []
        for _ in range(3):  # the first call prepares what later ones reuse
            start = self._clock()
            self._answer(module, first)
            took.append(self._clock() - start)
        return min(took) / len(first)

    def better(self, value: float, than: float) -> bool:
        """Whether a value is better; NaN never is."""
        if math.isnan(value) or math.isnan(than):
            return math.isnan(than) and not math.isnan(value)
        return value > than if self._metric.higher_is_better else value < than

    def _answer(self, module: Any, batch: Chunk) -> Any:
        """The answer to a batch, in its structure, as arrays; None where it is not finite."""
        import torch

        with torch.no_grad():
            args, kwargs = self._signature.call([torch.from_numpy(np.array(x)) for x in batch.inputs])
            leaves = [to_numpy(x) for x in flatten(module(*args, **kwargs))[0]]
        if any(x.dtype.kind == "f" and not np.isfinite(x).all() for x in leaves):
            return None
        return self._signature.answer(leaves)

    def _targets(self, batch: Chunk) -> Any:
        return batch.targets if batch.targets is not None else primary(self._answer(self._teacher, batch))


class Best:
    """The best weights that were seen, the untrained ones included.  Of equal ones, the later, which learned more."""

    def __init__(self, watch: Watch, value: float, weights: Weights) -> None:
        self._watch, self.value, self.weights = watch, value, weights
        self.idle = 0  # looks without a gain

    def offer(self, value: float, weights: Weights) -> bool:
        """Keep weights (copies) if they are no worse; whether they were kept."""
        gain = self._watch.better(value, self.value)
        if gain or value == self.value:
            self.value, self.weights = value, weights
        self.idle = 0 if gain else self.idle + 1
        return gain or value == self.value
