"""The executor: every request gets its own answer or its own reason, whatever happens to a batch."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from company import POISON, Script, Troupe, troupe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accelerando.errors import ClosedError, DeadlineError, OverloadedError, RowsError
from accelerando.serve.account import status_of
from accelerando.serve.company import GoneError
from accelerando.serve.governor import Decision, RungState, Signal
from accelerando.serve.isolation import LostError
from accelerando.serve.salvage import PROBE_SECONDS, PROBES, search
from accelerando.serve.status import Stand
from accelerando.serve.tickets import Ticket
from accelerando.signature import Array, Port
from accelerando.testing.bundles import SIGNATURE

pytestmark = pytest.mark.usefixtures("hasty")
WAIT = 30.0  # for what takes milliseconds on any machine


class Stands:
    """A governor that stands where it is told."""

    def __init__(self, rung: int, rows: int = 1) -> None:
        self.rung, self.rows = rung, rows

    def decide(self, last: Decision | None, signal: Signal, rungs: tuple[RungState, ...]) -> Decision:
        return Decision(self.rung, self.rows, signal.now, "it was told to")


@pytest.fixture
def make(tmp_path: Path) -> Any:
    made: list[Troupe] = []

    def one(*args: Any, **kwargs: Any) -> Troupe:
        made.append(troupe(tmp_path / f"{len(made)}", *args, **kwargs))
        return made[-1]

    yield one
    for each in made:
        each.close()


def hold(held: Troupe, rung: int) -> tuple[threading.Event, Any]:
    """Keep the executor busy on a rung: the gate that lets it go on, and the request that it is busy with."""
    script = held.scripts[rung]
    script.gate = threading.Event()
    script.calls.clear()
    ticket = held.ask()
    while not script.calls:
        time.sleep(0.001)
    return script.gate, ticket


def numbered(count: int) -> list[np.ndarray[Any, Any]]:
    return [np.full((1 + i % 3, 4), float(i), np.float32) for i in range(count)]


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_every_row_goes_back_to_its_own_caller(make: Any, rows: int) -> None:
    held = make(governor=Stands(1, rows))
    requests = numbered(40)
    tickets = [held.ask(leaf) for leaf in requests]
    for leaf, ticket in zip(requests, tickets, strict=True):
        (answer,) = ticket.future.result(WAIT).leaves
        assert answer.shape == (len(leaf), 3)
        np.testing.assert_array_equal(answer, np.full((len(leaf), 3), leaf[0, 0]))
    assert max(held.scripts[1].calls) <= max(rows, 3)


def test_what_waits_together_is_answered_together(make: Any) -> None:
    held = make(governor=Stands(1, 8))
    gate, first = hold(held, 1)
    tickets = [held.ask() for _ in range(8)]
    gate.set()
    assert first.future.result(WAIT).why.rows == 1
    assert [t.future.result(WAIT).why.rows for t in tickets] == [8] * 8


def test_a_request_of_more_rows_than_a_batch_goes_piece_by_piece(make: Any) -> None:
    held = make()
    leaf = np.arange(150 * 4, dtype=np.float32).reshape(150, 4)
    (answer,) = held.ask(leaf).future.result(WAIT).leaves
    np.testing.assert_allclose(answer[:, 0], leaf.mean(1))
    assert max(held.scripts[0].calls) <= 64


def test_only_the_poisonous_request_of_a_batch_fails(make: Any) -> None:
    held = make(governor=Stands(2, 8))
    gate, first = hold(held, 2)
    fine, bad = [held.ask(leaf) for leaf in numbered(6)], held.ask(np.full((1, 4), POISON, np.float32))
    gate.set()
    assert first.future.result(WAIT)
    for i, ticket in enumerate(fine):
        assert ticket.future.result(WAIT).leaves[0][0, 0] == i
    with pytest.raises(RowsError, match="a poisonous row"):
        bad.future.result(WAIT)
    assert held.conductor.tally.requests["failed"] == 1
    assert held.ask().future.result(WAIT)


def rows_with(poisonous: Sequence[int], count: int) -> Array:
    leaf = np.arange(count, dtype=np.float32)[:, None] * np.ones(4, np.float32)
    leaf[list(poisonous)] = POISON
    return leaf


@pytest.mark.parametrize(
    ("poisonous", "count", "said"),
    [
        ([2], 8, "^row 3 of 8 "),
        ([0, 6], 7, "^rows 1 and 7 of 7 "),
        ([0, 1, 2], 3, "^each of its 3 rows"),
        (range(64), 64, r"^rows 1, .* more of 64 \(counted from 1\), and perhaps others: "),
    ],
)
def test_the_poisonous_rows_of_a_request_are_named(make: Any, poisonous: Any, count: int, said: str) -> None:
    held = make(governor=Stands(2, 8))
    gate, first = hold(held, 2)
    fine, bad = held.ask(rows_with([], 4)), held.ask(rows_with(poisonous, count))
    gate.set()
    assert first.future.result(WAIT)
    (answer,) = fine.future.result(WAIT).leaves
    np.testing.assert_array_equal(answer[:, 0], np.arange(4))
    with pytest.raises(RowsError, match=said) as caught:
        bad.future.result(WAIT)
    assert "ValueError: a poisonous row" in str(caught.value)
    assert sum(len(script.calls) for script in held.scripts) <= PROBES + 6
    assert held.conductor.tally.requests["failed"] == 1


def test_the_poisonous_row_of_a_fixed_batch_is_named(make: Any) -> None:
    fixed = replace(SIGNATURE, inputs=(Port("x", "float32", (4, 4)),), outputs=(Port("logits", "float32", (4, 3)),))
    held = make(signature=fixed)
    with pytest.raises(RowsError, match=r"^row 2 of 4 "):
        held.ask(rows_with([1], 4)).future.result(WAIT)
    assert all(set(script.calls) <= {4} for script in held.scripts)


@pytest.mark.parametrize("lost", [LostError("the process died"), GoneError("it has just left")])
def test_rows_are_not_looked_for_at_the_cost_of_a_process_each(make: Any, lost: Exception) -> None:
    held = make(governor=Stands(2, 8))
    for script in held.scripts:
        script.error = lost
    with pytest.raises(RowsError, match=f"^{lost}$"):
        held.ask(8).future.result(WAIT)
    assert sum(len(script.calls) for script in held.scripts) == 3


@given(st.integers(2, 200), st.sets(st.integers(0, 199)), st.integers(1, 200))
def test_no_row_is_accused_that_does_not_fail_by_itself(count: int, poisonous: set[int], most: int) -> None:
    """Nor is one passed over, as long as the search was whole; too many rows at once may fail without any poison."""
    calls: list[slice] = []

    def run(rows: slice) -> None:
        calls.append(rows)
        if rows.stop - rows.start > most or poisonous & set(range(rows.start, rows.stop)):
            raise ValueError("poison")

    found, whole, _ = search(run, count, ValueError("together"), lambda: 0.0)
    real = {row for row in poisonous if row < count}
    assert len(calls) <= PROBES
    assert set(found) <= real
    assert not whole or set(found) == real
    assert whole or len(calls) == PROBES


def test_a_search_for_rows_ends_in_time() -> None:
    now = iter(range(100))

    def run(rows: slice) -> None:
        raise ValueError(f"row {rows.start}")

    found, whole, why = search(run, 64, ValueError("together"), lambda: next(now) * PROBE_SECONDS / 10)
    assert (found[:2], whole, str(why)) == ([0, 1], False, "row 0")


def test_rows_that_fail_only_together_are_not_accused(make: Any) -> None:
    held = make(governor=Stands(2, 8))
    for script in held.scripts:
        script.most_rows = 4
    with pytest.raises(RowsError, match=r"^none of its 8 rows fails by itself, but together: .*MemoryError"):
        held.ask(8).future.result(WAIT)


def test_a_rung_that_raises_is_given_up_and_nothing_is_lost(make: Any) -> None:
    held = make()
    broken = held.scripts[0]
    assert held.ask().future.result(WAIT).why.rung == 0
    broken.error = RuntimeError("out of order")
    answers = [held.ask().future.result(WAIT) for _ in range(6)]
    assert {a.why.rung for a in answers} <= {1, 2}
    assert any("out of order" in a.why.reason for a in answers)
    assert held.residents[0].state == "failed"
    assert "3 times in a row" in held.residents[0].why
    assert broken.closed == 1


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_whatever_a_backend_raises_the_executor_goes_on(make: Any, raised: BaseException) -> None:
    held = make(governor=Stands(1, 8))
    gate, first = hold(held, 1)
    tickets = [held.ask() for _ in range(3)]
    for script in held.scripts:
        script.error = raised
    gate.set()
    for ticket in (first, *tickets):
        with pytest.raises(RowsError, match=f"the model failed on it: {type(raised).__name__}"):
            ticket.future.result(WAIT)
    for script in held.scripts:
        script.error = None
    assert held.ask().future.result(WAIT)


@pytest.mark.parametrize("raised", [SystemExit(3), ValueError("no")])
def test_whatever_a_callback_raises_everybody_is_answered(make: Any, raised: BaseException) -> None:
    def fail(_: object) -> None:
        raise raised

    held = make(governor=Stands(1, 8))
    gate, first = hold(held, 1)
    tickets = [held.ask() for _ in range(3)]
    hurried = held.ask(seconds=0.05)
    for ticket in (first, *tickets, hurried):
        ticket.future.add_done_callback(fail)
    with pytest.raises(DeadlineError):
        hurried.future.result(WAIT)
    gate.set()
    assert all(ticket.future.result(WAIT) for ticket in (first, *tickets))
    hold(held, 1)
    with pytest.raises(DeadlineError):  # who watches the deadlines goes on too
        held.ask(seconds=0.05).future.result(WAIT)


def test_an_interrupt_reaches_the_caller_whose_request_is_being_run(make: Any) -> None:
    held = make(governor=Stands(1))
    held.scripts[1].error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        held.conductor.answer(Ticket([np.ones((1, 4), np.float32)], 1, time.monotonic()))
    held.scripts[1].error = None
    assert held.ask().future.result(WAIT)
    assert held.conductor.answer(Ticket([np.ones((1, 4), np.float32)], 1, time.monotonic()))


def test_an_error_before_a_batch_is_chosen_costs_the_head_alone(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held = make(governor=Stands(1))
    with monkeypatch.context() as patch:
        patch.setattr(held.conductor._footing, "states_for", lambda rows: 1 / 0)
        with pytest.raises(OverloadedError, match="an error of our own: ZeroDivisionError"):
            held.ask(seconds=math.inf).future.result(WAIT)
    assert held.ask().future.result(WAIT)


def test_where_the_goal_allows_no_other_rung_one_that_raises_is_given_up_all_the_same(make: Any) -> None:
    held = make(goal="speedup >= 4")
    assert held.ask().future.result(WAIT).why.rung == 2
    held.scripts[2].error = RuntimeError("out of order")
    assert [held.ask().future.result(WAIT).why.rung for _ in range(4)] == [1, 1, 1, 0]
    assert held.residents[2].state == "failed"


def test_who_asks_for_quality_gets_no_less_where_a_rung_fails(make: Any) -> None:
    held = make(drops=(0.0, 0.1, 0.3), governor=Stands(0))
    held.scripts[0].error = RuntimeError("out of order")
    with pytest.raises(RowsError, match="out of order"):
        held.ask(floor=held.residents.promise(0)).future.result(WAIT)
    assert held.ask().future.result(WAIT).why.rung == 1


def test_a_dead_request_is_told_so_while_a_long_batch_runs(make: Any) -> None:
    held = make(governor=Stands(2))
    gate, blocking = hold(held, 2)
    hurried = held.ask(seconds=0.05)
    with pytest.raises(DeadlineError, match="nothing was computed"):
        hurried.future.result(WAIT)
    assert not blocking.future.done()
    gate.set()
    assert blocking.future.result(WAIT)


def test_whose_patience_is_longer_than_a_thread_can_sleep_holds_up_nobody(make: Any) -> None:
    held = make(governor=Stands(2), goal="p99 <= 1e300s")
    gate, blocking = hold(held, 2)
    patient, hurried = held.ask(seconds=1e10), held.ask(seconds=0.05)
    time.sleep(0.2)
    late = held.ask(seconds=0.05)
    for ticket in (hurried, late):
        with pytest.raises(DeadlineError):
            ticket.future.result(WAIT)
    gate.set()
    assert blocking.future.result(WAIT)
    assert patient.future.result(WAIT)


def test_a_caller_that_gives_up_leaves_the_queue(make: Any) -> None:
    held = make(governor=Stands(2))
    gate, blocking = hold(held, 2)
    gone, stays = held.ask(3), held.ask(2)
    assert gone.future.cancel()
    assert held.conductor.waiting_rows == 2
    gate.set()
    assert stays.future.result(WAIT)
    assert blocking.future.result(WAIT)
    assert sum(held.scripts[2].calls) == 3
    assert held.conductor.tally.requests["cancelled"] == 1


def test_who_gives_up_between_the_queue_and_the_batch_is_counted_too(make: Any) -> None:
    held = make(governor=Stands(2))
    with held.conductor._cores:
        gone = held.ask()
        while held.conductor.waiting_rows:
            time.sleep(0.001)
        assert gone.future.cancel()
    assert held.ask().future.result(WAIT)
    assert held.conductor.tally.requests == {"answered": 1, "cancelled": 1}


def test_what_can_not_be_in_time_is_refused_at_once(make: Any) -> None:
    held = make([Script(0.05), Script(0.05), Script(0.05)])
    with pytest.raises(OverloadedError, match="even the fastest rung"):
        held.ask(seconds=0.001)
    assert held.conductor.tally.requests["refused"] == 1


def test_a_full_queue_refuses(make: Any) -> None:
    held = make(governor=Stands(2), waiting_rows=5)
    gate, running = hold(held, 2)
    held.ask(4)
    with pytest.raises(OverloadedError, match="wait already"):
        held.ask(2)
    gate.set()
    assert running.future.result(WAIT)


def test_a_floor_is_kept(make: Any) -> None:
    held = make(goal="p99 <= 30s", drops=(0.0, 0.1, 0.3))
    best = max(s.quality for s in held.residents.states)
    answer = held.ask(floor=best - 0.01).future.result(WAIT)
    assert answer.why.rung == 0
    with pytest.raises(OverloadedError, match="promises the quality"):
        held.ask(floor=best + 0.01).future.result(WAIT)


def test_the_mean_quality_never_falls_below_the_goal(make: Any) -> None:
    """Under pressure it takes the fast rung only for as long as the better one has earned it; the rest is refused."""
    slow, fast = Script(0.004), Script(0.0005)
    held = make([slow, slow, fast], drops=(0.0, 0.0, 0.3), goal="p99 <= 40ms, drop <= 10%")
    wanted = held.conductor.company.aims.quality
    promised = {s.number: s.quality for s in held.residents.states}
    assert promised[2] < wanted < promised[0]
    tickets = []
    for _ in range(400):
        try:
            tickets.append(held.ask(seconds=0.04))
        except OverloadedError:
            time.sleep(0.001)
    answers = []
    for ticket in tickets:
        try:
            answers.append(ticket.future.result(WAIT))
        except (OverloadedError, DeadlineError):
            continue
    assert answers
    assert np.mean([promised[a.why.rung] for a in answers]) >= wanted - 1e-9


def test_a_waiting_caller_runs_its_own_request_where_nobody_is_served(make: Any) -> None:
    held = make()
    now = time.monotonic()
    ticket = Ticket([np.ones((2, 4), np.float32)], 2, now, math.inf)
    answer = held.conductor.answer(ticket)
    np.testing.assert_array_equal(answer.leaves[0], np.ones((2, 3)))
    assert held.conductor.tally.requests["answered"] == 1
    assert ticket.future.result(0) is answer  # also where it is asked for only now


def test_a_waiting_caller_who_runs_its_own_request_learns_that_it_failed(make: Any) -> None:
    held = make()
    ticket = Ticket([np.full((1, 4), POISON, np.float32)], 1, time.monotonic())
    with pytest.raises(RowsError):
        held.conductor.answer(ticket)
    assert isinstance(ticket.future.exception(0), RowsError)
    assert held.conductor.tally.requests["failed"] == 1


def test_a_request_that_takes_next_to_nothing_is_answered_at_once(make: Any) -> None:
    held = make([Script(0.003)] * 3)
    quick = Ticket([np.ones((1, 4), np.float32)], 1, time.monotonic())
    held.conductor.submit(quick, at_once=10.0)
    assert quick.future.done()
    usual = Ticket([np.ones((1, 4), np.float32)], 1, time.monotonic())
    held.conductor.submit(usual, at_once=1e-6)
    assert not usual.future.done()
    assert usual.future.result(WAIT)


def test_many_threads_get_their_own_answers(make: Any) -> None:
    held = make()
    wrong: list[Any] = []

    def client(value: float) -> None:
        for _ in range(100):
            now = time.monotonic()
            answer = held.conductor.answer(Ticket([np.full((1, 4), value, np.float32)], 1, now))
            if answer.leaves[0][0, 0] != value:
                wrong.append(answer)

    clients = [threading.Thread(target=client, args=(float(i),)) for i in range(8)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    assert not wrong
    assert held.conductor.tally.requests["answered"] == 800
    assert held.conductor.waiting_rows == 0


def test_closing_answers_what_was_accepted_and_takes_no_more(make: Any) -> None:
    held = make([Script(0.002)] * 3)
    tickets = [held.ask() for _ in range(20)]
    held.conductor.close()
    assert all(t.future.result(0) for t in tickets)
    with pytest.raises(ClosedError):
        held.ask()


def test_closing_ends_also_where_requests_without_deadlines_wait(make: Any) -> None:
    held = make(governor=Stands(2))
    gate, running = hold(held, 2)
    waiting = [held.ask(seconds=math.inf) for _ in range(5)]
    closing = threading.Thread(target=held.conductor.close)
    closing.start()
    gate.set()
    closing.join(WAIT)
    assert not closing.is_alive()
    assert all(t.future.result(0) for t in (running, *waiting))


def test_a_company_that_takes_over_between_choosing_and_running_loses_nothing(make: Any, tmp_path: Path) -> None:
    """The old company's rungs are gone when its last batch comes to run: the new one's answer it."""
    held, other = make(governor=Stands(2)), make(governor=Stands(2))
    gate, running = hold(held, 2)
    tickets = [held.ask(np.full((1, 4), float(i), np.float32)) for i in range(10)]
    held.conductor.conduct(other.conductor.company)
    for resident in held.residents:
        resident.runner = None
    gate.set()
    assert running.future.result(WAIT)
    assert [t.future.result(WAIT).leaves[0][0, 0] for t in tickets] == list(range(10))


def test_slowness_that_was_seen_fades_so_that_nothing_is_refused_for_ever(make: Any) -> None:
    held = make([Script(0.002)] * 3, goal="p99 <= 100ms")
    for script in held.scripts:
        script.seconds = 0.3  # three calls of a stalled machine
    for _ in range(3):
        held.ask(seconds=30).future.result(WAIT)
    for script in held.scripts:
        script.seconds = 0.002
    refused = 0
    for _ in range(200):
        try:
            held.ask(seconds=0.1).future.result(WAIT)
            break
        except (OverloadedError, DeadlineError):
            refused += 1
            time.sleep(0.05)
    assert refused < 200


def test_the_stands_tell_where_it_stood_and_why(make: Any) -> None:
    governor = Stands(0)
    held = make(governor=governor)
    held.ask().future.result(WAIT)
    governor.rung = 2
    held.ask().future.result(WAIT)
    assert [s.rung for s in held.conductor.stands] == [0, 2]
    assert all(isinstance(s, Stand) and s.why for s in held.conductor.stands)
    assert held.conductor.tally.switches == 1
    assert held.conductor.standing == 2


@pytest.mark.parametrize(("metric", "quality"), [("accuracy", 0.9), ("mae", 2.0)])
def test_only_where_more_is_better_can_a_missed_answer_count_as_nothing(make: Any, metric: str, quality: float) -> None:
    held = make(metric=metric, quality=quality)
    answer = held.ask().future.result(WAIT)
    told = status_of("a name", held.conductor)
    assert (told.metric, told.answered, told.standing) == (metric, 1, answer.why.rung)
    if metric == "mae":
        assert math.isnan(told.effective_quality), "0 would be the best that there is"
    else:
        assert told.effective_quality == pytest.approx(0.9, abs=0.02)


class Loop:
    """An event loop whose turns come when they are told to."""

    def __init__(self) -> None:
        self.promised: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()

    def call_soon(self, work: Callable[..., object], *what: Any) -> None:
        self.promised.append((work, what))

    def ask(
        self, held: Troupe, value: float = 0.5, rows: int = 1, at_once: float = 10.0, seconds: float = 30.0
    ) -> Ticket:
        """Submit a request of so many rows, all of this value."""
        now = time.monotonic()
        ticket = Ticket([np.full((rows, 4), value, np.float32)], rows, now, now + seconds)
        held.conductor.submit_soon(ticket, at_once, self.call_soon)
        return ticket

    def turn(self) -> None:
        for _ in range(len(self.promised)):
            work, what = self.promised.popleft()
            work(*what)


def value_of(ticket: Ticket) -> float:
    (answer,) = ticket.future.result(WAIT).leaves
    assert answer.shape == (ticket.rows, 3)
    assert (answer == answer[0, 0]).all()
    return float(answer[0, 0])


@pytest.mark.parametrize(("most", "expected"), [(8, [8]), (4, [4, 4]), (1, [1] * 8)])
def test_what_comes_in_one_turn_is_answered_in_the_next(make: Any, most: int, expected: list[int]) -> None:
    """Together only as far as the governor joins it."""
    held, loop = make(governor=Stands(1, most)), Loop()
    tickets = [loop.ask(held, float(i)) for i in range(8)]
    assert not any(t.future.done() for t in tickets)
    loop.turn()
    assert [value_of(t) for t in tickets] == list(range(8))
    assert held.scripts[1].calls == expected
    assert held.conductor.tally.requests["answered"] == 8


def test_who_comes_alone_turn_after_turn_does_not_wait_for_one_each_time(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerando.serve.conductor.TURN", 1e3)  # however slow the machine
    held, loop = make(governor=Stands(1, 8)), Loop()
    alone = loop.ask(held)
    loop.turn()
    assert alone.future.done()
    assert loop.ask(held).future.done()
    together = [loop.ask(held) for _ in range(3)]
    assert not any(t.future.done() for t in together)
    loop.turn()
    assert [t.future.result(WAIT).why.rows for t in together] == [3] * 3
    assert not loop.ask(held).future.done()
    loop.turn()


@pytest.mark.parametrize(("seconds", "at_once"), [(0.0, 0.0), (0.003, 10.0)])
def test_what_takes_long_does_not_hold_up_the_loop(make: Any, seconds: float, at_once: float) -> None:
    held, loop = make([Script(seconds)] * 3, governor=Stands(1, 8)), Loop()
    gate = held.scripts[1].gate = threading.Event()
    tickets = [loop.ask(held, float(i), at_once=at_once) for i in range(4)]
    loop.turn()  # would not end before the gate is open
    assert not any(t.future.done() for t in tickets)
    gate.set()
    assert [value_of(t) for t in tickets] == list(range(4))


def test_an_error_in_a_turn_reaches_its_own_caller(make: Any) -> None:
    """By way of the executor: looking for the poisonous rows may take a second."""
    held, loop = make(governor=Stands(2, 8)), Loop()
    fine, bad = [loop.ask(held, float(i)) for i in range(4)], loop.ask(held, float(POISON))
    with held.conductor._lock:  # the executor can't have begun
        loop.turn()
        assert not any(t.future.done() for t in (*fine, bad))
    assert [value_of(t) for t in fine] == list(range(4))
    with pytest.raises(RowsError, match="a poisonous row"):
        bad.future.result(WAIT)


def test_a_loop_does_not_wait_for_cores_that_somebody_else_holds(make: Any) -> None:
    held, loop = make(governor=Stands(1, 8)), Loop()
    with held.conductor._cores:
        ticket = loop.ask(held, 3.0)
        loop.turn()
        assert not ticket.future.done()
    assert value_of(ticket) == 3.0


def test_an_error_of_the_runtimes_own_in_a_turn_fails_who_it_meets(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held, loop = make(governor=Stands(1, 8)), Loop()

    def broken(*_: Any) -> None:
        raise ArithmeticError("no tally")

    with monkeypatch.context() as patch:
        patch.setattr(held.conductor.tally, "answered", broken)
        tickets = [loop.ask(held) for _ in range(3)]
        loop.turn()
        for ticket in tickets:
            with pytest.raises(RowsError, match="no tally"):
                ticket.future.result(WAIT)
    assert held.ask().future.result(WAIT)


@pytest.mark.parametrize("raised", [ZeroDivisionError("not today"), SystemExit("not today")])
def test_a_governor_that_fails_costs_its_requests_and_nobody_else(make: Any, raised: BaseException) -> None:
    class Moody(Stands):
        def decide(self, last: Decision | None, signal: Signal, rungs: tuple[RungState, ...]) -> Decision:
            if self.rows == 0:
                raise raised
            return super().decide(last, signal, rungs)

    governor = Moody(1, 0)
    held, loop = make(governor=governor), Loop()
    tickets = [loop.ask(held), loop.ask(held)]
    loop.turn()
    for ticket in (*tickets, held.ask()):
        with pytest.raises(OverloadedError, match=f"the governor failed on it: {type(raised).__name__}: not today"):
            ticket.future.result(WAIT)
    governor.rows = 1
    assert held.ask().future.result(WAIT)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (lambda now: None, "must give a Decision, but gave None"),
        (lambda now: Decision(99, 1, now, ""), r"ready one \(0, 2\), but is 99"),
        (lambda now: Decision(1, 1, now, ""), r"ready one \(0, 2\), but is 1"),  # it failed
        (lambda now: Decision("2", 1, now, ""), r"ready one \(0, 2\), but is '2'"),  # type: ignore[arg-type]
        (lambda now: Decision(2, 0, now, ""), "rows of a Decision .* but are 0"),
        (lambda now: Decision(2, 1.5, now, ""), "rows of a Decision .* but are 1.5"),  # type: ignore[arg-type]
    ],
)
def test_a_decision_that_can_not_be_followed_costs_its_requests_and_nobody_else(make: Any, said: Any, why: str) -> None:
    class Absent(Stands):
        def decide(self, last: Decision | None, signal: Signal, rungs: tuple[RungState, ...]) -> Decision:
            return super().decide(last, signal, rungs) if self.rows else said(signal.now)

    governor = Absent(2, 0)
    held, loop = make(governor=governor), Loop()
    held.residents.turn_away(1, "failed", "it is to be")
    tickets = [loop.ask(held), held.ask()]
    loop.turn()
    for ticket in tickets:
        with pytest.raises(OverloadedError, match=f"the governor failed on it: .*{why}"):
            ticket.future.result(WAIT)
    with pytest.raises(OverloadedError, match=f"the governor failed on it: .*{why}"):
        held.conductor.answer(Ticket([np.ones((1, 4), np.float32)], 1, time.monotonic()))
    assert held.conductor.tally.requests["refused"] == 3
    governor.rows = 1
    assert held.ask().future.result(WAIT).why.rung == 2


def test_a_rung_that_goes_just_when_it_was_decided_for_costs_nothing(make: Any) -> None:
    class Late(Stands):
        def decide(self, last: Decision | None, signal: Signal, rungs: tuple[RungState, ...]) -> Decision:
            if self.rung == 1:
                held.residents.turn_away(1, "failed", "it is to be")
                self.rung = 2
                return Decision(1, 1, signal.now, "it was there")
            return super().decide(last, signal, rungs)

    held = make(governor=Late(1))
    assert [held.ask().future.result(WAIT).why.rung for _ in range(3)] == [0, 2, 2]


def test_where_it_stood_is_forgotten_when_other_rungs_take_over(make: Any) -> None:
    held, other = make(governor=Stands(2)), make()
    assert held.ask().future.result(WAIT).why.rung == 2
    held.conductor.conduct(replace(held.conductor.company))  # other aims
    assert held.conductor.standing == 2
    held.conductor.conduct(other.conductor.company)
    assert held.conductor.standing == 0


def test_closing_before_the_turn_answers_who_waits_for_it(make: Any) -> None:
    held, loop = make(governor=Stands(1, 8)), Loop()
    tickets = [loop.ask(held, float(i), seconds=math.inf) for i in range(5)]
    held.conductor.close()
    assert all(t.future.done() for t in tickets)
    loop.turn()
    assert [value_of(t) for t in tickets] == list(range(5))
    with pytest.raises(ClosedError):
        loop.ask(held)


def test_a_company_that_takes_over_before_the_turn_loses_nothing(make: Any) -> None:
    held, other, loop = make(governor=Stands(2, 8)), make(governor=Stands(2, 8)), Loop()
    tickets = [loop.ask(held, float(i)) for i in range(5)]
    held.conductor.conduct(other.conductor.company)
    for resident in held.residents:
        resident.runner = None
    loop.turn()
    assert [value_of(t) for t in tickets] == list(range(5))
    assert sum(other.scripts[2].calls) == 5


def test_who_gives_up_before_the_turn_is_not_computed(make: Any) -> None:
    held, loop = make(governor=Stands(2, 8)), Loop()
    gone, stays = loop.ask(held, rows=3), loop.ask(held, rows=2)
    assert gone.future.cancel()
    assert held.conductor.waiting_rows == 2
    loop.turn()
    assert stays.future.result(WAIT)
    assert held.scripts[2].calls == [2]


def test_a_loop_that_has_ended_takes_nobody_with_it(make: Any) -> None:
    held, ended, loop = make(governor=Stands(2, 8)), Loop(), Loop()
    left, mine = ended.ask(held, 1.0), loop.ask(held, 2.0)
    loop.turn()
    assert (value_of(left), value_of(mine)) == (1.0, 2.0)
    left, usual = ended.ask(held, 3.0, at_once=0.0), held.ask()
    assert value_of(left) == 3.0
    assert usual.future.result(WAIT)


STEPS = st.lists(
    st.tuples(st.sampled_from(["ask", "ask", "ask", "hard", "usual", "turn", "cancel", "conduct"]), st.integers(0, 1)),
    max_size=30,
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(steps=STEPS, most=st.sampled_from([1, 3, 8]), closes=st.booleans())
def test_whatever_comes_between_everybody_is_answered_once(
    make: Any, steps: list[tuple[str, int]], most: int, closes: bool
) -> None:
    held, loops = make(governor=Stands(1, most)), (Loop(), Loop())
    asked: list[Ticket] = []
    for number, (step, which) in enumerate(steps):
        loop = loops[which]
        if step in ("ask", "hard"):
            asked.append(loop.ask(held, float(number), 1 + number % 3, at_once=10.0 if step == "ask" else 0.0))
        elif step == "usual":
            asked.append(held.ask(np.full((2, 4), float(number), np.float32)))
        elif step == "turn":
            loop.turn()
        elif step == "cancel" and asked:
            asked[-1].future.cancel()
        elif step == "conduct":
            held.conductor.conduct(replace(held.conductor.company))
    if closes:
        held.conductor.close()
    for loop in loops:
        loop.turn()
    stayed = [t for t in asked if not t.future.cancelled()]
    assert [value_of(t) for t in stayed] == [float(t.leaves[0][0, 0]) for t in stayed]
    held.conductor.close()
    counts = held.conductor.tally.requests
    assert (counts["answered"], counts["cancelled"]) == (len(stayed), len(asked) - len(stayed))
    assert sum(counts.values()) - counts["late"] == len(asked)
    assert sum(held.scripts[1].calls) == sum(t.rows for t in stayed)
    assert held.conductor.waiting_rows == 0


@pytest.mark.parametrize("closes", [False, True])
def test_loops_and_threads_side_by_side_get_their_own_answers(make: Any, closes: bool) -> None:
    held = make(governor=Stands(1, 4))
    asked: list[list[tuple[float, Ticket]]] = [[] for _ in range(6)]

    def client(which: int) -> None:
        loop = Loop()
        for i in range(60):
            value = float(100 * which + i)
            try:
                if which % 3 == 2:
                    ticket = held.ask(np.full((1, 4), value, np.float32))
                else:
                    ticket = loop.ask(held, value, at_once=0.0 if which % 3 == 1 and i % 4 == 0 else 10.0)
            except ClosedError:
                break
            asked[which].append((value, ticket))
            if i % 3 == which % 3:
                loop.turn()
        loop.turn()

    clients = [threading.Thread(target=client, args=(which,)) for which in range(len(asked))]
    for one in clients:
        one.start()
    if closes:
        held.conductor.close()
    for one in clients:
        one.join(WAIT)
        assert not one.is_alive()
    accepted = [pair for some in asked for pair in some]
    assert [value_of(ticket) for _, ticket in accepted] == [value for value, _ in accepted]
    assert closes or len(accepted) == 360
    held.conductor.close()
    assert held.conductor.tally.requests["answered"] == len(accepted)
