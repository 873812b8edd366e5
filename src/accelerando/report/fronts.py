"""The front of a recipe: its steps that shape and heal, which stand before all others; and the members of a cascade.

A recipe from a manifest names its techniques only, so their stages are looked up; one that is not known here has
none, and is told like any other step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from accelerando.errors import BrokenPluginError
from accelerando.plugins import StoredTechnique, find, recipe_from_json
from accelerando.recipe import Backend, Recipe, Stage, Technique, key_of

Front = tuple[Technique, ...]


def stage_of(step: Technique) -> Stage | None:
    """When a technique is applied; None where it is not known here."""
    if not isinstance(step, StoredTechnique):
        return step.stage
    try:
        stage: Stage = find("techniques", step.name).stage
    except BrokenPluginError:
        return None
    return stage


def front_of(recipe: Recipe) -> Front:
    """The steps that shape and heal."""
    stages = [stage_of(step) for step in recipe.steps]
    ends = next((i for i, s in enumerate(stages) if s is None or s > Stage.HEAL), len(stages))
    return recipe.steps[:ends]


def tail_of(recipe: Recipe) -> Recipe:
    """What follows shaping and healing: lowering, quantizing, the backend."""
    return Recipe(recipe.steps[len(front_of(recipe)) :], recipe.backend)


def front_key(front: Sequence[Technique]) -> str:
    """The same for the same steps, whether they were made here or read from a bundle."""
    return key_of([step.to_json() for step in front])


def heals(step: Technique) -> bool:
    return stage_of(step) is Stage.HEAL


def is_bare(recipe: Recipe) -> bool:
    """Whether a recipe ends its front with a cut: a shape that was not healed."""
    front = front_of(recipe)
    return bool(front) and not heals(front[-1])


def chapters_of(front: Front) -> Iterator[tuple[Front, Front]]:
    """The cuts that were made together and the lessons after them, again and again; either may be empty."""
    cuts: Front = ()
    for taught, group in groupby(front, heals):
        if taught:
            yield cuts, tuple(group)
            cuts = ()
        else:
            cuts = tuple(group)
    if cuts:
        yield cuts, ()


def members_of(backend: Backend) -> tuple[Recipe, ...]:
    """The recipes that a cascade joins; where one is not known here in this form, as it was stored."""
    return tuple(map(_known, getattr(backend, "stored_members", ())))


def _known(stored: Recipe) -> Recipe:
    try:
        made = recipe_from_json(stored.to_json())
    except BrokenPluginError:
        return stored
    return made if made == stored else stored
