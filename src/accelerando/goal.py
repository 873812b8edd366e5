"""The goal language; `Goal.judge` judges evidence, and never says how to get it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from accelerando.interval import Interval
from accelerando.trial import Evidence


class Outcome(Enum):
    MET = "met"
    NOT_MET = "not met"
    UNSURE = "cannot tell"


@dataclass(frozen=True)
class Bound:
    """One bound of a goal: `speedup >= 4`.

    `quantity` is one of speedup, latency, p95, p99, throughput, memory, size, quality, drop; `least` is True for
    `>=`; `value` is in base units (times, seconds, rows per second, bytes, the metric's unit); `relative` is True for
    a drop given in percent of the original's value.
    """

    quantity: str
    least: bool
    value: float
    relative: bool = False


@dataclass(frozen=True)
class Check:
    """One bound held against the evidence."""

    bound: Bound
    interval: Interval
    outcome: Outcome


@dataclass(frozen=True)
class Verdict:
    """The outcome of a goal: met when every bound is, not met when one is not, else unsure."""

    outcome: Outcome
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Goal:
    """What is asked for."""

    text: str
    bounds: tuple[Bound, ...]
    batch: int = 1
    prefer: str = "quality"

    @classmethod
    def parse(cls, text: str, prefer: str | None = None) -> Goal:
        raise NotImplementedError

    def judge(self, evidence: Evidence) -> Verdict:
        raise NotImplementedError
