"""The order of certifying: who comes next, and who is the best."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from accelerando.goal import Goal
from accelerando.ladder import Rung
from accelerando.recipe import Recipe
from accelerando.search.certificate import Order
from accelerando.search.history import leader, sober
from accelerando.techniques.early_exit import EarlyExit
from accelerando.testing.fakes import fake_recipe, fake_trial, fakes_known, original_trial
from accelerando.trial import Evidence, Trial

pytestmark = pytest.mark.usefixtures("_fakes")
FAITHFUL = Goal.parse("drop <= 1%")


@pytest.fixture
def _fakes() -> object:
    with fakes_known():
        yield


def turned(evidence: Evidence, worse: int, better: int) -> Evidence:
    """Evidence of which so many answers were right with the original only, or with the recipe only."""
    theirs = evidence.original_scores[:, 0]
    ours = theirs.copy()
    ours[np.flatnonzero(theirs == 1)[:worse]] = 0
    ours[np.flatnonzero(theirs == 0)[:better]] = 1
    return replace(evidence, scores=ours[:, None])


def trial(level: int, speedup: float, worse: int = 0, better: int = 0, n: int = 1000) -> Trial:
    made = fake_trial(speedup, level=level, n=n, quality=0.8)
    assert made.verified
    return replace(made, outcome=replace(made.verified, evidence=turned(made.verified.evidence, worse, better)))


def cut(speedup: float, worse: int = 0, better: int = 0) -> Trial:
    """The same of a recipe that cuts something."""
    made = trial(1, speedup, worse, better)
    return replace(made, recipe=fake_recipe(1, [1]))


def certified(which: Trial, worse: int, better: int) -> Rung:
    """What the certify split makes of a trial."""
    assert which.verified
    evidence = replace(turned(which.verified.evidence, worse, better), split="certify")
    return Rung(which.recipe, which.verified.artifact, evidence, certified=True)


def walk(trials: list[Trial], goal: Goal, fate: dict[str, tuple[int, int]]) -> tuple[Order, list[str]]:
    """Certify all that the order asks for; by recipe, how many answers turn for the worse and the better."""
    verified = {t.recipe.key: t for t in trials}
    order, seen = Order.of(verified, trials[0].recipe, goal), []
    while order.waiting:
        now = order.waiting[0]
        seen.append(str(now.recipe))
        order.heard(now, certified(now, *fate.get(now.recipe.key, (0, 0))))
    return order, seen


def test_luck_on_the_select_split_is_not_taken_for_quality() -> None:
    lucky, safe = trial(1, 15.0, worse=30, better=40), trial(2, 4.0, worse=2, better=2)
    assert lucky.evidence
    assert FAITHFUL.judge(lucky.evidence).outcome.value == "met"
    assert sober(lucky.evidence).drop.mid == pytest.approx(0.0)
    assert leader([lucky, safe], FAITHFUL) is safe


def test_a_model_that_is_better_for_certain_keeps_its_gain() -> None:
    better = trial(1, 2.0, better=60).evidence
    assert better
    assert sober(better).drop == better.drop


def test_where_the_fastest_does_not_certify_a_safer_one_is_the_best_and_not_the_original() -> None:
    original = original_trial(n=1000, quality=0.8)
    bold, alike = trial(1, 15.0, worse=3, better=3), trial(2, 14.0, worse=3, better=3)
    safe = trial(3, 4.0)
    order, seen = walk([original, bold, alike, safe], FAITHFUL, {bold.recipe.key: (40, 10), alike.recipe.key: (40, 10)})
    assert order.best
    assert order.best.recipe == safe.recipe
    assert str(alike.recipe) not in seen  # as unsure as the one that failed
    assert seen[:2] == [str(bold.recipe), str(original.recipe)]


def test_the_first_that_meets_the_goal_is_the_best_whatever_comes_after() -> None:
    original = original_trial(n=1000, quality=0.8)
    first, other = trial(1, 6.0), trial(2, 3.0)
    order, _ = walk([original, first, other], FAITHFUL, {first.recipe.key: (1, 0)})
    assert order.best
    assert order.best.recipe == first.recipe


def test_what_cuts_nothing_stands_in_for_what_cut_too_much_though_both_looked_alike() -> None:
    original = original_trial(n=1000, quality=0.8)
    bold, plain = cut(6.0), trial(2, 3.0)
    order, _ = walk([original, bold, plain], FAITHFUL, {bold.recipe.key: (30, 0)})
    assert order.best
    assert order.best.recipe == plain.recipe


def test_a_model_without_its_early_exit_stands_in_for_it() -> None:
    original = original_trial(n=1000, quality=0.8)
    whole = trial(1, 4.0)
    left = replace(trial(1, 8.0), recipe=Recipe((EarlyExit(),), whole.recipe.backend))
    order, _ = walk([original, left, whole], FAITHFUL, {left.recipe.key: (30, 0)})
    assert order.best
    assert order.best.recipe == whole.recipe


def test_what_falls_short_of_the_speed_gives_way_to_the_next_in_merit() -> None:
    goal = Goal.parse("speedup >= 4, drop <= 1%")
    original = original_trial(n=1000, quality=0.8)
    first, second = trial(1, 5.0), trial(2, 4.8, worse=1)
    verified = {t.recipe.key: t for t in (original, first, second)}
    order = Order.of(verified, original.recipe, goal)
    order.heard(first, certified(trial(1, 3.9), 0, 0))
    assert [t.recipe for t in order.waiting[:2]] == [original.recipe, second.recipe]


def test_a_certificate_that_crashed_lets_the_next_one_in() -> None:
    original = original_trial(n=1000, quality=0.8)
    first, second = trial(1, 6.0), trial(2, 5.9)
    order = Order.of({t.recipe.key: t for t in (original, first, second)}, original.recipe, FAITHFUL)
    crashed = order.waiting[0]
    order.heard(crashed, None)
    (other,) = {first.recipe, second.recipe} - {crashed.recipe}
    assert order.waiting[1].recipe == other


def test_the_original_alone_is_an_order_too() -> None:
    original = original_trial(n=1000, quality=0.8)
    order, seen = walk([original], FAITHFUL, {})
    assert seen == [str(original.recipe)]
    assert order.best is None
