"""What a governed model has done so far, counted as it happens."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from math import exp

from accelerando.serve.status import BUCKETS, Histogram


class Tally:
    """Counts since the model was loaded.  Not thread-safe: its owner holds a lock."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()  # answered, late, refused, expired, failed, cancelled
        self.rows = 0
        self.batches = 0
        self.switches = 0
        self.losses = 0  # of the process that computed a batch
        self.latest = 0.0  # when the last answer was given, seconds since the epoch
        self._promised = 0.0  # certified quality of rows that were answered in time, summed
        self.all_rows = 0
        self._queued, self._computed = _Counts(), _Counts()
        self._busy, self._busy_until = 0.0, 0.0

    def answered(self, quality: float, rows: int, queued: float, computed: float, late: bool) -> None:
        """One request was answered; seconds, and the certified quality of its rung."""
        self.requests["answered"] += 1
        self.latest = time.time()
        self.rows += rows
        self.all_rows += rows
        if late:
            self.requests["late"] += 1
        else:
            self._promised += quality * rows
        self._queued.add(queued)
        self._computed.add(computed)

    def turned_away(self, how: str, rows: int) -> None:
        """One request was `refused`, `expired`, `failed` or `cancelled`."""
        self.requests[how] += 1
        if how != "cancelled":
            self.all_rows += rows

    def worked(self, start: float, end: float) -> None:
        """The executor worked from one moment to another, seconds of the monotonic clock."""
        kept = exp(-(end - start) / _MEMORY)
        self._busy, self._busy_until = self.utilisation(start) * kept + 1 - kept, end

    def utilisation(self, now: float) -> float:
        """The share of the last seconds in which the executor worked; what is past counts ever less."""
        return self._busy * exp(-max(now - self._busy_until, 0.0) / _MEMORY)

    @property
    def attainment(self) -> float:
        """The share of requests that were answered in time; 1 where there were none."""
        done = sum(self.requests[k] for k in ("answered", "refused", "expired", "failed"))
        return (self.requests["answered"] - self.requests["late"]) / done if done else 1.0

    @property
    def effective_quality(self) -> float:
        """The mean certified quality over all rows, 0 for those that were not answered in time."""
        return self._promised / self.all_rows if self.all_rows else 0.0

    @property
    def queued(self) -> Histogram:
        return self._queued.histogram()

    @property
    def computed(self) -> Histogram:
        return self._computed.histogram()


_MEMORY = 5.0  # seconds in which what was seen of the executor's work loses two thirds of its weight


class _Counts:
    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS) + 1)
        self._total = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(BUCKETS, seconds)] += 1
        self._total += seconds

    def histogram(self) -> Histogram:
        return Histogram(tuple(self._counts), self._total)
