"""What became of the models that were cut: which layers went, how far the quality fell, how lessons brought it back.

Taken from the recipes, from what each step said of its work (`Trial.log`), and from the trials of the same front
before it was healed.  What the journal does not hold is not told.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from accelerando.errors import Reason
from accelerando.interval import Interval
from accelerando.ladder import Ladder
from accelerando.recipe import Recipe, Technique
from accelerando.report import words
from accelerando.report.fronts import Front, chapters_of, front_key, front_of, heals, is_bare, members_of, tail_of
from accelerando.trial import Evidence, Refused, Trial

POINT = re.compile(r"(\d+(?:\.\d+)?):(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?= |$)")
MOST_SHAPES = 10  # in a report
SPLIT = "Qualities here are of the select split, by which lessons are stopped; certified ones are of another."
ONLY_MEASURED = frozenset({Reason.BELOW_QUALITY, Reason.TOO_SLOW})


@dataclass(frozen=True)
class Lesson:
    """A time of training; `curve` is (seconds, the metric on rows that it watched), as far as the log has it."""

    planned: float
    curve: tuple[tuple[float, float], ...] = ()
    said: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """How long it took: until its last look, or as planned where no look is known."""
        return self.curve[-1][0] if self.curve else self.planned


@dataclass(frozen=True)
class Chapter:
    """Cuts that were made together and the lessons after them, and the trials that measured what came of each."""

    cuts: Front
    said: tuple[tuple[str, ...], ...]  # what each cut said of its work, first what it took away
    lessons: tuple[Lesson, ...]
    bare: Trial | None  # cut, and not healed yet
    healed: Trial | None

    @property
    def fell(self) -> float | None:
        """The quality before the lessons: of the shape's own trial, or as the first look saw it."""
        if self.bare and self.bare.evidence:
            return self.bare.evidence.quality.mid
        first = self.lessons[0].curve[:1] if self.lessons else ()
        return first[0][1] if first and first[0][0] == 0 else None

    @property
    def rose(self) -> float | None:
        """The quality after the lessons: as a trial measured it, or at their last look."""
        if self.healed and self.healed.evidence:
            return self.healed.evidence.quality.mid
        last = self.lessons[-1].curve[-1:] if self.lessons else ()
        return last[0][1] if last else None

    @property
    def seconds(self) -> float:
        return sum(lesson.seconds for lesson in self.lessons)


@dataclass(frozen=True)
class Healing:
    """The story of one recipe that was cut or healed; `label` is its rung, `evidence` the rung's or its own.

    What it tells of quality is of the select split, also where the rung's evidence is of the certify split.
    """

    label: str
    recipe: Recipe
    evidence: Evidence
    chapters: tuple[Chapter, ...]

    @property
    def seconds(self) -> float:
        return sum(chapter.seconds for chapter in self.chapters)

    @cached_property
    def curve(self) -> tuple[tuple[float, float], ...]:
        """All lessons one after the other: (seconds of training, metric)."""
        points, start = list[tuple[float, float]](), 0.0
        for lesson in (lesson for chapter in self.chapters for lesson in chapter.lessons):
            points += [(start + seconds, value) for seconds, value in lesson.curve]
            start += lesson.seconds
        return tuple(points)

    @property
    def began(self) -> float:
        """The original's quality on the samples that the story is of; the rung's own, where no trial tells."""
        tried = (trial for chapter in self.chapters for trial in (chapter.bare, chapter.healed))
        known = next((trial.evidence for trial in tried if trial and trial.evidence), self.evidence)
        return known.original_quality.mid

    def told(self) -> list[tuple[str, str]]:
        """The story in a few lines: what was cut, how far the quality fell, and how far it was healed."""
        metric, quality = self.evidence.metric, self.began
        lines = []
        for chapter in self.chapters:
            for cut, said in zip(chapter.cuts, chapter.said, strict=True):
                lines.append(("cut", said[0] if said else ", ".join(words.front([cut]))))
            if chapter.cuts and chapter.fell is not None:
                speed = timed(chapter.bare) if chapter.bare else None
                at = f", at {words.times(speed.mid)}" if speed else ""
                fall = f"{words.quality(metric, quality)} to {words.quality(metric, chapter.fell)}"
                went = "rose" if chapter.fell > quality else "fell" if chapter.fell < quality else "went"
                lines.append((went, f"from {fall}{at}"))
            if chapter.lessons and chapter.rose is not None:
                lessons = words.count(len(chapter.lessons), "lesson")
                spent = f"by {lessons}, {words.duration(round(chapter.seconds))}"
                lines.append(("healed", f"to {words.quality(metric, chapter.rose)} {spent}"))
                quality = chapter.rose
        return lines


