"""The goal language; `Goal.judge` judges evidence, and never says how to get it.

    "speedup >= 4, drop <= 1%"      "p99 <= 5ms, drop <= 0.005"      "throughput >= 2000/s @ batch 32, memory <= 200MB"

A bound is met only when the end of the interval that counts meets it, and missed only when the other end misses
it; between the two nobody can tell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from decimal import Decimal
from enum import Enum

from accelerando.errors import GoalError
from accelerando.goal_text import PREFERENCES, QUANTITIES, BoundText, Quantity, read, spell
from accelerando.interval import Interval, least_count, sides_known
from accelerando.trial import Evidence

QUANTILES = {"latency": 0.5, "p95": 0.95, "p99": 0.99}  # of seconds per call
UNIT_METRICS = ("accuracy", "accuracy-at-half", "top-5", "f1", "mean-iou", "cosine", "agreement")  # never above 1
SAME_SPEED = math.log(1.02)  # speeds within 2 % count as one: that is how narrowly a duel measures them
SHARE = 0.01  # quality that is missed is counted in hundredths of the original's


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

    @property
    def kind(self) -> Quantity:
        return QUANTITIES[self.quantity]

    def spell(self, value: float) -> str:
        """A figure of this quantity in its unit, to three or four digits."""
        return spell(self.quantity, Decimal(f"{value:.4g}"), self.relative)

    def __str__(self) -> str:
        value = spell(self.quantity, Decimal(repr(self.value)), self.relative)
        return f"{self.quantity} {'>=' if self.least else '<='} {value}"


@dataclass(frozen=True)
class Check:
    """One bound held against the evidence.

    `shortfall` says how far the end of the interval that counts lies beyond the bound: 0 where it is met; for
    speeds and bytes the logarithm of the ratio, for quality log(1 + gap / what one may lose), so that 0.7 is "off
    by a factor of two" for all.  `note` says why nobody can tell, where it is not the interval's width.
    """

    bound: Bound
    interval: Interval
    outcome: Outcome
    shortfall: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        low, mid, high = (self.bound.spell(v) for v in (self.interval.low, self.interval.mid, self.interval.high))
        figure = mid if low == high else f"{mid} ({low} to {high})"
        return f"{self.bound}: {figure} {self.outcome.value}" + (f": {self.note}" if self.note else "")


@dataclass(frozen=True)
class Verdict:
    """The outcome of a goal: met when every bound is, not met when one is not, else unsure."""

    outcome: Outcome
    checks: tuple[Check, ...]

    @property
    def shortfall(self) -> float:
        """The sum over the checks: 0 where all are met, and small for a near miss."""
        return math.fsum(c.shortfall for c in self.checks)

    def explain(self) -> list[str]:
        """One line for each bound: `speedup >= 4: 5.12 (4.98 to 5.31) met`."""
        return [str(c) for c in self.checks]


@dataclass(frozen=True)
class Goal:
    """What is asked for.  `text` is as the user wrote it; `str()` is the same in one way of writing.

    Two goals are equal where they ask for the same, however they were written.
    """

    text: str = field(compare=False)
    bounds: tuple[Bound, ...]
    batch: int = 1
    prefer: str = "quality"

    @classmethod
    def parse(cls, text: str, prefer: str | None = None) -> Goal:
        """Read a goal.

        Args:
            text: bounds with commas between them; `@ batch N` once, for all of them.
            prefer: `quality` or `speed`: what to make the most of where every bound is met.  Also `, prefer speed`
                in the text.

        Raises:
            GoalError: it does not parse, or contradicts itself; the message has a caret under what is wrong.
        """
        if not isinstance(text, str):
            raise GoalError(f"a goal is a text such as 'speedup >= 4, drop <= 1%', but got {text!r}")
        if prefer is not None and prefer not in PREFERENCES:
            raise GoalError(f"prefer must be 'quality' or 'speed', but got {prefer!r}")
        words = read(text)
        if prefer is not None and words.prefer is not None and prefer != words.prefer:
            raise GoalError(f"the goal {text!r} prefers {words.prefer}, but prefer={prefer!r} was given; drop one")
        bounds = tuple(_bound(b) for b in words.bounds)
        return cls(text, bounds, words.batch or 1, prefer or words.prefer or "quality")

    def __str__(self) -> str:
        text = ", ".join(map(str, self.bounds))
        text += f" @ batch {self.batch}" if self.batch != 1 else ""
        return text + (f", prefer {self.prefer}" if self.prefer != "quality" else "")

    @property
    def speed_bounds(self) -> tuple[Bound, ...]:
        """Those on speedup, latency and throughput."""
        return tuple(b for b in self.bounds if b.kind.trade == "speed")

    @property
    def quality_bounds(self) -> tuple[Bound, ...]:
        """Those on quality and drop."""
        return tuple(b for b in self.bounds if b.kind.trade == "quality")

    @property
    def wants_speed(self) -> bool:
        """Whether to make the most of speed; if not, of quality.

        So where speed is preferred, and where quality alone is bounded (else the original would always win).
        """
        return self.prefer == "speed" or (bool(self.quality_bounds) and not self.speed_bounds)

    @property
    def samples_needed(self) -> int:
        """How many timed calls the quantiles need at least, so that their intervals exist; 0 where none is asked.

        At the least count the upper end is the slowest call of all; three times as many make it useful.
        """
        return max((least_count(QUANTILES[b.quantity]) for b in self.bounds if b.quantity in QUANTILES), default=0)

    def check(self, metric: str, higher_is_better: bool) -> None:
        """Whether the goal makes sense for a metric of this name and direction.

        Raises:
            GoalError: a bound on quality points the wrong way, or lies where the metric never gets to.
        """
        for bound in self.quality_bounds:
            if bound.quantity == "quality" and bound.least != higher_is_better:
                better, sign = ("higher", ">=") if higher_is_better else ("lower", "<=")
                right = replace(bound, least=not bound.least)
                raise GoalError(
                    f"'{bound}' points the wrong way: {better} is better for {metric}, so its bound must be "
                    f"written with {sign}; did you mean '{right}'?"
                )
            if metric in UNIT_METRICS and not bound.relative and abs(bound.value) > 1:
                right = replace(bound, value=bound.value / 100, relative=bound.quantity == "drop")
                raise GoalError(
                    f"'{bound}' can't be: {metric} lies between 0 and 1, so a bound in its own unit does too; "
                    f"did you mean '{right}'?"
                )

    def judge(self, evidence: Evidence) -> Verdict:
        """Hold every bound against the evidence."""
        checks = tuple(self._check(b, evidence) for b in self.bounds)
        outcomes = {c.outcome for c in checks}
        for outcome in (Outcome.NOT_MET, Outcome.UNSURE):
            if outcome in outcomes:
                return Verdict(outcome, checks)
        return Verdict(Outcome.MET, checks)

    def merit(self, evidence: Evidence) -> tuple[float, ...]:
        """A key by which the best evidence sorts last: `max(..., key=goal.merit)`.

        First the outcome (met, cannot tell, not met); then, where it is not met, how near it is; then what is
        wanted most, rounded to what noise allows to tell apart; then the other of speed and quality.
        """
        verdict = self.judge(evidence)
        rank = (Outcome.NOT_MET, Outcome.UNSURE, Outcome.MET).index(verdict.outcome)
        speed, drop = evidence.speedup.mid, evidence.drop
        if self.wants_speed:
            wanted = (float(round(math.log(speed) / SAME_SPEED)), -drop.mid, speed)
        else:
            wanted = (-_coarse(drop), speed, -drop.mid)
        return (float(rank), -verdict.shortfall, *wanted)

    def _check(self, bound: Bound, evidence: Evidence) -> Check:
        interval, low_known, high_known = _measured(bound, evidence)
        gap = bound.value - interval.low if bound.least else interval.high - bound.value
        shortfall = _shortfall(bound, interval, evidence) if gap > 0 else 0.0
        if bound.kind.timed and evidence.batch != self.batch:
            note = f"it was measured at batch {evidence.batch}, but batch {self.batch} is asked for"
            return Check(bound, interval, Outcome.UNSURE, shortfall, note)
        met_known, missed_known = (low_known, high_known) if bound.least else (high_known, low_known)
        missed = interval.high < bound.value if bound.least else interval.low > bound.value
        if gap <= 0 and met_known:
            return Check(bound, interval, Outcome.MET)
        if missed and missed_known:
            return Check(bound, interval, Outcome.NOT_MET, shortfall)
        note = "" if low_known and high_known else _too_few(bound, evidence)
        return Check(bound, interval, Outcome.UNSURE, shortfall, note)


def _bound(text: BoundText) -> Bound:
    return Bound(text.quantity, text.least, float(text.value), text.relative)


def _measured(bound: Bound, evidence: Evidence) -> tuple[Interval, bool, bool]:
    """The figure that a bound is about, and whether its lower and its upper end are known."""
    quantity = bound.quantity
    if quantity in QUANTILES:
        return evidence.latency(QUANTILES[quantity]), *sides_known(len(evidence.seconds), QUANTILES[quantity])
    if quantity in ("speedup", "throughput"):
        interval = evidence.speedup if quantity == "speedup" else evidence.throughput
        return interval, *sides_known(len(evidence.rounds), 0.5)
    if quantity == "quality":
        return evidence.quality, True, True
    if quantity == "drop":
        return evidence.relative_drop if bound.relative else evidence.drop, True, True
    return Interval.exactly(evidence.peak_bytes if quantity == "memory" else evidence.disk_bytes), True, True


def _too_few(bound: Bound, evidence: Evidence) -> str:
    quantile = QUANTILES.get(bound.quantity)
    if quantile is None:
        return f"{len(evidence.rounds)} rounds are too few for an interval, {least_count(0.5)} are needed"
    return f"{len(evidence.seconds)} timed calls are too few for an interval, {least_count(quantile)} are needed"


def _shortfall(bound: Bound, interval: Interval, evidence: Evidence) -> float:
    if bound.kind.trade != "quality":
        low, high = (interval.low, bound.value) if bound.least else (bound.value, interval.high)
        return math.log(high / low) if low > 0 else math.inf
    gap = bound.value - interval.low if bound.least else interval.high - bound.value
    share = SHARE if bound.relative else SHARE * (abs(evidence.original_quality.mid) or 1.0)
    return math.log1p(gap / (max(abs(bound.value), share) if bound.quantity == "drop" else share))


def _coarse(drop: Interval) -> float:
    """The middle of a drop, rounded to its half width taken up to a power of two, so that most share one grid."""
    half = (drop.high - drop.low) / 2
    if half <= 0:
        return drop.mid
    step = 2.0 ** math.ceil(math.log2(half))
    return round(drop.mid / step) * step
