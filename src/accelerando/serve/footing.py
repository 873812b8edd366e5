"""Where a conductor stands: what the governor is told before it decides, what it has decided, and what that leaves it.

Not thread-safe: the conductor holds its lock whenever it asks.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from accelerando.errors import UsageError
from accelerando.serve.aims import banked
from accelerando.serve.company import Company
from accelerando.serve.estimates import ArrivalRate, Slowdown
from accelerando.serve.governor import Decides, Decision, Governor, RungState, Signal, soonest
from accelerando.serve.interrupts import is_interrupt
from accelerando.serve.status import Stand
from accelerando.serve.tally import Tally
from accelerando.serve.tickets import Ticket

STANDS = 100  # latest changes of rung that are remembered
SLOW_SECONDS = 1.0  # in which what was seen of the machine's slowness loses two thirds of its weight
WISH_SECONDS = 0.5  # how often it is asked whether a rung that is out would have been stood on
log = logging.getLogger(__name__)


class Footing:
    """The load, the machine and the rungs, as far as they are known, and the rung that follows from them.

    Args:
        company: whose rungs it stands on.
        governor: says on which; anything with its `decide` will do.
        tally: where changes of rung are counted.
        clock: seconds, monotonic.
    """

    def __init__(self, company: Company, governor: Decides, tally: Tally, clock: Callable[[], float]) -> None:
        self.stands = deque[Stand](maxlen=STANDS)
        self.rate = ArrivalRate()
        self._governor, self._tally, self._clock = governor, tally, clock
        self._checks = type(governor) is not Governor  # what is somebody's own is checked
        self._slowdown = Slowdown()
        self._asked_wish = self._observed = -math.inf
        self._last: Decision | None = None
        self.company = company
        self.take(company)

    def take(self, company: Company) -> None:
        """Stand on another company's rungs, or go by other aims, from the next decision on."""
        if company.residents is not self.company.residents:
            self._last = None  # of the same number is another rung
        self.company = company
        self._bank = 0.0
        self._seen: tuple[tuple[RungState, ...], tuple[RungState, ...]] | None = None

    # --- what is known ------------------------------------------------------------------------------------------

    def states(self) -> tuple[RungState, ...]:
        """The rungs as the governor may see them; made anew when one was loaded or turned away."""
        raw = self.company.residents.states
        if self._seen is None or self._seen[0] is not raw:
            self._seen = raw, self.company.states()
            self.company.compare_with_best()
        return self._seen[1]

    def states_for(self, rows: int) -> tuple[RungState, ...]:
        """The rungs, as they are for a request of so many rows, which goes piece by piece where it has too many."""
        states = self.states()
        if rows <= self.company.residents.most_rows:
            return states
        return tuple(replace(s, most_rows=max(s.most_rows, rows)) for s in states)

    def slowness(self, now: float) -> float:
        """How much slower than usual calls are, as far as is known: what was seen fades while nothing runs.

        Else a machine that was slow once would be thought so for ever, for nothing is admitted that could tell.
        """
        return float(self._slowdown.factor() ** math.exp(-(now - self._observed) / SLOW_SECONDS))

    def soonest(self, ticket: Ticket, ahead: int, busy: float) -> float:
        """Seconds until a request that has just come can be answered; infinite where no rung keeps its floor.

        Args:
            ahead: rows that go before it.
            busy: seconds until what runs now should be done.
        """
        states, slowness = self.states_for(ticket.rows), self.slowness(ticket.arrived)
        return soonest(states, ticket.rows, ahead, busy, slowness, ticket.floor)

    def ran(self, expected: float, start: float, end: float) -> None:
        """A batch ran between two moments, and so many seconds had been expected."""
        self._slowdown.observe(expected, end - start)
        self._observed = end

    def answered(self, quality: float, asked: float, rows: int) -> None:
        """So many rows were answered by a rung that promises this quality, where so much was asked for."""
        if asked > -math.inf:
            self._bank = banked(self._bank, quality - asked, rows)

    # --- what follows -------------------------------------------------------------------------------------------

    def decide(self, queue: tuple[tuple[float, int, float], ...], rows: int) -> Decision:
        """The rung for what waits; none, with the reason, where the governor fails, or we do.

        Args:
            queue: as `Signal.queue`: who waits, the head first.
            rows: that wait, of all.
        """
        try:
            return self._decided(queue, rows)
        except BaseException as error:  # noqa: BLE001  logged; the executor goes on
            return self._undecided("an error of our own", error)

    def _decided(self, queue: tuple[tuple[float, int, float], ...], rows: int) -> Decision:
        now, aims = self._clock(), self.company.aims
        signal = Signal(
            now, rows, queue, self.rate.pressing(now), self.slowness(now), aims.patience,
            math.inf if aims.quality == -math.inf else self._bank, aims.quality,
        )  # fmt: skip
        decision = self._ask(signal, self.states_for(queue[0][1]))
        if decision.rung is not None:
            if self._last is None or self._last.rung != decision.rung:
                self._tally.switches += self._last is not None
                self.stands.append(Stand(time.time(), decision.rung, decision.why))
            self._last = decision
        if self.company.residents.cap is not None and now - self._asked_wish > WISH_SECONDS:
            self._asked_wish = now
            self._wish(signal)
        return decision

    def _ask(self, signal: Signal, rungs: tuple[RungState, ...]) -> Decision:
        """What the governor says, which may be somebody's own."""
        try:
            decision = self._governor.decide(self._last, signal, rungs)
            if self._checks:
                check(decision, rungs)
        except BaseException as error:  # noqa: BLE001  logged
            return self._undecided("the governor failed on it", error)
        return decision

    def _undecided(self, what: str, error: BaseException) -> Decision:
        """Costs the request at the head, and nobody else."""
        if is_interrupt(error):
            raise error
        log.error(what, exc_info=error)
        return Decision(None, 0, self._clock(), f"{what}: {type(error).__name__}: {error}")

    def _wish(self, signal: Signal) -> None:
        """Tell the residents of a rung that is out, and would have been stood on."""
        company = self.company
        dreamt = tuple(replace(s, ready=s.ready or s.number in company.aims.rungs) for s in self.states())
        wished = self._ask(signal, dreamt).rung
        if wished is not None:
            company.residents.missed(wished, signal.now)

    @property
    def standing(self) -> int:
        """The rung that is stood on; before the first request, the best that is ready."""
        if self._last is not None and self._last.rung is not None:
            return self._last.rung
        ready = [s for s in self.states() if s.ready]
        return max(ready, key=lambda s: s.quality).number if ready else 0


def check(decision: Decision, rungs: Sequence[RungState]) -> None:
    """Whether a decision can be followed.

    Raises:
        UsageError: it is none, or names what is not there.
    """
    if not isinstance(decision, Decision):
        raise UsageError(f"decide() must give a Decision, but gave {decision!r}")
    if decision.rung is None:
        return
    if not (isinstance(decision.rung, int) and any(s.ready and s.number == decision.rung for s in rungs)):
        known = ", ".join(str(s.number) for s in rungs if s.ready) or "none is"
        raise UsageError(
            f"the rung of a Decision must be None or the number of a ready one ({known}), but is {decision.rung!r}"
        )
    if not (isinstance(decision.rows, int) and decision.rows > 0):
        raise UsageError(f"the rows of a Decision must be a whole number of at least 1, but are {decision.rows!r}")