@dataclass(frozen=True)
class Shape:
    """A shape that was measured before it was healed; `became` says what healing led to."""

    front: Front
    trial: Trial
    became: str

    @property
    def speedup(self) -> Interval:
        found = timed(self.trial)
        assert found is not None
        return found


# --- rungs ------------------------------------------------------------------------------------------------------


def healings(ladder: Ladder, trials: Sequence[Trial]) -> tuple[Healing, ...]:
    """The story of each rung that was shaped or healed, and of such members of cascades that are no rungs."""
    by_key, fronts = {t.recipe.key: t for t in trials}, by_front(trials)
    found: dict[str, Healing] = {}
    plain = [(str(i), r.recipe, r.evidence) for i, r in enumerate(ladder.rungs) if not members_of(r.recipe.backend)]
    for i, rung in enumerate(ladder.rungs):
        for role, member in zip(("fast", "better"), members_of(rung.recipe.backend), strict=False):
            known = by_key.get(member.key)
            if known and known.evidence:
                plain.append((f"{i}, {role}", member, known.evidence))
    for label, recipe, evidence in plain:
        if front_of(recipe) and recipe.key not in found:
            trial = by_key.get(recipe.key)
            chapters = _chapters(recipe, trial.log if trial else (), fronts)
            found[recipe.key] = Healing(label, recipe, evidence, chapters)
    return tuple(sorted(found.values(), key=lambda h: int(h.label.partition(",")[0])))


def by_front(trials: Sequence[Trial]) -> Mapping[str, list[Trial]]:
    found = defaultdict(list)
    for trial in trials:
        if front := front_of(trial.recipe):
            found[front_key(front)].append(trial)
    return found


def _chapters(recipe: Recipe, log: Sequence[str], fronts: Mapping[str, list[Trial]]) -> tuple[Chapter, ...]:
    front, made, done = front_of(recipe), [], 0
    said = by_step(front, log)
    for cuts, lessons in chapters_of(front):
        middle, end = done + len(cuts), done + len(cuts) + len(lessons)
        bare = _like(recipe, fronts.get(front_key(front[:middle]), ())) if cuts else None
        healed = _like(recipe, fronts.get(front_key(front[:end]), ())) if lessons else None
        taken = tuple(map(tuple, said[done:middle]))
        learned = tuple(_lesson(s, lines) for s, lines in zip(lessons, said[middle:end], strict=True))
        made.append(Chapter(cuts, taken, learned, bare, healed))
        done = end
    return tuple(made)


def _like(recipe: Recipe, trials: Sequence[Trial]) -> Trial | None:
    """Of trials of one front, that with the same tail; else one that was scored; else one that was timed."""
    tail = tail_of(recipe)
    known = [t for t in trials if timed(t)]
    return max(known, key=lambda t: (t.evidence is not None, tail_of(t.recipe) == tail), default=None)


def timed(trial: Trial) -> Interval | None:
    """A trial's speedup, where it was timed at all."""
    if trial.evidence:
        return trial.evidence.speedup
    return trial.outcome.speedup if isinstance(trial.outcome, Refused) else None


