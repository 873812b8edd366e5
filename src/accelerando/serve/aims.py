"""What a goal asks of the governor.

A bound on latency is every request's patience.  Bounds on speedup, throughput, memory and size say which rungs may be
stood on.  A bound on quality holds for the mean of what is answered: a rung below it may be used for as long as
better ones have earned it.  Without a bound on speed the fastest rung that keeps the quality is wanted, as in the
search.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from accelerando.goal import Goal, Outcome
from accelerando.ladder import Ladder, Rung

LATENCIES = ("latency", "p95", "p99")
SAVINGS = 1000  # rows whose surplus of quality the bank keeps: what was saved long ago is not spent today


def orientation(ladder: Ladder) -> int:
    """1 where a higher value of the metric is better, -1 where a lower one is."""
    return 1 if ladder.original.evidence.higher_is_better else -1


def promise(rung: Rung, ladder: Ladder) -> float:
    """The quality that a rung's certificate promises, oriented so that greater is better.

    The original's, less what the rung loses at worst: drops are measured in pairs, on the same samples, and are known
    far better than the values themselves.
    """
    return promised_by_original(ladder) - (0.0 if rung is ladder.original else rung.drop.high)


def promised_by_original(ladder: Ladder) -> float:
    return orientation(ladder) * ladder.original.evidence.original_quality.mid


@dataclass(frozen=True)
class Aims:
    """A goal, as the governor needs it.

    Args:
        goal: as it was parsed.
        patience: seconds that an answer may take; infinite where no latency is asked for.
        quality: that the mean of the answers must promise, oriented like `promise`; minus infinity where none is.
        least_rate: rows per second that a rung must be able to answer.
        rungs: numbers of those that may be stood on.
    """

    goal: Goal
    patience: float
    quality: float
    least_rate: float
    rungs: frozenset[int]

    @classmethod
    def of(cls, goal: Goal, ladder: Ladder) -> Aims:
        """The aims of a goal on a ladder.

        Raises:
            GoalError: a bound on quality points the wrong way, or lies where the metric never gets to.
        """
        goal.check(ladder.original.evidence.metric, ladder.original.evidence.higher_is_better)
        original = promised_by_original(ladder)
        wanted = [-math.inf]
        for bound in goal.quality_bounds:
            if bound.quantity == "quality":
                wanted.append(orientation(ladder) * bound.value)
            else:
                wanted.append(original - bound.value * (abs(original) if bound.relative else 1.0))
        values = {b.quantity: b.value for b in goal.bounds}
        return cls(
            goal,
            min((values[name] for name in LATENCIES if name in values), default=math.inf),
            max(wanted),
            values.get("throughput", 0.0),
            frozenset(_allowed(goal, ladder)),
        )


def banked(bank: float, surplus: float, rows: int) -> float:
    """What the bank of quality holds after so many rows more, of this much more quality than is asked for."""
    return min(bank + surplus * rows, max(surplus, 0.0) * SAVINGS + max(bank, 0.0))


def _allowed(goal: Goal, ladder: Ladder) -> Iterable[int]:
    """The rungs that meet the bounds which a rung meets by itself; where none does, the one that is nearest."""
    if goal.wants_speed:
        return range(ladder.best(goal.merit), len(ladder))  # faster ones too: they carry what it can't
    own = tuple(b for b in goal.bounds if b.quantity in ("speedup", "memory", "size"))
    if not own:
        return range(len(ladder))
    asked = replace(goal, bounds=own)
    met = [i for i, rung in enumerate(ladder) if asked.judge(rung.evidence).outcome is Outcome.MET]
    return met or [ladder.best(asked.merit)]
