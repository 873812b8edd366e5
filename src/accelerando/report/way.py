"""The way from the original to the best: what each step brought, over recipes that were measured themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accelerando.interval import Interval
from accelerando.recipe import Plugin, Recipe
from accelerando.report import words
from accelerando.report.fronts import front_key, front_of, members_of
from accelerando.trial import Evidence, Refused

Part = tuple[str, ...]  # what a recipe is made of: a step or backend by name, one of its settings, a cut, a lesson


@dataclass(frozen=True)
class Seen:
    """A recipe that was measured: as a rung of the ladder, as a trial, or before it was turned away."""

    recipe: Recipe
    evidence: Evidence
    rung: int | None = None
    refused: Refused | None = None
    bare: bool = False  # turned away as a shape that was not healed


@dataclass(frozen=True)
class Leg:
    """One leg of the way from the original to the best: what was added, and the recipe measured at its end.

    `together` where several things were added at once, for nothing between them was measured; `before` and
    `drop_before` are the speedup and the drop at its beginning.
    """

    added: str
    together: bool
    seen: Seen
    before: Interval
    drop_before: Interval

    @property
    def after(self) -> Interval:
        return self.seen.evidence.speedup

    @property
    def gain(self) -> float:
        return self.after.mid / self.before.mid

    @property
    def clear(self) -> bool:
        """Whether it changed the speed by more than the intervals leave open."""
        return _apart(self.after, self.before)

    @property
    def regained(self) -> float:
        """By how much the quality rose, in the metric's own unit; negative where it fell."""
        return self.drop_before.mid - self.seen.evidence.drop.mid

    @property
    def quality_clear(self) -> bool:
        """Whether it changed the quality by more than the intervals leave open."""
        return _apart(self.seen.evidence.drop, self.drop_before)

    def brought(self, metric: str) -> str:
        """What it did to the quality, `-38.1 points`; empty where that is not clear."""
        if not self.quality_clear:
            return ""
        unit = " points" if metric in words.SHARES else ""
        return f"{'+' if self.regained > 0 else ''}{words.difference(metric, self.regained)}{unit}"


def way_to(seen: Sequence[Seen], original: Recipe, best: Recipe) -> tuple[Leg, ...]:
    """The way to the best, over measured recipes only.

    A simpler variant of the best is a recipe whose parts are all parts of the best: steps, backend and settings, the
    cuts and lessons as far as they begin like the best's; for a cascade those of its better recipe, for an early exit
    those of the whole model.  The longest chain of measured variants, each holding the one before, is the way; what was
    never measured apart is one leg.
    """
    whole = parts(best)
    variants = [s for s in seen if s.recipe != original and parts(s.recipe) <= whole]
    variants.sort(key=lambda s: (len(parts(s.recipe)), s.refused is not None))
    chains: list[list[Seen]] = []
    for variant in variants:
        before = [c for c in chains if parts(c[-1].recipe) < parts(variant.recipe)]
        chains.append([*max(before, key=len, default=[]), variant])
    chain = next((c for c in reversed(chains) if parts(c[-1].recipe) == whole), [])
    legs, known, speed, drop = [], frozenset[Part](), Interval.exactly(1.0), Interval.exactly(0.0)
    for end in chain:
        new = parts(end.recipe) - known
        legs.append(Leg(_added(end.recipe, new), _weight(end.recipe, new) > 1, end, speed, drop))
        known, speed, drop = parts(end.recipe), end.evidence.speedup, end.evidence.drop
    return tuple(legs)


def parts(recipe: Recipe) -> frozenset[Part]:
    """What a recipe is made of; settings at their defaults are not parts.

    A step that shapes or heals is a part together with all before it, for it means nothing without them.
    """
    if joined := _joined(recipe):
        return parts(joined[0]) | {("cascade", recipe.key)}
    front = front_of(recipe)
    found: set[Part] = {("front", front_key(front[: i + 1])) for i in range(len(front))}
    for role, part in [*(("step", s) for s in recipe.steps[len(front) :]), ("backend", recipe.backend)]:
        found |= {(role, part.name), *((role, part.name, setting) for setting in words.changed_knobs(part))}
    return frozenset(found)


def _joined(recipe: Recipe) -> tuple[Recipe, str] | None:
    """Of a cascade, the recipe that it makes faster, and by what, in words."""
    if exit_ := words.exit_of(recipe.backend):
        return exit_
    members = members_of(recipe.backend)
    return (members[1], f"asked first: {words.recipe(members[0])}") if len(members) == 2 else None


def _apart(one: Interval, other: Interval) -> bool:
    return one.low > other.high or one.high < other.low


def _added(recipe: Recipe, new: frozenset[Part]) -> str:
    """The new parts of a recipe in words, in the order in which a recipe is said."""
    if joined := _joined(recipe):
        better, first = joined
        rest = new - {("cascade", recipe.key)}
        return f"{_added(better, rest)} + {first}" if rest else first
    front = front_of(recipe)
    cut = [step for i, step in enumerate(front) if ("front", front_key(front[: i + 1])) in new]
    backend = recipe.backend
    last = [k for k in words.changed_knobs(backend) if ("backend", backend.name, k) in new]
    said = [words.called(backend.name)] if ("backend", backend.name) in new else []
    said += words.front(cut)
    for step in recipe.steps[len(front) :]:
        settings = [k for k in words.changed_knobs(step) if ("step", step.name, k) in new]
        if ("step", step.name) in new:
            said += [words.plugin(step)] if words.plugin(step) else []
        elif settings:
            said.append(f"{words.called(step.name)}: {', '.join(settings)}")
    return words.clean(" + ".join([*said, *last])) or "another form of the model"


def _weight(recipe: Recipe, new: frozenset[Part]) -> int:
    """How many changes of speed a leg joins: a backend with the change of form that it needs is one."""
    plain: list[Plugin] = [s for m in (members_of(recipe.backend) or (recipe,)) for s in m.steps]
    silent = {("step", s.name) for s in plain if words.NAMES.get(s.name) == ""}
    named = {p[:2] for p in new if len(p) == 2} - silent
    settings = {p for p in new if len(p) == 3 and p[:2] not in named}
    backend_settings = {p for p in new if len(p) == 3 and p[0] == "backend" and p[:2] in named}
    return len(named) + len(settings) + len(backend_settings)
