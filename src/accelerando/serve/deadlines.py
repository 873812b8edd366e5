"""The queue of requests: by priority, then the earliest deadline first; rows are counted, not requests."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from itertools import count

from accelerando.serve.tickets import MOST_PRIORITY, Ticket

LOOK_AHEAD = 64  # requests from the head on that are looked at for a batch
_Place = tuple[int, float, int]  # priority, deadline, order of arrival: no two are the same
_FOR_LAST = MOST_PRIORITY + 1  # a request without a priority comes after all that have one


class DeadlineQueue:
    """Requests that wait.  Not thread-safe: its owner holds a lock.

    A sorted list: with thousands of requests that wait, a deletion at its head still takes microseconds.

    Args:
        most_rows: that may wait.
    """

    def __init__(self, most_rows: int = 10_000) -> None:
        self.most_rows = most_rows
        self.rows = 0
        self._order: list[tuple[_Place, Ticket]] = []
        self._places: dict[Ticket, _Place] = {}
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._order)

    def push(self, ticket: Ticket) -> bool:
        """Put a request in its place; whether there was room."""
        if self.rows + ticket.rows > self.most_rows and self._order:
            return False
        place = (ticket.priority or _FOR_LAST, ticket.deadline, next(self._numbers))
        self._places[ticket] = place
        insort(self._order, (place, ticket))
        self.rows += ticket.rows
        return True

    def remove(self, ticket: Ticket) -> bool:
        """Take a request out; whether it was there."""
        place = self._places.pop(ticket, None)
        if place is None:
            return False
        del self._order[bisect_left(self._order, (place,))]
        self.rows -= ticket.rows
        return True

    def rows_before(self, priority: int, deadline: float) -> int:
        """Rows that a new request of this priority and deadline would have to wait for."""
        index = bisect_left(self._order, ((priority or _FOR_LAST, deadline, math.inf),))
        return self.rows if index == len(self._order) else sum(t.rows for _, t in self._order[:index])

    def head(self) -> Ticket | None:
        """The request whose turn it is."""
        return self._order[0][1] if self._order else None

    def glance(self, most: int, now: float) -> tuple[tuple[float, int, float], ...]:
        """Of the first requests: (seconds left, rows, least quality that will do)."""
        return tuple((t.deadline - now, t.rows, t.floor) for _, t in self._order[:most])

    def next_deadline(self) -> float:
        """When the first of all deadlines passes; infinite where there is none."""
        if not self._order:  # so it is for most of the time
            return math.inf
        return min(self._order[i][1].deadline for i in self._starts())

    def expired(self, now: float) -> list[Ticket]:
        """Take out those whose deadline has passed: a request that is dead is never run."""
        dead = []
        for i in self._starts():
            for (_, deadline, _), ticket in self._order[i:]:
                if deadline >= now:
                    break
                dead.append(ticket)
        return [t for t in dead if self.remove(t)]

    def take(self, rows: int, quality: float) -> list[Ticket]:
        """Take out the head and what shares a batch with it.

        Args:
            rows: that the batch may have; the head goes alone where it has more.
            quality: of the rung that answers; a request that asks for more stays, and so does one whose axes, other
                than the batch, have other lengths than the head's.
        """
        taken: list[Ticket] = []
        for _, ticket in self._order[:LOOK_AHEAD]:
            if not taken:
                rows -= ticket.rows
            elif ticket.rows > rows:
                break
            elif ticket.floor > quality or ticket.likeness != taken[0].likeness:
                continue
            else:
                rows -= ticket.rows
            taken.append(ticket)
            if rows <= 0:
                break
        for ticket in taken:
            self.remove(ticket)
        return taken

    def _starts(self) -> list[int]:
        """Where each priority begins: within one, deadlines grow."""
        starts = []
        index = 0
        while index < len(self._order):
            starts.append(index)
            index = bisect_left(self._order, ((self._order[index][0][0] + 1, -math.inf, -1),))
        return starts
