"""Rungs in memory: proven when loaded, pinned, evicted under a cap, and turned away with a reason."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from company import Script, ScriptedRunner, ladder_of

from accelerando.bundle import Bundle
from accelerando.errors import BundleError, UsageError
from accelerando.ladder import Rung
from accelerando.memory import resident_bytes
from accelerando.recipe import Runner
from accelerando.serve import costs
from accelerando.serve.costs import Cost
from accelerando.serve.residents import VOTE_SECONDS, VOTES, Residents
from accelerando.testing.bundles import write_bundle

MB = 10**6


def loaded(
    bundle: Bundle, scripts: list[Script], cap: int | None = None, order: tuple[int, ...] = (2, 0, 1)
) -> Residents:
    def start(rung: Rung) -> Runner:
        number = bundle.ladder.index(rung.recipe)
        assert number is not None
        script = scripts[number]
        if script.error:
            raise script.error
        return ScriptedRunner(script)

    residents = Residents(bundle, start, threading.Lock(), cap)
    residents.begin(order, first=len(order))
    return residents


def states(residents: Residents) -> list[str]:
    return [r.state for r in residents]


@pytest.fixture
def scripts() -> list[Script]:
    return [Script() for _ in range(3)]


def test_all_are_loaded_where_there_is_no_cap(tmp_path: Path, scripts: list[Script]) -> None:
    residents = loaded(write_bundle(tmp_path / "b"), scripts)
    assert states(residents) == ["ready"] * 3
    residents.close()
    assert [s.closed for s in scripts] == [1, 1, 1]


def test_the_rest_is_loaded_behind_the_callers_back(tmp_path: Path, scripts: list[Script]) -> None:
    bundle = write_bundle(tmp_path / "b")
    residents = Residents(bundle, lambda rung: ScriptedRunner(scripts[0]), threading.Lock())
    residents.begin((2, 0, 1), first=1)
    assert residents[2].state == "ready"
    for _ in range(3000):
        if states(residents) == ["ready"] * 3:
            break
        time.sleep(0.01)
    assert states(residents) == ["ready"] * 3
    residents.close()


def test_a_rung_that_answers_otherwise_than_certified_is_not_stood_on(tmp_path: Path, scripts: list[Script]) -> None:
    bundle = write_bundle(tmp_path / "b")

    class Perturbed(ScriptedRunner):
        def __call__(self, leaves: Any) -> Any:
            return [answer + np.float32(0.5) for answer in super().__call__(leaves)]

    def start(rung: Rung) -> Runner:
        return Perturbed(scripts[1]) if rung is bundle.ladder[1] else ScriptedRunner(scripts[0])

    residents = Residents(bundle, start, threading.Lock())
    residents.begin((2, 1, 0), first=3)
    assert states(residents) == ["ready", "failed", "ready"]
    assert "certified" in residents[1].why
    assert scripts[1].closed == 1
    assert 1 not in [s.number for s in residents.states]
    residents.close()


def test_only_calls_that_are_timed_hold_the_cores(tmp_path: Path, scripts: list[Script]) -> None:
    """The first call of a size may build a session, which takes long: a request must not wait for it."""
    bundle, cores = write_bundle(tmp_path / "b"), threading.Lock()
    calls: list[tuple[int, bool]] = []

    class Watched(ScriptedRunner):
        def __call__(self, leaves: Any) -> Any:
            calls.append((len(leaves[0]), cores.locked()))
            return super().__call__(leaves)

    residents = Residents(bundle, lambda rung: Watched(scripts[0]), cores)
    residents.begin((2,))
    assert residents[2].state == "ready"
    assert calls[:2] == [(4, False), (1, False)]  # the stored rows, and the first of a single one
    for size in {size for size, _ in calls[1:]}:
        held = [locked for rows, locked in calls[1:] if rows == size]
        assert not held[0]
        assert held[1:].count(True) == len(held) - 1 >= costs.CALLS
    assert not cores.locked()
    residents.close()


def test_a_request_gets_the_cores_while_a_rung_is_proven(tmp_path: Path, scripts: list[Script]) -> None:
    cores, scripts[0].gate = threading.Lock(), threading.Event()
    residents = Residents(write_bundle(tmp_path / "b"), lambda rung: ScriptedRunner(scripts[0]), cores)
    residents.want(2)
    for _ in range(5000):
        if scripts[0].calls:
            break
        time.sleep(0.001)
    assert scripts[0].calls == [4]
    assert cores.acquire(timeout=5)  # as a request does; the rung's call lasts until the gate is opened
    assert residents[2].state == "loading"
    cores.release()
    scripts[0].gate.set()
    residents.close()


def test_a_rung_that_can_not_be_loaded_costs_nothing_else(tmp_path: Path, scripts: list[Script]) -> None:
    scripts[2].error = RuntimeError("no such instruction")
    residents = loaded(write_bundle(tmp_path / "b"), scripts)
    assert states(residents) == ["ready", "ready", "failed"]
    assert "no such instruction" in residents[2].why
    residents.close()


def test_where_none_can_be_loaded_it_says_why_of_each(tmp_path: Path, scripts: list[Script]) -> None:
    for script in scripts:
        script.error = RuntimeError("broken")
    with pytest.raises(BundleError, match=r"no-rung.*rung 0: RuntimeError: broken"):
        loaded(write_bundle(tmp_path / "b"), scripts)


def capped(tmp_path: Path, peaks: tuple[int, int, int] = (60 * MB, 30 * MB, 25 * MB)) -> Bundle:
    """Rungs that took these peaks when they were certified, all of one library of about 25 MB."""
    bundle = ladder_of(write_bundle(tmp_path / "b"), (0.0, 0.01, 0.02))
    rungs = tuple(
        replace(r, evidence=replace(r.evidence, peak_bytes=peak)) for r, peak in zip(bundle.ladder, peaks, strict=True)
    )
    return replace(bundle, ladder=replace(bundle.ladder, rungs=rungs))


def test_a_cap_keeps_rungs_out_and_what_is_shared_counts_once(tmp_path: Path, scripts: list[Script]) -> None:
    residents = loaded(capped(tmp_path), scripts, cap=40 * MB)
    assert states(residents) == ["out", "ready", "ready"]  # 25 for the library, some 0 and 5 for the two
    assert "no room" in residents[0].why
    residents.close()


def test_a_cap_below_the_fastest_rung_is_refused(tmp_path: Path, scripts: list[Script]) -> None:
    with pytest.raises(UsageError, match="allow more"):
        loaded(capped(tmp_path), scripts, cap=20 * MB)


def test_a_rung_that_is_missed_for_long_makes_room_for_itself(tmp_path: Path, scripts: list[Script]) -> None:
    residents = loaded(capped(tmp_path), scripts, cap=62 * MB, order=(2, 1, 0))
    assert states(residents) == ["out", "ready", "ready"]
    for vote in range(VOTES * 2):
        residents.missed(0, now=vote * 0.01)
    assert states(residents) == ["out", "ready", "ready"]  # often enough, but not for long enough
    residents.missed(0, now=VOTE_SECONDS + 1)
    for _ in range(3000):
        if residents[0].state == "ready":
            break
        time.sleep(0.01)
    assert states(residents) == ["ready", "out", "ready"]  # the fastest is pinned
    assert scripts[1].closed == 1
    residents.close()


class Memory:
    """What the rungs of some bundles hold, by their certificates, and the most that it ever was."""

    def __init__(self) -> None:
        self.held = self.most = 25 * MB  # the library

    def take(self, size: int) -> None:
        self.held += size
        self.most = max(self.most, self.held)

    def of(self, bundle: Bundle, cap: int, elder: Residents | None = None, pid: int = 0) -> Residents:
        """The rungs of a bundle under a cap, of which nothing is loaded yet."""
        memory = self

        def start(rung: Rung) -> Runner:
            size = rung.evidence.peak_bytes - 25 * MB

            class Counted(ScriptedRunner):
                def close(self) -> None:
                    memory.take(-size)

            memory.take(size)
            return Counted(Script())

        return Residents(bundle, start, threading.Lock(), cap, pid=lambda: pid, elder=elder)


def test_a_bundle_that_takes_over_shares_the_cap_with_the_one_before(tmp_path: Path) -> None:
    bundle, memory, cap = capped(tmp_path, (60 * MB, 30 * MB, 26 * MB)), Memory(), 68 * MB
    elder = memory.of(bundle, cap)
    elder.begin((2, 0, 1), first=3)
    assert states(elder) == ["ready"] * 3
    heir = memory.of(bundle, cap, elder)
    elder.give_way({1})
    heir.begin((2, 1, 0))
    assert states(elder) == ["out", "ready", "ready"]  # no more than was needed has left, and neither the pinned one
    assert states(heir) == ["out", "ready", "ready"]
    assert not elder.load(0)
    elder.close()
    heir.fill()
    for _ in range(3000):
        if states(heir) == ["ready"] * 3:
            break
        time.sleep(0.01)
    assert states(heir) == ["ready"] * 3
    assert memory.most <= cap
    heir.close()
    assert memory.held == 25 * MB


def test_where_both_have_no_room_the_one_that_is_served_stays(tmp_path: Path) -> None:
    bundle, memory, cap = capped(tmp_path, (60 * MB, 30 * MB, 26 * MB)), Memory(), 67 * MB
    elder = memory.of(bundle, cap)
    elder.begin((2, 0, 1), first=3)
    heir = memory.of(bundle, cap, elder)
    elder.give_way({0})
    with pytest.raises(UsageError, match="leaves too little of it"):
        heir.begin((2, 0, 1), lambda: heir[0].state == "ready")
    assert elder[0].state == elder[2].state == "ready"
    heir.close()
    elder.fill()
    for _ in range(3000):
        if states(elder) == ["ready"] * 3:
            break
        time.sleep(0.01)
    assert states(elder) == ["ready"] * 3
    assert memory.most <= cap
    elder.close()


def test_a_process_of_its_own_has_a_library_of_its_own(tmp_path: Path) -> None:
    bundle, memory = capped(tmp_path, (60 * MB, 30 * MB, 26 * MB)), Memory()
    elder = memory.of(bundle, 50 * MB)
    elder.begin((2,))
    elder.give_way({2})
    beside, inside = memory.of(bundle, 50 * MB, elder, pid=1), memory.of(bundle, 50 * MB, elder)
    with pytest.raises(UsageError, match="leaves too little of it"):
        beside.begin((2,))
    inside.begin((2,))
    assert (states(beside)[2], states(inside)[2]) == ("out", "ready")
    for residents in (elder, beside, inside):
        residents.close()


@pytest.mark.skipif(not resident_bytes(os.getpid()), reason="this system does not tell what a process holds")
def test_what_was_there_before_the_first_bundle_is_nobodys(tmp_path: Path, scripts: list[Script]) -> None:
    bundle = write_bundle(tmp_path / "b")

    class Heavy(ScriptedRunner):
        def __init__(self, script: Script) -> None:
            super().__init__(script)
            self.weights = np.ones(50 * MB, np.uint8)

        def close(self) -> None:
            self.weights = self.weights[:1].copy()

    elder = Residents(bundle, lambda rung: Heavy(scripts[0]), threading.Lock())
    elder.begin((2,))
    heir = Residents(bundle, lambda rung: Heavy(scripts[0]), threading.Lock(), elder=elder)
    heir.begin((2,))
    elder.close()
    assert 45 * MB < heir.memory < 95 * MB
    heir.close()


def test_who_makes_room_is_waited_for_without_the_lock(tmp_path: Path, scripts: list[Script]) -> None:
    bundle, cores = capped(tmp_path), threading.Lock()
    residents = Residents(bundle, lambda rung: ScriptedRunner(scripts[0]), cores, 62 * MB)
    residents.begin((2, 1), first=2)
    with cores:  # a request is being computed
        loads = threading.Thread(target=residents.load, args=(0, True))
        loads.start()
        for _ in range(3000):
            if residents[1].state == "out":
                break
            time.sleep(0.01)
        asks = threading.Thread(target=residents.missed, args=(1, 0.0))
        asks.start()
        asks.join(10)
        stuck = asks.is_alive()
    loads.join()
    asks.join()
    assert not stuck, "the lock was held while the cores were waited for"
    assert states(residents) == ["ready", "out", "ready"]
    residents.close()


def test_nobody_leaves_for_a_rung_that_has_no_room_all_the_same(tmp_path: Path, scripts: list[Script]) -> None:
    residents = loaded(capped(tmp_path), scripts, cap=40 * MB, order=(2, 1))
    assert not residents.load(0, evict=True)
    assert states(residents) == ["out", "ready", "ready"]
    assert [residents.may_come(n) for n in range(3)] == [False, True, True]
    residents.close()


def test_a_rung_that_is_turned_away_gives_its_memory_back(tmp_path: Path, scripts: list[Script]) -> None:
    known: list[weakref.ref[Runner]] = []

    class Knotted(ScriptedRunner):
        def __init__(self, script: Script) -> None:
            super().__init__(script)
            self.knot = self  # only the collector undoes it
            known.append(weakref.ref(self))

    residents = Residents(write_bundle(tmp_path / "b"), lambda rung: Knotted(scripts[0]), threading.Lock())
    residents.begin((2, 1))
    gc.disable()
    try:
        residents.turn_away(1, "failed", "it does not answer")
    finally:
        gc.enable()
    assert [ref() is None for ref in known] == [False, True]
    residents.close()


def test_a_rung_that_was_turned_away_stays_away(tmp_path: Path, scripts: list[Script]) -> None:
    residents = loaded(write_bundle(tmp_path / "b"), scripts)
    residents.turn_away(1, "quarantined", "it disagrees")
    assert residents[1].state == "quarantined"
    assert not residents.load(1)
    assert scripts[1].closed == 1
    assert [s.number for s in residents.states if s.ready] == [0, 2]
    residents.close()


def test_costs_are_the_line_through_what_was_measured() -> None:
    now = [0.0]

    def run(leaves: Any) -> Any:
        now[0] += 0.002 + 0.0005 * len(leaves[0])
        return list(leaves)

    cost = costs.measure(run, [np.ones((1, 4), np.float32)], 64, threading.Lock(), clock=lambda: now[0])
    assert cost.fixed == pytest.approx(0.002)
    assert cost.per_row == pytest.approx(0.0005)


def test_a_cost_does_not_follow_the_machine_that_is_slower_by_now() -> None:
    """A neighbour took half of it since the other rung was timed, comes and goes, and changes nothing."""
    now, calls = [0.0], [0]

    def rung(seconds: float) -> costs.Run:
        def run(leaves: Any) -> Any:
            calls[0] += 1
            now[0] += seconds * len(leaves[0]) * (2.0 if calls[0] // 16 % 2 else 1.8)
            return list(leaves)

        return run

    row, known = [np.ones((1, 4), np.float32)], Cost(0.0, 0.001)
    cost = costs.measure(rung(0.003), row, 4, threading.Lock(), (rung(0.001), known), clock=lambda: now[0])
    assert cost.seconds(4) == pytest.approx(0.012)
    alone = costs.measure(rung(0.003), row, 4, threading.Lock(), clock=lambda: now[0])
    assert alone.seconds(4) > 0.02  # what two stopwatches would have told


@pytest.mark.parametrize("stalled", [2, 4])  # the first that is timed of one row, or of two
def test_a_stall_at_one_size_does_not_keep_the_greater_ones_from_being_timed(stalled: int) -> None:
    """A line through a single size could not tell what part of a call does not grow with its rows."""
    now, sizes = [0.0], list[int]()

    def run(leaves: Any) -> Any:
        sizes.append(len(leaves[0]))
        now[0] += 5.0 if len(sizes) == stalled else 0.002 + 0.0005 * len(leaves[0])
        return list(leaves)

    cost = costs.measure(run, [np.ones((1, 4), np.float32)], 64, threading.Lock(), clock=lambda: now[0])
    assert max(sizes) >= 4
    assert (cost.fixed, cost.per_row) == pytest.approx((0.002, 0.0005))


def test_a_cost_is_that_of_a_call_that_finds_its_rung_warm() -> None:
    """As it does where requests are many, which is when costs decide; after another rung, or a pause, it is cold."""
    now, last = [0.0], [""]

    def rung(name: str, seconds: float) -> costs.Run:
        def run(leaves: Any) -> Any:
            now[0] += seconds * len(leaves[0]) + (0.004 if last[0] != name else 0.0)
            last[0] = name
            return list(leaves)

        return run

    row, known = [np.ones((1, 4), np.float32)], Cost(0.0, 0.001)
    beside = rung("fast", 0.001), known
    cost = costs.measure(rung("slow", 0.003), row, 4, threading.Lock(), beside, clock=lambda: now[0])
    assert (cost.fixed, cost.per_row) == pytest.approx((0.0, 0.003))


def test_a_rung_is_timed_against_the_fastest_that_is_ready(tmp_path: Path) -> None:
    scripts = [Script(seconds=0.002), Script(seconds=0.004), Script(seconds=0.001)]
    residents = loaded(write_bundle(tmp_path / "b"), scripts, order=(2,))
    before = len(scripts[2].calls)
    assert residents.load(0)
    beside = scripts[2].calls[before:]
    assert len(beside) > costs.CALLS
    assert set(beside) == {1}
    residents.close()


def test_a_rung_is_timed_alone_where_the_other_leaves_meanwhile(tmp_path: Path, scripts: list[Script]) -> None:
    bundle, cores = write_bundle(tmp_path / "b"), threading.Lock()
    made: list[Residents] = []

    class Leaving(ScriptedRunner):
        def __call__(self, leaves: Any) -> Any:
            if self.script.closed:
                raise RuntimeError("it is closed")
            if made and made[0][0].state == "loading" and self.script is scripts[2]:
                made[0].turn_away(2, "quarantined", "a test")
            return super().__call__(leaves)

    def start(rung: Rung) -> Runner:
        number = bundle.ladder.index(rung.recipe)
        assert number is not None
        return Leaving(scripts[number])

    made.append(Residents(bundle, start, cores))
    made[0].begin((2,), first=1)
    assert made[0].load(0)
    assert states(made[0])[::2] == ["ready", "quarantined"]
    made[0].close()


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ([(1, 0.01)], Cost(0.0, 0.01)),
        ([(8, 0.04)], Cost(0.0, 0.005)),
        ([(1, 0.01), (2, 0.01), (4, 0.0099)], Cost(0.01, 0.0)),
        ([(1, 0.001), (2, 0.003)], Cost(0.0, 0.00125)),
    ],
)
def test_no_part_of_a_cost_is_negative(known: list[tuple[int, float]], expected: Cost) -> None:
    cost = costs.fit(known)
    assert (cost.fixed, cost.per_row) == pytest.approx((expected.fixed, expected.per_row))
