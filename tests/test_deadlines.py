"""The queue: no request is lost or comes twice, and the order is that of priority, then deadline."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from accelerando.serve.deadlines import DeadlineQueue
from accelerando.serve.tickets import MOST_PRIORITY, Ticket


def ticket(
    rows: int = 1, deadline: float = math.inf, priority: int = 0, floor: float = -math.inf, width: int = 4
) -> Ticket:
    return Ticket([np.zeros((rows, width), np.float32)], rows, 0.0, deadline, floor, priority)


def test_the_earliest_deadline_goes_first() -> None:
    queue = DeadlineQueue()
    late, soon, never = ticket(deadline=9), ticket(deadline=3), ticket()
    for one in (late, never, soon):
        queue.push(one)
    assert [queue.take(1, 0.0) for _ in range(3)] == [[soon], [late], [never]]


def test_the_usual_comes_after_every_priority() -> None:
    queue = DeadlineQueue()
    usual, last = ticket(deadline=1), ticket(deadline=9, priority=MOST_PRIORITY)
    queue.push(usual)
    queue.push(last)
    assert [queue.take(1, 0.0)[0] for _ in range(2)] == [last, usual]


def test_a_priority_goes_before_a_deadline() -> None:
    queue = DeadlineQueue()
    usual, urgent, first = ticket(deadline=1), ticket(deadline=9, priority=2), ticket(deadline=10, priority=1)
    for one in (usual, urgent, first):
        queue.push(one)
    assert [queue.take(1, 0.0)[0] for _ in range(3)] == [first, urgent, usual]


def test_rows_are_counted_and_the_cap_is_kept() -> None:
    queue = DeadlineQueue(most_rows=10)
    assert queue.push(ticket(6))
    assert not queue.push(ticket(5))
    assert queue.push(ticket(4))
    assert (queue.rows, len(queue)) == (10, 2)
    assert [t.rows for t in queue.take(6, 0.0)] == [6]
    assert queue.rows == 4


def test_the_head_goes_alone_where_it_has_more_rows_than_a_batch() -> None:
    queue = DeadlineQueue()
    queue.push(ticket(9, deadline=1))
    queue.push(ticket(1, deadline=2))
    assert [t.rows for t in queue.take(4, 0.0)] == [9]


def test_what_asks_for_more_quality_or_has_another_shape_stays() -> None:
    queue = DeadlineQueue()
    head, picky, wide, like = (
        ticket(deadline=1),
        ticket(deadline=2, floor=0.9),
        ticket(deadline=3, width=5),
        ticket(deadline=4),
    )
    for one in (head, picky, wide, like):
        queue.push(one)
    assert queue.take(10, quality=0.8) == [head, like]
    assert queue.rows == 2


def test_the_dead_leave_at_once_whatever_their_priority() -> None:
    queue = DeadlineQueue()
    dead = [ticket(deadline=1), ticket(deadline=2, priority=3)]
    alive = [ticket(deadline=8), ticket(deadline=9, priority=3)]
    for one in (*alive, *dead):
        queue.push(one)
    assert queue.next_deadline() == 1
    assert set(queue.expired(now=5)) == set(dead)
    assert queue.expired(now=5) == []
    assert queue.rows == 2


REQUESTS = st.builds(
    ticket, st.integers(1, 5), st.floats(0, 10), st.sampled_from([0, 0, 0, 1, 2]), st.sampled_from([0.0, 0.5, 0.9])
)


@given(st.lists(st.one_of(REQUESTS, st.sampled_from(["take", "expire", "remove"])), max_size=60), st.randoms())
def test_no_request_is_lost_or_comes_twice(steps: list[Ticket | str], random: object) -> None:
    queue, given_in, out = DeadlineQueue(), [], []
    for now, step in enumerate(steps):
        if isinstance(step, Ticket):
            queue.push(step)
            given_in.append(step)
        elif step == "take" and len(queue):
            out += queue.take(4, 0.6)
        elif step == "expire":
            dead = queue.expired(now / 6)
            assert all(t.deadline < now / 6 for t in dead)
            out += dead
        elif step == "remove" and given_in:
            chosen = given_in[now % len(given_in)]
            if queue.remove(chosen):
                out.append(chosen)
            assert not queue.remove(chosen)
        assert queue.rows == sum(t.rows for t in given_in) - sum(t.rows for t in out)
        shown = queue.glance(100, 0.0)
        assert sum(rows for _, rows, _ in shown) == queue.rows
    while len(queue):
        out += queue.take(3, 1.0)
    assert len(out) == len(set(out)) == len(given_in)
