"""What happened lately: statuses of one model that were seen some seconds apart, compared.

A `Status` counts since the model was loaded; a reader wants to know of the last minute.  The difference of two
statuses tells it, so nothing is counted twice and the hot path has nothing to do with it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from accelerando.errors import AccelerandoError
from accelerando.interval import Interval
from accelerando.serve.status import BUCKETS, Histogram, RungStatus, Status
from accelerando.server.repository import Repository

WINDOW = 60.0  # seconds that the headline figures tell of
SMOOTH = 10.0  # seconds that a point of a chart tells of
STEP = 2.0  # seconds between points
SPAN = 600.0  # seconds of points that are kept
COUNTS = ("rows", "all_rows", "answered", "late", "refused", "expired", "failed", "cancelled", "switches")


def statuses(shelf: Repository) -> list[Status]:
    """The status of every model that is ready, by name; one that goes away meanwhile is left out."""
    found = []
    for name in sorted({entry.name for entry in shelf.index() if entry.state == "READY"}):
        try:
            found.append(shelf.find(name).status())
        except AccelerandoError:  # it was unloaded between the two calls
            continue
    return found


def quantile(histogram: Histogram, share: float) -> float | None:
    """About the quantile of a histogram, in seconds; None where it is empty.

    Linear within a bucket, as Prometheus' `histogram_quantile` does it, so that both tell the same.  What lies beyond
    the last bucket's end is told as that end.
    """
    whole = sum(histogram.counts)
    if whole <= 0:
        return None
    wanted, below = share * whole, 0.0
    for number, end in enumerate(BUCKETS):
        count = histogram.counts[number]
        if count and below + count >= wanted:
            start = BUCKETS[number - 1] if number else 0.0
            return start + (end - start) * (wanted - below) / count
        below += count
    return BUCKETS[-1]


@dataclass(frozen=True)
class Recent:
    """What happened between two moments.

    Args:
        seconds: between the two.
        requests: that came to an end, but for those that their caller cancelled; `in_time` were answered in time.
        late, refused, expired, failed: the others, each in one of these.
        rows: per second, that were answered.
        quality: mean over all rows of the certified quality, 0 for those not answered in time; None without rows, and
            where less of the metric is better.
        answers: certified quality of the rows that were answered, mean over them; None where none was.
        drop: likewise.
        queued, computed: seconds.
    """

    seconds: float
    requests: int
    in_time: int
    late: int
    refused: int
    expired: int
    failed: int
    rows: float
    quality: float | None
    answers: Interval | None
    drop: Interval | None
    queued: Histogram
    computed: Histogram

    @property
    def share(self) -> float | None:
        """Of the requests, those answered in time; None without requests."""
        return self.in_time / self.requests if self.requests else None


def compare(before: Status, after: Status, seconds: float) -> Recent:
    """What happened from one status of a model to a later one, `seconds` apart."""
    more = {name: max(0, getattr(after, name) - getattr(before, name)) for name in COUNTS}
    in_time = max(0, more["answered"] - more["late"])
    late, refused, expired, failed = (more[name] for name in ("late", "refused", "expired", "failed"))
    answered = _answered(before, after)
    quality = None
    if more["all_rows"] and not math.isnan(after.effective_quality):  # mean times count is the sum, and sums subtract
        earned = after.effective_quality * after.all_rows - before.effective_quality * before.all_rows
        quality = earned / more["all_rows"]
    return Recent(
        seconds=seconds,
        requests=in_time + late + refused + expired + failed,
        in_time=in_time,
        late=late,
        refused=refused,
        expired=expired,
        failed=failed,
        rows=sum(count for _, count in answered) / seconds if seconds > 0 else 0.0,
        quality=quality,
        answers=_mean((rung.quality, count) for rung, count in answered),
        drop=_mean((rung.drop, count) for rung, count in answered),
        queued=_difference(before.queued, after.queued),
        computed=_difference(before.computed, after.computed),
    )


def _answered(before: Status, after: Status) -> list[tuple[RungStatus, int]]:
    """Rungs and the rows that each answered meanwhile; those of a bundle that came meanwhile count from its start."""
    same = before.version == after.version
    known = {rung.number: rung.answered for rung in before.rungs} if same else {}
    return [(rung, max(0, rung.answered - known.get(rung.number, 0))) for rung in after.rungs]


def _mean(weighted: Iterable[tuple[Interval, int]]) -> Interval | None:
    """The mean of intervals, end by end: wider than the mean's own interval, never narrower."""
    pairs = [(interval, count) for interval, count in weighted if count]
    whole = sum(count for _, count in pairs)
    if not whole:
        return None
    low, mid, high = (sum(getattr(i, end) * n for i, n in pairs) / whole for end in ("low", "mid", "high"))
    return Interval(min(low, mid), mid, max(mid, high), pairs[0][0].confidence)


def _difference(before: Histogram, after: Histogram) -> Histogram:
    counts = tuple(max(0, b - a) for a, b in zip(before.counts, after.counts, strict=True))
    return Histogram(counts, max(0.0, after.total - before.total))


class Point(NamedTuple):
    """One moment of the charts.  `at` in seconds since the epoch; shares, seconds, rows per second, bytes.

    `share`, `quality` and the quantiles tell of the seconds before it (`SMOOTH`), and are None where nothing came.
    """

    at: float
    standing: int
    arriving: float
    answered: float
    queue: int
    busy: float
    slowdown: float
    share: float | None
    quality: float | None
    computed50: float | None
    computed99: float | None
    queued99: float | None
    memory: int


class History:
    """The last minutes of one model, bounded: a few statuses for the differences, and the points of the charts."""

    def __init__(self) -> None:
        self.points: deque[Point] = deque(maxlen=int(SPAN / STEP))
        self._seen: deque[tuple[float, Status]] = deque(maxlen=int(WINDOW / STEP) + 2)

    def note(self, now: float, at: float, status: Status) -> None:
        """Keep a status; `now` by a monotonic clock, `at` since the epoch.  Sooner than a step it is not kept."""
        if self._seen and _began_anew(self._seen[-1][1], status):
            self._seen.clear()
        if not self._seen:
            self._seen.append((now, status))
        elif now - self._seen[-1][0] < 0.95 * STEP:  # a timer that rings a little early counts
            return
        else:
            self._seen.append((now, status))
        self.points.append(self._point(now, at, status))

    def recent(self, now: float, status: Status, seconds: float = WINDOW) -> Recent:
        """What happened in the seconds before now, or since it was first seen."""
        if not self._seen or _began_anew(self._seen[-1][1], status):
            return compare(status, status, 0.0)
        start, before = next((pair for pair in self._seen if now - pair[0] <= seconds), self._seen[-1])
        return compare(before, status, now - start)

    def _point(self, now: float, at: float, status: Status) -> Point:
        recent = self.recent(now, status, SMOOTH)
        return Point(
            at=round(at, 3),
            standing=status.standing,
            arriving=status.rate,
            answered=recent.rows,
            queue=status.queue_rows,
            busy=status.utilisation,
            slowdown=status.slowdown,
            share=recent.share,
            quality=recent.quality,
            computed50=quantile(recent.computed, 0.5),
            computed99=quantile(recent.computed, 0.99),
            queued99=quantile(recent.queued, 0.99),
            memory=status.memory_bytes,
        )


def _began_anew(before: Status, after: Status) -> bool:
    """Whether the counts began again at 0, as they do when a model was unloaded and loaded."""
    return any(getattr(after, name) < getattr(before, name) for name in COUNTS)
