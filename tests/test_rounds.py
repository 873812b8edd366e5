"""The judge of speed, on arms whose true speed is known: a machine that drifts, bursts and stalls."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

import numpy as np
import pytest

from accelerando.interval import Interval
from accelerando.measure import rounds as duel_module
from accelerando.measure.clock import MIX_REPEATS, mix_seconds, time_mix
from accelerando.measure.rounds import CERTIFY, SELECT, Effort, Rounds, duel
from accelerando.trial import LUCK


@dataclass
class World:
    """A shared machine: its slowness wanders, and now and then somebody else takes it."""

    rng: np.random.Generator
    slowness: float = 1.0
    blocks: int = 0

    def step(self) -> float:
        self.blocks += 1
        self.slowness *= float(np.exp(self.rng.normal(0, 0.02)))
        return self.slowness * (3.0 if self.rng.random() < 0.03 else 1.0)


@dataclass
class FakeArm:
    """An arm that takes `seconds` a call on a quiet machine."""

    world: World
    seconds: float
    pid: int = field(default_factory=os.getpid)

    def block(self, seconds: float, timeout: float, core: int = 0) -> np.ndarray:
        slow = self.world.step()
        return self.seconds * slow * np.exp(self.world.rng.normal(0, 0.05, size=20))

    def typical(self, block: np.ndarray) -> float:
        return float(np.median(block))


def fight(ratio: float, seed: int, effort: Effort = SELECT, swap: bool = False, **options: object) -> Rounds:
    world = World(np.random.default_rng(seed))
    candidate, original = FakeArm(world, 1e-3 / ratio), FakeArm(world, 1e-3)
    arms = (original, candidate) if swap else (candidate, original)
    return duel(*arms, effort, cores=2, seed=seed, **options)


def share(seeds: range, ratio: float, holds, effort: Effort = SELECT) -> float:
    return float(np.mean([holds(fight(ratio, seed, effort).speedup) for seed in seeds]))


def test_an_equal_candidate_is_called_faster_in_at_most_one_duel_of_twenty() -> None:
    assert share(range(200), 1.0, lambda s: s.low > 1) <= 0.05


@pytest.mark.slow
def test_a_planted_slowdown_of_five_percent_is_seen() -> None:
    assert share(range(200), 0.95, lambda s: s.high < 1, CERTIFY) >= 0.95
    assert share(range(200), 0.95, lambda s: s.high < 1) >= 0.85  # with the rounds that the search gives


def test_the_interval_covers_the_truth() -> None:
    assert share(range(200), 2.0, lambda s: s.low <= 2.0 <= s.high) >= 0.93


def test_the_order_of_the_arms_does_not_matter() -> None:
    straight = np.median([fight(1.3, s).speedup.mid for s in range(60)])
    swapped = np.median([1 / fight(1.3, s, swap=True).speedup.mid for s in range(60)])
    assert straight == pytest.approx(swapped, rel=0.01)


def test_each_arm_goes_first_about_as_often() -> None:
    order: list[str] = []

    class Noting(FakeArm):
        name = ""

        def block(self, seconds: float, timeout: float, core: int = 0) -> np.ndarray:
            order.append(self.name)
            return super().block(seconds, timeout)

    world = World(np.random.default_rng(0))
    a, b = Noting(world, 1e-3), Noting(world, 1e-3)
    a.name, b.name = "a", "b"
    duel(a, b, Effort(200, 200, 0.1), cores=2)
    assert 70 <= order[::2].count("a") <= 130


def test_sabotage_a_duel_that_swaps_its_arms_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(candidate, original, *args, **kwargs):
        return duel(original, candidate, *args, **kwargs)

    monkeypatch.setitem(globals(), "fight", lambda ratio, seed, *rest: _fight_with(swapped, ratio, seed))
    assert share(range(40), 0.95, lambda s: s.high < 1) < 0.95


def test_sabotage_two_stopwatches_fail_where_the_duel_holds() -> None:
    """One block of each arm, one after the other, as stopwatches do: drift alone makes them lie."""
    lies = 0
    for seed in range(200):
        world = World(np.random.default_rng(seed))
        blocks = [[FakeArm(world, 1e-3).block(0.1, 1) for _ in range(20)] for _ in range(2)]
        mids = [np.concatenate(b) for b in blocks]
        lies += np.median(mids[1]) / np.median(mids[0]) > 1.02
    assert lies / 200 > 0.05


def _fight_with(judge, ratio: float, seed: int) -> Rounds:
    world = World(np.random.default_rng(seed))
    return judge(FakeArm(world, 1e-3 / ratio), FakeArm(world, 1e-3), SELECT, cores=2, seed=seed)


def test_it_stops_early_when_the_interval_is_narrow() -> None:
    class Steady(FakeArm):
        def block(self, seconds: float, timeout: float, core: int = 0) -> np.ndarray:
            return np.full(20, self.seconds)

    world = World(np.random.default_rng(0))
    seen = duel(Steady(world, 1e-3), Steady(world, 2e-3), SELECT, cores=2)
    assert len(seen.rounds) == SELECT.least
    assert seen.speedup == Interval(2.0, 2.0, 2.0, seen.speedup.confidence).widened(LUCK)


def test_it_stops_early_when_its_question_is_answered_and_goes_on_while_it_is_not() -> None:
    wide = Effort(8, 32, 0.1, narrow=0.0)
    assert len(fight(3.0, 1, wide, answered=lambda s: s.low > 1.5).rounds) < 32
    assert len(fight(3.0, 1, wide, answered=lambda s: False).rounds) == 32


def test_it_goes_on_until_there_are_calls_enough_for_the_quantile_that_is_asked() -> None:
    assert sum(1 for _ in fight(1.0, 0, Effort(8, 8, 0.1, calls=500)).seconds) >= 500


def test_a_contest_tells_apart_what_is_close_on_a_machine_that_changes() -> None:
    right = 0
    for seed in range(60):
        world = World(np.random.default_rng(seed))
        arms = [FakeArm(world, 1e-3 / s) for s in (3.0, 3.3)]
        first, second = duel_module.contest(arms, FakeArm(world, 1e-3), SELECT, cores=2, seed=seed)
        assert np.array_equal(first.rounds[:, 1], second.rounds[:, 1])
        right += second.speedup.mid > first.speedup.mid
    assert right >= 55


# --- what takes longer for some inputs --------------------------------------------------------------------------


@dataclass
class Moody(FakeArm):
    """An arm that takes `seconds` for nine inputs of ten and 21 times as long for the tenth: thrice on the mean."""

    inputs: int = 48

    def block(self, seconds: float, timeout: float, core: int = 0) -> np.ndarray:
        rng, slow = self.world.rng, self.world.step()
        each = self.seconds * np.where(rng.random(self.inputs) < 0.1, 21.0, 1.0)
        others = np.where(rng.random((MIX_REPEATS, self.inputs)) < 0.005, 50.0, 1.0)  # somebody else's turn
        return (slow * each * others * np.exp(rng.normal(0, 0.05, size=others.shape))).ravel()

    def typical(self, block: np.ndarray) -> float:
        return mix_seconds(block)


def moody(seed: int, kind: type[Moody] = Moody) -> Interval:
    world = World(np.random.default_rng(seed))
    return duel(kind(world, 1e-3), FakeArm(world, 3e-3), Effort(24, 24, 0.1), cores=2, seed=seed).speedup


def test_a_path_that_one_input_in_ten_takes_is_in_the_figure() -> None:
    seen = [moody(seed) for seed in range(100)]
    assert np.median([s.mid for s in seen]) == pytest.approx(1.0, abs=0.06)
    assert np.mean([s.low <= 1.0 <= s.high for s in seen]) >= 0.9  # and so is which inputs were drawn


def test_sabotage_a_median_over_calls_does_not_see_that_path() -> None:
    class Sly(Moody):
        def typical(self, block: np.ndarray) -> float:
            return float(np.median(block))

    assert moody(0, Sly).low > 2.0  # "three times faster": it is no faster at all


def test_the_clock_gives_every_input_of_a_mix_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own: 90 % of calls take 1 ms, 10 % take 21 ms, and two calls are stretched by others."""
    now, calls = [0], [0]

    def run(batch: tuple[int, ...]) -> None:
        calls[0] += 1
        now[0] += batch[0] * 1_000_000 * (40 if calls[0] in (20, 40) else 1)

    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    block = time_mix(run, [(21,) if i % 10 == 0 else (1,) for i in range(50)])
    assert len(block) == 50 * MIX_REPEATS
    assert mix_seconds(block) == pytest.approx(3e-3)
    assert np.median(block) == pytest.approx(1e-3)


def test_disturbed_rounds_are_kept_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))

    class Busy:
        def __init__(self, at: int) -> None:
            self.at = at

        @classmethod
        def now(cls, pids: list[int]) -> Busy:
            return cls(next(ticks))

        def stolen_until(self, later: Busy, cores: int) -> float:
            return 0.5 if self.at == 4 else 0.0

    monkeypatch.setattr(duel_module, "Activity", Busy)
    seen = fight(1.0, 0, Effort(10, 10, 0.1))
    assert len(seen.rounds) == 10
    assert (seen.stolen > 0).sum() == 1
