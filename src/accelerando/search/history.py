"""What is known from the trials so far, and what a proposal is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from statistics import median

from accelerando.errors import Reason
from accelerando.goal import QUANTILES, Goal
from accelerando.interval import Interval
from accelerando.recipe import Recipe, Stage, Technique
from accelerando.search.belief import DROP, SPEED, Belief, spread
from accelerando.trial import ARGUMENTS, Evidence, Refused, Trial

MEASURING_SECONDS = 4.0  # what measuring takes, whatever it is
BLURRED = 0.3  # relative width of the best's interval over which it is measured again at once
SHARP_ROUNDS = 48
LOSSLESS_DROP = 1e-3  # relative; under it a recipe counts as lossless
BUILD_FAILURES = frozenset(Reason) - {Reason.TOO_SLOW, Reason.BELOW_QUALITY, Reason.TIMED_OUT}


@dataclass(frozen=True)
class Proposal:
    """A recipe to try, and why.

    `again`: it is to be measured again rather than built.  `rivals`: with these, in the same rounds.
    """

    recipe: Recipe
    why: str
    again: bool = False
    rivals: tuple[Recipe, ...] = ()


@dataclass(frozen=True)
class History:
    """What is known from the trials so far; of a recipe that was measured again, the last counts."""

    trials: tuple[Trial, ...]

    @cached_property
    def last(self) -> dict[str, Trial]:
        return {t.recipe.key: t for t in self.trials}

    @cached_property
    def verified(self) -> tuple[Trial, ...]:
        return tuple(t for t in self.last.values() if t.verified)

    @cached_property
    def speed(self) -> Belief:
        seen = []
        for trial in self.last.values():
            speedup = trial.evidence.speedup if trial.evidence else getattr(trial.outcome, "speedup", None)
            if speedup is not None and not trial.recipe.backend.members:
                error = spread((math.log(speedup.low), math.log(speedup.high)))
                seen.append((trial.recipe, math.log(speedup.mid), error + 0.02))
        return Belief.learn(seen, SPEED)

    @cached_property
    def usual_seconds(self) -> float:
        """What a call of the original takes: the median over all trials, for at times others' load slows it."""
        return median(t.evidence.original_latency().mid for t in self.last.values() if t.evidence)

    @cached_property
    def drop(self) -> Belief:
        seen = []
        for trial in self.last.values():
            cut = front_of(trial.recipe) or trial.recipe.backend.members  # what a cut loses says nothing of its tail
            if trial.evidence and not cut:
                drop = trial.evidence.relative_drop
                seen.append((trial.recipe, drop.mid, spread((drop.low, drop.high)) + 5e-4))
        return Belief.learn(seen, DROP)

    def seconds(self, recipe: Recipe) -> float:
        """What trying a recipe is likely to take: as long as its like did, or what its parts say of themselves."""
        names = [p.name for p in (*recipe.steps, recipe.backend)]
        like = [
            t.seconds
            for t in self.last.values()
            if t.seconds > 0 and names == [p.name for p in (*t.recipe.steps, t.recipe.backend)]
        ]
        if like:
            return sum(like) / len(like)
        done = {p.name for t in self.verified for p in t.recipe.steps}
        new = [p for p in (*recipe.steps, recipe.backend) if p.name not in done]
        return MEASURING_SECONDS + sum(p.expected_seconds for p in new)

    def knows(self, recipe: Recipe) -> bool:
        """Whether each technique and backend of a recipe was measured at least once, in whatever company."""
        return {p.name for p in (*recipe.steps, recipe.backend)} <= self.measured

    @cached_property
    def measured(self) -> frozenset[str]:
        seen = [t.recipe for t in self.last.values() if t.evidence or getattr(t.outcome, "speedup", None)]
        return frozenset(p.name for r in seen for p in (*r.steps, r.backend))

    def blurred(self, trial: Trial) -> bool:
        """Whether a trial's speedup is too uncertain to hold others against, and more rounds may still help."""
        evidence = trial.evidence
        return evidence is not None and evidence.speedup.width > BLURRED and len(evidence.rounds) < SHARP_ROUNDS

    def doomed(self, recipe: Recipe) -> bool:
        """Whether a step that already failed would fail again: the same steps up to and with the one that did."""
        for trial in self.last.values():
            out = trial.outcome
            if not isinstance(out, Refused) or out.step is None or out.reason not in BUILD_FAILURES:
                continue
            failed = (*trial.recipe.steps, trial.recipe.backend)[: out.step + 1]
            if (*recipe.steps, recipe.backend)[: out.step + 1] == failed:
                return True
        return False


