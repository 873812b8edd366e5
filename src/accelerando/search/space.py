"""The space: every route that forms and stages allow, and the settings along it.

A route is technique classes, then a backend class.  Recipes are made from it one choice at a time; the space is
never multiplied out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Backend, Plugin, Recipe, Stage, Technique
from accelerando.trial import Refused, Trial
from accelerando.workload import Form, Model


@dataclass(frozen=True)
class Route:
    """Settings to choose from: for each technique in order, then for the backend; defaults first."""

    choices: tuple[tuple[Plugin, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(c[0].name for c in self.choices)

    def recipe(self, parts: Sequence[Plugin]) -> Recipe:
        *steps, backend = parts
        return Recipe(tuple(steps), backend)  # type: ignore[arg-type]

    @property
    def default(self) -> Recipe:
        return self.recipe([c[0] for c in self.choices])

    @property
    def stands_alone(self) -> bool:
        """Whether it needs no shape before it: a backend made for certain shapes (`offers`) gains nothing by itself."""
        return not self.default.backend.offers

    def neighbours(self, recipe: Recipe) -> Iterator[Recipe]:
        """The recipes that differ from one on this route in a single part."""
        parts: list[Plugin] = [*recipe.steps, recipe.backend]
        for i, choices in enumerate(self.choices):
            for choice in choices:
                if choice != parts[i]:
                    yield self.recipe([*parts[:i], choice, *parts[i + 1 :]])


@dataclass(frozen=True)
class Space:
    """All routes for a model here, and those that planning had to turn away.

    A route lowers, quantizes and runs.  `shapes` and `healers`, at their defaults, may stand before any route of a
    torch module.
    """

    original: Recipe
    routes: tuple[Route, ...]
    turned_away: tuple[tuple[Recipe, RefusalError], ...] = field(default=())
    shapes: tuple[Technique, ...] = ()
    healers: tuple[Technique, ...] = ()

    @classmethod
    def plan(
        cls,
        model: Model,
        machine: Machine,
        techniques: Mapping[str, type[Technique]],
        backends: Mapping[str, type[Backend]],
        batch: int = 1,
    ) -> Space:
        """Derive the routes from what techniques and backends declare.

        A backend's knob `batch`, where it has one, is set to the batch at which the goal asks for speed.  At most one
        technique of a route quantizes; a backend that needs the user's own code takes no steps; what a technique
        wants, the backend must offer.
        """
        lowering = [t for t in techniques.values() if t.stage >= Stage.LOWER]
        kinds: tuple[Any, ...] = (*lowering, *backends.values())
        settings = {kind: _settings(kind, model, machine, batch) for kind in kinds}
        routes, away = [], []
        for steps in _chains(model.form, Stage.LOWER, (), lowering):
            form = steps[-1].gives if steps else model.form
            for backend in backends.values():
                if form not in backend.takes or (steps and not backend.portable):
                    continue
                if not {t.wants for t in steps} - {""} <= backend.offers:
                    continue
                route = Route(tuple(settings[kind] for kind in (*steps, backend)))
                if refusal := route.default.refuse(model, machine):
                    away.append((route.default, refusal))
                else:
                    routes.append(route)
        found: dict[Stage, list[Technique]] = {Stage.SHAPE: [], Stage.HEAL: []}
        shortest = min((r.default for r in routes if r.default.steps), key=lambda r: len(r.steps), default=None)
        for kind in (t for t in techniques.values() if t.stage < Stage.LOWER and t.takes is model.form):
            step = _settings(kind, model, machine, batch)[0]
            if shortest is None:
                break  # nothing runs a changed module here
            recipe = Recipe((step, *shortest.steps), shortest.backend)  # type: ignore[arg-type]
            if refusal := recipe.refuse(model, machine):
                away.append((recipe, refusal))
            else:
                found[step.stage].append(step)  # type: ignore[attr-defined, arg-type]
        shapes, healers = tuple(found[Stage.SHAPE]), tuple(found[Stage.HEAL])
        return cls(original_recipe(model, backends), tuple(routes), tuple(away), shapes, healers)

    @cached_property
    def by_names(self) -> Mapping[tuple[str, ...], Route]:
        return {route.names: route for route in self.routes}

    def trials_turned_away(self, history: Iterable[Trial]) -> Iterator[Trial]:
        """A trial for each reason that planning found and that the history does not hold yet: its shortest route."""
        known = {t.recipe.key for t in history}
        shortest: dict[tuple[Reason, str], tuple[Recipe, RefusalError]] = {}
        for recipe, refusal in sorted(self.turned_away, key=lambda pair: len(pair[0].steps)):
            shortest.setdefault((refusal.reason, refusal.detail), (recipe, refusal))
        for recipe, refusal in shortest.values():
            if recipe.key not in known:
                yield Trial(recipe, Refused(refusal.reason, refusal.detail, refusal.step))

    def route_of(self, recipe: Recipe) -> Route | None:
        return self.by_names.get((*(s.name for s in recipe.steps), recipe.backend.name))


def _settings(kind: Any, model: Model, machine: Machine, batch: int) -> tuple[Plugin, ...]:
    """A plugin's choices, each once."""
    choices = tuple(kind.choices(model, machine)) or (kind(),)
    sized = (replace(c, batch=batch) if getattr(c, "batch", 0) else c for c in choices)
    return tuple(dict.fromkeys(sized))


def original_recipe(model: Model, backends: Mapping[str, type[Backend]]) -> Recipe:
    """The original as a recipe: no steps, and the backend in which it came, at its defaults."""
    return Recipe((), backends["eager" if model.form is Form.TORCH else "onnxruntime"]())


def _chains(
    form: Form, stage: Stage, so_far: tuple[type[Any], ...], techniques: Sequence[type[Technique]]
) -> Iterator[tuple[type[Any], ...]]:
    """Every order of techniques in which forms chain and stages do not go back."""
    yield so_far
    quantized = any(t.stage is Stage.QUANTIZE for t in so_far)
    for technique in techniques:
        if technique.takes is not form or technique.stage < stage or technique in so_far:
            continue
        if quantized and technique.stage is Stage.QUANTIZE:
            continue
        yield from _chains(technique.gives, technique.stage, (*so_far, technique), techniques)
