"""What a governed model tells about itself: plain data for the dashboard, the metrics and `print`."""

from __future__ import annotations

from dataclasses import dataclass

from accelerando.interval import Interval

# Upper ends of the latency histogram's buckets, in seconds; what is slower falls into the last one.
BUCKETS = (
    0.0002, 0.0003, 0.0005, 0.0007, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1,
    0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip


@dataclass(frozen=True)
class RungStatus:
    """One rung.

    Args:
        state: `out`, `loading`, `ready`, `quarantined` or `failed`; `why` in words where it is one of the last two.
        quality: as certified; `drop` and `speedup` likewise.
        seconds: what a call of one row takes on this machine.
        bytes: memory that it adds while it is loaded.
        answered: rows that it has answered since its bundle was loaded.
        agreement: how often its answers agreed with the best rung's, where that was watched.
    """

    number: int
    recipe: str
    state: str
    why: str
    quality: Interval
    drop: Interval
    speedup: Interval
    seconds: float
    bytes: int
    answered: int
    agreement: Interval | None = None


@dataclass(frozen=True)
class Histogram:
    """Counts of seconds by `BUCKETS` (one more for the rest), not cumulative, and their sum."""

    counts: tuple[int, ...]
    total: float


@dataclass(frozen=True)
class Stand:
    """When the governor changed its rung, and why.  `at` is in seconds since the epoch."""

    at: float
    rung: int
    why: str


@dataclass(frozen=True)
class Status:
    """A governed model at one moment.  Counts are of requests since it was loaded, but for those of rows.

    Args:
        name: of the model; `version` of its bundle, `goal` in force, `metric` by which quality is told.
        standing: the rung that is stood on; `stands` the latest changes, oldest first.
        queue_rows: rows that wait; `rate` rows that arrive per second; `slowdown` of this machine just now (1: quiet).
        utilisation: share of the last seconds in which the executor worked.
        rows: that were answered; `all_rows` those of all requests that ended, but for what their callers cancelled.
        answered, late, refused, expired, failed, cancelled: `late` ones are among the answered; `refused` at once, for
            they could not have been in time; `expired` while they waited.
        attainment: share of the requests that were answered in time, of all.
        effective_quality: the mean over all rows of the certified quality, 0 for those that were not answered in time;
            NaN where less of the metric is better, for an answer that never came has no error that it could count as.
        queued, computed: seconds.
        memory_bytes: held by the loaded rungs; `memory_cap` what they may hold, None where there is no cap.
        drift: what of the inputs has drifted, in words; empty where nothing has.
        batches: that were computed for those that are answered; `latest` is when the last was, in seconds since the
            epoch, 0 before the first.
        losses: how often the process that computed a batch died or hung, and was replaced.
    """

    name: str
    version: int
    goal: str
    metric: str
    rungs: tuple[RungStatus, ...]
    standing: int
    stands: tuple[Stand, ...]
    queue_rows: int
    rate: float
    slowdown: float
    utilisation: float
    rows: int
    all_rows: int
    answered: int
    late: int
    refused: int
    expired: int
    failed: int
    cancelled: int
    switches: int
    attainment: float
    effective_quality: float
    queued: Histogram
    computed: Histogram
    memory_bytes: int
    memory_cap: int | None
    audited: int = 0
    drift: tuple[str, ...] = ()
    batches: int = 0
    latest: float = 0.0
    losses: int = 0
