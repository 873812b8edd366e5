"""The requests that wait: who is let in, and who is lost.

A thread sleeps until the next deadline passes, so that a request which is dead leaves also while a long batch runs.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from accelerando.errors import DeadlineError, OverloadedError
from accelerando.serve.deadlines import DeadlineQueue
from accelerando.serve.tally import Tally
from accelerando.serve.tickets import Answer, Ticket

Lost = tuple[Ticket, str, Exception]  # who is not answered, what the tally calls that, and why


class WaitingRoom:
    """The queue with its door and its clock.  Whoever uses it holds the lock, unless it says otherwise.

    Args:
        lock: of all that the conductor changes.
        rows: that may wait.
        tally: told of each that is turned away.
        clock: seconds, monotonic.
    """

    def __init__(self, lock: threading.RLock, rows: int, tally: Tally, clock: Callable[[], float]) -> None:
        self.queue = DeadlineQueue(rows)
        self._lock, self._tally, self._clock = lock, tally, clock
        self._dead = threading.Condition(lock)
        self._closing = False
        self._guarded = math.inf  # the deadline for which the thread sleeps
        self._thread = threading.Thread(target=self._bury, name="accelerando-deadlines", daemon=True)
        self._thread.start()

    def admit(self, ticket: Ticket, soonest: Callable[[Ticket, int], float]) -> None:
        """Refuse at once who is lost already.

        Args:
            soonest: seconds until it could be answered, with so many rows before it.

        Raises:
            OverloadedError: no rung could answer it in time.
        """
        if ticket.deadline == math.inf:
            return
        ahead = self.queue.rows_before(ticket.priority, ticket.deadline)
        needed = soonest(ticket, ahead)
        if ticket.arrived + needed <= ticket.deadline:
            return
        self._tally.turned_away("refused", ticket.rows)
        if needed == math.inf:
            raise OverloadedError(
                "no rung that is ready promises the quality that it asks for; ask for less, or try again later"
            )
        raise OverloadedError(
            f"{ticket.deadline - ticket.arrived:.3g} s were given, but with {ahead} rows before it even the fastest "
            f"rung would answer in about {needed:.3g} s; give it longer, or send less"
        )

    def enter(self, ticket: Ticket, guarded: bool = True) -> None:
        """Let it wait.

        Args:
            guarded: its deadline is watched; else somebody sees to the queue, or calls `guard`, before long.

        Raises:
            OverloadedError: no more rows may wait.
        """
        if not self.queue.push(ticket):
            self._tally.turned_away("refused", ticket.rows)
            raise OverloadedError(f"{self.queue.rows:,} rows wait already; try again later, or send less")

        def forget(future: Future[Answer]) -> None:
            if future.cancelled():
                self._forget(ticket)

        ticket.future.add_done_callback(forget)
        if guarded:
            self.guard()

    def guard(self) -> None:
        """Have the deadlines of all who wait watched."""
        if self.queue.next_deadline() < self._guarded:
            self._dead.notify()

    def expired(self) -> list[Lost]:
        """Those whose deadline has passed; they have left."""
        words = "its deadline passed while it waited; nothing was computed"
        return [(ticket, "expired", DeadlineError(words)) for ticket in self.queue.expired(self._clock())]

    def refuse(self, ticket: Ticket, how: str, error: Exception) -> None:
        """Tell somebody who has left the queue that there will be no answer.  Called without the lock."""
        if self.begins(ticket):
            with self._lock:
                self._tally.turned_away(how, ticket.rows)
            ticket.settle(error)

    def begins(self, ticket: Ticket) -> bool:
        """Whether somebody who has left the queue is still there: from now on nobody can give up any more.

        Called without the lock, once for each.
        """
        if ticket.begin():
            return True
        with self._lock:  # it was cancelled on the way from the queue to here, where `_forget` does not find it
            self._tally.turned_away("cancelled", ticket.rows)
        return False

    def close(self) -> None:
        """End the thread, once nobody waits any longer.  Called without the lock."""
        with self._lock:
            self._closing = True
            self._dead.notify_all()
        self._thread.join()

    def _forget(self, ticket: Ticket) -> None:
        """Its caller gave up: its rows leave the queue at once."""
        with self._lock:
            if self.queue.remove(ticket):
                self._tally.turned_away("cancelled", ticket.rows)

    def _bury(self) -> None:
        """Fail each request as soon as its deadline has passed, whatever else is being done."""
        while True:
            with self._lock:
                self._guarded = self.queue.next_deadline()
                if self._closing and not len(self.queue):
                    return
                seconds = self._guarded - self._clock()
                if seconds > 0:
                    self._dead.wait(min(seconds, threading.TIMEOUT_MAX))
                    continue
                lost = self.expired()
            for one in lost:
                self.refuse(*one)
            if not lost:
                time.sleep(1e-4)  # the clock stands between the deadline and what is past it
