"""The conductor: one executor owns the cores, takes requests from the queue, and asks the governor before each batch.

Nothing polls: the executor sleeps until a request comes, and a second thread until the next deadline passes, so that a
request which is dead leaves the queue also while a long batch runs.  Where nobody else is being served, a caller that
waits anyway runs its own request, which spares two changes of threads; so does one whose request takes next to nothing.

Of locks, `cores` is never taken under another, and under the conductor's own no other than the residents' and the
watch's is.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from accelerando.errors import ClosedError, DeadlineError, OverloadedError, RowsError
from accelerando.serve import batches
from accelerando.serve.company import Company
from accelerando.serve.deadlines import DeadlineQueue
from accelerando.serve.estimates import ArrivalRate, Slowdown
from accelerando.serve.governor import GLANCE, Decides, Decision, RungState, Signal, soonest
from accelerando.serve.status import Stand
from accelerando.serve.tally import Tally
from accelerando.serve.tickets import Answer, Explanation, Ticket
from accelerando.signature import Array

log = logging.getLogger(__name__)
STANDS = 100  # latest changes of rung that are remembered
FAILURES = 3  # in a row, of requests that another rung then answered: the rung is given up
SAVINGS = 1000  # rows whose surplus of quality the bank keeps: what was saved long ago is not spent today
SLOW_SECONDS = 1.0  # in which what was seen of the machine's slowness loses two thirds of its weight
WISH_SECONDS = 0.5  # how often it is asked whether a rung that is out would have been stood on


@dataclass(frozen=True)
class Batch:
    """Requests that are to run together: on which rung of which company, and why there."""

    tickets: list[Ticket]
    company: Company
    rung: int
    why: str

    @property
    def rows(self) -> int:
        return sum(t.rows for t in self.tickets)


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
        self.tally, self.stands = Tally(), deque[Stand](maxlen=STANDS)
        self._governor, self._cores, self._clock = governor, cores, clock
        self._queue = DeadlineQueue(waiting_rows)
        self._rate, self._slowdown = ArrivalRate(), Slowdown()
        self._last: Decision | None = None
        self._failures: Counter[int] = Counter()
        self._asked_wish = self._observed = -math.inf
        self._busy_until = 0.0  # when what runs now should be done
        self._lock = threading.RLock()
        self._work, self._dead = threading.Condition(self._lock), threading.Condition(self._lock)
        self._busy = self._closing = False
        self._guarded = math.inf  # the deadline for which the second thread sleeps
        self.conduct(company)
        self._threads = [threading.Thread(target=self._execute_all, name="accelerando-executor", daemon=True)]
        self._threads.append(threading.Thread(target=self._bury, name="accelerando-deadlines", daemon=True))
        for thread in self._threads:
            thread.start()

    # --- what is conducted --------------------------------------------------------------------------------------

    @property
    def company(self) -> Company:
        return self._company

    def conduct(self, company: Company) -> None:
        """Conduct another company, or the same with other aims, from the next batch on."""
        with self._lock:
            self._company = company
            self._bank = 0.0
            self._seen: tuple[tuple[RungState, ...], tuple[RungState, ...]] | None = None

    def _states(self) -> tuple[RungState, ...]:
        """The rungs as the governor may see them; made anew when one was loaded or turned away.  With the lock held."""
        raw = self._company.residents.states
        if self._seen is None or self._seen[0] is not raw:
            self._seen = raw, self._company.states()
            self._company.compare_with_best()
        return self._seen[1]

    def _states_for(self, rows: int) -> tuple[RungState, ...]:
        """The rungs, as they are for a request of so many rows, which goes piece by piece where it has too many."""
        states = self._states()
        if all(s.most_rows >= rows for s in states):
            return states
        return tuple(replace(s, most_rows=max(s.most_rows, rows)) for s in states)

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
            self._serve_here(batch)

    def answer(self, ticket: Ticket) -> Answer:
        """The answer to a request whose caller waits for it; raises what `submit` does, or what became of it."""
        self.submit(ticket, at_once=math.inf)
        return ticket.future.result()

    def _taken(self, ticket: Ticket, at_once: float) -> Batch | None:
        """A batch of its own, which the caller is to run; none where it was put into the queue."""
        with self._lock:
            self._admit(ticket)
            if at_once and not self._busy and not len(self._queue):
                decision = self._decide(((ticket.deadline - ticket.arrived, ticket.rows, ticket.floor),), ticket.rows)
                if decision.rung is not None:
                    cost = self._company.residents[decision.rung].cost
                    if at_once == math.inf or (cost is not None and cost.seconds(ticket.rows) <= at_once):
                        self._busy = True
                        return Batch([ticket], self._company, decision.rung, decision.why)
            self._enqueue(ticket)
            return None

    def _serve_here(self, batch: Batch) -> None:
        try:
            self._serve(batch)
        finally:
            self._rest()

    def _admit(self, ticket: Ticket) -> None:
        """Count it as an arrival, and refuse it at once where it is lost already."""
        if self._closing:
            raise ClosedError("the model was closed; load it again")
        now = ticket.arrived
        self._rate.observe(now, ticket.rows, waits=self._busy or len(self._queue) > 0)
        if ticket.deadline == math.inf:
            return
        ahead = self._queue.rows_before(ticket.priority, ticket.deadline)
        busy = max(self._busy_until - now, 0.0) if self._busy else 0.0
        needed = soonest(self._states_for(ticket.rows), ticket.rows, ahead, busy, self._slowness(now), ticket.floor)
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
        if not self._queue.push(ticket):
            self.tally.turned_away("refused", ticket.rows)
            raise OverloadedError(f"{self._queue.rows:,} rows wait already; try again later, or send less")
        ticket.future.add_done_callback(lambda future: self._forget(ticket) if future.cancelled() else None)
        if ticket.deadline < self._guarded:
            self._dead.notify()
        if not self._busy:
            self._work.notify()

    def _forget(self, ticket: Ticket) -> None:
        """Its caller gave up: its rows leave the queue at once."""
        with self._lock:
            if self._queue.remove(ticket):
                self.tally.turned_away("cancelled", ticket.rows)

    def _slowness(self, now: float) -> float:
        """How much slower than usual calls are, as far as is known: what was seen fades while nothing runs.

        Else a machine that was slow once would be thought so for ever, for nothing is admitted that could tell.
        """
        return float(self._slowdown.factor() ** math.exp(-(now - self._observed) / SLOW_SECONDS))

    # --- requests are answered ----------------------------------------------------------------------------------

    def _execute_all(self) -> None:
        while True:
            with self._lock:
                while self._busy or not (len(self._queue) or self._closing or self._company.may_audit()):
                    self._work.wait()
                if not len(self._queue) and self._closing:
                    self._dead.notify_all()  # whose thread ends with this one
                    return
                batch, lost = self._next() if len(self._queue) else (None, [])
                audit = batch is None and not lost
                self._busy = audit or batch is not None
            try:
                for ticket, how, error in lost:
                    self._refuse(ticket, how, error)
                if batch is not None:
                    self._serve(batch)
                elif audit:
                    self._look()
            except Exception as error:  # the executor outlives whatever it meets, or nobody is answered any more
                log.exception("an error of the executor's own")
                for ticket in batch.tickets if batch else ():
                    if not ticket.future.done():
                        ticket.future.set_exception(_of_rows(error))
            finally:
                self._rest()

    def _rest(self) -> None:
        """What ran is done: whoever waits for the cores may go on."""
        with self._lock:
            self._busy = False
            if len(self._queue) or self._closing or self._company.may_audit():
                self._work.notify()

    def _next(self) -> tuple[Batch | None, list[tuple[Ticket, str, Exception]]]:
        """The next batch, or none where the head had to be refused; and who is lost, how, and why."""
        lost: list[tuple[Ticket, str, Exception]] = []
        lost += [(ticket, "expired", _expired()) for ticket in self._queue.expired(self._clock())]
        head = self._queue.head()
        if head is None:
            return None, lost
        decision = self._decide(self._queue.glance(GLANCE, self._clock()), self._queue.rows)
        if decision.rung is None:
            self._queue.remove(head)
            return None, [*lost, (head, "refused", OverloadedError(f"it was refused: {decision.why}"))]
        state = next(s for s in self._states() if s.number == decision.rung)
        tickets = self._queue.take(decision.rows, state.quality)
        return Batch(tickets, self._company, decision.rung, decision.why), lost

    def _decide(self, queue: tuple[tuple[float, int, float], ...], rows: int) -> Decision:
        now, aims = self._clock(), self._company.aims
        signal = Signal(
            now, rows, queue, self._rate.pressing(now), self._slowness(now), aims.patience,
            math.inf if aims.quality == -math.inf else self._bank, aims.quality,
        )  # fmt: skip
        decision = self._governor.decide(self._last, signal, self._states_for(queue[0][1]))
        if decision.rung is not None:
            if self._last is None or self._last.rung != decision.rung:
                self.tally.switches += self._last is not None
                self.stands.append(Stand(time.time(), decision.rung, decision.why))
            self._last = decision
        if self._company.residents.cap is not None and now - self._asked_wish > WISH_SECONDS:
            self._asked_wish = now
            dreamt = tuple(replace(s, ready=s.ready or s.number in aims.rungs) for s in self._states())
            wished = self._governor.decide(self._last, signal, dreamt).rung
            if wished is not None:
                self._company.residents.missed(wished, now)
        return decision

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
            self._serve_alone(batch, failure)
            return
        self._failures[batch.rung] = 0
        with self._lock:
            self._slowdown.observe(expected, end - start)
            self._observed = end
            self.tally.worked(start, end)
            self.tally.batches += 1
        self._deliver(batch, answers, start, end)

    def _serve_alone(self, batch: Batch, failure: Exception) -> None:
        """A batch failed: each request by itself, on its rung and then on another; only what is poisonous fails."""
        with self._lock:
            company = self._company
            ready = [s.number for s in self._states() if s.ready]
        ready.sort(key=lambda n: n != batch.rung)  # its own first: its process may have died of something else
        for ticket in batch.tickets:
            for number in ready[:2]:
                start = self._clock()
                try:
                    with self._cores:
                        answers = company.run(number, ticket.leaves)
                except Exception as error:  # noqa: BLE001  as above
                    failure = error
                    continue
                why = f"rung {batch.rung} failed on its batch: {failure}"
                self._deliver(Batch([ticket], company, number, why), [answers], start, self._clock())
                if number != batch.rung and company is batch.company:
                    self._blame(company, batch.rung, failure)
                break
            else:
                with self._lock:
                    self.tally.turned_away("failed", ticket.rows)
                ticket.future.set_exception(_of_rows(failure))

    def _blame(self, company: Company, number: int, failure: Exception) -> None:
        """A rung failed where another answered; too often in a row, and it is given up."""
        self._failures[number] += 1
        if self._failures[number] >= FAILURES:
            why = f"it failed {FAILURES} times in a row: {failure}"
            log.warning("given up", extra={"rung": number, "reason": why})
            company.residents.turn_away(number, "failed", why)

    def _deliver(self, batch: Batch, answers: Sequence[list[Array]], start: float, end: float) -> None:
        company, number, rows = batch.company, batch.rung, batch.rows
        resident = company.residents[number]
        quality = company.residents.promise(number)
        with self._lock:
            if company.aims.quality > -math.inf:
                surplus = quality - company.aims.quality
                most = max(surplus, 0.0) * SAVINGS + max(self._bank, 0.0)
                self._bank = min(self._bank + surplus * rows, most)
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

    # --- between requests ---------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Ask the best rung what another was asked; one whose answers agree too seldom is quarantined."""
        company = self._company
        found = company.audit(self._cores)
        if found is not None and found.quarantine:
            log.warning("quarantined", extra={"rung": found.rung, "reason": found.why})
            company.residents.turn_away(found.rung, "quarantined", found.why)

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
    def standing(self) -> int:
        """The rung that is stood on; before the first request, the best that is ready."""
        with self._lock:
            if self._last is not None and self._last.rung is not None:
                return self._last.rung
            ready = [s for s in self._states() if s.ready]
            return max(ready, key=lambda s: s.quality).number if ready else 0

    def figures(self) -> tuple[float, float, float]:
        """Rows that arrive per second, slow-down, utilisation: now."""
        with self._lock:
            now = self._clock()
            return self._rate.at(now), self._slowness(now), self.tally.utilisation(now)

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


def _of_rows(failure: Exception) -> Exception:
    if isinstance(failure, RowsError):
        return failure
    return RowsError(f"the model failed on it: {type(failure).__name__}: {failure}")
