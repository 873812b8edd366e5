"""The ladder: rungs that can be told apart, whatever the order in which they were found."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accelerando.errors import Reason
from accelerando.goal import Goal
from accelerando.ladder import Ladder, Rung
from accelerando.testing.fakes import ORIGINAL, fake_recipe, fake_rung, fake_trial, original_trial
from accelerando.trial import Trial


@cache
def trial(level: int, speedup: float, drop: float, noise: float) -> Trial:
    return fake_trial(speedup, drop, noise, level=level, seed=level, rounds=10, calls=10)


SPEEDS = st.sampled_from([0.5, 0.97, 1.0, 1.3, 2.0, 2.03, 2.06, 2.5, 4.0, 4.1, 4.2, 8.0])
DROPS = st.sampled_from([-0.05, 0.0, 0.005, 0.01, 0.02, 0.1, 0.5])
NOISES = st.sampled_from([0.001, 0.01, 0.05, 0.5])


@st.composite
def histories(draw: st.DrawFn) -> list[Trial]:
    parts = draw(st.lists(st.tuples(SPEEDS, DROPS, NOISES), max_size=9))
    return [original_trial(), *(trial(i + 1, *p) for i, p in enumerate(parts))]


def keys(ladder: Ladder) -> list[str]:
    return [r.recipe.key for r in ladder]


quick = settings(max_examples=100, deadline=None)


@quick
@given(histories())
def test_rungs_are_trials_and_each_is_clearly_faster(history: list[Trial]) -> None:
    ladder = Ladder.climb(history, ORIGINAL)
    assert ladder.original.recipe == ORIGINAL
    evidence = {t.recipe.key: t.evidence for t in history}
    assert all(evidence[r.recipe.key] is r.evidence for r in ladder)
    for slow, fast in pairwise(ladder.rungs):
        assert fast.evidence.clearly_faster_than(slow.evidence)
    for slow, fast in pairwise(ladder.rungs[1:]):
        assert slow.evidence.drop.mid < fast.evidence.drop.mid


@quick
@given(histories())
def test_climbing_a_ladder_changes_nothing(history: list[Trial]) -> None:
    ladder = Ladder.climb(history, ORIGINAL)
    assert keys(Ladder.of(ladder.rungs)) == keys(Ladder.of(reversed(ladder.rungs), ORIGINAL)) == keys(ladder)


@quick
@given(histories(), st.randoms(use_true_random=False))
def test_the_order_of_trials_does_not_matter(history: list[Trial], random: object) -> None:
    shuffled = list(history)
    random.shuffle(shuffled)
    assert keys(Ladder.climb(shuffled, ORIGINAL)) == keys(Ladder.climb(history, ORIGINAL))


@quick
@given(histories(), st.integers(0, 9), st.floats(0.3, 0.95), st.sampled_from([0.0, 0.005, 0.1]), NOISES)
def test_a_dominated_trial_changes_nothing(
    history: list[Trial], which: int, slower: float, worse: float, noise: float
) -> None:
    ladder = Ladder.climb(history, ORIGINAL)
    better = ladder[which % len(ladder)].evidence
    loser = trial(99, better.speedup.mid * slower, better.drop.mid + worse, noise)
    assert loser.evidence is not None
    if loser.evidence.speedup.high < better.speedup.low and loser.evidence.drop.mid >= better.drop.mid:
        assert keys(Ladder.climb([*history, loser], ORIGINAL)) == keys(ladder)


@quick
@given(histories())
def test_the_fastest_is_kept_up_to_noise(history: list[Trial]) -> None:
    ladder = Ladder.climb(history, ORIGINAL)
    found = [t.evidence for t in history if t.evidence]
    sure = max(e.speedup.low for e in found if e is ladder.original.evidence or e.clearly_faster_than(found[0]))
    assert ladder.fastest.evidence.speedup.high >= sure


@quick
@given(histories(), st.integers(0, 9))
def test_what_must_be_kept_is_kept(history: list[Trial], which: int) -> None:
    wanted = history[which % len(history)]
    ladder = Ladder.climb(history, ORIGINAL, keep=wanted.recipe)
    base = history[0].evidence
    assert wanted.evidence is not None
    assert base is not None
    faster = wanted.evidence.clearly_faster_than(base)
    assert (ladder.index(wanted.recipe) is not None) == (faster or wanted.recipe == ORIGINAL)
    for slow, fast in pairwise(ladder.rungs):
        assert fast.evidence.clearly_faster_than(slow.evidence)


def levels(ladder: Ladder) -> list[int]:
    return [r.recipe.backend.knobs["level"] for r in ladder]


def climb(*trials: Trial) -> list[int]:
    return levels(Ladder.climb([original_trial(), *trials], ORIGINAL))


def test_neighbours_that_differ_by_noise_are_not_two_rungs() -> None:
    # a plain Pareto front would keep all four: each a little slower and a little better
    near = [fake_trial(4.0 - 0.02 * i, 0.02 - 0.005 * i, 0.03, level=i, seed=i) for i in range(1, 5)]
    assert len(climb(*near)) == 2


def test_a_slower_rung_stays_only_for_better_quality() -> None:
    fast, slow_same = fake_trial(8, 0.005, level=1), fake_trial(4, 0.005, level=2)
    slow_better, slow_worse = fake_trial(4, -0.03, level=3), fake_trial(4, 0.1, level=4)
    assert climb(fast, slow_same) == [0, 1]
    assert climb(fast, slow_worse) == [0, 1]
    assert climb(fast, slow_better) == [0, 3, 1]


def test_quality_decides_between_rungs_of_one_speed() -> None:
    assert climb(fake_trial(4.0, 0.1, level=1), fake_trial(3.99, 0.0, level=2, seed=1)) == [0, 2]


def test_a_position_does_not_drift_down_by_small_steps() -> None:
    steps = [fake_trial(4 * 0.99**i, 0.2 - 0.02 * i, 0.01, level=i + 1, seed=i) for i in range(10)]
    top = Ladder.climb([original_trial(), *steps], ORIGINAL).fastest
    assert top.evidence.speedup.mid > 3.9


def test_a_rung_that_was_measured_badly_does_not_drive_out_a_good_one() -> None:
    good = fake_trial(4, 0.02, 0.01, level=1)
    vague = fake_trial(5, 0.0, 1.0, level=2, rounds=8)
    assert vague.evidence is not None
    assert vague.evidence.speedup.low < 4 < vague.evidence.speedup.high
    assert climb(good, vague) == [0, 1]


def test_what_is_slower_than_the_original_or_refused_is_no_rung() -> None:
    slow, same, refused = (
        fake_trial(0.5, level=1),
        fake_trial(1.0, level=2),
        fake_trial(level=3, refused=Reason.CRASHED),
    )
    assert climb(slow, same, refused) == [0]


def test_the_best_measured_of_one_recipe_counts() -> None:
    screened = fake_trial(9, 0.0, level=1, rounds=7)
    proper = fake_trial(3, 0.0, level=1, rounds=40)
    for history in ([screened, proper], [proper, screened]):
        ladder = Ladder.climb([original_trial(), *history], ORIGINAL)
        assert ladder.fastest.evidence is proper.evidence
    selected, certified = fake_rung(9, level=1, rounds=50), fake_rung(3, level=1, certified=True)
    ladder = Ladder.of([fake_rung(1, level=0), selected, certified])
    assert ladder.fastest is certified


def test_the_original_must_be_there() -> None:
    with pytest.raises(ValueError, match="begins with the original, but fake_backend is not among 1"):
        Ladder.climb([fake_trial(level=1)], ORIGINAL)
    with pytest.raises(ValueError, match="measure the original first"):
        Ladder.of([])


def test_best_and_index() -> None:
    ladder = Ladder.climb([original_trial(), fake_trial(8, 0.1, level=1), fake_trial(4, 0.0, level=2)], ORIGINAL)
    assert levels(ladder) == [0, 2, 1]
    assert ladder.best(Goal.parse("speedup >= 3, drop <= 5%").merit) == 1
    assert ladder.best(Goal.parse("speedup >= 6").merit) == 2
    assert ladder.best(Goal.parse("drop <= 50%").merit) == 2
    assert ladder.index(fake_recipe(1)) == 2
    assert ladder.index(fake_recipe(7)) is None
    assert len(ladder) == 3


def test_sabotage_a_plain_pareto_front_is_caught() -> None:
    """The property that neighbours are clearly apart has teeth: the textbook front breaks it."""
    trials = [original_trial(), *(trial(i, 4.0 - 0.02 * i, 0.1 - 0.01 * i, 0.05) for i in range(1, 6))]
    rungs = [Rung(t.recipe, t.verified.artifact, t.verified.evidence) for t in trials if t.verified]

    def dominated(r: Rung) -> bool:
        mine = r.evidence
        return any(
            o.evidence.speedup.mid > mine.speedup.mid and o.evidence.drop.mid <= mine.drop.mid
            for o in rungs
            if o is not r
        )

    front = sorted((r for r in rungs if not dominated(r)), key=lambda r: r.evidence.speedup.mid)
    apart = [b.evidence.clearly_faster_than(a.evidence) for a, b in pairwise(front)]
    assert not all(apart)
    assert len(Ladder.of(rungs)) < len(front)


def test_of_several_statistics_per_sample() -> None:
    """Rungs whose metric is set-level are compared by the same law."""
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 2, size=(50, 6)).astype(np.float64)
    base = fake_rung(1, level=0)
    rungs = [
        replace(r, evidence=replace(r.evidence, metric="f1", scores=scores, original_scores=scores))
        for r in (base, fake_rung(4, level=1), fake_rung(2, level=2))
    ]
    assert levels(Ladder.of(rungs)) == [0, 1]
