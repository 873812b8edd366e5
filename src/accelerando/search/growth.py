"""Growth: speed to spare is spent on quality.

Where quality is what is wanted most, and a recipe that needs no training is much faster than asked, the original is
made larger until it is about as fast as asked, and learns on, from the labels too.  As with cuts, a shape is measured
before it is trained, with the best tail behind it; how much larger follows from the speeds measured so far (the
logarithm of the time is linear in the logarithm of the size).  Lessons are given as to cuts (`shapes`), until one more
brings nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from accelerando.goal import UNIT_METRICS, Goal, Outcome
from accelerando.recipe import Recipe, Technique
from accelerando.search.belief import share_of
from accelerando.search.budget import Budget
from accelerando.search.cuts import AIM, SHORTEST_LESSON, Cuts
from accelerando.search.directions import LARGER
from accelerando.search.history import LOSSLESS_DROP, History, Proposal, asked_speedup, drop_of, front_of, tail_of
from accelerando.search.shapes import Lessons
from accelerando.search.space import Space
from accelerando.trial import Evidence, Trial

LEAST_SPARE = 1.25  # times faster than wanted that the best tail must be
LEAST_TIMES, MOST_TIMES = 1.1, 4.0  # larger than the original
ROOM = 1.25  # a grown model this much faster than wanted could have been larger
TRIES = 3  # sizes of one way to grow
SHALLOWER, SHARE = "drop_layers", 0.3  # what goes where a model becomes wider for it, and how much


@dataclass(frozen=True)
class Way:
    """A way to become larger: the knob of the technique that grows, and what is cut after it."""

    grower: Technique
    knob: str
    cuts: tuple[Technique, ...] = ()

    def front(self, times: float) -> tuple[Technique, ...]:
        """The steps that make a model about as many times as costly."""
        return self._steps(round(times / self._left, 2))

    def times(self, front: Sequence[Technique]) -> float | None:
        """What `front` was given for these steps; None where they are no steps of this way."""
        knobs = front[0].knobs if front else {}
        value = knobs.get(self.knob)
        if not isinstance(value, float) or value <= 1 or tuple(front) != self._steps(value):
            return None
        return value * self._left

    def _steps(self, value: float) -> tuple[Technique, ...]:
        return (self.grower.with_knobs(**{**dict.fromkeys(LARGER, 1.0), self.knob: value}), *self.cuts)

    @property
    def _left(self) -> float:
        return math.prod(1 - (share_of(s) or 0.0) for s in self.cuts)


def next_growth(space: Space, history: History, goal: Goal, budget: Budget) -> Proposal | None:
    """The next larger shape to measure, or its next lesson; None where there is no speed to spare, or no use for it.

    A technique that grows is in the space only where there are labels to learn from.
    """
    if not space.healers or goal.wants_speed or not goal.speed_bounds:
        return None
    growth = Growth(Cuts(space, history, goal, budget))
    if growth.tail is None or not growth.may_gain:
        return None
    return growth.measure() or Lessons(growth.cuts).heal(growth.shapes, enough=-math.inf)


@dataclass(frozen=True)
class Growth:
    """What is known of larger models that were measured, and what to measure next."""

    cuts: Cuts

    @property
    def tail(self) -> Trial | None:
        """The fastest training-free recipe that meets all that is asked but for quality."""
        return next((t for t in self.cuts.tails if self._fits(t)), None)

    @property
    def may_gain(self) -> bool:
        """Whether there is any quality to gain: the original is not perfect."""
        evidence = self.tail.evidence if self.tail else None
        if evidence is None or evidence.metric not in UNIT_METRICS:
            return evidence is not None
        return evidence.original_quality.mid < 1 - LOSSLESS_DROP

    @property
    def ways(self) -> list[Way]:
        """Ways to grow that were not refused: as many as there is time to hold against each other."""
        shapes = self.cuts.space.shapes
        growers = [s for s in shapes if set(LARGER) <= s.knobs.keys()]
        shallower = [s.with_knobs(share=SHARE) for s in shapes if s.name == SHALLOWER]
        ways = [Way(grower, knob) for grower in growers for knob in LARGER]
        ways += [Way(grower, LARGER[0], (cut,)) for grower in growers for cut in shallower]
        return [w for w in ways if all(self.cuts.speed(t) for _, t in self._tried(w))][: self.cuts.breadth]

    @property
    def shapes(self) -> list[Trial]:
        """Of each way the largest that fits, untrained; what lost least first."""
        found = []
        for way in self.ways:
            fitting = [(times, t) for times, t in self._tried(way) if self._fits(t)]
            found += [max(fitting, key=lambda pair: pair[0])[1]] if fitting else []
        return sorted(found, key=drop_of)

    def measure(self) -> Proposal | None:
        """A size whose speed is still to be measured, if no lesson was given yet."""
        if any(self.cuts.lessons_after(front_of(t.recipe)) for t in self.shapes):
            return None
        for way in self.ways:
            if recipe := self._next_size(way):
                return Proposal(recipe, "how fast it is when larger, before it learns on: there is speed to spare")
        return None

    def _next_size(self, way: Way) -> Recipe | None:
        tail, tried = self.tail, self._tried(way)
        assert tail is not None
        assert tail.evidence is not None
        base, wanted = self.cuts.speed(tail), AIM * asked_speedup(self.cuts.goal, tail.evidence)
        if base < LEAST_SPARE * wanted or len(tried) >= TRIES:
            return None
        times = base / wanted
        if tried:
            size, nearest = min(tried, key=lambda pair: abs(math.log(self.cuts.speed(pair[1]) / wanted)))
            if self._fits(nearest) and self.cuts.speed(nearest) < ROOM * wanted:
                return None
            slope = max(math.log(base / self.cuts.speed(nearest)) / math.log(size), 0.1)
            times = min(times ** (1 / slope), size**2)
        if times < LEAST_TIMES:
            return None
        recipe = Recipe((*way.front(min(times, MOST_TIMES)), *tail_of(tail.recipe).steps), tail.recipe.backend)
        history = self.cuts.history
        if recipe.key in history.last or history.doomed(recipe):
            return None
        return recipe if history.seconds(recipe) + SHORTEST_LESSON <= self.cuts.budget.to_explore else None

    def _tried(self, way: Way) -> list[tuple[float, Trial]]:
        """How many times larger, and the trial, of what was grown in this way and not trained."""
        known = ((way.times(front_of(t.recipe)), t) for t in self.cuts.history.last.values())
        return [(times, trial) for times, trial in known if times is not None]

    def _fits(self, trial: Trial) -> bool:
        """Whether all is met but for quality, by the end of the interval that counts."""
        evidence: Evidence | None = trial.evidence
        if evidence is None:
            return False
        checks = self.cuts.goal.judge(evidence).checks
        return all(c.outcome is Outcome.MET for c in checks if c.bound not in self.cuts.goal.quality_bounds)
