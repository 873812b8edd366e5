"""Which shape to measure or to heal next: steps 3 to 5 of the search, as pure as `ask`.

`cuts` finds shapes that are fast enough, untrained.  Only these are healed: all of a level for a short lesson, the
better half for one thrice as long, and so on (successive halving; Jamieson and Talwalkar, AISTATS 2016).  A lesson
goes on where the last one ended.  When one keeps the quality that is asked for, and speed is what is wanted, the next
level is cut out of what was healed, half as fast again: a model is narrowed in steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from accelerando.goal import Goal
from accelerando.recipe import Recipe, Stage, Technique
from accelerando.search.belief import spread
from accelerando.search.budget import Budget
from accelerando.search.cuts import AIM, SHORTEST_LESSON, STEP, Cuts, Level
from accelerando.search.history import LOSSLESS_DROP, History, Proposal, allowed_drop, drop_of, front_of, tail_of
from accelerando.search.space import Space
from accelerando.trial import Trial

MOST_LESSONS = 3  # at a level that is not asked for; then a nearer one is tried
FELT = 0.003  # relative drop by which quantizing is felt
LEFT = 0.5  # of what was lost: a lesson that leaves more is the last, unless what is left is near what is allowed
NEAR = 5.0  # times the drop that is allowed
LONGER = 3  # how many times longer the next lesson is
LESSON_SHARE = 1 / 20  # of the time to explore: the first lesson of a shape
LONGEST_FIRST = 120  # seconds


def next_shape(space: Space, history: History, goal: Goal, budget: Budget) -> Proposal | None:
    """The next shape to measure, or the next lesson; None when nothing is worth its time."""
    if not space.shapes or not space.healers:
        return None
    return Lessons(Cuts(space, history, goal, budget)).next()


@dataclass(frozen=True)
class Lessons:
    """Lessons for shapes that were measured."""

    _cuts: Cuts

    def next(self) -> Proposal | None:
        """The next cut to measure or to heal."""
        if not self._cuts.tails:
            return None
        step = STEP
        while (level := self._cuts.level(step)) is not None:
            if found := self._at(level):
                return found
            if not self._cuts.goal.wants_speed:
                return None
            step = math.sqrt(step)  # nothing was healed so far up: try half way
        return None

    def _at(self, level: Level) -> Proposal | None:
        if found := self._cuts.measure(level):
            return found
        shapes = sorted(self._cuts.shapes(level), key=drop_of)  # what lost least will heal soonest
        return self.heal(shapes[: self._cuts.width(level)]) or self._other_tail(level)

    def heal(self, shapes: Sequence[Trial], enough: float = LOSSLESS_DROP) -> Proposal | None:
        """The next lesson: a first one for each shape, then longer ones for the better half.

        Args:
            enough: the relative drop at which lessons end, where quality is wanted.
        """
        if not shapes:
            return None
        first = self._first_lesson()
        untaught = [s for s in shapes if not self._cuts.lessons_after(front_of(s.recipe))]
        for shape in untaught:
            if proposal := self._lesson(shape.recipe, first, "its first lesson"):
                return proposal
        best = self._best_taught(shapes)
        if best is None or self._satisfied(best, shapes, enough):
            return None
        rounds = [self._cuts.lessons_after(front_of(s.recipe)) for s in shapes]
        most = MOST_LESSONS if self._cuts.goal.wants_speed else math.inf
        for number in range(1, max(map(len, rounds)) + 1):
            if number >= most:
                return None
            in_round = [lessons[number - 1] for lessons in rounds if len(lessons) >= number]
            in_round = [t for t in in_round if t.evidence is not None and self._learns(t)]
            in_round.sort(key=drop_of)
            for trial in in_round[: max(1, len(in_round) // 2)]:
                longer = int(first * LONGER**number)
                if proposal := self._lesson(trial.recipe, longer, f"lesson {number + 1}, for it healed best"):
                    return proposal
        return None

    def _learns(self, trial: Trial) -> bool:
        """Whether the last lesson brought enough for a longer one to be worth its time."""
        lost, before = drop_of(trial), front_of(trial.recipe)[:-1]
        untaught = [drop_of(t) for t in self._cuts.history.last.values() if front_of(t.recipe) == before]
        within_reach = NEAR * allowed_drop(self._cuts.goal, trial.evidence)
        return lost <= max(within_reach, LEFT * min(untaught, default=math.inf))

    def _lesson(self, recipe: Recipe, seconds: int, why: str) -> Proposal | None:
        """A lesson more for a recipe, cut short to the time that is left."""
        around = min(60.0, self._cuts.history.seconds(replace_front(recipe, ())) + 5)
        seconds = min(seconds, int(self._cuts.budget.to_explore - around))
        if seconds < SHORTEST_LESSON:
            return None
        front, lesson = front_of(recipe), self._cuts.space.healers[0].with_knobs(seconds=seconds)
        if front[-1].stage is Stage.HEAL and "quantized" in lesson.knobs:  # it can do it again: now with fewer bits
            lesson = lesson.with_knobs(quantized=self._hurt_by_quantizing(recipe))
        taught = Recipe((*front, lesson, *recipe.steps[len(front) :]), recipe.backend)
        if any(map(partial(_goes_on, front), self._cuts.history.last.values())) or self._cuts.history.doomed(taught):
            return None
        return Proposal(taught, f"{why}, {seconds} s")

    def _hurt_by_quantizing(self, recipe: Recipe) -> bool:
        """Whether fewer bits cost the original quality: only then are steps with simulated ones worth their time."""
        steps = [s.name for s in recipe.steps if s.stage is Stage.QUANTIZE]
        alike = [
            t.evidence.relative_drop.mid
            for t in self._cuts.history.last.values()
            if t.evidence
            and not front_of(t.recipe)
            and steps == [s.name for s in t.recipe.steps if s.stage is Stage.QUANTIZE]
        ]
        return bool(steps) and min(alike, default=0.0) > FELT

    def _first_lesson(self) -> int:
        return int(min(max(self._cuts.whole * LESSON_SHARE, SHORTEST_LESSON), LONGEST_FIRST))

    def _best_taught(self, shapes: Sequence[Trial]) -> Trial | None:
        taught = [t for s in shapes for t in self._cuts.lessons_after(front_of(s.recipe)) if t.evidence]
        return min(taught, key=drop_of, default=None)

    def _satisfied(self, best: Trial, shapes: Sequence[Trial], enough: float) -> bool:
        """Whether more lessons would not help: it keeps its quality, and no more is wanted or to be had."""
        evidence = best.evidence
        if evidence is None or not self._cuts.keeps(evidence):
            return False
        if self._cuts.goal.wants_speed or evidence.relative_drop.mid <= enough:
            return True
        lessons = next(ts for s in shapes if best in (ts := self._cuts.lessons_after(front_of(s.recipe))))
        lessons = [t for t in lessons if t.evidence]
        if len(lessons) < 2:
            return False
        last = lessons[-1].evidence.relative_drop if lessons[-1].evidence else evidence.relative_drop
        return drop_of(lessons[-2]) - last.mid < spread((last.low, last.high))

    def _other_tail(self, level: Level) -> Proposal | None:
        """Another way to lower and quantize what healed best, where its quality is short or might be better."""
        best = self._best_taught(self._cuts.shapes(level))
        if best is None or best.evidence is None or front_of(best.recipe)[-1].wants:
            return None
        if self._cuts.keeps(best.evidence) and best.evidence.relative_drop.mid <= LOSSLESS_DROP:
            return None
        front, mine = front_of(best.recipe), self._cuts.speed(self._tail_trial(best))
        for tail in self._cuts.tails:
            recipe = replace_front(tail.recipe, front)
            expected = self._cuts.speed(best) * self._cuts.speed(tail) / mine
            if recipe.key in self._cuts.history.last or expected < level.target / AIM * 0.95:
                continue
            if self._cuts.history.seconds(tail.recipe) < self._cuts.budget.to_explore and not self._cuts.history.doomed(
                recipe
            ):
                return Proposal(recipe, f"what healed best, lowered otherwise; about {expected:.1f}x expected")
        return None

    def _tail_trial(self, trial: Trial) -> Trial:
        tail = tail_of(trial.recipe)
        return next((t for t in self._cuts.tails if t.recipe == tail), self._cuts.tails[0])


def replace_front(recipe: Recipe, front: Sequence[Technique]) -> Recipe:
    """A recipe with other steps that shape and heal."""
    return Recipe((*front, *tail_of(recipe).steps), recipe.backend)


def _goes_on(front: tuple[Technique, ...], trial: Trial) -> bool:
    """Whether a trial is of a front with one lesson more."""
    steps = front_of(trial.recipe)
    return len(steps) == len(front) + 1 and steps[:-1] == front and steps[-1].stage is Stage.HEAL
