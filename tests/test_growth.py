"""Growing on a world whose answers are known: when a larger model is tried, how large, and when not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_healing import Case, Deep, site
from test_healing import taught as fitted
from test_search import BACKENDS, MACHINE, MODEL, TECHNIQUES, Clock, Paper, truth
from test_shapes import FASTEST, Cut, Teach

from accelerando.adoption import adopt
from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.demo import digits
from accelerando.errors import Reason
from accelerando.goal import Goal, Outcome
from accelerando.machine import Machine
from accelerando.plugins import discover
from accelerando.recipe import Artifact, Recipe, Stage, Technique
from accelerando.search.budget import Budget
from accelerando.search.grounds import attempt
from accelerando.search.growth import Way, next_growth
from accelerando.search.history import History, Proposal, front_of, leader
from accelerando.search.proposal import ask
from accelerando.search.site import Site
from accelerando.search.space import Space, original_recipe
from accelerando.techniques.distil import Distil
from accelerando.techniques.export_onnx import ExportOnnx
from accelerando.techniques.grow import Grow
from accelerando.testing.fakes import fake_evidence
from accelerando.trial import Refused, Trial, Verified
from accelerando.workload import Form

ASKED = Goal.parse("speedup >= 2, drop <= 1%")  # where six times is to be had without training


@dataclass(frozen=True)
class Bigger(Paper, Technique):
    width: float = 1.0
    depth: float = 1.5
    takes, gives, stage = Form.TORCH, Form.TORCH, Stage.SHAPE
    knob, values = "depth", ()


@dataclass(frozen=True)
class DropLayers(Cut):
    """The cut that goes with what is wider."""


PARTS = {**TECHNIQUES, "bigger": Bigger, "drop_layers": DropLayers, "teach": Teach}
SPACE = Space.plan(MODEL, MACHINE, PARTS, BACKENDS)
World = Callable[[Recipe], tuple[float, float]]


def world(recipe: Recipe, slope: float = 0.8, talent: float = 0.02) -> tuple[float, float]:
    """(speedup, drop) of a recipe; a larger model is slower, and learns what the original did not know."""
    speed, drop = truth(Recipe(tuple(s for s in recipe.steps if s.stage > Stage.HEAL), recipe.backend))
    size, lost, seconds = 1.0, 0.0, 0.0
    for step in front_of(recipe):
        knobs: dict[str, Any] = dict(step.knobs)
        if step.name == "bigger":
            size *= knobs["width"] * knobs["depth"]
        elif step.name == "drop_layers":
            size *= 1 - knobs["share"]
            lost += 0.2 * knobs["share"]
        else:
            seconds += knobs["seconds"]
    learned = 1 - math.exp(-seconds / 40)
    return speed * size**-slope, drop + lost * (1 - learned) - talent * math.log(size) * learned


def search(
    goal: Goal = ASKED, seconds: float = 1200, space: Space = SPACE, truly: World = world, **evidence: float
) -> tuple[list[Trial], Clock]:
    clock, trials, taught = Clock(), [], set()
    budget = Budget(seconds, clock, 0.0)
    while len(trials) < 200 and (proposal := ask(space, trials, goal, budget)):
        front = front_of(proposal.recipe)
        if front and front[-1].stage is Stage.HEAL and front not in taught:
            taught.add(front)
            clock.now += float(front[-1].knobs["seconds"])  # type: ignore[arg-type]
        trials.append(outcome(proposal.recipe, truly, len(trials), **evidence))
        clock.now += 10
    return trials, clock


@cache
def usual() -> list[Trial]:
    return search()[0]


def outcome(recipe: Recipe, truly: World, seed: int, **other: Any) -> Trial:
    try:
        speed, drop = truly(recipe)
    except ValueError as refused:
        return Trial(recipe, Refused(Reason.UNSUPPORTED, str(refused), 0), 1.0)
    found = fake_evidence(speedup=speed, drop=drop, noise=0.01, n=20_000, rounds=20, seed=seed, **other)
    if found.relative_drop.low > 0.01:
        return Trial(recipe, Refused(Reason.BELOW_QUALITY, "", None, found, found.speedup), 10.0)
    return Trial(recipe, Verified(Artifact(()), found), 10.0)


def grown(trials: list[Trial]) -> list[Trial]:
    return [t for t in trials if any(s.name == "bigger" for s in t.recipe.steps)]


def shape_of(recipe: Recipe) -> tuple[Technique, ...]:
    return tuple(s for s in recipe.steps if s.stage is Stage.SHAPE)


def taught(trials: list[Trial]) -> list[Trial]:
    return [t for t in grown(trials) if front_of(t.recipe)[-1].stage is Stage.HEAL]


def fits(trial: Trial, goal: Goal = ASKED) -> bool:
    assert trial.evidence
    return all(c.outcome is Outcome.MET for c in goal.judge(trial.evidence).checks if c.bound in goal.speed_bounds)


# --- where there is speed to spare ---------------------------------------------------------------------------------


def test_speed_to_spare_becomes_quality() -> None:
    trials = usual()
    best = leader([t for t in trials if t.verified], ASKED)
    assert best is not None
    assert best in taught(trials)
    assert best.evidence
    assert best.evidence.drop.high < 0  # better than the original, for certain
    assert ASKED.judge(best.evidence).outcome is Outcome.MET


@pytest.mark.parametrize("slope", [0.3, 0.8, 1.6])
def test_only_what_was_measured_and_is_fast_enough_is_taught(slope: float) -> None:
    trials, _ = search(truly=lambda recipe: world(recipe, slope))
    measured: set[tuple[Technique, ...]] = set()
    for trial in grown(trials):
        if trial in taught(trials):
            assert shape_of(trial.recipe) in measured
        elif fits(trial):
            measured.add(shape_of(trial.recipe))
    assert taught(trials)


@pytest.mark.parametrize("slope", [0.5, 0.8, 1.6])
def test_it_grows_until_little_is_to_spare(slope: float) -> None:
    trials, _ = search(truly=lambda recipe: world(recipe, slope))
    speeds = [world(t.recipe, slope)[0] for t in taught(trials)]
    assert min(speeds) <= (2 * 1.1 * 1.3 if slope > 0.5 else 6.1 / 4**slope)  # or until it is four times as large


@pytest.mark.slow
def test_lessons_end_when_one_more_brings_nothing() -> None:
    trials, clock = search(seconds=7200)
    assert clock.now < 0.6 * 7200
    assert len({front_of(t.recipe) for t in taught(trials)}) >= 2


def test_larger_is_tried_after_all_that_needs_no_training() -> None:
    trials = usual()
    first = next(i for i, t in enumerate(trials) if t in grown(trials))
    assert {p.name for t in trials[:first] for p in (*t.recipe.steps, t.recipe.backend)} >= {"int8", "quick", "slow"}


def test_wider_and_shallower_is_among_them_where_there_is_time() -> None:
    assert any({s.name for s in shape_of(t.recipe)} == {"bigger", "drop_layers"} for t in usual())
    assert not any("drop_layers" in str(t.recipe) for t in search(seconds=300)[0])


def test_a_quality_that_the_original_lacks_may_be_asked_for() -> None:
    goal = Goal.parse("speedup >= 2, quality >= 0.91")
    best = leader([t for t in search(goal)[0] if t.verified], goal)
    assert best is not None
    assert best.evidence
    assert goal.judge(best.evidence).outcome is Outcome.MET


# --- where not -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["drop <= 1%", "speedup >= 2, drop <= 1%, prefer speed", "speedup >= 5, drop <= 1%"])
def test_never_where_speed_is_wanted_or_there_is_none_to_spare(text: str) -> None:
    assert not grown(search(Goal.parse(text))[0])


def test_never_without_training_data() -> None:
    assert not grown(search(space=replace(SPACE, healers=()))[0])


def test_never_where_it_was_turned_away_when_planning_as_without_labels() -> None:
    space = replace(SPACE, shapes=tuple(s for s in SPACE.shapes if s.name != "bigger"))
    assert not grown(search(space=space)[0])


def test_never_where_nothing_is_to_be_gained() -> None:
    assert not grown(search(quality=1.0)[0])


def test_never_where_the_original_is_too_large_already() -> None:
    trials, _ = search(Goal.parse("speedup >= 2, size <= 500KB"))  # a fake takes 1 MB
    assert not grown(trials)


def test_what_cannot_grow_is_asked_once_for_each_way() -> None:
    def stiff(recipe: Recipe) -> tuple[float, float]:
        if any(s.knobs.get("width", 1.0) != 1.0 for s in recipe.steps):
            raise ValueError("attention ties its units")
        return world(recipe)

    trials, _ = search(truly=stiff)
    refused = [t for t in grown(trials) if isinstance(t.outcome, Refused) and t.outcome.reason is Reason.UNSUPPORTED]
    assert 1 <= len(refused) <= 2  # wider, and wider but shallower
    assert taught(trials)  # deeper


@pytest.mark.parametrize("seconds", [60.0, 200.0, 900.0])
def test_the_budget_is_kept(seconds: float) -> None:
    _, clock = search(seconds=seconds)
    assert clock.now <= seconds


def test_what_was_grown_is_no_cut_for_another_goal() -> None:
    trials = usual()
    proposal = ask(SPACE, trials, FASTEST, Budget(3600, Clock(1500), 0.0))
    assert proposal is not None
    assert proposal.recipe not in [t.recipe for t in grown(trials)]


@given(st.floats(1.1, 4), st.sampled_from(["width", "depth"]), st.booleans())
def test_a_way_knows_what_it_made(times: float, knob: str, shallower: bool) -> None:
    way = Way(Bigger(), knob, (DropLayers(0.3),) if shallower else ())
    front = way.front(times)
    assert way.times(front) == pytest.approx(times, abs=0.006)
    others = [Way(Bigger(), k, c) for k in ("width", "depth") for c in ((), (DropLayers(0.3),))]
    assert [other.times(front) is not None for other in others].count(True) == 1
    assert way.times((*front, Teach())) is None
    assert way.times(()) is None


# --- from end to end -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case() -> Case:
    """Digits, and a network that was not taught to the end."""
    (x, y), (x_test, y_test) = digits()
    x, x_test = x.reshape(-1, 64), x_test.reshape(-1, 64)
    return Case(fitted(x, y, 0, Deep(32, 2), steps=60), (x, y), (x_test, y_test))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_grown_learns_on_from_what_the_original_knows(case: Case, tmp_path: Path) -> None:
    recipe = Recipe((Grow(width=2.0, depth=1.0), Distil(seconds=20), ExportOnnx()), Onnxruntime())
    with site(case, tmp_path / "bundle") as where:
        built = where.grounds.workshop.build(recipe, tmp_path / "rung", 200.0)
        watched = where.workload.select
    assert built.log[0].startswith("grow: wider: 2 hidden widths times 2, now 64 to 64")
    curve = next(line for line in built.log if line.startswith("distil: curve")).split()[2:]
    values = [float(point.split(":")[1]) for point in curve]
    with torch.no_grad():
        answers = case.model(torch.from_numpy(np.concatenate([c.inputs[0] for c in watched.chunks]))).argmax(1)
    known = float(np.mean(answers.numpy() == watched.targets))
    assert values[0] == pytest.approx(known, abs=0.05)  # the same function to begin with, seen on some of the rows
    assert max(values) > values[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_larger_model_is_taught_that_was_not_measured_and_fast_enough(case: Case, tmp_path: Path) -> None:
    """Whether there is speed to spare is a matter of the machine; what is done with it is not."""
    load, budget = adopt(case.model, case.test, train=case.train, metric="accuracy"), Budget(120)
    goal, machine = Goal.parse("speedup >= 1.5, drop <= 10%"), Machine.look()
    space = Space.plan(load.teachable, machine, discover("techniques"), discover("backends"))
    assert "grow" in [s.name for s in space.shapes]
    with Site(tmp_path / "bundle", load, machine, goal, budget, space.original) as where:
        trials: tuple[Trial, ...] = ()
        proposal: Proposal | None = Proposal(space.original, "")
        while proposal is not None:
            trials += (attempt(proposal, where.grounds, trials, budget.left),)
            plain = Proposal(Recipe((ExportOnnx(),), Onnxruntime(threads=1)), "")
            proposal = plain if len(trials) == 1 else next_growth(space, History(trials), goal, budget)
    assert trials[1].verified
    larger = [t for t in trials if front_of(t.recipe)]
    for i, trial in enumerate(larger):
        if front_of(trial.recipe)[-1].stage is Stage.HEAL:
            assert any(front_of(t.recipe) == shape_of(trial.recipe) and fits(t, goal) for t in larger[:i])
        elif trial.verified and shape_of(trial.recipe)[1:] == ():
            assert abs(trial.verified.evidence.drop.mid) < 0.01  # the same function


@pytest.mark.slow
@pytest.mark.parametrize(("text", "spared"), [("speedup >= 1.01, drop <= 50%", True), ("drop <= 50%", False)])
def test_a_larger_model_is_slower_on_purpose_where_quality_is_wanted(
    case: Case, tmp_path: Path, text: str, spared: bool
) -> None:
    load, goal = adopt(case.model, case.test, train=case.train, metric="accuracy"), Goal.parse(text)
    original = original_recipe(load.model, discover("backends"))
    quick = Recipe((ExportOnnx(),), Onnxruntime(threads=1))
    evidence = fake_evidence(1e6, n=len(load.select), original_seconds=1e-3)  # no larger model is as fast as that
    with Site(tmp_path / "bundle", load, Machine.look(), goal, Budget(120), original) as where:
        first = attempt(Proposal(original, ""), where.grounds, (), 100.0)
        trials = (first, Trial(quick, Verified(Artifact(()), evidence), 1.0))
        larger = Recipe((Grow(width=2.0, depth=1.0), ExportOnnx()), Onnxruntime())
        trial = attempt(Proposal(larger, ""), where.grounds, trials, 100.0)
    assert ("loses nothing" in getattr(trial.outcome, "detail", "")) is not spared
