"""`refresh`: the owner retrained the original; its bundle's recipes are applied to the new weights, without a search.

What a search finds depends on the structure of a model and on the machine, and hardly on the weights.  So the recipes
are taken as they are, and everything is measured, judged and certified anew.  Where the bundle holds the students of
its lessons, a recipe goes on from there: it gets one more, short lesson with the new original for a teacher
(`search/head_start.py`).  Else its lessons are given again, but shorter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerando.adoption import adopt
from accelerando.bundle import Bundle
from accelerando.errors import ModelError, UsageError
from accelerando.machine import Machine
from accelerando.metric import METRICS
from accelerando.pipeline import Trials, carry_out, must_run, need_extra, watcher_of
from accelerando.plugins import discover, recipe_from_json
from accelerando.recipe import Recipe, Stage, Technique
from accelerando.report.progress import Watcher
from accelerando.result import Result
from accelerando.search.again import refresh_again
from accelerando.search.budget import LEAST_SECONDS, Budget
from accelerando.search.grounds import attempt
from accelerando.search.head_start import HeadStart, front_key
from accelerando.search.history import Proposal
from accelerando.search.site import Site
from accelerando.search.space import original_recipe
from accelerando.search.structure import differs, structure_of
from accelerando.train.course import OPTIMIZERS
from accelerando.train.schedule import gentle
from accelerando.trial import Refused, Trial
from accelerando.workload import Form, Workload

BUDGET_SHARE = 0.19  # of what the search took: a fifth, with opening and closing
LEAST_BUDGET = 60.0
LESSON_SHARE = 0.4  # of the budget: the lessons of the best rung together, where they begin with nothing
ONE_LESSON_SHARE = 0.25  # of the budget: the lesson of a student that was taught before
SHORTEST_LESSON = 5


@dataclass(frozen=True)
class Plan:
    """Ways to apply a recipe, of which the next is for where the one before can't be built.

    Args:
        given: keys of the lessons that need not be given, for the bundle holds the student that they ended with.
    """

    ways: tuple[Recipe, ...]
    given: frozenset[str] = frozenset()


def refresh(
    bundle: str | Path,
    model: Any,
    data: Any,
    into: str | Path,
    *,
    train: Any = None,
    metric: str | Callable[[Any, Any], Any] | None = None,
    budget: str | float | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    augment: Callable[[Any], Any] | None = None,
    origin: str | None = None,
    progress: Watcher | bool = True,
) -> Result:
    """Make a bundle for new weights of a model, by the recipes of the bundle that was made for the old ones.

    Args:
        bundle: the folder of the bundle that was made for the old weights; it is not changed.
        model: the new original, of the same structure.
        data, train, metric, loss, augment, origin, progress: as for `accelerate`.
        into: the new bundle's folder; a refresh that is there is resumed.
        budget: wall-clock time; without it, a fifth of what the search took, and a minute at least.

    Returns:
        The result, judged by the same goal.

    Raises:
        UsageError: a mistake in the arguments, such as recipes with lessons and no `train`.
        ModelError: the new model's structure is another: run `accelerate` for it.
        BundleError: the bundle can't be trusted.
    """
    need_extra()
    started = time.monotonic()
    before = Bundle.open(bundle)
    if Path(into).resolve() == before.path.resolve():
        raise UsageError(f"into={str(into)!r} is the bundle itself; give another folder, for the old one stays whole")
    allowance = Budget.parse(max(LEAST_BUDGET, BUDGET_SHARE * before.run["seconds"]) if budget is None else budget)
    allowance = replace(allowance, started=started)
    if metric is None and before.workload["metric"] in METRICS:
        metric = before.workload["metric"]
    workload, machine = adopt(model, data, train=train, metric=metric, loss=loss, augment=augment), Machine.look()
    _check_structure(before, workload)
    recipes = [recipe_from_json(r.recipe.to_json()) for r in _ordered(before)]
    if workload.train is None and any(_lesson_seconds(r) for r in recipes):
        raise UsageError("the bundle's recipes hold lessons, which need training data: give train=")
    head_start = HeadStart.of(before) if workload.model.form is Form.TORCH else None
    original = original_recipe(workload.model, discover("backends"))
    watcher = watcher_of(progress, allowance)
    again = refresh_again(Path(bundle), workload, allowance, Path(into), origin)
    goal, plans = before.goal, [Plan((original,)), *_plans(recipes, head_start, allowance)]
    with Site(into, workload, machine, goal, allowance, original, None, origin, again, head_start) as site, watcher:
        return carry_out(site, watcher, partial(_apply, plans))


def _apply(plans: Sequence[Plan], site: Site, history: Trials, watcher: Watcher) -> Trials:
    """Attempt each recipe, the best first, as long as time lasts; the original and the best in any case."""
    watcher.phase("applying the bundle's recipes to the new weights")
    known = {t.recipe.key: t for t in history}
    taught = {key for trial in history for key in _lessons(trial.recipe)}
    for number, plan in enumerate(plans):
        for recipe in plan.ways:
            trial = known.get(recipe.key)
            if trial is None:
                new = sum(s for key, s in _lessons(recipe).items() if key not in taught | plan.given)
                if number > 1 and new + LEAST_SECONDS > site.budget.to_explore:
                    break
                trial = _attempt(site, recipe, history, watcher)
                if number == 0:
                    must_run(trial)
                history = site.note(history, trial)
                watcher.found(trial, None)
                taught |= _lessons(recipe).keys()
            if not (isinstance(trial.outcome, Refused) and trial.outcome.step is not None):
                break
    return history


def _attempt(site: Site, recipe: Recipe, history: Trials, watcher: Watcher) -> Trial:
    proposal = Proposal(recipe, "a rung of the bundle that was made for the old weights")
    return attempt(proposal, site.grounds, history, max(site.budget.left, 30.0), partial(watcher.trying, recipe))


def _ordered(bundle: Bundle) -> list[Any]:
    """The rungs beyond the original: the best first, then the others from the fastest down."""
    best = bundle.ladder.rungs[bundle.best]
    others = [r for r in reversed(bundle.ladder.rungs[1:]) if r is not best]
    return [best, *others] if best is not bundle.ladder.rungs[0] else others


# --- lessons ----------------------------------------------------------------------------------------------------


def _plans(recipes: Sequence[Recipe], head_start: HeadStart | None, budget: Budget) -> Iterator[Plan]:
    """How each recipe's lessons are given now: all by one measure, so that what recipes share is done once."""
    seconds = max(SHORTEST_LESSON, round(ONE_LESSON_SHARE * budget.seconds))
    for recipe, shorter in zip(recipes, _shortened(recipes, budget), strict=True):
        longer = _taught_on(recipe, seconds)
        taught = [m.steps for m in _members(longer) if _last_lesson(m.steps) is not None]
        if head_start and taught and all(head_start.known(steps) == _last_lesson(steps) for steps in taught):
            yield Plan((longer, shorter), frozenset(_lessons(recipe)))
        else:
            yield Plan((shorter,))