@dataclass(frozen=True, eq=False)
class SoberEvidence(Evidence):
    """Evidence in which a drop below zero counts as none, unless its whole interval lies there.

    Of many recipes that are worth the same, the luckiest on the select split looks better than the original; on the
    certify split it will not.  What decides is then whether its interval would fit about zero.
    """

    @cached_property
    def drop(self) -> Interval:
        return _sobered(super().drop)

    @cached_property
    def relative_drop(self) -> Interval:
        return _sobered(super().relative_drop)


def _sobered(drop: Interval) -> Interval:
    luck = -drop.mid if drop.mid < 0 <= drop.high else 0.0
    return Interval(drop.low + luck, drop.mid + luck, drop.high + luck)


@lru_cache(maxsize=1024)
def sober(evidence: Evidence) -> Evidence:
    """The evidence without what looks like luck."""
    if evidence.drop.mid >= 0 and evidence.relative_drop.mid >= 0:
        return evidence
    return SoberEvidence(**{name: getattr(evidence, name) for name in ARGUMENTS})


def merit(trial: Trial, goal: Goal) -> tuple[float, ...]:
    """A key by which the verified trial that promises the best certificate sorts last."""
    assert trial.evidence is not None
    return goal.merit(sober(trial.evidence))


def leader(verified: Iterable[Trial], goal: Goal) -> Trial | None:
    """The best of the verified trials, as the goal has it."""
    return max(verified, key=lambda t: merit(t, goal), default=None)


def speed_of(evidence: Evidence | None) -> float:
    return evidence.speedup.mid if evidence else 0.0


def allowed_drop(goal: Goal, best: Evidence | None) -> float:
    """The relative drop that may be, for the belief: the goal's own, or a usual one where it bounds no drop."""
    unit = max(abs(best.original_quality.mid), 1e-12) if best else 1.0
    allowed = [b.value if b.relative else b.value / unit for b in goal.quality_bounds if b.quantity == "drop"]
    return min(allowed, default=0.02)


def holds(evidence: Evidence | None, goal: Goal) -> bool:
    return evidence is not None and evidence.relative_drop.mid <= allowed_drop(goal, evidence)


def asked_speedup(goal: Goal, best: Evidence) -> float:
    """The speed that is asked for, as a speedup, by way of the original's own latency."""
    asked = [1.0]
    for bound in goal.speed_bounds:
        if bound.quantity == "speedup":
            asked.append(bound.value)
        elif bound.quantity == "throughput":
            asked.append(bound.value * best.original_latency().mid / best.batch)
        else:
            asked.append(best.original_latency(QUANTILES[bound.quantity]).mid / bound.value)
    return max(asked)


def front_of(recipe: Recipe) -> tuple[Technique, ...]:
    """The steps that shape and heal: they stand before all others."""
    return tuple(s for s in recipe.steps if s.stage <= Stage.HEAL)


def tail_of(recipe: Recipe) -> Recipe:
    """What follows shaping and healing: lowering, quantizing, the backend."""
    return Recipe(recipe.steps[len(front_of(recipe)) :], recipe.backend)


def drop_of(trial: Trial) -> float:
    """The relative drop as it was measured; infinite where it was not."""
    return trial.evidence.relative_drop.mid if trial.evidence else math.inf
