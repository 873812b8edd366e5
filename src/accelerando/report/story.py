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
from accelerando.recipe import Plugin, Recipe
from accelerando.report import words
from accelerando.trial import Evidence, Refused, Trial

Part = tuple[str, ...]  # what a recipe is made of: a step or backend by name, or one of its settings


@dataclass(frozen=True)
class Seen:
    """A recipe that was measured: as a rung of the ladder, as a trial, or before it was turned away."""

    recipe: Recipe
    evidence: Evidence
    rung: int | None = None
    refused: Refused | None = None


@dataclass(frozen=True)
class Leg:
    """One leg of the way from the original to the best: what was added, and the recipe measured at its end.

    `together` where several things were added at once, for nothing between them was measured; `before` is the
    speedup at its beginning.
    """

    added: str
    together: bool
    seen: Seen
    before: Interval

    @property
    def after(self) -> Interval:
        return self.seen.evidence.speedup

    @property
    def gain(self) -> float:
        return self.after.mid / self.before.mid

    @property
    def clear(self) -> bool:
        """Whether it changed the speed by more than the intervals leave open."""
        return self.after.low > self.before.high or self.after.high < self.before.low


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
        return sum(t.verified is None for t in self.trials)

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
                found[trial.recipe.key] = Seen(trial.recipe, trial.evidence, None, refused)
        for number, rung in enumerate(self.bundle.ladder.rungs):
            found[rung.recipe.key] = Seen(rung.recipe, rung.evidence, number)
        return tuple(found.values())

    @cached_property
    def timed(self) -> tuple[tuple[Recipe, Refused, Interval], ...]:
        """Recipes that were turned away on their speed, before their quality was looked at."""
        outcomes = [(t.recipe, t.outcome) for t in self.trials if isinstance(t.outcome, Refused)]
        return tuple((r, o, o.speedup) for r, o in outcomes if o.evidence is None and o.speedup is not None)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Those turned away, by reason, the most frequent first."""
        found: dict[Reason, list[Trial]] = defaultdict(list)
        for trial in self.trials:
            if isinstance(trial.outcome, Refused):
                found[trial.outcome.reason].append(trial)
        return tuple(Group(r, tuple(ts)) for r, ts in sorted(found.items(), key=lambda item: -len(item[1])))

    @cached_property
    def tallies(self) -> tuple[Tally, ...]:
        """By backend, then by technique: one that holds several counts for each; changes of form are left out."""
        backends: dict[str, list[Trial]] = defaultdict(list)
        techniques: dict[str, list[Trial]] = defaultdict(list)
        for trial in self.trials:
            backends[trial.recipe.backend.name].append(trial)
            for name in dict.fromkeys(step.name for step in trial.recipe.steps):
                if words.NAMES.get(name) != "":
                    techniques[name].append(trial)
        return tuple(_tally(name, trials) for each in (backends, techniques) for name, trials in each.items())

    @cached_property
    def way(self) -> tuple[Leg, ...]:
        """The way from the original to the best, over measured recipes only.

        A simpler variant of the best is a recipe whose parts (steps, backend, settings) are all parts of the best.
        The longest chain of measured variants, each holding the one before, is the way; what was never measured
        apart is one leg.
        """
        whole = parts(self.best.recipe)
        start = self.original.recipe.key
        variants = [s for s in self.seen if s.recipe.key != start and parts(s.recipe) <= whole]
        variants.sort(key=lambda s: (len(parts(s.recipe)), s.refused is not None))
        chains: list[list[Seen]] = []
        for variant in variants:
            before = [c for c in chains if parts(c[-1].recipe) < parts(variant.recipe)]
            chains.append([*max(before, key=len, default=[]), variant])
        way = next((c for c in reversed(chains) if parts(c[-1].recipe) == whole), [])
        legs, known, speed = [], frozenset[Part](), Interval.exactly(1.0)
        for seen in way:
            new = parts(seen.recipe) - known
            legs.append(Leg(_added(seen.recipe, new), _weight(seen.recipe, new) > 1, seen, speed))
            known, speed = parts(seen.recipe), seen.evidence.speedup
        return tuple(legs)

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


def parts(recipe: Recipe) -> frozenset[Part]:
    """What a recipe is made of; settings at their defaults are not parts."""
    found: set[Part] = set()
    for role, part in [*(("step", s) for s in recipe.steps), ("backend", recipe.backend)]:
        found |= {(role, part.name), *((role, part.name, setting) for setting in words.changed_knobs(part))}
    return frozenset(found)


def _ordered(recipe: Recipe) -> list[tuple[str, Plugin]]:
    return [("backend", recipe.backend), *(("step", s) for s in recipe.steps)]


def _added(recipe: Recipe, new: frozenset[Part]) -> str:
    """The new parts of a recipe in words, in the order in which a recipe is said."""
    said, last = [], []
    for role, part in _ordered(recipe):
        settings = [k for k in words.changed_knobs(part) if (role, part.name, k) in new]
        name = words.NAMES.get(part.name, part.name.replace("_", " "))
        if role == "backend":
            said += [name] if (role, part.name) in new else []
            last = settings
        elif (role, part.name) in new:
            said += [words.plugin(part)] if words.plugin(part) else []
        elif settings:
            said.append(f"{name or part.name.replace('_', ' ')}: {', '.join(settings)}")
    return words.clean(" + ".join([*said, *last])) or "another form of the model"


def _weight(recipe: Recipe, new: frozenset[Part]) -> int:
    """How many changes of speed a leg joins: a backend with the change of form that it needs is one."""
    silent = {("step", s.name) for s in recipe.steps if words.NAMES.get(s.name) == ""}
    named = {p[:2] for p in new if len(p) == 2} - silent
    settings = {p for p in new if len(p) == 3 and p[:2] not in named}
    backend_settings = {p for p in new if len(p) == 3 and p[0] == "backend" and p[:2] in named}
    return len(named) + len(settings) + len(backend_settings)


def _tally(name: str, trials: list[Trial]) -> Tally:
    good = [t.verified.evidence for t in trials if t.verified is not None]
    best = max(good, key=lambda e: e.speedup.mid, default=None)
    said = words.NAMES.get(name) or name.replace("_", " ")
    return Tally(words.clean(said), len(trials), len(good), sum(t.seconds for t in trials), best)
