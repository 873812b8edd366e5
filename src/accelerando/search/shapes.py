"""Which shape to try next, and how long to heal it: steps 3 to 5 of the search, as pure as `ask`.

Speed hardly depends on the weights, so a shape is measured before it is trained, with the best training-free tail
(lowering, quantizing, backend) behind it.  A *direction* says how much of the cut each technique of the stage SHAPE
takes on; how deep to cut for the speed that is wanted follows from the speeds measured so far (`Belief`: the
logarithm of the speedup is linear in the logarithm of what a cut leaves).  Directions are single techniques first,
then what Optuna's sampler makes of how well the former ones healed.

Only shapes that are fast enough are healed: all of a level for a short lesson, the better half for one thrice as
long, and so on (successive halving; Jamieson and Talwalkar, AISTATS 2016).  A lesson goes on where the last one
ended.  When one keeps the quality that is asked for, and speed is what is wanted, the next level is cut out of what
was healed, half as fast again: a model is narrowed in steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from accelerando.errors import Reason
from accelerando.goal import Goal, Outcome
from accelerando.recipe import Recipe, Stage, Technique
from accelerando.search.belief import share_of, spread
from accelerando.search.budget import Budget
from accelerando.search.directions import Direction, depth_of, direction_of, mixtures
from accelerando.search.history import (
    LOSSLESS_DROP,
    History,
    Proposal,
    asked_speedup,
    front_of,
    holds,
    tail_of,
)
from accelerando.search.space import Space
from accelerando.trial import Evidence, Refused, Trial

STEP = 1.5  # how much faster each level is than the one before, where speed is what is wanted
LEAST_STEP = 1.12  # less is not worth a lesson
SLACK = 0.98  # speeds closer than this count as one
AIM = 1.12  # how far beyond the wanted speed to cut: the low end of an interval must reach it
WINDOW = 1.12  # a shape this much faster than wanted was cut deeper than it need be
WIDTH, SECONDS_EACH = 4, 200  # shapes of the first level at most, if there is so much time for each; later half as many
CUTS_EACH = 2  # cuts that are measured for each shape that a level may have, where there is one at all
DEEPER = 2.0  # times that one cut of a direction may be deeper than the last: a gain in the noise says little
TRIES = 4  # cuts of one direction by which to meet a speed
MOST_LESSONS = 3  # at a level that is not asked for; then a nearer one is tried
LONGER = 3  # how many times longer the next lesson is
LESSON_SHARE = 1 / 20  # of the time to explore: the first lesson of a shape
SHORTEST_LESSON, LONGEST_FIRST = 8, 120  # seconds
MOST_SHARE = 0.95
TAILS = 3  # training-free tails that a healed shape is tried with


@dataclass(frozen=True)
class Level:
    """Shapes of about one speed, cut out of one front.

    Args:
        front: steps that shaped and healed what is cut now; none at first.
        base: speedup with the best tail before the cut.
        target: speedup that is wanted of the shapes.
        most: speedup from which on shapes belong to a level further up, where healing has failed already.
    """

    front: tuple[Technique, ...]
    base: float
    target: float
    most: float = math.inf


def next_shape(space: Space, history: History, goal: Goal, budget: Budget) -> Proposal | None:
    """The next shape to measure, or the next lesson; None when nothing is worth its time."""
    if not space.shapes or not space.healers:
        return None
    return _Shaping(space, history, goal, budget).next()


@dataclass(frozen=True)
class _Shaping:
    space: Space
    history: History
    goal: Goal
    budget: Budget

    def next(self) -> Proposal | None:
        if not self.tails:
            return None
        step = STEP
        while (level := self._level(step)) is not None:
            if found := self._at(level):
                return found
            if not self.goal.wants_speed:
                return None
            step = math.sqrt(step)  # nothing was healed so far up: try half way
        return None

    def _at(self, level: Level) -> Proposal | None:
        return self._measure(level) or self._heal(level) or self._other_tail(level)

    # --- where to stand ---------------------------------------------------------------------------------------

    @cached_property
    def tails(self) -> list[Trial]:
        """The fastest training-free recipes that keep the quality, one of each backend and precision first."""
        found = [
            t
            for t in self.history.verified
            if t.recipe.steps and not front_of(t.recipe) and t.recipe.backend.steady and holds(t.evidence, self.goal)
        ]
        found.sort(key=self._speed, reverse=True)
        kinds = {tuple(s.name for s in t.recipe.steps): t for t in reversed(found)}
        firsts = sorted(kinds.values(), key=self._speed, reverse=True)
        return firsts[:TAILS]

    def _level(self, step: float) -> Level | None:
        """Where to cut next: from the fastest that keeps its quality, to what is asked or a step further."""
        keeps = [t for t in self.history.verified if self._keeps(t.evidence) and t.recipe.backend.steady]
        start = max(keeps, key=self._speed, default=None)
        base = max(self._speed(self.tails[0]), self._speed(start) if start else 0.0)
        front = front_of(start.recipe) if start and front_of(start.recipe) else ()
        if self.goal.wants_speed:
            most = base * step**2 / AIM * SLACK if step < STEP else math.inf
            return Level(front, base, base * step, most) if step >= LEAST_STEP else None
        free = [t for t in keeps if not front_of(t.recipe)]
        base = max(map(self._speed, [*free, self.tails[0]]))
        asked = self._asked()
        return Level((), base, asked * AIM) if base < asked else None

    def _asked(self) -> float:
        evidence = self.tails[0].evidence
        assert evidence is not None
        return asked_speedup(self.goal, evidence)

    def _keeps(self, evidence: Evidence | None) -> bool:
        """Whether the quality that the goal asks for is kept for certain; without such a bound, about kept."""
        if evidence is None:
            return False
        if not self.goal.quality_bounds:
            return holds(evidence, self.goal)
        checks = self.goal.judge(evidence).checks
        return all(c.outcome is Outcome.MET for c in checks if c.bound in self.goal.quality_bounds)

    # --- shapes -----------------------------------------------------------------------------------------------

    def _measure(self, level: Level) -> Proposal | None:
        """A shape whose speed is still to be measured, if the level has too few and no lesson was given on it yet."""
        width, shapes = self._width(level), self._shapes(level)
        if len(shapes) >= width or any(self._lessons_after(front_of(t.recipe)) for t in shapes):
            return None
        if shapes and sum(self._is_cut(t, level) for t in self.history.last.values()) >= CUTS_EACH * width:
            return None  # time for lessons
        for direction in self._directions(level, width):
            tried = self._cuts(level, direction)
            if any(self._in_window(t, level) for t in tried) or len(tried) >= TRIES:
                continue
            recipe = self._cut(level, direction)
            if recipe is None or recipe.key in self.history.last or self.history.doomed(recipe):
                continue
            if self.history.seconds(recipe) + SHORTEST_LESSON > self.budget.to_explore:
                continue
            return Proposal(recipe, f"how fast it is when cut, before it is healed; {level.target:.1f}x is wanted")
        return None

    def _width(self, level: Level) -> int:
        """How many shapes of a level are held against each other."""
        width = min(WIDTH, max(2, round(self._whole / SECONDS_EACH)))
        return width if not level.front else max(1, width // 2)

    @property
    def _whole(self) -> float:
        """Seconds for exploring, those that are gone included."""
        return self.budget.to_explore + self.budget.used

    def _shapes(self, level: Level) -> list[Trial]:
        """Measured, untrained cuts of a level that are fast enough: of each direction the slowest."""
        fast: dict[tuple[str, ...], Trial] = {}
        for trial in self.history.last.values():
            cut = front_of(trial.recipe)[len(level.front) :]
            if not self._is_cut(trial, level) or not self._fast_enough(trial, level):
                continue
            names = tuple(s.name for s in cut)
            if names not in fast or self._speed(trial) < self._speed(fast[names]):
                fast[names] = trial
        return sorted(fast.values(), key=self._speed)

    def _is_cut(self, trial: Trial, level: Level) -> bool:
        front = front_of(trial.recipe)
        cut = front[len(level.front) :]
        return front[: len(level.front)] == level.front and bool(cut) and all(s.stage is Stage.SHAPE for s in cut)

    def _cuts(self, level: Level, direction: Direction) -> list[Trial]:
        """What was cut in a direction from the level's front and could be timed."""
        found = []
        for trial in self.history.last.values():
            cut = front_of(trial.recipe)[len(level.front) :]
            if self._is_cut(trial, level) and {s.name for s in cut} == set(direction) and self._speed(trial):
                found.append(trial)
        return found

    def _fast_enough(self, trial: Trial, level: Level) -> bool:
        return level.target / AIM * SLACK <= self._speed(trial) < level.most

    def _in_window(self, trial: Trial, level: Level) -> bool:
        return self._fast_enough(trial, level) and self._speed(trial) <= level.target * WINDOW

    def _speed(self, trial: Trial) -> float:
        """The speedup as far as it was measured, 0.0 where it was not; for a cut, what it was after its lessons too."""
        front, tail = front_of(trial.recipe), tail_of(trial.recipe)
        taught = self._lessons_after(front) if front and front[-1].stage is Stage.SHAPE else []
        return min([self._own_speed(trial), *(self._own_speed(t) for t in taught if tail_of(t.recipe) == tail)])

    def _own_speed(self, trial: Trial) -> float:
        """Half way between the ratio and the clock, in logarithms.

        Others' load slows the original, which has all cores, more than a small model on one: in such minutes the
        ratio is too good, and what the model takes against what the original usually takes is not good enough.
        """
        if trial.evidence is None:
            speedup = getattr(trial.outcome, "speedup", None)
            return speedup.mid if speedup else 0.0
        return math.sqrt(trial.evidence.speedup.mid * self.history.usual_seconds / trial.evidence.latency().mid)

    def _directions(self, level: Level, count: int) -> list[Direction]:
        """Single techniques first, then mixtures; in later levels, what healed best first."""
        useless = {t.recipe.steps[len(level.front)].name for t in self.history.last.values() if self._nothing(t, level)}
        names = [s.name for s in self.space.shapes if share_of(s) is not None and self._tail_for(s)]
        names = [name for name in names if name not in useless]
        singles: list[Direction] = [{name: 1.0} for name in names]
        known = self._healed_directions()
        if level.front and known:
            first = [d for d, _ in sorted(known, key=lambda pair: pair[1])]
            singles = [*first, *(d for d in singles if d not in first)]
        mixed = mixtures([n for n in names if not self._class(n).wants], known, count)
        return [*singles[: max(count, len(names))], *mixed]

    def _nothing(self, trial: Trial, level: Level) -> bool:
        """Whether the first cut into a level's front was refused: that technique has nothing to do there."""
        outcome = trial.outcome
        refused = isinstance(outcome, Refused) and outcome.reason in (Reason.NOTHING_TO_DO, Reason.UNSUPPORTED)
        return refused and self._is_cut(trial, level) and getattr(outcome, "step", None) == len(level.front)

    def _healed_directions(self) -> list[tuple[Direction, float]]:
        """Directions whose shapes had a lesson, and the relative drop after it per gain in log speed."""
        found = []
        for trial in self.history.last.values():
            front = front_of(trial.recipe)
            if trial.evidence is None or not front or front[-1].stage is not Stage.HEAL:
                continue
            gained = math.log(max(self._speed(trial) / self._speed(self.tails[0]), 1.05))
            found.append((direction_of(front), trial.evidence.relative_drop.mid / gained))
        return found

    def _class(self, name: str) -> Any:
        return next(type(s) for s in self.space.shapes if s.name == name)

    def _cut(self, level: Level, direction: Direction) -> Recipe | None:
        """The recipe of a cut in a direction that should be as fast as the level wants."""
        belief, steps = self.history.speed, {s.name: s for s in self.space.shapes}
        effect = sum(max(belief.effect("shape", n), 0.1) * w for n, w in direction.items())
        base, nearest = level.base, max(self._cuts(level, direction), key=self._speed, default=None)
        depth = math.log(level.target / base) / effect
        if nearest is not None:  # go on from what was measured in this very direction
            measured = sum(depth_of(s) for s in front_of(nearest.recipe)[len(level.front) :])
            gained = math.log(max(self._speed(nearest) / base, 1.02))
            depth = measured * min(math.log(level.target / base) / gained, DEEPER)
        cut = tuple(
            steps[name].with_knobs(share=round(min(1 - math.exp(-depth * weight), MOST_SHARE), 3))
            for name, weight in direction.items()
        )
        tail = self._tail_for(*cut)
        return Recipe((*level.front, *cut, *tail.steps), tail.backend) if tail else None

    def _tail_for(self, *cut: Technique) -> Recipe | None:
        """The best tail, or where a cut pays on a certain backend only, the shortest route to that one."""
        wanted = {s.wants for s in cut if s.wants}
        if not wanted:
            return tail_of(self.tails[0].recipe)
        routes = [r.default for r in self.space.routes if wanted <= r.default.backend.offers and r.default.steps]
        return min(routes, key=lambda r: len(r.steps), default=None)

    # --- lessons ----------------------------------------------------------------------------------------------

    def _heal(self, level: Level) -> Proposal | None:
        """The next lesson of a level: a first one for each shape, then longer ones for the better half."""
        shapes = sorted(self._shapes(level), key=_drop)[: self._width(level)]  # what lost least will heal soonest
        if not shapes:
            return None
        first = self._first_lesson()
        untaught = [s for s in shapes if not self._lessons_after(front_of(s.recipe))]
        for shape in untaught:
            if proposal := self._lesson(shape.recipe, first, "its first lesson"):
                return proposal
        best = self._best_taught(shapes)
        if best is None or self._satisfied(best, shapes):
            return None
        rounds = [self._lessons_after(front_of(s.recipe)) for s in shapes]
        most = MOST_LESSONS if self.goal.wants_speed else math.inf
        for number in range(1, max(map(len, rounds)) + 1):
            if number >= most:
                return None
            in_round = [lessons[number - 1] for lessons in rounds if len(lessons) >= number]
            in_round = [t for t in in_round if t.evidence is not None]
            in_round.sort(key=_drop)
            for trial in in_round[: max(1, len(in_round) // 2)]:
                longer = int(first * LONGER**number)
                if proposal := self._lesson(trial.recipe, longer, f"lesson {number + 1}, for it healed best"):
                    return proposal
        return None

    def _lesson(self, recipe: Recipe, seconds: int, why: str) -> Proposal | None:
        """A lesson more for a recipe, cut short to the time that is left."""
        around = min(60.0, self.history.seconds(replace_front(recipe, ())) + 5)
        seconds = min(seconds, int(self.budget.to_explore - around))
        if seconds < SHORTEST_LESSON:
            return None
        front, lesson = front_of(recipe), self.space.healers[0].with_knobs(seconds=seconds)
        if front[-1].stage is Stage.HEAL and "quantized" in lesson.knobs:  # it can do it again: now with fewer bits
            lesson = lesson.with_knobs(quantized=any(s.stage is Stage.QUANTIZE for s in recipe.steps))
        taught = Recipe((*front, lesson, *recipe.steps[len(front) :]), recipe.backend)
        if any(map(partial(_goes_on, front), self.history.last.values())) or self.history.doomed(taught):
            return None
        return Proposal(taught, f"{why}, {seconds} s")

    def _first_lesson(self) -> int:
        return int(min(max(self._whole * LESSON_SHARE, SHORTEST_LESSON), LONGEST_FIRST))

    def _lessons_after(self, front: Sequence[Technique]) -> list[Trial]:
        """The trials of a shape after its first lesson, its second, ...: with the tail that did best."""
        found: dict[int, Trial] = {}
        for trial in self.history.last.values():
            steps = front_of(trial.recipe)
            more = steps[len(front) :]
            if steps[: len(front)] == tuple(front) and more and all(s.stage is Stage.HEAL for s in more):
                known = found.get(len(more))
                if known is None or known.evidence is None or (trial.evidence and _drop(trial) < _drop(known)):
                    found[len(more)] = trial
        return [found[n] for n in sorted(found)]

    def _best_taught(self, shapes: Sequence[Trial]) -> Trial | None:
        taught = [t for s in shapes for t in self._lessons_after(front_of(s.recipe)) if t.evidence]
        return min(taught, key=_drop, default=None)

    def _satisfied(self, best: Trial, shapes: Sequence[Trial]) -> bool:
        """Whether more lessons would not help: it keeps its quality, and no more is wanted or to be had."""
        evidence = best.evidence
        if evidence is None or not self._keeps(evidence):
            return False
        if self.goal.wants_speed or evidence.relative_drop.mid <= LOSSLESS_DROP:
            return True
        lessons = next(ts for s in shapes if best in (ts := self._lessons_after(front_of(s.recipe))))
        lessons = [t for t in lessons if t.evidence]
        if len(lessons) < 2:
            return False
        last = lessons[-1].evidence.relative_drop if lessons[-1].evidence else evidence.relative_drop
        return _drop(lessons[-2]) - last.mid < spread((last.low, last.high))

    # --- other tails ------------------------------------------------------------------------------------------

    def _other_tail(self, level: Level) -> Proposal | None:
        """Another way to lower and quantize what healed best, where its quality is short or might be better."""
        best = self._best_taught(self._shapes(level))
        if best is None or best.evidence is None or front_of(best.recipe)[-1].wants:
            return None
        if self._keeps(best.evidence) and best.evidence.relative_drop.mid <= LOSSLESS_DROP:
            return None
        front, mine = front_of(best.recipe), self._speed(self._tail_trial(best))
        for tail in self.tails:
            recipe = replace_front(tail.recipe, front)
            expected = self._speed(best) * self._speed(tail) / mine
            if recipe.key in self.history.last or expected < level.target / AIM * 0.95:
                continue
            if self.history.seconds(tail.recipe) < self.budget.to_explore and not self.history.doomed(recipe):
                return Proposal(recipe, f"what healed best, lowered otherwise; about {expected:.1f}x expected")
        return None

    def _tail_trial(self, trial: Trial) -> Trial:
        tail = tail_of(trial.recipe)
        return next((t for t in self.tails if t.recipe == tail), self.tails[0])


def replace_front(recipe: Recipe, front: Sequence[Technique]) -> Recipe:
    """A recipe with other steps that shape and heal."""
    return Recipe((*front, *tail_of(recipe).steps), recipe.backend)


def _goes_on(front: tuple[Technique, ...], trial: Trial) -> bool:
    """Whether a trial is of a front with one lesson more."""
    steps = front_of(trial.recipe)
    return len(steps) == len(front) + 1 and steps[:-1] == front and steps[-1].stage is Stage.HEAL


def _drop(trial: Trial) -> float:
    return trial.evidence.relative_drop.mid if trial.evidence else math.inf
