"""The search on a world whose answers are known: what it finds, how soon, and that it is no grid."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accelerando.errors import Reason, RefusalError, UsageError
from accelerando.goal import Goal
from accelerando.machine import Machine
from accelerando.recipe import Artifact, Backend, Recipe, Runner, Stage, Technique
from accelerando.search.belief import SPEED, Belief, expected_gain
from accelerando.search.budget import Budget
from accelerando.search.proposal import ask, leader
from accelerando.search.space import Space
from accelerando.signature import Port, Signature
from accelerando.testing.fakes import fake_evidence
from accelerando.trial import Refused, Trial, Verified
from accelerando.workload import Form, Model, Samples

SIGNATURE = Signature(
    (Port("x", "float32", ("batch", 4)),),
    (Port("y", "float32", ("batch", 2)),),
    ("x",),
    1,
    {"x": {"leaf": 0}},
    {"leaf": 0},
)
MODEL = Model(Form.TORCH, None, SIGNATURE)
MACHINE = Machine.look()


class Paper:
    """What plugins on paper share: they are planned with, and never run."""

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Any]:
        return [cls(), *(cls(**{cls.knob: v}) for v in cls.values)]

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        raise AssertionError("on paper only")

    def compile(self, model: Model, folder: Path) -> Artifact:
        raise AssertionError("on paper only")

    def load(self, artifact: Artifact, folder: Path, signature: Signature, skeleton: Any = None) -> Runner:
        raise AssertionError("on paper only")


@dataclass(frozen=True)
class Eager(Paper, Backend):
    threads: int = 0
    takes: ClassVar[frozenset[Form]] = frozenset({Form.TORCH})
    portable: ClassVar[bool] = False
    knob, values = "threads", (1, 2)


@dataclass(frozen=True)
class Quick(Paper, Backend):
    threads: int = 0
    layout: str = "plain"
    takes: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    knob, values = "threads", (1, 2, 4)

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Any]:
        return [cls(t, lay) for lay in ("plain", "blocked") for t in (0, 1, 2, 4)]


@dataclass(frozen=True)
class Slow(Paper, Backend):
    threads: int = 0
    takes: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    knob, values = "threads", (1, 2, 4)


@dataclass(frozen=True)
class Export(Paper, Technique):
    takes, gives, stage, exact = Form.TORCH, Form.ONNX, Stage.LOWER, True
    knob, values = "", ()


@dataclass(frozen=True)
class Int8(Paper, Technique):
    method: str = "minmax"
    takes, gives, stage = Form.ONNX, Form.ONNX, Stage.QUANTIZE
    knob, values = "method", ("entropy", "percentile", "mixed")


TECHNIQUES = {"export": Export, "int8": Int8}
BACKENDS = {"eager": Eager, "quick": Quick, "slow": Slow}
SPACE = Space.plan(MODEL, MACHINE, TECHNIQUES, BACKENDS)


def truth(recipe: Recipe, int8_gain: float = 1.6, int8_drop: float = 0.002) -> tuple[float, float]:
    """(speedup, drop) of a recipe in this world."""
    speed, drop = {"eager": 1.0, "quick": 3.0, "slow": 1.5}[recipe.backend.name], 0.0
    knobs = recipe.backend.knobs
    speed *= {0: 1.0, 1: 1.15, 2: 1.0, 4: 0.7}[int(knobs["threads"])]
    speed *= 1.1 if knobs.get("layout") == "blocked" else 1.0
    for step in recipe.steps:
        if step.name == "int8":
            speed *= int8_gain
            drop += (
                int8_drop * {"minmax": 1.0, "entropy": 0.7, "percentile": 0.8, "mixed": 0.3}[str(step.knobs["method"])]
            )
    return speed, drop


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def search(goal: Goal, seconds: float = 600, most: int = 100, **world: float) -> tuple[list[Trial], Clock]:
    """Run the search in the world: each trial takes ten seconds."""
    clock = Clock()
    budget = Budget(seconds, clock, 0.0)
    trials: list[Trial] = []
    while len(trials) < most and (proposal := ask(SPACE, trials, goal, budget)):
        trials.append(outcome(proposal.recipe, len(trials), **world))
        clock.now += 10
    return trials, clock


def outcome(recipe: Recipe, seed: int, **world: float) -> Trial:
    speed, drop = truth(recipe, **world)
    evidence = fake_evidence(speedup=speed, drop=drop, noise=0.01, n=2000, rounds=20, seed=seed)
    return Trial(recipe, Verified(Artifact(()), evidence), 10.0)


def best_speed(trials: list[Trial]) -> float:
    return max(truth(t.recipe)[0] for t in trials)


GOAL = Goal.parse("drop <= 1%")
EVERY = [r.recipe([*combo]) for r in SPACE.routes for combo in __import__("itertools").product(*r.choices)]


def test_the_original_is_tried_first() -> None:
    assert search(GOAL, most=1)[0][0].recipe == SPACE.original


def test_it_finds_the_fastest_and_is_no_grid() -> None:
    trials, _ = search(GOAL)
    tried = {t.recipe.key for t in trials}
    fastest = max(truth(r)[0] for r in EVERY)
    assert best_speed(trials) >= 0.97 * fastest
    assert len(tried) <= 0.6 * len(EVERY)


def test_a_good_recipe_is_among_the_first_few() -> None:
    assert best_speed(search(GOAL, most=5)[0]) >= 3.0


def test_what_one_trial_teaches_is_used_for_the_next() -> None:
    """Where int8 is slower than float, most of its settings are never tried."""
    trials, _ = search(GOAL, int8_gain=0.6)
    tried = [t for t in trials if any(s.name == "int8" for s in t.recipe.steps)]
    assert 1 <= len(tried) <= 6


def test_a_speed_that_a_lossless_recipe_reaches_is_taken_before_a_faster_one_that_loses() -> None:
    goal = Goal.parse("speedup >= 2.5, drop <= 1%")
    trials, _ = search(goal, int8_drop=0.008)
    best = leader([t for t in trials if t.recipe != SPACE.original], goal)
    assert best is not None
    assert not any(s.name == "int8" for s in best.recipe.steps)


def test_where_only_speed_is_wanted_the_fastest_that_holds_wins() -> None:
    trials, _ = search(GOAL)
    best = leader(trials, GOAL)
    assert best is not None
    assert any(s.name == "int8" for s in best.recipe.steps)


def test_a_step_that_failed_is_not_tried_again_in_other_company() -> None:
    clock, trials = Clock(), []
    budget = Budget(600, clock, 0.0)
    while (proposal := ask(SPACE, trials, GOAL, budget)) and len(trials) < 60:
        recipe = proposal.recipe
        if recipe.steps:
            trials.append(Trial(recipe, Refused(Reason.EXPORT_FAILED, "no", step=0), 10.0))
        else:
            trials.append(outcome(recipe, len(trials)))
        clock.now += 10
    assert sum(t.verified is None for t in trials) == 1


def test_it_ends_when_nothing_is_worth_its_time_and_keeps_within_its_budget() -> None:
    assert search(GOAL, seconds=10_000)[1].now < 2_000
    short, clock = search(GOAL, seconds=100)
    assert clock.now <= 80
    assert short


def test_it_is_replayed_from_its_history() -> None:
    trials, _ = search(GOAL, most=12)
    clock = Clock()
    for i, trial in enumerate(trials):
        clock.now = 10.0 * i
        proposal = ask(SPACE, trials[:i], GOAL, Budget(600, clock, 0.0))
        assert proposal is not None
        assert proposal.recipe == trial.recipe


def test_at_the_end_it_measures_again_what_cannot_be_told_apart() -> None:
    clock = Clock(350.0)
    twins = [r for r in EVERY if r.backend.name == "quick" and not any(s.name == "int8" for s in r.steps)][:2]
    trials = [outcome(SPACE.original, 0)]
    trials += [
        Trial(r, Verified(Artifact(()), fake_evidence(speedup=3.0, noise=0.05, n=2000, rounds=12, seed=i)), 10)
        for i, r in enumerate(twins)
    ]
    proposal = ask(SPACE, trials, GOAL, Budget(500, clock, 0.0))
    assert proposal is not None
    assert proposal.again
    assert {proposal.recipe, *proposal.rivals} == set(twins)


def test_what_was_in_one_contest_does_not_race_again() -> None:
    clock = Clock(350.0)
    twins = [r for r in EVERY if r.backend.name == "quick" and not r.steps[1:]][:2]
    evidence = [fake_evidence(speedup=3.0, noise=0.05, n=2000, rounds=12, seed=i) for i in range(2)]
    same = replace(evidence[1], rounds=np.stack([evidence[1].rounds[:, 0], evidence[0].rounds[:, 1]], axis=1))
    trials = [outcome(SPACE.original, 0)]
    trials += [Trial(r, Verified(Artifact(()), e), 10) for r, e in zip(twins, (evidence[0], same), strict=True)]
    assert ask(SPACE, trials, GOAL, Budget(500, clock, 0.0)) is None


def test_planning_derives_the_routes_from_forms_and_stages() -> None:
    assert {r.names for r in SPACE.routes} == {
        ("eager",), ("export", "quick"), ("export", "slow"), ("export", "int8", "quick"), ("export", "int8", "slow"),
    }  # fmt: skip


def test_what_planning_turns_away_is_a_trial_with_its_reason() -> None:
    @dataclass(frozen=True)
    class Absent(Slow):
        needs: ClassVar[tuple[str, ...]] = ("no_such_package",)

    space = Space.plan(MODEL, MACHINE, TECHNIQUES, {**BACKENDS, "absent": Absent})
    away = list(space.trials_turned_away([]))
    assert [(t.outcome.reason, t.outcome.detail) for t in away if isinstance(t.outcome, Refused)] == [
        (Reason.MISSING_PACKAGE, "absent needs no_such_package")
    ]
    assert list(space.trials_turned_away(away)) == []


def test_a_refusal_in_planning_is_no_route() -> None:
    @dataclass(frozen=True)
    class Picky(Slow):
        def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
            return RefusalError(Reason.NOT_NATIVE, "not here")

    space = Space.plan(MODEL, MACHINE, TECHNIQUES, {**BACKENDS, "picky": Picky})
    assert not any("picky" in r.names for r in space.routes)


def test_a_belief_moves_what_shares_a_part_and_hardly_what_does_not() -> None:
    def quick(threads: int) -> Recipe:
        return Recipe((Export(),), Quick(threads))

    seen = Belief.learn([(quick(0), math.log(3), 0.01)], SPEED)
    before = Belief.learn([], SPEED)
    assert seen.about(quick(1))[0] == pytest.approx(math.log(3), abs=0.1)
    assert seen.about(quick(1))[1] < before.about(quick(1))[1]
    other = Recipe((Export(),), Slow())
    moved = [abs(seen.about(r)[0] - before.about(r)[0]) for r in (quick(1), other)]
    assert moved[1] < moved[0]
    assert seen.about(other)[1] > seen.about(quick(1))[1]
    own = Recipe((), Eager(1))
    assert seen.about(own) == before.about(own)


@given(st.floats(-2, 2), st.floats(0.01, 2), st.floats(-2, 2))
@settings(max_examples=200)
def test_the_expected_gain_is_positive_and_at_least_the_gain_of_the_mean(
    mean: float, deviation: float, best: float
) -> None:
    assert expected_gain(mean, deviation, best) >= max(0.0, mean - best) - 1e-9


@given(st.floats(5, 1e6), st.sampled_from(["s", "min", "h"]))
def test_a_budget_reads_what_it_means(value: float, unit: str) -> None:
    scale = {"s": 1, "min": 60, "h": 3600}[unit]
    assert Budget.parse(f"{value:.3f}{unit}").seconds == pytest.approx(float(f"{value:.3f}") * scale)


@pytest.mark.parametrize("text", ["", "soon", "5 parsecs", "-3min", "1s", "6min later"])
def test_a_budget_that_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="budget"):
        Budget.parse(text)
