"""Shaping and healing on a world whose answers are known: what is measured, what is taught, and for how long."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from test_search import BACKENDS, MACHINE, MODEL, TECHNIQUES, Clock, Paper, truth

from accelerando.errors import Reason
from accelerando.goal import Goal
from accelerando.recipe import Artifact, Recipe, Stage, Technique
from accelerando.search.budget import Budget
from accelerando.search.history import front_of, leader
from accelerando.search.proposal import ask
from accelerando.search.space import Space
from accelerando.testing.fakes import fake_evidence
from accelerando.trial import Refused, Trial, Verified
from accelerando.workload import Form

WANTED = Goal.parse("speedup >= 12, drop <= 1%")
FASTEST = Goal.parse("drop <= 1%")


@dataclass(frozen=True)
class Cut(Paper, Technique):
    share: float = 0.5
    takes, gives, stage = Form.TORCH, Form.TORCH, Stage.SHAPE
    knob, values = "share", ()


@dataclass(frozen=True)
class Shallow(Cut):
    """Drops layers: what it takes away is time saved, and heals well."""


@dataclass(frozen=True)
class Thin(Cut):
    """Cuts channels: saves less than it takes away, and heals badly."""


@dataclass(frozen=True)
class Crush(Cut):
    """What it takes away no lesson brings back."""


@dataclass(frozen=True)
class Teach(Paper, Technique):
    seconds: int = 60
    takes, gives, stage = Form.TORCH, Form.TORCH, Stage.HEAL
    typical_seconds: ClassVar[float] = 60.0
    knob, values = "seconds", ()


SHAPES = {"shallow": Shallow, "thin": Thin}
SPACE = Space.plan(MODEL, MACHINE, {**TECHNIQUES, **SHAPES, "teach": Teach}, BACKENDS)
SAVES = {"shallow": 0.9, "thin": 0.5, "crush": 0.9}  # speed's exponent
COSTS = {"shallow": 1.0, "thin": 2.0, "crush": 1.0}  # how hard a cut is to heal


def shaped(recipe: Recipe) -> tuple[float, float]:
    """(speedup, drop) of a recipe in this world; a lesson takes away what a cut lost, as fast as its seconds go by."""
    speed, drop = truth(Recipe(tuple(s for s in recipe.steps if s.stage > Stage.HEAL), recipe.backend))
    wound = lost = 0.0
    for step in front_of(recipe):
        if step.name == "crush":
            lost = 0.5
        if step.stage is Stage.SHAPE:
            depth = -math.log1p(-float(step.knobs["share"]))  # type: ignore[arg-type]
            speed *= math.exp(SAVES[step.name] * depth)
            wound += 0.3 * COSTS[step.name] * depth
        else:
            wound *= math.exp(-float(step.knobs["seconds"]) / 40)  # type: ignore[arg-type]
    return speed, drop + wound + lost


def search(goal: Goal, seconds: float = 1800, space: Space = SPACE) -> tuple[list[Trial], Clock]:
    clock, trials = Clock(), []
    budget, taught = Budget(seconds, clock, 0.0), set()
    while len(trials) < 200 and (proposal := ask(space, trials, goal, budget)):
        front = front_of(proposal.recipe)
        if front and front[-1].stage is Stage.HEAL and front not in taught:
            taught.add(front)
            clock.now += float(front[-1].knobs["seconds"])  # type: ignore[arg-type]
        speed, drop = shaped(proposal.recipe)
        evidence = fake_evidence(speedup=speed, drop=drop, noise=0.01, n=20_000, rounds=20, seed=len(trials))
        lost = evidence.relative_drop.low > 0.01
        outcome = Refused(Reason.BELOW_QUALITY, "", None, evidence, evidence.speedup) if lost else None
        trials.append(Trial(proposal.recipe, outcome or Verified(Artifact(()), evidence), 10.0))
        clock.now += 10
    return trials, clock


def cuts(trials: list[Trial]) -> list[Trial]:
    return [t for t in trials if front_of(t.recipe) and front_of(t.recipe)[-1].stage is Stage.SHAPE]


def lessons(trials: list[Trial]) -> list[Trial]:
    return [t for t in trials if front_of(t.recipe) and front_of(t.recipe)[-1].stage is Stage.HEAL]


def test_a_speed_that_no_tool_reaches_is_reached_by_a_healed_shape() -> None:
    trials, _ = search(WANTED)
    best = leader([t for t in trials if t.verified], WANTED)
    assert best is not None
    assert best.evidence is not None
    assert best.evidence.speedup.low >= 12
    assert best.evidence.relative_drop.high <= 0.01


def test_only_shapes_that_are_fast_enough_are_taught() -> None:
    trials, _ = search(WANTED)
    assert lessons(trials)
    assert all(shaped(t.recipe)[0] >= 11.5 for t in lessons(trials) if "int8" in str(t.recipe))


def test_a_shape_is_measured_before_it_is_taught() -> None:
    trials, _ = search(WANTED)
    measured: set[tuple[Technique, ...]] = set()
    for trial in trials:
        front = front_of(trial.recipe)
        shape = tuple(s for s in front if s.stage is Stage.SHAPE)
        if front and front[-1].stage is Stage.HEAL:
            assert shape in measured
        measured.add(shape)


def test_most_time_goes_to_the_shape_that_heals_best() -> None:
    trials, _ = search(Goal.parse("speedup >= 20, drop <= 1%"))
    seconds = {"shallow": 0.0, "thin": 0.0}
    for trial in lessons(trials):
        names = {s.name for s in front_of(trial.recipe)} & seconds.keys()
        if len(names) == 1:
            seconds[names.pop()] += float(front_of(trial.recipe)[-1].knobs["seconds"])  # type: ignore[arg-type]
    assert seconds["shallow"] > seconds["thin"]


@pytest.mark.slow
def test_what_one_lesson_did_not_help_gets_no_longer_one() -> None:
    space = Space.plan(MODEL, MACHINE, {**TECHNIQUES, "crush": Crush, "teach": Teach}, BACKENDS)
    trials, _ = search(WANTED, space=space)
    fronts = [front_of(t.recipe) for t in lessons(trials)]
    assert fronts
    assert all([s.stage for s in front].count(Stage.HEAL) == 1 for front in fronts)


def test_without_a_speed_to_reach_the_ladder_is_climbed_step_by_step() -> None:
    trials, _ = search(FASTEST, seconds=3600)
    kept = sorted(t.evidence.speedup.mid for t in trials if t.verified and t.evidence and t.recipe.steps)
    free = max(shaped(t.recipe)[0] for t in trials if not front_of(t.recipe))
    beyond = [free, *(s for s in kept if s > 1.05 * free)]
    assert len(beyond) >= 3
    assert all(after / before <= 1.7 for before, after in itertools.pairwise(beyond))


def test_a_later_level_is_cut_out_of_what_was_healed() -> None:
    trials, _ = search(FASTEST, seconds=3600)
    stages = [[s.stage for s in front_of(t.recipe)] for t in lessons(trials)]
    assert any((Stage.HEAL, Stage.SHAPE) in itertools.pairwise(order) for order in stages)


@pytest.mark.slow
def test_no_lesson_is_given_where_the_goal_is_met_without_one() -> None:
    trials, _ = search(Goal.parse("speedup >= 3, drop <= 1%"))
    assert not lessons(trials)


@pytest.mark.slow
def test_without_training_data_nothing_is_cut() -> None:
    space = replace(SPACE, healers=())
    trials, _ = search(FASTEST, space=space)
    assert not cuts(trials)


@pytest.mark.parametrize("seconds", [120.0, 400.0, 1800.0])
def test_the_budget_is_kept(seconds: float) -> None:
    _, clock = search(WANTED, seconds=seconds)
    assert clock.now <= seconds


def test_it_is_replayed_from_its_history() -> None:
    trials, _ = search(WANTED, seconds=1200)
    clock, taught = Clock(), set()
    for i, trial in enumerate(trials):
        proposal = ask(SPACE, trials[:i], WANTED, Budget(1200, clock, 0.0))
        assert proposal is not None
        assert proposal.recipe == trial.recipe
        front = front_of(trial.recipe)
        if front and front[-1].stage is Stage.HEAL and front not in taught:
            taught.add(front)
            clock.now += float(front[-1].knobs["seconds"])  # type: ignore[arg-type]
        clock.now += 10
