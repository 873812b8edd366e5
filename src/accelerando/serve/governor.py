"""The governor: on which rung to stand for the next batch.

`decide` is pure: the same last decision, signal and rungs give the same decision.  Nothing here reads a clock, runs a
model or keeps state, so the simulator runs the same code as the server.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RungState:
    """What the governor knows of one rung.

    Args:
        number: on the ladder; 0 is the original.
        quality: what its certificate promises: the low end of its quality's interval, in the metric's unit, with the
            sign turned where lower is better, so that greater is always better.
        fixed: seconds that a call takes however few its rows.
        per_row: seconds more for each row.
        tail: how many times longer than that its p95 is; at least 1.
        most_rows: the greatest batch that it takes.
        ready: it is loaded, warm, and not quarantined.
    """

    number: int
    quality: float
    fixed: float
    per_row: float
    tail: float = 1.0
    most_rows: int = 64
    ready: bool = True

    def seconds(self, rows: int) -> float:
        """What a batch usually takes, in seconds."""
        return self.fixed + self.per_row * rows


@dataclass(frozen=True)
class Signal:
    """What is seen when the executor is free.

    Args:
        now: seconds of a monotonic clock.
        rows: rows in the queue.
        queue: the requests at the head of the queue, earliest deadline first: (seconds left until its deadline, its
            rows, the quality that it asks for at least).  At most `GLANCE` of them, then `rows` tells of the rest.
        rate: rows that arrive per second, averaged over about half a second.
        slowdown: how many times slower than its cost a call takes just now; 1 on a quiet machine.
        patience: seconds that an answer may take by the goal; infinite where no latency is asked for.
        bank: how far the mean quality of what was answered lies above what is asked for, times the rows counted;
            infinite where no mean quality is asked for.
    """

    now: float
    rows: int
    queue: tuple[tuple[float, int, float], ...]
    rate: float = 0.0
    slowdown: float = 1.0
    patience: float = float("inf")
    bank: float = float("inf")


@dataclass(frozen=True)
class Decision:
    """Where to stand.

    Args:
        rung: its number on the ladder; None where the head of the queue can't be answered in time by any rung, so that
            it must be refused.
        rows: how many rows the next batch holds at most.
        since: when this rung was first stood on, seconds of the signal's clock.
        why: in words.
    """

    rung: int | None
    rows: int
    since: float
    why: str
