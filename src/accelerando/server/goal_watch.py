"""Whether a served model meets its goal just now, bound by bound.

The search judged the goal by a duel (`Goal.judge`); here it is held against what the server sees of its own requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from accelerando.errors import GoalError
from accelerando.goal import QUANTILES, Bound, Goal
from accelerando.interval import Interval
from accelerando.serve.status import RungStatus, Status
from accelerando.server.recent import Recent

MET, NOT_MET, UNSURE, QUIET = "met", "not met", "cannot tell", "quiet"
KEEPS_UP = 0.99  # of the requests in time: what counts as keeping up where no quantile is asked for


@dataclass(frozen=True)
class Sight:
    """One bound held against the last minute: `bound` in words, `outcome` met, not met, cannot tell or quiet."""

    bound: str
    outcome: str
    said: str


@dataclass(frozen=True)
class Outlook:
    """The outcome of a goal just now: not met when one bound is not, met when all are, quiet without requests."""

    outcome: str
    sights: tuple[Sight, ...]


@lru_cache(maxsize=128)  # it is asked for twice a second, and is nearly always the same
def read(text: str) -> Goal | None:
    """The goal of a text; None where there is none, or none that can be read."""
    try:
        return Goal.parse(text) if text.strip() else None
    except GoalError:
        return None


def needed(goal: Goal | None) -> float:
    """The share of requests that must be in time: 0.99 for a p99, 0.5 for a latency; `KEEPS_UP` where none is asked."""
    quantiles = [QUANTILES[b.quantity] for b in goal.bounds if b.quantity in QUANTILES] if goal else []
    return max(quantiles, default=KEEPS_UP)


def judge(goal: Goal | None, status: Status, recent: Recent) -> Outlook:
    """Hold a goal against the last minute.  Without a goal, whether the requests were answered in time."""
    if goal is None:
        held = [("requests in time", _in_time(recent, KEEPS_UP))]
    else:
        held = [(str(bound), _held(bound, status, recent)) for bound in goal.bounds]
    sights = tuple(Sight(bound, *told) for bound, told in held)
    outcomes = {sight.outcome for sight in sights}
    for outcome in (NOT_MET, QUIET, UNSURE):
        if outcome in outcomes:
            return Outlook(outcome, sights)
    return Outlook(MET if recent.requests else QUIET, sights)


def _held(bound: Bound, status: Status, recent: Recent) -> tuple[str, str]:
    rung = next((r for r in status.rungs if r.number == status.standing), None)
    if bound.quantity in QUANTILES:
        return _in_time(recent, QUANTILES[bound.quantity])
    if bound.quantity == "throughput":
        return _throughput(bound, recent)
    if bound.quantity == "memory":
        figure = Interval.exactly(float(status.memory_bytes))
        return _within(bound, figure), f"the loaded rungs hold {bound.spell(figure.mid)}"
    if bound.quantity == "speedup" and rung is not None:
        return _within(bound, rung.speedup), f"rung {rung.number} is certified for {_spelt(bound, rung.speedup)}"
    if bound.quantity in ("quality", "drop") and rung is not None:
        return _quality(bound, status, recent, rung)
    return UNSURE, "nothing is measured of it while it serves"


def _in_time(recent: Recent, share: float) -> tuple[str, str]:
    if recent.share is None:
        return QUIET, "no requests"
    said = f"{percent(recent.share)} of {recent.requests:,} in time, {percent(share)} needed"
    return (MET if recent.share >= share else NOT_MET), said


def _throughput(bound: Bound, recent: Recent) -> tuple[str, str]:
    if recent.share is None:
        return QUIET, "no requests"
    if recent.rows >= bound.value:
        return MET, f"{recent.rows:,.0f} rows/s are answered"
    if recent.share >= KEEPS_UP:
        return MET, f"it keeps up with the {recent.rows:,.0f} rows/s that come"
    return NOT_MET, f"{recent.rows:,.0f} rows/s are answered, and {percent(recent.share)} of the requests in time"


def _quality(bound: Bound, status: Status, recent: Recent, rung: RungStatus) -> tuple[str, str]:
    """The certified quality of what was answered; of the rung that is stood on where nothing was."""
    figure = (recent.drop or rung.drop) if bound.quantity == "drop" else (recent.answers or rung.quality)
    if bound.relative:
        whole = next((abs(r.quality.mid) for r in status.rungs if r.number == 0), 0.0)
        if not whole:
            return UNSURE, "the original's quality is not known"
        figure = figure.map(lambda value: value / whole)
    whose = "the answers are" if recent.answers else f"rung {rung.number} is"
    return _within(bound, figure), f"{whose} certified for {_spelt(bound, figure)}"


def _within(bound: Bound, figure: Interval) -> str:
    """Met by the end of the interval that counts, as everywhere here."""
    if not all(map(math.isfinite, (figure.low, figure.high))):
        return UNSURE
    low, high = (figure.low, figure.high) if bound.least else (-figure.high, -figure.low)
    value = bound.value if bound.least else -bound.value
    return MET if low >= value else NOT_MET if high < value else UNSURE


def _spelt(bound: Bound, figure: Interval) -> str:
    low, mid, high = (bound.spell(float(f"{v:.3g}")) for v in (figure.low, figure.mid, figure.high))
    return mid if low == high else f"{mid} ({low} to {high})"


def percent(share: float) -> str:
    """A share as `99.97 %`, cut and not rounded: what is not all is never told as 100 %."""
    cut = math.floor(share * 10000 + 1e-9) / 100
    return f"{cut:.2f}".rstrip("0").rstrip(".") + " %"


def to_json(goal: Goal | None, text: str) -> dict[str, Any]:
    """A goal as the dashboard needs it: its text, and its bounds apart, so that one of them can be moved."""
    if goal is None:
        return {"text": text, "bounds": [], "batch": 1, "prefer": "quality"}
    bounds = [{"text": str(b), "quantity": b.quantity, "least": b.least, "value": b.value} for b in goal.bounds]
    return {"text": text, "bounds": bounds, "batch": goal.batch, "prefer": goal.prefer}