# --- what the steps said ----------------------------------------------------------------------------------------


def by_step(front: Sequence[Technique], log: Sequence[str]) -> list[list[str]]:
    """The lines of each step without its name; a lesson's end with its curve."""
    found, at = [], 0
    for step in front:
        opening = f"{step.name}: "
        first = next((i for i in range(at, len(log)) if log[i].startswith(opening)), len(log))
        lines: list[str] = []
        for line in log[first:]:
            if not line.startswith(opening):
                break
            lines.append(words.clean(line.removeprefix(opening)))
            if heals(step) and lines[-1].startswith("curve "):
                break
        found.append(lines)
        at = first + len(lines) if lines else at
    return found


def _lesson(step: Technique, lines: Sequence[str]) -> Lesson:
    curve = next((line for line in lines if line.startswith("curve ")), "")
    points = ((float(s), float(v)) for s, v in POINT.findall(curve))
    finite = tuple((s, v) for s, v in points if math.isfinite(s) and math.isfinite(v))
    planned = step.knobs.get("seconds")
    said = tuple(line for line in lines if not line.startswith("curve "))
    return Lesson(float(planned) if isinstance(planned, (int, float)) else 0.0, finite, said)


def lessons_of(trial: Trial) -> list[tuple[str, Lesson]]:
    """The lessons in a trial's recipe, each under the key of all steps up to it."""
    front = front_of(trial.recipe)
    said = by_step(front, trial.log)
    return [(front_key(front[: i + 1]), _lesson(s, said[i])) for i, s in enumerate(front) if heals(s)]


def taught_seconds(history: Sequence[Trial]) -> list[float]:
    """What each trial spent on lessons: those that no trial before it had been taught already."""
    known, found = set[str](), []
    for trial in history:
        new = [(key, lesson) for key, lesson in lessons_of(trial) if key not in known]
        known |= {key for key, lesson in new if lesson.curve}
        found.append(min(trial.seconds, sum(lesson.seconds for _, lesson in new if lesson.curve)))
    return found


# --- shapes -----------------------------------------------------------------------------------------------------


def only_measured(trial: Trial) -> bool:
    """Whether a trial is of a shape that was timed before healing, and so did not fail: it was not to win yet."""
    outcome = trial.outcome
    refused = isinstance(outcome, Refused) and outcome.reason in ONLY_MEASURED and timed(trial) is not None
    return refused and is_bare(trial.recipe)


def shapes(ladder: Ladder, trials: Sequence[Trial]) -> tuple[Shape, ...]:
    """Every shape that was measured before it was healed, once, the fastest first."""
    found = []
    for same in by_front([t for t in trials if only_measured(t)]).values():
        trial = max(same, key=lambda t: t.evidence is not None)
        found.append(Shape(front_of(trial.recipe), trial, _became(front_of(trial.recipe), ladder, trials)))
    return tuple(sorted(found, key=lambda s: -s.speedup.mid))


def _became(front: Front, ladder: Ladder, trials: Sequence[Trial]) -> str:
    """`rung 3`, `96.1 %` where what was healed is no rung, or `not healed`."""

    def goes_on(recipe: Recipe) -> bool:
        longer, length = front_of(recipe), len(front)
        return len(longer) > length and heals(longer[length]) and front_key(longer[:length]) == front_key(front)

    healed = [(len(front_of(rung.recipe)), f"rung {i}") for i, rung in enumerate(ladder.rungs) if goes_on(rung.recipe)]
    if healed:
        return min(healed)[1]
    if any(goes_on(member) for rung in ladder.rungs for member in members_of(rung.recipe.backend)):
        return "in a cascade"
    scored = [t.evidence for t in trials if t.evidence and goes_on(t.recipe)]
    if scored:
        best = min(scored, key=lambda e: e.drop.mid)
        return f"healed to {words.quality(best.metric, best.quality.mid)}"
    return "not healed"