def _taught_on(recipe: Recipe, seconds: int) -> Recipe:
    """The recipe with one lesson more after its last, like that one but short and gentle; so for members."""
    members = tuple(_taught_on(m, seconds) for m in recipe.backend.members)
    backend = recipe.backend.with_members(members) if members else recipe.backend
    last = _last_lesson(recipe.steps)
    if last is None:
        return Recipe(recipe.steps, backend)
    lesson = recipe.steps[last].with_knobs(seconds=seconds)
    if lesson.knobs.get("optimizer") in OPTIMIZERS and "learning_rate" in lesson.knobs:
        lesson = lesson.with_knobs(learning_rate=gentle(str(lesson.knobs["optimizer"])))
    return Recipe((*recipe.steps[: last + 1], lesson, *recipe.steps[last + 1 :]), backend)


def _shortened(recipes: Sequence[Recipe], budget: Budget) -> list[Recipe]:
    """The recipes with shorter lessons."""
    if not recipes:
        return []
    longest = _lesson_seconds(recipes[0]) or max(map(_lesson_seconds, recipes))
    factor = min(1.0, LESSON_SHARE * budget.seconds / longest) if longest else 1.0
    return [_shorter(r, factor) for r in recipes]


def _shorter(recipe: Recipe, factor: float) -> Recipe:
    steps = tuple(
        s.with_knobs(seconds=max(SHORTEST_LESSON, round(float(s.knobs["seconds"] or 0) * factor)))
        if s.stage is Stage.HEAL
        else s
        for s in recipe.steps
    )
    members = tuple(_shorter(m, factor) for m in recipe.backend.members)
    return Recipe(steps, recipe.backend.with_members(members) if members else recipe.backend)


def _members(recipe: Recipe) -> Sequence[Recipe]:
    return recipe.backend.members or (recipe,)


def _last_lesson(steps: Sequence[Technique]) -> int | None:
    return max((i for i, step in enumerate(steps) if step.stage is Stage.HEAL), default=None)


def _lessons(recipe: Recipe) -> Mapping[str, float]:
    """Seconds of each lesson, by the key of all steps up to it."""
    return {
        front_key(m.steps[: i + 1]): step.expected_seconds
        for m in _members(recipe)
        for i, step in enumerate(m.steps)
        if step.stage is Stage.HEAL
    }


def _lesson_seconds(recipe: Recipe) -> float:
    return sum(_lessons(recipe).values())


def _check_structure(before: Bundle, workload: Workload) -> None:
    """Raises ModelError where the new model is called otherwise, or is built otherwise, than the old one."""
    if before.signature != workload.model.signature:
        raise ModelError(
            f"the new model is called otherwise: {before.signature.inputs} -> {before.signature.outputs} was "
            f"optimized, and this is {workload.model.signature.inputs} -> {workload.model.signature.outputs}; "
            "run accelerate (`accelerando optimize`) for it"
        )
    if differs(before.workload.get("structure"), structure_of(workload)):
        raise ModelError(
            "the new model is built otherwise than the one that was optimized (other layers, other sizes, or other "
            "settings such as dilation or heads), so its recipes may not fit; run accelerate (`accelerando optimize`) "
            "for it"
        )
