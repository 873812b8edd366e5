"""`refresh`: the owner retrained the original; its bundle's recipes are applied to the new weights, without a search.

What a search finds depends on the structure of a model and on the machine, and hardly on the weights.  So the recipes
are taken as they are, lessons are given again but shorter, and everything is measured, judged and certified anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerando.adoption import adopt
from accelerando.bundle import Bundle
from accelerando.errors import ModelError, UsageError
from accelerando.machine import Machine
from accelerando.metric import METRICS
from accelerando.pipeline import must_run, need_extra, watcher_of
from accelerando.plugins import discover, recipe_from_json
from accelerando.recipe import Recipe, Stage
from accelerando.report.progress import Watcher
from accelerando.result import Result
from accelerando.search.budget import LEAST_SECONDS, Budget
from accelerando.search.grounds import attempt
from accelerando.search.history import Proposal
from accelerando.search.site import Site, structure_of
from accelerando.search.space import original_recipe
from accelerando.trial import Trial
from accelerando.workload import Form, Workload

BUDGET_SHARE = 0.2  # of what the search took
LEAST_BUDGET = 60.0
LESSON_SHARE = 0.4  # of the budget: the lessons of the best rung together
SHORTEST_LESSON = 5


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
    before = Bundle.open(bundle)
    if Path(into).resolve() == before.path.resolve():
        raise UsageError(f"into={str(into)!r} is the bundle itself; give another folder, for the old one stays whole")
    if metric is None and before.workload["metric"] in METRICS:
        metric = before.workload["metric"]
    workload, machine = adopt(model, data, train=train, metric=metric, loss=loss, augment=augment), Machine.look()
    _check_structure(before, workload)
    recipes = [recipe_from_json(r.recipe.to_json()) for r in _ordered(before)]
    if workload.train is None and any(_lesson_seconds(r) for r in recipes):
        raise UsageError("the bundle's recipes hold lessons, which need training data: give train=")
    allowance = Budget.parse(max(LEAST_BUDGET, BUDGET_SHARE * before.run["seconds"]) if budget is None else budget)
    original = original_recipe(workload.model, discover("backends"))
    watcher = watcher_of(progress, allowance)
    with Site(into, workload, machine, before.goal, allowance, original, None, origin) as site, watcher:
        if site.finished is not None:
            return Result(site.finished)
        history = site.history()
        try:
            history = _apply(site, [original, *_shortened(recipes, allowance)], history, watcher)
            watcher.phase("certifying on samples that nothing was selected on")
            written = site.finish(history, watcher.trying)
        except KeyboardInterrupt:
            watcher.note("interrupted: what was done is kept; call again with the same folder to go on")
            written = site.save(site.history(), "interrupted")
    return Result(written)


def _apply(site: Site, recipes: Sequence[Recipe], history: tuple[Trial, ...], watcher: Watcher) -> tuple[Trial, ...]:
    """Attempt each recipe, the best first, as long as time lasts; the original and the best in any case."""
    watcher.phase("applying the bundle's recipes to the new weights")
    known = {t.recipe.key for t in history}
    for number, recipe in enumerate(recipes):
        if recipe.key in known:
            continue
        if number > 1 and _lesson_seconds(recipe) + LEAST_SECONDS > site.budget.to_explore:
            continue
        proposal = Proposal(recipe, "a rung of the bundle that was made for the old weights")
        trial = attempt(proposal, site.grounds, history, max(site.budget.left, 30.0), partial(watcher.trying, recipe))
        if number == 0:
            must_run(trial)
        history = site.note(history, trial)
        watcher.found(trial, None)
    return history


def _ordered(bundle: Bundle) -> list[Any]:
    """The rungs beyond the original: the best first, then the others from the fastest down."""
    best = bundle.ladder.rungs[bundle.best]
    others = [r for r in reversed(bundle.ladder.rungs[1:]) if r is not best]
    return [best, *others] if best is not bundle.ladder.rungs[0] else others


def _shortened(recipes: Sequence[Recipe], budget: Budget) -> list[Recipe]:
    """The recipes with shorter lessons: all by one factor, so that what they share is done once."""
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


def _lesson_seconds(recipe: Recipe) -> float:
    members = recipe.backend.members or (recipe,)
    return sum(s.expected_seconds for m in members for s in m.steps if s.stage is Stage.HEAL)


def _check_structure(before: Bundle, workload: Workload) -> None:
    """Raises ModelError where the new model is called otherwise, or is built otherwise, than the old one."""
    if before.signature != workload.model.signature:
        raise ModelError(
            f"the new model is called otherwise: {before.signature.inputs} -> {before.signature.outputs} was "
            f"optimized, and this is {workload.model.signature.inputs} -> {workload.model.signature.outputs}; "
            "run accelerate (`accelerando optimize`) for it"
        )
    was, now = before.workload.get("structure"), structure_of(workload.model)
    if workload.model.form is Form.TORCH and was is not None and was != now:
        raise ModelError(
            "the new model is built otherwise than the one that was optimized (other layers, or other sizes), so its "
            "recipes may not fit; run accelerate (`accelerando optimize`) for it"
        )
