"""Cuts of a model: which there are of about one speed, and how deep the next must be to meet it.

Speed hardly depends on the weights, so a shape is measured before it is trained, with the best training-free tail
(lowering, quantizing, backend) behind it.  A *direction* says how much of the cut each technique of the stage SHAPE
takes on; how deep to cut for the speed that is wanted follows from the speeds measured so far (`Belief`: the
logarithm of the speedup is linear in the logarithm of what a cut leaves).  Directions are single techniques first,
then what Optuna's sampler makes of how well the former ones healed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from accelerando.errors import Reason
from accelerando.goal import Goal, Outcome
from accelerando.recipe import Recipe, Stage, Technique
from accelerando.search.belief import share_of
from accelerando.search.budget import Budget
from accelerando.search.directions import Direction, depth_of, direction_of, grows, mixtures
from accelerando.search.history import History, Proposal, asked_speedup, drop_of, front_of, holds, sober, tail_of
from accelerando.search.space import Space
from accelerando.trial import Evidence, Refused, Trial

STEP = 1.5  # how much faster each level is than the one before, where speed is what is wanted
LEAST_STEP = 1.12  # less is not worth a lesson
SLACK = 0.98  # speeds closer than this count as one
AIM = 1.1  # how far beyond the wanted speed to cut: the low end of an interval must reach it
WINDOW = 1.08  # a shape this much faster than that was cut deeper than it need be, and will heal worse for it
DISTURBED = 1.3  # times the original's usual call: in such a minute nothing is measured well
WIDTH, SECONDS_EACH = 4, 200  # shapes of the first level at most, if there is so much time for each; later half as many
CUTS_EACH = 2  # cuts that are measured for each shape that a level may have, where there is one at all
DEEPER = 2.0  # times that one cut of a direction may be deeper than the last: a gain in the noise says little
TRIES = 4  # cuts of one direction by which to meet a speed
MOST_SHARE = 0.95
TAILS = 3  # training-free tails that a healed shape is tried with
SHORTEST_LESSON = 8  # seconds


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


@dataclass(frozen=True)
class Cuts:
    """What is known of the shapes that were measured, and what to measure next."""

    space: Space
    history: History
    goal: Goal
    budget: Budget

    @cached_property
    def tails(self) -> list[Trial]:
        """The fastest training-free recipes that keep the quality, one of each backend and precision first."""
        found = [
            t
            for t in self.history.verified
            if t.recipe.steps and not front_of(t.recipe) and t.recipe.backend.steady and holds(t.evidence, self.goal)
        ]
        found.sort(key=self.speed, reverse=True)
        kinds = {tuple(s.name for s in t.recipe.steps): t for t in reversed(found)}
        firsts = sorted(kinds.values(), key=self.speed, reverse=True)
        return firsts[:TAILS]

    def level(self, step: float) -> Level | None:
        """Where to cut next: from the fastest that keeps its quality, to what is asked or a step further."""
        keeps = [t for t in self.history.verified if self.keeps(t.evidence) and t.recipe.backend.steady]
        start = max(keeps, key=self.speed, default=None)
        base = max(self.speed(self.tails[0]), self.speed(start) if start else 0.0)
        front = front_of(start.recipe) if start and front_of(start.recipe) else ()
        if self.goal.wants_speed:
            most = base * step**2 / AIM * SLACK if step < STEP else math.inf
            return Level(front, base, base * step, most) if step >= LEAST_STEP else None
        free = [t for t in keeps if not front_of(t.recipe)]
        base = max(map(self.speed, [*free, self.tails[0]]))
        asked = self._asked()
        return Level((), base, asked * AIM) if base < asked else None

    def _asked(self) -> float:
        evidence = self.tails[0].evidence
        assert evidence is not None
        return asked_speedup(self.goal, evidence)

    def keeps(self, evidence: Evidence | None) -> bool:
        """Whether the quality that the goal asks for is kept for certain; without such a bound, about kept."""
        if evidence is None:
            return False
        if not self.goal.quality_bounds:
            return holds(evidence, self.goal)
        checks = self.goal.judge(sober(evidence)).checks
        return all(c.outcome is Outcome.MET for c in checks if c.bound in self.goal.quality_bounds)

    def measure(self, level: Level) -> Proposal | None:
        """A shape whose speed is still to be measured, if the level has too few and no lesson was given on it yet."""
        width, shapes = self.width(level), self.shapes(level)
        if len(shapes) >= width or any(self.lessons_after(front_of(t.recipe)) for t in shapes):
            return None
        if shapes and sum(self._is_cut(t, level) for t in self.history.last.values()) >= CUTS_EACH * width:
            return None  # time for lessons
        if again := next((t for t in self.history.last.values() if self._worth_another_look(t, level)), None):
            return Proposal(again.recipe, "the machine was much slower than usual while it was measured")
        for direction in self._directions(level, width):
            tried = self._cuts(level, direction)
            if any(self._in_window(t, level) for t in tried) or len(tried) >= TRIES or self._hopeless(level, direction):
                continue
            recipe = self._cut(level, direction)
            if recipe is None or recipe.key in self.history.last or self.history.doomed(recipe):
                continue
            if self.history.seconds(recipe) + SHORTEST_LESSON > self.budget.to_explore:
                continue
            return Proposal(recipe, f"how fast it is when cut, before it is healed; {level.target:.1f}x is wanted")
        return None

    def width(self, level: Level) -> int:
        """How many shapes of a level are held against each other."""
        return self.breadth if not level.front else max(1, self.breadth // 2)

    @property
    def breadth(self) -> int:
        """How many shapes of the original are held against each other."""
        return min(WIDTH, max(2, round(self.whole / SECONDS_EACH)))

    @property
    def whole(self) -> float:
        """Seconds for exploring, those that are gone included."""
        return self.budget.to_explore + self.budget.used

    def shapes(self, level: Level) -> list[Trial]:
        """Measured, untrained cuts of a level that are fast enough: of each direction the slowest."""
        fast: dict[tuple[str, ...], Trial] = {}
        for trial in self.history.last.values():
            cut = front_of(trial.recipe)[len(level.front) :]
            if not self._is_cut(trial, level) or not self._fast_enough(trial, level):
                continue
            names = tuple(s.name for s in cut)
            if names not in fast or self.speed(trial) < self.speed(fast[names]):
                fast[names] = trial
        return sorted(fast.values(), key=self.speed)

    def _is_cut(self, trial: Trial, level: Level) -> bool:
        front = front_of(trial.recipe)
        cut = front[len(level.front) :]
        return front[: len(level.front)] == level.front and bool(cut) and all(share_of(s) is not None for s in cut)

    def _worth_another_look(self, trial: Trial, level: Level) -> bool:
        """Whether a cut was measured in a bad minute, and not twice yet."""
        seen = sum(t.recipe.key == trial.recipe.key for t in self.history.trials)
        return self._is_cut(trial, level) and self._disturbed(trial) and seen < 2

    def _disturbed(self, trial: Trial) -> bool:
        evidence = trial.evidence
        return evidence is not None and evidence.original_latency().mid > DISTURBED * self.history.usual_seconds

    def _cuts(self, level: Level, direction: Direction) -> list[Trial]:
        """What was cut in a direction from the level's front and could be timed."""
        found = []
        for trial in self.history.last.values():
            cut = front_of(trial.recipe)[len(level.front) :]
            if self._is_cut(trial, level) and {s.name for s in cut} == set(direction) and self.speed(trial):
                found.append(trial)
        return found

    def _fast_enough(self, trial: Trial, level: Level) -> bool:
        return level.target / AIM * SLACK <= self.speed(trial) < level.most

    def _in_window(self, trial: Trial, level: Level) -> bool:
        return self._fast_enough(trial, level) and self.speed(trial) <= level.target * WINDOW

    def speed(self, trial: Trial) -> float:
        """The speedup as far as it was measured, 0.0 where it was not; for a cut, what it was after its lessons too."""
        front, tail = front_of(trial.recipe), tail_of(trial.recipe)
        taught = self.lessons_after(front) if front and front[-1].stage is Stage.SHAPE else []
        seen = [trial, *(t for t in taught if tail_of(t.recipe) == tail and t.evidence)]
        seen = [t for t in seen if not self._disturbed(t)] or seen
        return min(map(self._own_speed, seen))

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
        promising = [n for n in names if not self._class(n).wants and not self._hopeless(level, {n: 1.0})]
        mixed = mixtures(promising, known, count)
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
            if trial.evidence is None or not front or front[-1].stage is not Stage.HEAL or grows(front):
                continue
            gained = math.log(max(self.speed(trial) / self.speed(self.tails[0]), 1.05))
            found.append((direction_of(front), trial.evidence.relative_drop.mid / gained))
        return found

    def _class(self, name: str) -> Any:
        return next(type(s) for s in self.space.shapes if s.name == name)

    def _cut(self, level: Level, direction: Direction) -> Recipe | None:
        """The recipe of a cut in a direction that should be as fast as the level wants."""
        belief, steps = self.history.speed, {s.name: s for s in self.space.shapes}
        effect = sum(max(belief.effect("shape", n), 0.1) * w for n, w in direction.items())
        depth = math.log(level.target / level.base) / effect
        if (
            known := self._reached(level, direction)
        ) is not None:  # go on from what was measured in this very direction
            measured, needed = known
            depth = min(needed, DEEPER * measured)
        cut = tuple(
            steps[name].with_knobs(share=round(min(1 - math.exp(-depth * weight), MOST_SHARE), 3))
            for name, weight in direction.items()
        )
        tail = self._tail_for(*cut)
        return Recipe((*level.front, *cut, *tail.steps), tail.backend) if tail else None

    def _reached(self, level: Level, direction: Direction) -> tuple[float, float] | None:
        """How deep the cut nearest to a level's speed was, and how deep one must be to meet it, in logarithms."""
        away = lambda t: abs(math.log(self.speed(t) / level.target))  # noqa: E731
        nearest = min(self._cuts(level, direction), key=away, default=None)
        if nearest is None:
            return None
        depth = sum(depth_of(s) for s in front_of(nearest.recipe)[len(level.front) :])
        gained = math.log(max(self.speed(nearest) / level.base, 1.02))
        return depth, depth * math.log(level.target / level.base) / gained

    def _hopeless(self, level: Level, direction: Direction) -> bool:
        """Whether no cut in a direction would be fast enough, by what the last one gained."""
        known = self._reached(level, direction)
        return known is not None and known[1] > -math.log1p(-MOST_SHARE) / max(direction.values())

    def _tail_for(self, *cut: Technique) -> Recipe | None:
        """The best tail, or where a cut pays on a certain backend only, the shortest route to that one."""
        wanted = {s.wants for s in cut if s.wants}
        if not wanted:
            return tail_of(self.tails[0].recipe)
        routes = [r.default for r in self.space.routes if wanted <= r.default.backend.offers and r.default.steps]
        return min(routes, key=lambda r: len(r.steps), default=None)

    def lessons_after(self, front: Sequence[Technique]) -> list[Trial]:
        """The trials of a shape after its first lesson, its second, ...: with the tail that did best."""
        found: dict[int, Trial] = {}
        for trial in self.history.last.values():
            steps = front_of(trial.recipe)
            more = steps[len(front) :]
            if steps[: len(front)] == tuple(front) and more and all(s.stage is Stage.HEAL for s in more):
                known = found.get(len(more))
                if known is None or known.evidence is None or (trial.evidence and drop_of(trial) < drop_of(known)):
                    found[len(more)] = trial
        return [found[n] for n in sorted(found)]
