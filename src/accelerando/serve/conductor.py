"""The conductor: one executor owns the cores, takes requests from the queue, and asks the governor before each batch.

Nothing polls: the executor sleeps until a request comes, and a second thread until the next deadline passes, so that a
request which is dead leaves the queue also while a long batch runs.  Where nobody else is being served, a caller that
waits anyway runs its own request, which spares two changes of threads; so does one whose request takes next to nothing.
An event loop does so once in a turn, for all requests that have come in it, so that they can share a batch.

Of locks, `cores` is never taken under another, and under the conductor's own no other than the residents' and the
watch's is.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from accelerando.errors import ClosedError, DeadlineError, OverloadedError
from accelerando.serve import batches
from accelerando.serve.batches import Batch
from accelerando.serve.company import Company
from accelerando.serve.deadlines import DeadlineQueue
from accelerando.serve.footing import Footing
from accelerando.serve.governor import GLANCE, Decides
from accelerando.serve.salvage import Salvage, of_rows
from accelerando.serve.status import Stand
from accelerando.serve.tally import Tally
from accelerando.serve.tickets import Answer, Explanation, Ticket
from accelerando.signature import Array

TURN = 2e-3  # usual seconds that a turn of an event loop may spend with requests; what is left is the executor's
BESIDE = 5e-5  # of them, what a batch takes beside its own
MOST_ALONE = 31  # requests that are answered each by itself, where few come, before a turn's wait for others is tried
Soon = Callable[..., object]  # `call_soon` of an event loop
Lost = tuple[Ticket, str, Exception]  # who is not answered, what the tally calls that, and why
log = logging.getLogger(__name__)


class Conductor:
    """The executor with its queue.  Thread-safe.

    Args:
        company: whom it conducts.
        governor: says on which rung to stand; anything with its `decide` will do.
        cores: held while anything computes, by others too.
        waiting_rows: that the queue takes at most.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        company: Company,
        governor: Decides,
        cores: threading.Lock,
        waiting_rows: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tally = Tally()
        self._cores, self._clock = cores, clock
        self._queue = DeadlineQueue(waiting_rows)
        self._footing = Footing(company, governor, self.tally, clock)
        self._salvage = Salvage(cores, clock)
        self._busy_until = 0.0  # when what runs now should be done
        self._lock = threading.RLock()
        self._work, self._dead = threading.Condition(self._lock), threading.Condition(self._lock)
        self._busy = self._closing = False
        self._soon: Soon | None = None  # of the loop that has promised to see to the queue in its next turn
        self._alone = self._calm = 0  # requests yet to be answered without waiting for others, and of how many
        self._guarded = math.inf  # the deadline for which the second thread sleeps
        self._threads = [threading.Thread(target=self._execute_all, name="accelerando-executor", daemon=True)]
        self._threads.append(threading.Thread(target=self._bury, name="accelerando-deadlines", daemon=True))
        for thread in self._threads:
            thread.start()

    # --- what is conducted --------------------------------------------------------------------------------------

    @property
    def company(self) -> Company:
        return self._footing.company

    def conduct(self, company: Company) -> None:
        """Conduct another company, or the same with other aims, from the next batch on."""
        with self._lock:
            self._footing.take(company)

    # --- requests come ------------------------------------------------------------------------------------------

    def submit(self, ticket: Ticket, at_once: float = 0.0) -> None:
        """Put a request into the queue.

        Args:
            at_once: where nobody else is being served and it takes no longer than these seconds, it is answered before
                this returns: two changes of threads would take as long.

        Raises:
            OverloadedError: no rung could answer it in time, or the queue is full.
            ClosedError: the conductor has been closed.
        """
        if (batch := self._taken(ticket, at_once)) is not None:
            try:
                self._serve(batch)
            finally:
                self._rest()

    def submit_soon(self, ticket: Ticket, at_once: float, soon: Soon) -> None:
        """Put a request into the queue, which the caller's event loop sees to in its next turn.

        Whoever has come until then is answered there, together where the governor joins them; what takes longer than
        `at_once`, or would hold up the loop for more than `TURN`, is the executor's.  A turn costs something too: where
        one brought no more than one request, some are answered without it before the next is tried.

        Args:
            soon: the loop's `call_soon`; this is called in its thread.

        Raises:
            OverloadedError, ClosedError: as `submit`.
        """
        if self._alone > 0:
            self._alone -= 1
            self.submit(ticket, at_once)
            return
        with self._lock:
            self._admit(ticket)
            if self._busy:
                self._enqueue(ticket)  # who is busy wakes the executor when it is done
                return
            self._push(ticket)
            if self._soon != soon:  # no loop has promised, or another one, which may have ended since
                self._soon = soon
                soon(self._serve_soon, at_once, soon)

    def answer(self, ticket: Ticket) -> Answer:
        """The answer to a request whose caller waits for it; raises what `submit` does, or what became of it."""
        self.submit(ticket, at_once=math.inf)
        return ticket.future.result()

    def _taken(self, ticket: Ticket, at_once: float) -> Batch | None:
        """A batch of its own, which the caller is to run; none where it was put into the queue."""
        with self._lock:
            self._admit(ticket)
            if at_once and not self._busy and not len(self._queue):
                alone = (ticket.deadline - ticket.arrived, ticket.rows, ticket.floor)
                decision = self._footing.decide((alone,), ticket.rows)
                if decision.rung is not None and self._is_brief(decision.rung, ticket.rows, at_once):
                    self._busy = True
                    return Batch([ticket], self.company, decision.rung, decision.why)
            self._enqueue(ticket)
            return None

    def _admit(self, ticket: Ticket) -> None:
        """Count it as an arrival, and refuse it at once where it is lost already."""
        if self._closing:
            raise ClosedError("the model was closed; load it again")
        now = ticket.arrived
        self._footing.rate.observe(now, ticket.rows, waits=self._busy or len(self._queue) > 0)
        if ticket.deadline == math.inf:
            return
        ahead = self._queue.rows_before(ticket.priority, ticket.deadline)
        busy = max(self._busy_until - now, 0.0) if self._busy else 0.0
        needed = self._footing.soonest(ticket, ahead, busy)
        if now + needed > ticket.deadline:
            self.tally.turned_away("refused", ticket.rows)
            if needed == math.inf:
                raise OverloadedError(
                    "no rung that is ready promises the quality that it asks for; ask for less, or try again later"
                )
            raise OverloadedError(
                f"{ticket.deadline - now:.3g} s were given, but with {ahead} rows before it even the fastest rung "
                f"would answer in about {needed:.3g} s; give it longer, or send less"
            )

    def _enqueue(self, ticket: Ticket) -> None:
        """Put it into the queue for the executor."""
        self._push(ticket)
        if ticket.deadline < self._guarded:
            self._dead.notify()
        if not self._busy:
            self._work.notify()

    def _push(self, ticket: Ticket) -> None:
        if not self._queue.push(ticket):
            self.tally.turned_away("refused", ticket.rows)
            raise OverloadedError(f"{self._queue.rows:,} rows wait already; try again later, or send less")
        ticket.future.add_done_callback(lambda future: self._forget(ticket) if future.cancelled() else None)

    def _forget(self, ticket: Ticket) -> None:
        """Its caller gave up: its rows leave the queue at once."""
        with self._lock:
            if self._queue.remove(ticket):
                self.tally.turned_away("cancelled", ticket.rows)

    # --- requests are answered ----------------------------------------------------------------------------------

    def _execute_all(self) -> None:
        while True:
            with self._lock:
                while self._busy or not (len(self._queue) or self._closing or self.company.may_audit()):
                    self._work.wait()
                if not len(self._queue) and self._closing:
                    self._dead.notify_all()  # whose thread ends with this one
                    return
                batch, lost = self._next() if len(self._queue) else (None, [])
                self._busy = True
            try:
                self._attend(batch, lost)
            finally:
                self._rest()

    def _serve_soon(self, at_once: float, soon: Soon) -> None:
        """See to the queue in an event loop's turn, as far as that may do so; the rest is the executor's."""
        left = TURN
        with self._lock:
            if self._soon == soon:
                self._soon = None
            if self._busy or not len(self._queue):
                self._guard()
                return
            self._busy = True
            self._calm = 0 if len(self._queue) > 1 else min(2 * self._calm + 1, MOST_ALONE)
            self._alone = self._calm
        try:
            while True:
                with self._lock:
                    batch, lost = self._next(at_once, left)
                if batch is None and not lost:
                    return
                cost = batch.company.residents[batch.rung].cost if batch else None
                left -= BESIDE + (cost.seconds(batch.rows) if batch and cost else 0.0)
                self._attend(batch, lost)
        finally:
            self._rest()

    def _attend(self, batch: Batch | None, lost: list[Lost]) -> None:
        """Refuse those who are lost, and serve a batch; audit where there is neither."""
        try:
            for ticket, how, error in lost:
                self._refuse(ticket, how, error)
            if batch is not None:
                self._serve(batch)
            elif not lost:
                self.company.audit(self._cores)
        except Exception as error:  # the executor outlives whatever it meets, or nobody is answered any more
            log.exception("an error of the executor's own")
            for ticket in batch.tickets if batch else ():
                if not ticket.future.done():
                    ticket.future.set_exception(of_rows(error))

    def _rest(self) -> None:
        """What ran is done: whoever waits for the cores may go on."""
        with self._lock:
            self._busy = False
            self._guard()
            if len(self._queue) or self._closing or self.company.may_audit():
                self._work.notify()

    def _guard(self) -> None:
        """Have the deadlines of all who still wait watched: those who wait for a loop's next turn only are not."""
        if self._queue.next_deadline() < self._guarded:
            self._dead.notify()

    def _next(self, at_once: float = math.inf, most: float = math.inf) -> tuple[Batch | None, list[Lost]]:
        """The next batch, and who is lost.

        None where the head had to be refused, where nobody waits, and where the head would take longer than `at_once`
        or its batch than `most` seconds.
        """
        lost: list[Lost] = [(ticket, "expired", _expired()) for ticket in self._queue.expired(self._clock())]
        head = self._queue.head()
        if head is None:
            return None, lost
        try:
            decision = self._footing.decide(self._queue.glance(GLANCE, self._clock()), self._queue.rows)
        except Exception as error:  # a governor of somebody's own fails: that costs its request, not the executor
            log.exception("the governor failed")
            self._queue.remove(head)
            words = f"the governor failed on it: {type(error).__name__}: {error}"
            return None, [*lost, (head, "refused", OverloadedError(words))]
        if decision.rung is None:
            self._queue.remove(head)
            return None, [*lost, (head, "refused", OverloadedError(f"it was refused: {decision.why}"))]
        rows = max(decision.rows, head.rows)
        if not (self._is_brief(decision.rung, head.rows, at_once) and self._is_brief(decision.rung, rows, most)):
            return None, lost
        state = next(s for s in self._footing.states() if s.number == decision.rung)
        tickets = self._queue.take(decision.rows, state.quality)
        return Batch(tickets, self.company, decision.rung, decision.why), lost

    def _is_brief(self, rung: int, rows: int, seconds: float) -> bool:
        """Whether so many rows should take a rung no longer than so many seconds."""
        cost = self.company.residents[rung].cost
        return seconds == math.inf or (cost is not None and cost.seconds(rows) <= seconds)

    def _serve(self, batch: Batch) -> None:
        """Run one batch, and answer each of its requests."""
        resident = batch.company.residents[batch.rung]
        start = self._clock()
        expected = resident.cost.seconds(batch.rows) if resident.cost else 0.0
        self._busy_until = start + expected
        failure: Exception | None = None
        answers: list[list[Array]] = []
        with self._cores:
            alive = [t for t in batch.tickets if t.future.set_running_or_notify_cancel()]
            batch = replace(batch, tickets=alive)
            if not alive:
                return
            try:
                answers = batches.split(batch.company.run(batch.rung, batches.join(alive)), alive)
            except Exception as error:  # noqa: BLE001  whatever a backend raises: each request is tried by itself
                failure = error
            end = self._clock()
        if failure is not None:
            self._save(batch, failure)
            return
        self._salvage.succeeded(batch.rung)
        with self._lock:
            self._footing.ran(expected, start, end)
            self.tally.worked(start, end)
            self.tally.batches += 1
        self._deliver(batch, answers, start, end)

    def _save(self, batch: Batch, failure: Exception) -> None:
        """A batch failed: what can be saved of it is, and only what is poisonous fails."""
        with self._lock:
            company = self.company
            ready = [s.number for s in self._footing.states() if s.ready]
        for saved in self._salvage.each(batch, failure, company, ready):
            if saved.error is None:
                alone = Batch([saved.ticket], company, saved.rung, saved.why)
                self._deliver(alone, [saved.answers], saved.start, saved.end)
            else:
                with self._lock:
                    self.tally.turned_away("failed", saved.ticket.rows)
                saved.ticket.future.set_exception(saved.error)

    def _deliver(self, batch: Batch, answers: Sequence[list[Array]], start: float, end: float) -> None:
        company, number, rows = batch.company, batch.rung, batch.rows
        resident = company.residents[number]
        quality = company.residents.promise(number)
        with self._lock:
            self._footing.answered(quality, company.aims.quality, rows)
            for ticket in batch.tickets:
                queued, late = start - ticket.arrived, end > ticket.deadline
                self.tally.answered(number, quality, ticket.rows, queued, end - start, late)
        for ticket, leaves in zip(batch.tickets, answers, strict=True):
            why = Explanation(
                number, resident.text, resident.rung.quality, start - ticket.arrived, end - start, rows, batch.why,
                company.version,
            )  # fmt: skip
            company.note(ticket, leaves, number)
            ticket.future.set_result(Answer(leaves, why))

    def _bury(self) -> None:
        """Fail each request as soon as its deadline has passed, whatever the executor does."""
        while True:
            with self._lock:
                self._guarded = self._queue.next_deadline()
                if self._closing and not len(self._queue):
                    return
                seconds = self._guarded - self._clock()
                if seconds > 0:
                    self._dead.wait(None if seconds == math.inf else seconds)
                    continue
                dead = self._queue.expired(self._clock())
            for ticket in dead:
                self._refuse(ticket, "expired", _expired())
            if not dead:
                time.sleep(1e-4)  # the clock stands between the deadline and what is past it

    def _refuse(self, ticket: Ticket, how: str, error: Exception) -> None:
        if ticket.future.set_running_or_notify_cancel():
            with self._lock:
                self.tally.turned_away(how, ticket.rows)
            ticket.future.set_exception(error)

    # --- what it tells, and the end -----------------------------------------------------------------------------

    @property
    def waiting_rows(self) -> int:
        return self._queue.rows

    @property
    def stands(self) -> deque[Stand]:
        """The latest changes of rung, oldest first."""
        return self._footing.stands

    @property
    def standing(self) -> int:
        """The rung that is stood on; before the first request, the best that is ready."""
        with self._lock:
            return self._footing.standing

    def figures(self) -> tuple[float, float, float]:
        """Rows that arrive per second, slow-down, utilisation: now."""
        with self._lock:
            now = self._clock()
            return self._footing.rate.at(now), self._footing.slowness(now), self.tally.utilisation(now)

    def close(self) -> None:
        """Take no more requests, answer those that were accepted, and end the threads."""
        with self._lock:
            self._closing = True
            self._work.notify_all()
            self._dead.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()


def _expired() -> DeadlineError:
    return DeadlineError("its deadline passed while it waited; nothing was computed")
