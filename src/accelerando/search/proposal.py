"""What to try next: history in, proposal out, no state.  So a search can be resumed and replayed.

Explore while there is time: every technique and backend gets its first trial before any gets its second; after
that, of all recipes that are one step from what is known, the one that promises most for its cost, where the
promise is the expected gain in speed times the probability that quality holds (Gardner et al. 2014, constrained
expected improvement).  When that has had its share of the time, or nothing promises any more, cut the model and heal
it (`shapes`), or where there is speed to spare, make it larger and teach it more (`growth`).  Then race: the best and
whatever can't be told from it are measured in the same rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from accelerando.goal import Goal
from accelerando.recipe import Recipe
from accelerando.search.belief import expected_gain, probability
from accelerando.search.budget import Budget
from accelerando.search.growth import next_growth
from accelerando.search.history import (
    LOSSLESS_DROP,
    History,
    Proposal,
    allowed_drop,
    asked_speedup,
    holds,
    leader,
    speed_of,
)
from accelerando.search.shapes import next_shape
from accelerando.search.space import Space
from accelerando.trial import Refused, Trial

LEAST_GAIN = 0.008  # expected gain in log speed under which exploring is over
QUALITY_UNIT = 0.05  # relative drop that is worth as much as a factor e in speed, where quality is preferred
NEW_SHARE = 0.4  # of the time left that trying something altogether new may take before its turn
TRAINING_FREE_SHARE = 0.3  # of the budget, after which shapes have their turn
RIVALS = 3  # how many race against the best


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
    if budget.to_explore > 0 and best is not None:
        if budget.used < TRAINING_FREE_SHARE * budget.seconds:
            found = _explore(space, history, goal, best, budget) or next_shape(space, history, goal, budget)
        else:
            found = next_shape(space, history, goal, budget) or _explore(space, history, goal, best, budget)
        if found := found or next_growth(space, history, goal, budget):
            return found
    if budget.to_race > 0:
        return _race(history, best, goal, space.original)
    return None


def _explore(space: Space, history: History, goal: Goal, best: Trial | None, budget: Budget) -> Proposal | None:
    proposals = []
    fastest = max((speed_of(t.evidence) for t in history.verified if holds(t.evidence, goal)), default=1.0)
    for recipe in _candidates(space, history):
        seconds = history.seconds(recipe)
        if seconds > budget.to_explore + 5 and history.verified[1:]:
            continue
        gain, why = _promise(recipe, history, goal, best, fastest)
        if gain >= LEAST_GAIN:
            new = seconds <= NEW_SHARE * budget.to_explore and not history.knows(recipe)
            proposals.append((new, gain / seconds, recipe.key, Proposal(recipe, why)))
    return max(proposals, key=lambda p: p[:3])[3] if proposals else None


def _candidates(space: Space, history: History) -> list[Recipe]:
    """Every untried recipe one step from what is known: the defaults of each route, the neighbours of what ran,
    and a route's defaults with the settings that served best elsewhere."""
    pool: dict[str, Recipe] = {}
    ranked = sorted(history.verified, key=lambda t: -speed_of(t.evidence))
    settings: dict[str, object] = {}
    for trial in ranked:
        for part in (*trial.recipe.steps, trial.recipe.backend):
            settings.setdefault(part.name, part)
    for route in (r for r in space.routes if r.stands_alone):
        borrowed = [settings.get(c[0].name, c[0]) for c in route.choices]
        for recipe in (route.default, route.recipe(borrowed)):  # type: ignore[arg-type]
            pool.setdefault(recipe.key, recipe)
    too_slow = [t for t in history.last.values() if isinstance(t.outcome, Refused) and t.outcome.speedup]
    for trial in (*ranked, *too_slow):
        if route_ := space.route_of(trial.recipe):
            for recipe in route_.neighbours(trial.recipe):
                pool.setdefault(recipe.key, recipe)
    return [r for key, r in pool.items() if key not in history.last and not history.doomed(r)]


def _promise(recipe: Recipe, history: History, goal: Goal, best: Trial | None, fastest: float) -> tuple[float, str]:
    """The expected gain of trying a recipe, in log speed or what is worth as much, and in words.

    Args:
        fastest: speedup of those that hold the goal's quality.
    """
    mean, deviation = history.speed.about(recipe)
    drop, uncertainty = history.drop.about(recipe)
    allowed = allowed_drop(goal, best.evidence if best else None)
    enough = probability((allowed - drop) / uncertainty)
    gain = enough * expected_gain(mean, deviation, math.log(fastest))
    if best is not None and best.evidence is not None and goal.speed_bounds and not goal.wants_speed:
        asked = asked_speedup(goal, best.evidence)
        reaches = probability((mean - math.log(asked)) / deviation)
        lost = max(best.evidence.relative_drop.mid, 0.0) if speed_of(best.evidence) >= asked else allowed
        better = expected_gain(-drop, uncertainty, -lost)  # less is lost than by the best so far
        if lost > LOSSLESS_DROP:  # else there is nothing to win: nobody is believed to be better than the original
            gain = max(gain, reaches * min(better, lost) / QUALITY_UNIT)
    return (
        gain,
        f"about {math.exp(mean):.1f}x expected ({math.exp(mean - deviation):.1f} to {math.exp(mean + deviation):.1f})",
    )


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
        and holds(t.evidence, goal) == holds(lead, goal)
        and (t.evidence.speedup.high >= lead.speedup.low or t.evidence.latency().mid <= lead.latency().high)
    ]
    by_ratio = sorted(rivals, key=lambda t: -speed_of(t.evidence))
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
