"""Recipes that end with an early exit: how they are made, and how they are told."""

from __future__ import annotations

from accelerando.recipe import Recipe
from accelerando.techniques.early_exit import EarlyExit
from accelerando.workload import Form


def at_exit(whole: Recipe, share: float, part: str = "exit") -> Recipe:
    """A recipe that leaves before its end, with a share of its layers behind the exit; or a part of one."""
    return Recipe((*whole.steps, EarlyExit(share, part)), whole.backend)


def exit_of(recipe: Recipe) -> EarlyExit | None:
    """The exit that a recipe ends with, if it does."""
    last = recipe.steps[-1] if recipe.steps else None
    return last if isinstance(last, EarlyExit) else None


def whole_of(recipe: Recipe) -> Recipe | None:
    """The recipe without its exit; None where it has none."""
    return Recipe(recipe.steps[:-1], recipe.backend) if exit_of(recipe) else None


def forms_of(recipe: Recipe) -> frozenset[Form]:
    """What its backend may be given: the last step says which form it is, if there is a step."""
    return frozenset({recipe.steps[-1].gives}) if recipe.steps else recipe.backend.takes
