"""`accelerate`: the whole story on one screen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerando.adoption import adopt
from accelerando.errors import GoalError, MissingExtraError, ModelError
from accelerando.goal import Goal
from accelerando.machine import Machine
from accelerando.plugins import discover
from accelerando.recipe import Recipe, Stage
from accelerando.report.progress import Progress, Quiet, Watcher
from accelerando.result import Result
from accelerando.search.again import search_again
from accelerando.search.budget import Budget
from accelerando.search.cascades import Pair, next_cascade
from accelerando.search.grounds import attempt, race
from accelerando.search.history import Proposal, front_of, leader
from accelerando.search.proposal import ask
from accelerando.search.site import Site
from accelerando.search.space import Space
from accelerando.trial import Refused, Trial

Trials = tuple[Trial, ...]


def accelerate(
    model: Any,
    data: Any,
    goal: str = "drop <= 1%",
    *,
    train: Any = None,
    metric: str | Callable[[Any, Any], Any] | None = None,
    budget: str | float = "6min",
    into: str | Path = "bundle",
    prefer: str | None = None,
    memory_limit: int | None = None,
    origin: str | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    augment: Callable[[Any], Any] | None = None,
    progress: Watcher | bool = True,
) -> Result:
    """Find, prove and ship the fastest faithful version of a model.

    **Everyday arguments**

    Args:
        model: a torch.nn.Module, or the path of an .onnx file.  It is not changed.
        data: what it is judged on: arrays, tensors, (inputs, targets), a dict of keyword inputs, a DataLoader, a
            Dataset or any iterable of batches.  Axis 0 is the batch.  Inputs alone are fine: answers are then
            compared with the original's.
        goal: bounds on speed, quality, memory and size, as in `"speedup >= 4, drop <= 1%"`.
        train: more data, for calibration and retraining: without it a part of `data` is set aside for calibration,
            and nothing is retrained.  Its targets may be missing.
        metric: a name, a function (outputs, targets) -> per-sample scores, or None to guess.
        budget: wall-clock time, as in `"6min"`, or seconds.
        into: the bundle's folder; a search that is there is resumed.

    **Other arguments**

        prefer: "quality" or "speed", where the goal bounds both and several recipes meet it.
        memory_limit: bytes that a candidate may hold, building or running; by default four fifths of the machine's.
        loss: for retraining, (the model's answer, targets) -> a scalar tensor; guessed where it is obvious.
        augment: for retraining, a tuple of input tensors (n, ...) -> another; small shifts of images otherwise.
        origin: how to get the original again (`model.py:build`), for `accelerando bench`.
        progress: True to show it, False for silence, or a watcher of your own.

    Returns:
        The result; its bundle is in the folder.  On Ctrl-C, the best so far.

    Raises:
        UsageError: a mistake in the arguments; raised before any work.
        BundleError: the folder holds something else.
    """
    need_extra()
    asked, allowance = Goal.parse(goal, prefer), Budget.parse(budget)
    workload, machine = adopt(model, data, train=train, metric=metric, loss=loss, augment=augment), Machine.look()
    asked.check(workload.metric.name, workload.metric.higher_is_better)
    asked = _at_fixed_batch(asked, workload.fixed_batch)
    space = Space.plan(workload.teachable, machine, discover("techniques"), discover("backends"), asked.batch)
    watcher = watcher_of(progress, allowance)
    again = search_again(workload, asked, allowance, Path(into), origin, memory_limit)
    with Site(into, workload, machine, asked, allowance, space.original, memory_limit, origin, again) as site, watcher:
        return carry_out(site, watcher, partial(_explore, space))


def carry_out(site: Site, watcher: Watcher, try_recipes: Callable[[Site, Trials, Watcher], Trials]) -> Result:
    """Try recipes at a site, and certify what was found; what is there already is the result, or gone on with."""
    if site.finished is not None:
        return Result(site.finished)
    for note in site.workload.notes:
        watcher.note(note)
    history = site.history()
    try:
        history = try_recipes(site, history, watcher)
        watcher.phase("certifying on samples that nothing was selected on")
        bundle = site.finish(history, watcher.trying)
    except KeyboardInterrupt:
        watcher.note("interrupted: the best so far is kept; call again with the same folder to go on")
        bundle = site.save(site.history(), "interrupted")
    return Result(bundle)


def _explore(space: Space, site: Site, history: Trials, watcher: Watcher) -> Trials:
    """The only loop: ask, attempt, note."""
    for trial in space.trials_turned_away(history):
        history = site.note(history, trial)
    tuned: set[Pair] = set()
    while proposal := _next(space, site, history, tuned):
        recipe = proposal.recipe
        if proposal.rivals:
            watcher.phase("telling the best apart, in the same rounds")
            watcher.trying(recipe, "racing")
            trials = race(proposal, site.grounds, history, site.budget.to_race)
        else:
            watcher.phase(_phase(proposal))
            trials = [attempt(proposal, site.grounds, history, site.budget.left, partial(watcher.trying, recipe))]
        if recipe == space.original and not proposal.again:
            must_run(trials[0])
        for trial in trials:
            history = site.note(history, trial)
            watcher.found(trial, _best(history, site.goal, space.original))
    return history


def _next(space: Space, site: Site, history: Trials, tuned: set[Pair]) -> Proposal | None:
    """What to try next; when exploring is over, cascades of what was found come before the race."""
    proposal = ask(space, history, site.goal, site.budget)
    if proposal is not None and not proposal.rivals:
        return proposal
    return next_cascade(history, site.grounds, site.budget.to_race, tuned) or proposal


def _phase(proposal: Proposal) -> str:
    if proposal.again:
        return "measuring the best again"
    if proposal.recipe.backend.members:
        return "joining two recipes"
    front = front_of(proposal.recipe)
    if not front:
        return "looking for faster recipes"
    return "healing a shape that is fast enough" if front[-1].stage is Stage.HEAL else "measuring a shape"


def must_run(trial: Trial) -> None:
    """The original must be measurable, or nothing can be judged.

    Raises:
        ModelError: it is not.
    """
    if isinstance(trial.outcome, Refused):
        raise ModelError(
            f"the original itself can't be measured: {trial.outcome.reason.happened}: {trial.outcome.detail}"
        )


def _at_fixed_batch(goal: Goal, fixed: int | None) -> Goal:
    """The goal at the one batch that the model takes, where it takes one only.

    Raises:
        GoalError: the goal asks for another batch.
    """
    if fixed is None or goal.batch == fixed:
        return goal
    if goal.batch != 1:
        raise GoalError(f"the model takes batches of {fixed} only, but the goal asks for batch {goal.batch}")
    sized = replace(goal, batch=fixed)
    return replace(sized, text=str(sized))


def need_extra() -> None:
    """Raises MissingExtraError, with the pip line, where what the search itself needs is not installed."""
    missing = [name for name in ("cloudpickle", "onnx", "optuna") if find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"a search needs {', '.join(missing)}: pip install 'accelerando[optimize]'")


def _best(history: Trials, goal: Goal, original: Recipe) -> Trial | None:
    last = {t.recipe.key: t for t in history}
    return leader([t for t in last.values() if t.verified and t.recipe != original], goal)


def watcher_of(progress: Watcher | bool, budget: Budget) -> Watcher:
    """The watcher of a call: a live one, none, or the caller's own."""
    if isinstance(progress, bool):
        return Progress(budget.seconds) if progress else Quiet()
    return progress
