"""What a bundle has to tell, derived once for every kind of report.  Nothing here measures."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

from accelerando.bundle import Bundle
from accelerando.errors import Reason
from accelerando.goal import Outcome
from accelerando.interval import Interval
from accelerando.ladder import Rung
from accelerando.recipe import Recipe
from accelerando.report import words
from accelerando.report.fronts import front_of, heals
from accelerando.report.healing import Healing, Shape, healings, lessons_of, only_measured, shapes, taught_seconds
from accelerando.report.way import Leg, Seen, way_to
from accelerando.trial import Evidence, Refused, Trial


@dataclass(frozen=True)
class Group:
    """Recipes that were turned away for one reason."""

    reason: Reason
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Tally:
    """What became of the recipes that hold one technique or backend."""

    name: str
    tried: int
    verified: int
    seconds: float
    best: Evidence | None  # the fastest that was verified


@dataclass(frozen=True)
class Story:
    """A bundle, and what follows from it."""

    bundle: Bundle

    @cached_property
    def history(self) -> tuple[Trial, ...]:
        """Every trial, in order; a recipe that was measured again is there again."""
        return tuple(self.bundle.trials)

    @cached_property
    def trials(self) -> tuple[Trial, ...]:
        """The last trial of every recipe."""
        return tuple({t.recipe.key: t for t in self.history}.values())

    @property
    def original(self) -> Rung:
        return self.bundle.ladder.rungs[0]

    @property
    def best(self) -> Rung:
        return self.bundle.ladder.rungs[self.bundle.best]

    @property
    def metric(self) -> str:
        return self.best.evidence.metric

    @property
    def turned_away(self) -> int:
        return sum(t.verified is None and not only_measured(t) for t in self.trials)

    @property
    def only_measured(self) -> int:
        """How many recipes are shapes that were not healed: they did not fail."""
        return sum(map(only_measured, self.trials))

    @cached_property
    def taught(self) -> tuple[float, ...]:
        """Seconds of lessons within each trial of the history; a lesson that was given before takes none again."""
        return tuple(taught_seconds(self.history))

    def name(self, recipe: Recipe) -> str:
        """A recipe in words; the original says that it is one."""
        said = words.recipe(recipe)
        return f"the original ({said})" if recipe.key == self.original.recipe.key else said

    @cached_property
    def seen(self) -> tuple[Seen, ...]:
        """Every measured recipe once; a rung's evidence stands before that of its trial."""
        found: dict[str, Seen] = {}
        for trial in self.trials:
            if trial.evidence is not None:
                refused = trial.outcome if isinstance(trial.outcome, Refused) else None
                found[trial.recipe.key] = Seen(trial.recipe, trial.evidence, None, refused, only_measured(trial))
        for number, rung in enumerate(self.bundle.ladder.rungs):
            found[rung.recipe.key] = Seen(rung.recipe, rung.evidence, number)
        return tuple(found.values())

    @cached_property
    def timed(self) -> tuple[tuple[Recipe, Refused, Interval], ...]:
        """Recipes that were turned away on their speed, before their quality was looked at."""
        refused = [t for t in self.trials if not only_measured(t)]
        outcomes = [(t.recipe, t.outcome) for t in refused if isinstance(t.outcome, Refused)]
        return tuple((r, o, o.speedup) for r, o in outcomes if o.evidence is None and o.speedup is not None)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Those turned away, by reason, the most frequent first."""
        found: dict[Reason, list[Trial]] = defaultdict(list)
        for trial in self.trials:
            if isinstance(trial.outcome, Refused) and not only_measured(trial):
                found[trial.outcome.reason].append(trial)
        return tuple(Group(r, tuple(ts)) for r, ts in sorted(found.items(), key=lambda item: -len(item[1])))

    @cached_property
    def tallies(self) -> tuple[Tally, ...]:
        """By backend, then by technique: one that holds several counts for each; changes of form are left out.

        The seconds of lessons count for what heals, and all others for the rest.
        """
        whole, lessons = defaultdict[str, float](float), defaultdict[str, float](float)
        for trial, taught in zip(self.history, self.taught, strict=True):
            whole[trial.recipe.key] += trial.seconds
            lessons[trial.recipe.key] += taught
        backends: dict[str, list[Trial]] = defaultdict(list)
        techniques: dict[str, list[Trial]] = defaultdict(list)
        healers = {s.name for t in self.trials for s in front_of(t.recipe) if heals(s)}
        for trial in self.trials:
            backends[trial.recipe.backend.name].append(trial)
            for name in dict.fromkeys(step.name for step in trial.recipe.steps):
                if words.NAMES.get(name) != "":
                    techniques[name].append(trial)

        def seconds(name: str, trials: list[Trial]) -> float:
            taught = sum(lessons[t.recipe.key] for t in trials)
            return taught if name in healers else sum(whole[t.recipe.key] for t in trials) - taught

        rows = [item for each in (backends, techniques) for item in each.items()]
        return tuple(_tally(name, trials, seconds(name, trials)) for name, trials in rows)

    @property
    def effort(self) -> str:
        """What the search did, in one sentence: `47 recipes in 2 min: 30 verified, 9 turned away, ...`."""
        run = self.bundle.run
        spent = f" in {words.duration(float(run['seconds']))}" if run.get("seconds") else ""
        budget = f" of {words.duration(float(run['budget_seconds']))}" if run.get("budget_seconds") else ""
        verified = sum(t.verified is not None for t in self.trials)
        said = f"{words.count(len(self.trials), 'recipe')}{spent}{budget}: {verified} verified, "
        said += f"{self.turned_away} turned away"
        said += f", {words.count(self.only_measured, 'shape')} measured before healing" if self.only_measured else ""
        given = [key for t in self.trials for key, lesson in lessons_of(t) if lesson.curve]
        if given:
            count = words.count(len(set(given)), "lesson")
            said += f"; {count}, {words.duration(round(sum(self.taught)))} in all"
        return f"{said}."

    @cached_property
    def way(self) -> tuple[Leg, ...]:
        """The way from the original to the best."""
        return way_to(self.seen, self.original.recipe, self.best.recipe)

    @cached_property
    def healings(self) -> tuple[Healing, ...]:
        """The story of each rung that was shaped or healed."""
        return healings(self.bundle.ladder, self.trials)

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes that were measured before they were healed, the fastest first."""
        return shapes(self.bundle.ladder, self.trials)

    @property
    def headline(self) -> str:
        """The verdict's figures in one sentence."""
        evidence, outcome = self.best.evidence, self.bundle.verdict.outcome
        if self.bundle.best == 0:
            return f"nothing was proven to be better than the original ({words.recipe(self.best.recipe)})"
        bounds = words.between(evidence.speedup, words.times).partition(" ")[2]
        speed = f"{words.faster(evidence.speedup)} {bounds}".strip()
        told = ("speedup", "drop", "quality")
        rest = [
            f"{c.bound.quantity} {words.between(c.interval, lambda v, b=c.bound: words.quantity(b, v, self.metric))}"
            for c in self.bundle.verdict.checks
            if c.bound.quantity not in told
        ]
        quality = f"{self.metric} {words.quality(self.metric, evidence.quality.mid)}"
        sentence = ", ".join([speed, *rest, quality, f"drop {words.drop(self.metric, evidence.drop)}"])
        return sentence if outcome is Outcome.MET else f"the nearest is {sentence}"


def _tally(name: str, trials: list[Trial], seconds: float) -> Tally:
    good = [t.verified.evidence for t in trials if t.verified is not None]
    best = max(good, key=lambda e: e.speedup.mid, default=None)
    return Tally(words.clean(words.called(name)), len(trials), len(good), seconds, best)
