"""What to try next: history in, proposal out, no state.  So a search can be resumed and replayed.

Explore while there is time: every technique and backend gets its first trial before any gets its second; after
that, of all recipes that are one step from what is known, the one that promises most for its cost, where the
promise is the expected gain in speed times the probability that quality holds (Gardner et al. 2014, constrained
expected improvement).  Then race: the best and whatever can't be told from it are measured in the same rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from accelerando.errors import Reason
from accelerando.goal import Goal
from accelerando.recipe import Recipe
from accelerando.search.belief import DROP, SPEED, Belief, expected_gain, probability, spread
from accelerando.search.budget import Budget
from accelerando.search.space import Space
from accelerando.trial import Evidence, Refused, Trial

LEAST_GAIN = 0.008  # expected gain in log speed under which exploring is over
LOSSLESS_DROP = 1e-3  # relative; under it a recipe counts as lossless
QUALITY_UNIT = 0.05  # relative drop that is worth as much as a factor e in speed, where quality is preferred
MEASURING_SECONDS = 4.0  # what measuring takes, whatever it is
NEW_SHARE = 0.4  # of the time left that trying something altogether new may take before its turn
BLURRED = 0.3  # relative width of the best's interval over which it is measured again at once
SHARP_ROUNDS = 48
RIVALS = 3  # how many race against the best
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
            if speedup is not None:
                error = spread((math.log(speedup.low), math.log(speedup.high)))
                seen.append((trial.recipe, math.log(speedup.mid), error + 0.02))
        return Belief.learn(seen, SPEED)

    @cached_property
    def drop(self) -> Belief:
        seen = []
        for trial in self.last.values():
            if trial.evidence:
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
        return MEASURING_SECONDS + sum(p.typical_seconds for p in new)

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


def ask(space: Space, trials: Sequence[Trial], goal: Goal, budget: Budget) -> Proposal | None:
    """The next recipe to try, or None when nothing is worth its time any more.

    The original comes first: without its evidence nothing can be judged.
    """
    history = History(tuple(trials))
    if space.original.key not in history.last:
        return Proposal(space.original, "the original, against which all is measured")
    best = leader(history.verified, goal)
    if budget.to_race > 0 and best is not None and best.recipe != space.original and history.blurred(best):
        return Proposal(best.recipe, "the best must be known well, for all others are held against it", again=True)
    if budget.to_explore > 0 and (found := _explore(space, history, goal, best, budget)):
        return found
    if budget.to_race > 0:
        return _race(history, best, goal, space.original)
    return None


def leader(verified: Iterable[Trial], goal: Goal) -> Trial | None:
    """The best of the verified trials, as the goal has it."""
    return max(verified, key=lambda t: goal.merit(t.evidence), default=None)  # type: ignore[arg-type]


def _explore(space: Space, history: History, goal: Goal, best: Trial | None, budget: Budget) -> Proposal | None:
    proposals = []
    for recipe in _candidates(space, history):
        seconds = history.seconds(recipe)
        if seconds > budget.to_explore + 5 and history.verified[1:]:
            continue
        gain, why = _promise(recipe, history, goal, best)
        if gain >= LEAST_GAIN:
            new = seconds <= NEW_SHARE * budget.to_explore and not history.knows(recipe)
            proposals.append((new, gain / seconds, recipe.key, Proposal(recipe, why)))
    return max(proposals, key=lambda p: p[:3])[3] if proposals else None


def _candidates(space: Space, history: History) -> list[Recipe]:
    """Every untried recipe one step from what is known: the defaults of each route, the neighbours of what ran,
    and a route's defaults with the settings that served best elsewhere."""
    pool: dict[str, Recipe] = {}
    ranked = sorted(history.verified, key=lambda t: -_speed(t.evidence))
    settings: dict[str, object] = {}
    for trial in ranked:
        for part in (*trial.recipe.steps, trial.recipe.backend):
            settings.setdefault(part.name, part)
    for route in space.routes:
        borrowed = [settings.get(c[0].name, c[0]) for c in route.choices]
        for recipe in (route.default, route.recipe(borrowed)):  # type: ignore[arg-type]
            pool.setdefault(recipe.key, recipe)
    too_slow = [t for t in history.last.values() if isinstance(t.outcome, Refused) and t.outcome.speedup]
    for trial in (*ranked, *too_slow):
        if route_ := space.route_of(trial.recipe):
            for recipe in route_.neighbours(trial.recipe):
                pool.setdefault(recipe.key, recipe)
    return [r for key, r in pool.items() if key not in history.last and not history.doomed(r)]


