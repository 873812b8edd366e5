"""The conductor: one executor owns the cores, takes requests from the queue, and asks the governor before each batch.

Nothing polls: the executor sleeps until a request comes.  Where nobody else is being served, a caller that waits anyway
runs its own request, which spares two changes of threads; so does one whose request takes next to nothing.  An event
loop does so once in a turn, for all requests that have come in it, so that they can share a batch; what then takes
longer than was foreseen, or fails, it leaves to the executor.

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
from concurrent.futures import Future
from functools import partial

from accelerando.errors import ClosedError, OverloadedError, UsageError
from accelerando.serve import batches
from accelerando.serve.batches import Batch
from accelerando.serve.company import Company
from accelerando.serve.footing import Footing
from accelerando.serve.governor import GLANCE, Decides
from accelerando.serve.interrupts import OURS, apart_from_ours, is_interrupt
from accelerando.serve.isolation import LostError, Unfinished
from accelerando.serve.salvage import Salvage, none_left, of_rows
from accelerando.serve.status import Stand
from accelerando.serve.tally import Tally
from accelerando.serve.tickets import Answer, Explanation, Ticket
from accelerando.serve.waiting_room import Lost, WaitingRoom
from accelerando.signature import Array

TURN = 2e-3  # usual seconds that a turn of an event loop may spend with requests; what is left is the executor's
BESIDE = 5e-5  # of them, what a batch takes beside its own
MOST_ALONE = 31  # requests that are answered each by itself, where few come, before a turn's wait for others is tried
PATIENCE = 1e-3  # seconds that an event loop waits for another process
Soon = Callable[..., object]  # `call_soon` of an event loop
Left = Callable[[], None]  # what is left to do of a batch
log = logging.getLogger(__name__)


class Conductor:
    """The executor with its queue.  Thread-safe.

    Args:
        company: whom it conducts, until `conduct` says otherwise.
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
        self.company = company
        self.tally = Tally()
        self._cores, self._clock = cores, clock
        self._footing = Footing(company, governor, self.tally, clock)
        self._salvage = Salvage(cores, clock)
        self._busy_until = 0.0  # when what runs now should be done
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._room = WaitingRoom(self._lock, waiting_rows, self.tally, clock)
        self._queue = self._room.queue
        self._busy = 0  # the thread that serves, as `get_ident` tells; none where it is 0
        self._closing = False
        self._left: Left | None = None  # by an event loop, of a batch that it began; all are busy until it is done
        self._soon: Soon | None = None  # of the loop that has promised to see to the queue in its next turn
        self._alone = self._calm = 0  # requests yet to be answered without waiting for others, and of how many
        self._executor = threading.Thread(target=self._execute_all, name=f"{OURS}executor", daemon=True)
        self._executor.start()

    def conduct(self, company: Company) -> None:
        """Conduct another company, or the same with other aims, from the next batch on."""
        with self._lock:
            self.company = company
            self._footing.take(company)

    # --- requests come ------------------------------------------------------------------------------------------

    def submit(self, ticket: Ticket, at_once: float = 0.0, patience: float = math.inf) -> Future[Answer]:
        """Put a request into the queue.

        Args:
            at_once: where nobody else is being served and it should take no longer than these seconds, it is run before
                this returns: two changes of threads would take as long.
            patience: seconds that the caller can then wait for another process; also, where it is not endless, it can't
                wait until a failure has been looked into.

        Returns:
            The ticket's future.

        Raises:
            OverloadedError: no rung could answer it in time, or the queue is full.
            ClosedError: the conductor has been closed, or no rung can answer any longer.
        """
        future = ticket.future  # made before anybody else knows of it
        self._submit(ticket, at_once, patience)
        return future

    def _submit(self, ticket: Ticket, at_once: float, patience: float = math.inf) -> None:
        if (batch := self._taken(ticket, at_once)) is not None:
            left = None
            try:
                left = self._attend(batch, [], patience)
            finally:
                self._rest(left)

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
            self.submit(ticket, at_once, PATIENCE)
            return
        with self._lock:
            self._come(ticket)
            self._admit(ticket)
            if self._busy:
                self._room.enter(ticket)  # who is busy wakes the executor when it is done
                return
            self._room.enter(ticket, guarded=False)
            if self._soon != soon:  # no loop has promised, or another one, which may have ended since
                self._soon = soon
                soon(self._serve_soon, at_once, soon)

    def answer(self, ticket: Ticket) -> Answer:
        """The answer to a request whose caller waits for it.

        Raises what `submit` does, or what became of it; UsageError where the caller is a callback of another request.
        """
        if self._busy == threading.get_ident():
            raise UsageError(
                "the model was called by a callback of one of its answers, in the very thread that has to answer it, "
                "and would wait for ever; use `submit` there, or call it in another thread"
            )
        self._submit(ticket, at_once=math.inf)
        return ticket.result()

    def _taken(self, ticket: Ticket, at_once: float) -> Batch | None:
        """A batch of its own, which the caller is to run; none where it was put into the queue."""
        with self._lock:
            self._come(ticket)
            if at_once and not self._busy and not self._queue.rows:
                alone = (ticket.deadline - ticket.arrived, ticket.rows, ticket.floor)
                decision = self._footing.decide((alone,), ticket.rows)
                if decision.rung is not None and self._is_brief(decision.rung, ticket.rows, at_once):
                    self._busy = threading.get_ident()
                    return Batch([ticket], self.company, decision.rung, decision.why)
            self._admit(ticket)
            self._room.enter(ticket)
            if not self._busy:
                self._work.notify()
            return None

    def _come(self, ticket: Ticket) -> None:
        """Count it as an arrival, where there is anybody to answer it."""
        if self._closing:
            raise ClosedError("the model was closed; load it again")
        if not self.company.residents.ready:
            self.tally.turned_away("refused", ticket.rows)
            raise none_left(self.company)
        self._footing.rate.observe(ticket.arrived, ticket.rows, waits=bool(self._busy or self._queue.rows))

    def _admit(self, ticket: Ticket) -> None:
        """Refuse it at once where it is lost already."""
        busy = max(self._busy_until - ticket.arrived, 0.0) if self._busy else 0.0
        self._room.admit(ticket, partial(self._footing.soonest, busy=busy))

    # --- requests are answered ----------------------------------------------------------------------------------

    def _execute_all(self) -> None:
        while (do := self._to_do()) is not None:
            try:
                do()
            finally:
                self._rest()

    def _to_do(self) -> Callable[[], object] | None:
        """What the executor is to do next, as soon as there is something; None when all is over."""
        with self._lock:
            while self._left is None and (self._busy or not self._is_wanted()):
                self._work.wait()
            if self._left is not None:
                left, self._left = self._left, None
                return left
            if not len(self._queue) and self._closing:
                return None
            batch, lost = self._next() if len(self._queue) else (None, [])
            self._busy = threading.get_ident()
            return partial(self._attend, batch, lost)

    def _is_wanted(self) -> bool:
        """Whether there is anything for the executor to do, besides what an event loop left to it."""
        return self._queue.rows > 0 or self._closing or self.company.may_audit()

    def _serve_soon(self, at_once: float, soon: Soon) -> None:
        """See to the queue in an event loop's turn, as far as that may do so; the rest is the executor's."""
        seconds = TURN
        with self._lock:
            if self._soon == soon:
                self._soon = None
            if self._busy or not len(self._queue):
                self._room.guard()
                return
            self._busy = threading.get_ident()
            self._calm = 0 if len(self._queue) > 1 else min(2 * self._calm + 1, MOST_ALONE)
            self._alone = self._calm
        left: Left | None = None
        try:
            while left is None:
                with self._lock:
                    batch, lost = self._next(at_once, seconds)
                if batch is None and not lost:
                    return
                cost = batch.company.residents[batch.rung].cost if batch else None
                seconds -= BESIDE + (cost.seconds(batch.rows) if batch and cost else 0.0)
                left = self._attend(batch, lost, PATIENCE)
        finally:
            self._rest(left)

    def _attend(self, batch: Batch | None, lost: list[Lost], patience: float = math.inf) -> Left | None:
        """Refuse those who are lost, and serve a batch; audit where there is neither.  Returns what is left to do."""
        try:
            for one in lost:
                self._room.refuse(*one)
            if batch is not None:
                return self._serve(batch, patience)
            if not lost:
                self.company.audit(self._cores)
        except BaseException as error:  # the executor outlives it, or nobody is answered any more
            self._give_up(batch.tickets if batch else (), error)
            if is_interrupt(error):
                raise
        return None

    def _give_up(self, tickets: Sequence[Ticket], error: BaseException) -> None:
        """These requests were taken for a batch, and something else than the model failed, or was interrupted."""
        if not is_interrupt(error):
            log.error("an error of the executor's own", exc_info=error)
        for ticket in tickets:
            if ticket.is_open() or (not ticket.future.done() and self._room.begins(ticket)):
                self._fail(ticket, of_rows(error))

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        with self._lock:
            self.tally.turned_away("failed", ticket.rows)
        ticket.settle(error)

    def _rest(self, left: Left | None = None) -> None:
        """What ran is done, but for what is left to the executor: whoever waits for the cores may go on."""
        with self._lock:
            self._left, self._busy = left, (self._executor.ident or 0) if left is not None else 0
            if self._queue.rows:
                self._room.guard()
            if left is not None or self._is_wanted():
                self._work.notify()

    def _next(self, at_once: float = math.inf, most: float = math.inf) -> tuple[Batch | None, list[Lost]]:
        """The next batch, and who is lost.

        None where the head had to be refused, where nobody waits, and where the head would take longer than `at_once`
        or its batch than `most` seconds.
        """
        lost = self._room.expired()
        head = self._queue.head()
        if head is None:
            return None, lost
        decision = self._footing.decide(self._queue.glance(GLANCE, self._clock()), self._queue.rows)
        if decision.rung is None:
            self._queue.remove(head)
            return None, [*lost, (head, "refused", OverloadedError(f"it was refused: {decision.why}"))]
        rows = max(decision.rows, head.rows)
        if not (self._is_brief(decision.rung, head.rows, at_once) and self._is_brief(decision.rung, rows, most)):
            return None, lost
        tickets = self._queue.take(decision.rows, self.company.residents.promise(decision.rung))
        return Batch(tickets, self.company, decision.rung, decision.why), lost

    def _is_brief(self, rung: int, rows: int, seconds: float) -> bool:
        """Whether so many rows should take a rung no longer than so many seconds."""
        if seconds == math.inf:
            return True
        cost = self.company.residents[rung].cost
        return cost is not None and cost.seconds(rows) <= seconds

    def _serve(self, batch: Batch, patience: float = math.inf) -> Left | None:
        """Run one batch, and answer each of its requests.

        Returns:
            What is left to do, for the executor, where the caller has no endless patience: waiting for the cores or for
            another process (which then holds them), or looking into a failure.
        """
        resident = batch.company.residents[batch.rung]
        start = self._clock()
        expected = resident.cost.seconds(batch.rows) if resident.cost else 0.0
        self._busy_until = start + expected
        if not self._cores.acquire(timeout=patience if patience < math.inf else -1):
            return partial(self._complete, batch, partial(self._serve, batch))
        alive = list(filter(self._room.begins, batch.tickets))
        if not alive:
            self._cores.release()
            return None
        if len(alive) < len(batch.tickets):
            batch = batch._replace(tickets=alive)

        def run() -> list[Array]:
            return batch.company.run(batch.rung, batches.join(alive), patience)

        return self._finish(batch, run, start, expected, patience)

    def _finish(
        self, batch: Batch, run: Callable[[], list[Array]], start: float, expected: float, patience: float = math.inf
    ) -> Left | None:
        """Run a batch that holds the cores, or wait until it has run; give them back, and answer."""
        failure: Exception | None = None
        unfinished = False
        try:
            answers = batches.split(run(), batch.tickets)
        except Unfinished as running:
            unfinished = True
            rest = partial(self._finish, batch, running.wait, start, expected)
            return partial(self._complete, batch, rest)
        except Exception as error:  # noqa: BLE001  whatever a backend raises: each request is tried by itself
            failure = error
        finally:
            if not unfinished:
                self._cores.release()
        if failure is not None:
            if patience < math.inf:
                return partial(self._complete, batch, partial(self._save, batch, failure))
            self._save(batch, failure)
            return None
        end = self._clock()
        self._salvage.succeeded(batch.rung)
        with self._lock:
            self._footing.ran(expected, start, end)
            self.tally.worked(start, end)
            self.tally.batches += 1
        self._deliver(batch, answers, start, end)
        return None

    def _complete(self, batch: Batch, rest: Callable[[], object]) -> None:
        """Do what was left to do of a batch."""
        try:
            rest()
        except BaseException as error:  # noqa: BLE001  logged
            self._give_up(batch.tickets, error)

    def _save(self, batch: Batch, failure: Exception) -> None:
        """A batch failed: what can be saved of it is, and only what is poisonous fails."""
        with self._lock:
            company = self.company
            ready = [s.number for s in self._footing.states() if s.ready]
            # Then those that the goal rules out, the fastest first: else nobody could tell the rung from the rows.
            ready += [s.number for s in reversed(company.residents.states) if s.ready and s.number not in ready]
            self.tally.losses += isinstance(failure, LostError)
        if isinstance(failure, LostError):
            whose = {"bundle": str(company.residents.bundle.path), "rung": batch.rung, "reason": str(failure)}
            log.warning("the process that computes was lost; another takes its place", extra=whose)
        for saved in self._salvage.each(batch, failure, company, ready):
            if saved.error is None:
                alone = Batch([saved.ticket], company, saved.rung, saved.why)
                self._deliver(alone, [saved.answers], saved.start, saved.end)
            else:
                self._fail(saved.ticket, saved.error)

    def _deliver(self, batch: Batch, answers: Sequence[list[Array]], start: float, end: float) -> None:
        company, number, rows = batch.company, batch.rung, batch.rows
        resident = company.residents[number]
        quality = company.residents.promise(number)
        with self._lock:
            self._footing.answered(quality, company.aims.quality, rows)
            for ticket in batch.tickets:
                queued, late = start - ticket.arrived, end > ticket.deadline
                self.tally.answered(quality, ticket.rows, queued, end - start, late)
        for ticket, leaves in zip(batch.tickets, answers, strict=True):
            why = Explanation(
                number, resident.text, resident.rung.quality, start - ticket.arrived, end - start, rows, batch.why,
                company.version,
            )  # fmt: skip
            company.note(ticket, leaves, number)
            ticket.settle(Answer(leaves, why))

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

    def apart(self, work: Callable[[], object]) -> None:
        """Do what waits for the answers of those who were accepted; by another thread where this one has to give them.

        So it is in callbacks of requests, and where the last reference to a model is dropped there, or is found by the
        collector in a thread of ours.
        """
        apart_from_ours(work, self._busy)

    def close(self) -> None:
        """Take no more requests, answer those that were accepted, and end the threads; see `apart`."""
        with self._lock:
            self._closing = True
            self._work.notify_all()
        self._executor.join()
        self._room.close()
