"""The conductor: one executor owns the cores, takes requests from the queue, and asks the governor before each batch.

Nothing polls: the executor sleeps until a request comes, and a second thread until the next deadline passes, so that a
request which is dead leaves the queue also while a long batch runs.  A caller that waits anyway runs its own request
where nobody else is being served, which spares two changes of threads.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from accelerando.errors import ClosedError, DeadlineError, OverloadedError, RowsError
from accelerando.serve import batches
from accelerando.serve.company import Company
from accelerando.serve.deadlines import DeadlineQueue
from accelerando.serve.estimates import ArrivalRate, Slowdown
from accelerando.serve.governor import GLANCE, Decides, Decision, RungState, Signal, soonest
from accelerando.serve.residents import Resident
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
        self._bank = 0.0
        self._failures: Counter[int] = Counter()
        self._asked_wish = self._observed = -math.inf
        self._busy_until = 0.0  # when what runs now should be done
        self._lock = threading.RLock()
        self._work, self._dead = threading.Condition(self._lock), threading.Condition(self._lock)
        self._idle = threading.Condition(self._lock)
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
            company.residents.changed = self._look_again
            self._look_again()

    def _look_again(self) -> None:
        with self._lock:
            self._states = self._company.states()
            best = self._company.best()
            if self._company.watch is not None and best is not None:
                self._company.watch.refer_to(best.number)

    # --- requests come ------------------------------------------------------------------------------------------

    def submit(self, ticket: Ticket) -> None:
        """Put a request into the queue.

        Raises:
            OverloadedError: no rung could answer it in time, or the queue is full.
            ClosedError: the conductor has been closed.
        """
        with self._lock:
            self._admit(ticket)
            self._enqueue(ticket)

    def _enqueue(self, ticket: Ticket) -> None:
        with self._lock:
            if not self._queue.push(ticket):
                self.tally.turned_away("refused", ticket.rows)
                raise OverloadedError(f"{self._queue.rows:,} rows wait already; try again later, or send less")
            ticket.future.add_done_callback(lambda future: self._forget(ticket) if future.cancelled() else None)
            if ticket.deadline < self._guarded:
                self._dead.notify()
            if not self._busy:
                self._work.notify()

    def answer(self, ticket: Ticket) -> Answer:
        """The answer to a request whose caller waits for it; raises what `submit` does, or what became of it."""
        with self._lock:
            self._admit(ticket)
            decision = None
            if not self._busy and not len(self._queue):
                found = self._decide(((ticket.deadline - ticket.arrived, ticket.rows, ticket.floor),), ticket.rows)
                decision = found if found.rung is not None else None
            if decision is None:
                self._enqueue(ticket)
            self._busy = self._busy or decision is not None
        if decision is not None:
            self._serve([ticket], decision)
            self._rest()
        return ticket.future.result()

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
        needed = soonest(self._rungs_for(ticket.rows), ticket.rows, ahead, busy, self._slowness(now), ticket.floor)
        if now + needed > ticket.deadline:
            self.tally.turned_away("refused", ticket.rows)
            raise OverloadedError(
                f"{ticket.deadline - now:.3g} s were given, but with {ahead} rows before it even the fastest rung "
                f"would answer in about {needed:.3g} s; give it longer, or send less"
            )

    def _rungs_for(self, rows: int) -> tuple[RungState, ...]:
        """The rungs, as they are for a request of so many rows, which goes piece by piece where it has too many."""
        if all(s.most_rows >= rows for s in self._states):
            return self._states
        return tuple(replace(s, most_rows=max(s.most_rows, rows)) for s in self._states)

    def _slowness(self, now: float) -> float:
        """How much slower than usual calls are, as far as is known: what was seen fades while nothing runs.

        Else a machine that was slow once would be thought so for ever, for nothing is admitted that could tell.
        """
        return float(self._slowdown.factor() ** math.exp(-(now - self._observed) / SLOW_SECONDS))

    def _forget(self, ticket: Ticket) -> None:
        """Its caller gave up: its rows leave the queue at once."""
        with self._lock:
            if self._queue.remove(ticket):
                self.tally.turned_away("cancelled", ticket.rows)

    # --- requests are answered ----------------------------------------------------------------------------------

    def _execute_all(self) -> None:
        while True:
            with self._lock:
                while self._busy or not (len(self._queue) or self._closing or self._company.may_audit()):
                    self._work.wait()
                if not len(self._queue) and self._closing:
                    return
                audit = not len(self._queue)
                tickets, decision = ([], None) if audit else self._next()
                self._busy = audit or bool(tickets)
            if audit:
                self._audit()
            elif decision is not None and tickets:
                self._serve(tickets, decision)
            if audit and self._company.drift is not None:
                self._company.drift.look()
            self._rest()

    def _rest(self) -> None:
        """What ran is done: whoever waits for the cores may go on."""
        with self._lock:
            self._busy = False
            if len(self._queue) or self._closing or self._company.may_audit():
                self._work.notify()
            self._idle.notify_all()

    def _next(self) -> tuple[list[Ticket], Decision | None]:
        """The next batch and its rung; nothing where the head had to be refused."""
        dead = self._queue.expired(self._clock())
        self._refuse(dead, "expired", DeadlineError("its deadline passed while it waited; nothing was computed"))
        head = self._queue.head()
        if head is None:
            return [], None
        decision = self._decide(self._queue.glance(GLANCE, self._clock()), self._queue.rows)
        if decision.rung is None:
            self._queue.remove(head)
            self._refuse([head], "refused", OverloadedError(f"it was refused: {decision.why}"))
            return [], None
        state = next(s for s in self._states if s.number == decision.rung)
        return self._queue.take(decision.rows, state.quality), decision

    def _decide(self, queue: tuple[tuple[float, int, float], ...], rows: int) -> Decision:
        now, aims = self._clock(), self._company.aims
        signal = Signal(
            now, rows, queue, self._rate.pressing(now), self._slowness(now), aims.patience,
            math.inf if aims.quality == -math.inf else self._bank, aims.quality,
        )  # fmt: skip
        decision = self._governor.decide(self._last, signal, self._rungs_for(queue[0][1]))
        if decision.rung is not None:
            if self._last is None or self._last.rung != decision.rung:
                self.tally.switches += self._last is not None
                self.stands.append(Stand(time.time(), decision.rung, decision.why))
            self._last = decision
        if self._company.residents.cap is not None and now - self._asked_wish > WISH_SECONDS:
            self._asked_wish = now
            self._wish(signal, now)
        return decision

    def _wish(self, signal: Signal, now: float) -> None:
        """Whether a rung that is out of memory would be stood on were it in."""
        aims = self._company.aims
        dreamt = tuple(replace(s, ready=s.ready or s.number in aims.rungs) for s in self._states)
        wished = self._governor.decide(self._last, signal, dreamt).rung
        if wished is not None:
            self._company.residents.missed(wished, now)

    def _serve(self, tickets: list[Ticket], decision: Decision) -> None:
        """Run one batch, and answer each of its requests."""
        company, number = self._company, decision.rung
        assert number is not None
        resident = company.residents[number]
        rows = sum(t.rows for t in tickets)
        start = self._clock()
        expected = resident.cost.seconds(rows) if resident.cost else 0.0
        self._busy_until = start + expected
        failure: Exception | None = None
        answers: list[list[Array]] = []
        with self._cores:
            tickets = [t for t in tickets if t.future.running() or t.future.set_running_or_notify_cancel()]
            if not tickets:
                return
            try:
                answers = batches.split(self._run(resident, batches.join(tickets)), tickets)
            except Exception as error:  # noqa: BLE001  whatever a backend raises: each request is tried by itself
                failure = error
            end = self._clock()
        if failure is not None:
            self._serve_alone(tickets, decision, failure)
            return
        self._failures[number] = 0
        with self._lock:
            self._slowdown.observe(expected, end - start)
            self._observed = end
            self.tally.worked(start, end)
            self.tally.batches += 1
        self._deliver(tickets, answers, decision, resident, start, end)

    def _run(self, resident: Resident, leaves: Sequence[Array]) -> list[Array]:
        runner = resident.runner
        if runner is None:
            raise RowsError(f"rung {resident.number} has just left the memory")
        state = self._company.residents.states
        most = next((s.most_rows for s in state if s.number == resident.number), len(leaves[0]))
        return batches.run_within(runner, leaves, most)

    def _serve_alone(self, tickets: Sequence[Ticket], decision: Decision, failure: Exception) -> None:
        """A batch failed: each of its requests by itself, on its rung and then on another; only the poisonous fail."""
        first = decision.rung
        assert first is not None
        others = [s.number for s in self._states if s.ready and s.number != first]
        for ticket in tickets:
            for number in [first, *others[:1]]:  # its process may have died of something else
                resident = self._company.residents[number]
                start = self._clock()
                try:
                    with self._cores:
                        answers = self._run(resident, ticket.leaves)
                except Exception as error:  # noqa: BLE001  as above
                    failure = error
                    continue
                why = f"rung {first} failed on its batch: {failure}"
                self._deliver([ticket], [answers], replace(decision, why=why), resident, start, self._clock())
                if number != first:
                    self._blame(first, failure)
                break
            else:
                with self._lock:
                    self.tally.turned_away("failed", ticket.rows)
                ticket.future.set_exception(_of_rows(failure))

    def _blame(self, number: int, failure: Exception) -> None:
        """A rung failed where another answered; too often in a row, and it is given up."""
        self._failures[number] += 1
        if self._failures[number] >= FAILURES:
            self._company.residents.turn_away(number, "failed", f"it failed {FAILURES} times in a row: {failure}")

    def _deliver(
        self, tickets: Sequence[Ticket], answers: Sequence[list[Array]], decision: Decision, resident: Resident,
        start: float, end: float,
    ) -> None:  # fmt: skip
        rung, company = resident.rung, self._company
        quality = next((s.quality for s in self._states if s.number == resident.number), 0.0)
        rows = sum(t.rows for t in tickets)
        with self._lock:
            if company.aims.quality > -math.inf:
                surplus = quality - company.aims.quality
                self._bank = min(self._bank + surplus * rows, max(surplus, 0.0) * SAVINGS + max(self._bank, 0.0))
            for ticket in tickets:
                self.tally.answered(
                    resident.number, quality, ticket.rows, start - ticket.arrived, end - start, end > ticket.deadline
                )
        for ticket, leaves in zip(tickets, answers, strict=True):
            why = Explanation(
                resident.number, resident.text, rung.quality, start - ticket.arrived, end - start, rows, decision.why,
                company.version,
            )  # fmt: skip
            company.note(ticket, leaves, resident.number)
            ticket.future.set_result(Answer(leaves, why))

    # --- between requests ---------------------------------------------------------------------------------------

    def _audit(self) -> None:
        """Ask the best rung what another rung was asked; one whose answers agree too seldom is quarantined."""
        company, best = self._company, self._company.best()
        assert company.watch is not None
        if best is None:
            return

        def run(number: int, leaves: Sequence[Array]) -> list[Array]:
            with self._cores:
                return self._run(company.residents[number], leaves)

        try:
            found = company.watch.audit(lambda leaves: run(best.number, leaves), best=best.number, run=run)
        except Exception as error:  # noqa: BLE001  a request that fails again was told to its caller: no news of a rung
            log.debug("an audit failed: %s", error)
            return
        self.tally.audited += 1
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
            self._refuse(dead, "expired", DeadlineError("its deadline passed while it waited; nothing was computed"))
            if not dead:
                time.sleep(1e-4)  # the clock stands between the deadline and what is past it

    def _refuse(self, tickets: Sequence[Ticket], how: str, error: Exception) -> None:
        for ticket in tickets:
            if ticket.future.set_running_or_notify_cancel():
                with self._lock:
                    self.tally.turned_away(how, ticket.rows)
                ticket.future.set_exception(error)

    # --- the end ------------------------------------------------------------------------------------------------

    @property
    def waiting_rows(self) -> int:
        return self._queue.rows

    @property
    def standing(self) -> int:
        """The rung that is stood on; before the first request, the one where the governor would begin."""
        with self._lock:
            if self._last is not None and self._last.rung is not None:
                return self._last.rung
            ready = [s for s in self._states if s.ready]
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


def _of_rows(failure: Exception) -> Exception:
    if isinstance(failure, RowsError):
        return failure
    return RowsError(f"the model failed on it: {type(failure).__name__}: {failure}")