def _speed(evidence: Evidence | None) -> float:
    return evidence.speedup.mid if evidence else 0.0


def _promise(recipe: Recipe, history: History, goal: Goal, best: Trial | None) -> tuple[float, str]:
    """The expected gain of trying a recipe, in log speed or what is worth as much, and in words."""
    mean, deviation = history.speed.about(recipe)
    drop, uncertainty = history.drop.about(recipe)
    allowed = _allowed(goal, best.evidence if best else None)
    holds = probability((allowed - drop) / uncertainty)
    fastest = max((_speed(t.evidence) for t in history.verified if _holds(t.evidence, goal)), default=1.0)
    gain = holds * expected_gain(mean, deviation, math.log(fastest))
    if best is not None and best.evidence is not None and goal.speed_bounds and not goal.wants_speed:
        asked = _asked_speedup(goal, best.evidence)
        reaches = probability((mean - math.log(asked)) / deviation)
        lost = max(best.evidence.relative_drop.mid, 0.0) if _speed(best.evidence) >= asked else allowed
        better = expected_gain(-drop, uncertainty, -lost)  # less is lost than by the best so far
        if lost > LOSSLESS_DROP:  # else there is nothing to win: nobody is believed to be better than the original
            gain = max(gain, reaches * min(better, lost) / QUALITY_UNIT)
    return (
        gain,
        f"about {math.exp(mean):.1f}x expected ({math.exp(mean - deviation):.1f} to {math.exp(mean + deviation):.1f})",
    )


def _allowed(goal: Goal, best: Evidence | None) -> float:
    """The relative drop that may be, for the belief: the goal's own, or a usual one where it bounds no drop."""
    unit = max(abs(best.original_quality.mid), 1e-12) if best else 1.0
    allowed = [b.value if b.relative else b.value / unit for b in goal.quality_bounds if b.quantity == "drop"]
    return min(allowed, default=0.02)


def _holds(evidence: Evidence | None, goal: Goal) -> bool:
    return evidence is not None and evidence.relative_drop.mid <= _allowed(goal, evidence)


def _asked_speedup(goal: Goal, best: Evidence) -> float:
    """The speed that is asked for, as a speedup, by way of the original's own latency."""
    asked = [1.0]
    for bound in goal.speed_bounds:
        if bound.quantity == "speedup":
            asked.append(bound.value)
        elif bound.quantity == "throughput":
            asked.append(bound.value * best.original_latency().mid / best.batch)
        else:
            quantile = {"latency": 0.5, "p95": 0.95, "p99": 0.99}[bound.quantity]
            asked.append(best.original_latency(quantile).mid / bound.value)
    return max(asked)


def _race(history: History, best: Trial | None, goal: Goal, original: Recipe) -> Proposal | None:
    """The best and its rivals in one contest, unless they were in one already."""
    if best is None or best.evidence is None or best.recipe == original:
        return None
    lead = best.evidence
    rivals = [
        t
        for t in history.verified
        if t.recipe not in (best.recipe, original)
        and t.evidence is not None
        and _holds(t.evidence, goal) == _holds(lead, goal)
        and (t.evidence.speedup.high >= lead.speedup.low or t.evidence.latency().mid <= lead.latency().high)
    ]
    by_ratio = sorted(rivals, key=lambda t: -_speed(t.evidence))
    by_clock = sorted(rivals, key=lambda t: t.evidence.latency().mid if t.evidence else math.inf)
    chosen = list({t.recipe.key: t for pair in zip(by_ratio, by_clock, strict=True) for t in pair}.values())[:RIVALS]
    if all(t.evidence is not None and t.evidence.same_contest(lead) for t in chosen):
        return None
    return Proposal(
        best.recipe,
        "what can't be told from the best races with it",
        again=True,
        rivals=tuple(t.recipe for t in chosen),
    )
