"""The rungs of one bundle with all that belongs to them while they serve, and how they come together."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any

from accelerando.bundle import Bundle
from accelerando.errors import GoalError, RowsError, UsageError
from accelerando.goal import Goal
from accelerando.goal_text import is_number
from accelerando.ladder import Rung
from accelerando.recipe import Runner
from accelerando.serve.aims import Aims, orientation
from accelerando.serve.batches import run_within
from accelerando.serve.governor import Decides, RungState
from accelerando.serve.interrupts import is_interrupt
from accelerando.serve.isolation import Apart, Remote
from accelerando.serve.residents import Residents
from accelerando.serve.tickets import Ticket
from accelerando.signature import Array

if TYPE_CHECKING:
    from accelerando.serve.drift import Drift
    from accelerando.serve.watch import Watch

log = logging.getLogger(__name__)


class GoneError(RowsError):
    """The rung is not in memory (any longer): nothing is known of the rows."""


@dataclass(frozen=True)
class Company:
    """What a conductor conducts: the rungs of one bundle, what is asked of them, and who watches their answers."""

    residents: Residents
    aims: Aims
    watch: Watch | None
    drift: Drift | None
    version: int
    end: Callable[[], None] = lambda: None  # gives back what it holds

    def best(self) -> RungState | None:
        """The rung whose answers the others' are held against."""
        return max((s for s in self.residents.states if s.ready), key=lambda s: s.quality, default=None)

    def serves(self) -> bool:
        """Whether a rung is ready that promises what the goal asks of the mean quality."""
        return any(s.ready and s.quality >= self.aims.quality for s in self.states())

    def needed(self) -> frozenset[int]:
        """Rungs without which it would serve no more: the fastest, and the fastest that promises what the goal asks."""
        ready = [s for s in self.states() if s.ready]
        serving = [s for s in ready if s.quality >= self.aims.quality]
        return frozenset(s.number for s in (*ready[-1:], *serving[-1:]))

    def attainable(self) -> float:
        """The best quality that is promised by a rung which may be stood on, now or later; oriented."""
        there = {r.number for r in self.residents if self.residents.may_come(r.number)}
        return max(map(self.residents.promise, there & self.aims.rungs or there), default=-math.inf)

    def check(self) -> None:
        """Whether the goal can be kept at all: no load would ever let what asks for more be answered.

        Raises:
            GoalError: no rung that may be stood on promises the quality that is asked for in the mean.
        """
        best, asked = self.attainable(), self.aims.quality
        if best >= asked:
            return
        ladder, cap = self.residents.bundle.ladder, self.residents.cap
        sign, metric = orientation(ladder), ladder.original.evidence.metric
        under = "" if cap is None else f", under a memory of {cap:,} bytes"
        raise GoalError(
            f"the goal '{self.aims.goal}' asks for a mean {metric} of {sign * asked:.4g}, but no rung of "
            f"{self.residents.bundle.path} that can run here{under} promises better than "
            f"{sign * best:.4g}; ask for less"
        )

    def may_audit(self) -> bool:
        """Whether there is an answer to look at, and looking takes no longer than a request may wait."""
        if self.watch is None or not self.watch.pending:
            return False
        best = self.best()
        return best is not None and best.seconds(1) * 2 <= self.aims.patience

    def compare_with_best(self) -> None:
        """Have the answers held against those of the best rung that is ready by now."""
        best = self.best()
        if self.watch is not None and best is not None:
            self.watch.refer_to(best.number)

    def run(self, number: int, leaves: Sequence[Array], patience: float = math.inf, whole: bool = False) -> list[Array]:
        """The answers of a rung, no more rows at a time than it takes; the caller holds the cores.

        Args:
            patience: seconds that the caller can wait where another process computes.
            whole: take all rows at a time.

        Raises:
            GoneError: the rung is not in memory (any longer).
            Unfinished: it takes longer.
        """
        resident, rows = self.residents[number], len(leaves[0])
        runner, cost = resident.runner, resident.cost
        if runner is None:
            raise GoneError(f"rung {number} has just left the memory")
        resident.used = time.monotonic()
        most = rows if whole else self.residents.most_rows
        if type(runner) is not Remote:  # not isinstance: an abstract class takes long over it
            try:
                return run_within(runner, leaves, most)
            except BaseException as error:
                if isinstance(error, Exception) or is_interrupt(error):
                    raise
                raise RowsError(f"the model failed on it: {type(error).__name__}: {error}") from error
        return runner.run(leaves, most, patience, cost.seconds(min(rows, most)) if cost else None)

    def audit(self, cores: threading.Lock) -> None:
        """Look at one answer that was kept, and at the inputs; a rung that agrees too seldom is quarantined."""
        best = self.best()
        if self.watch is None or best is None:
            return

        def run(leaves: Sequence[Array]) -> list[Array]:
            with cores:
                return self.run(best.number, leaves)

        def run_whole(number: int, leaves: Sequence[Array]) -> list[Array]:
            with cores:
                return self.run(number, leaves, whole=True)

        try:
            if self.drift is not None:
                self.drift.look()
            found = self.watch.audit(run, best=best.number, run=run_whole)
        except Exception as error:  # noqa: BLE001  a request that fails again was told to its caller: no news of a rung
            log.debug("an audit failed: %s", error)
            return
        if found is not None and found.quarantine:
            whose = {"bundle": str(self.residents.bundle.path), "rung": found.rung, "reason": found.why}
            log.warning("quarantined", extra=whose)
            self.residents.turn_away(found.rung, "quarantined", found.why)

    def note(self, ticket: Ticket, leaves: list[Array], number: int) -> None:
        """Count what was answered, and keep what is to be looked at later; what goes wrong there concerns no caller."""
        self.residents[number].answered += ticket.rows
        try:
            if self.watch is not None and self.watch.wants(number):
                self.watch.add(ticket.leaves, leaves, number)
            if self.drift is not None:
                self.drift.observe(ticket.leaves)
        except Exception as error:  # noqa: BLE001  as said
            log.warning("the watch failed: %s", error)

    def states(self) -> tuple[RungState, ...]:
        """The rungs as the governor may see them: what the goal rules out is not ready, while anything else is."""
        states = self.residents.states
        allowed = {
            s.number
            for s in states
            if s.ready and s.number in self.aims.rungs and s.seconds(s.most_rows) * self.aims.least_rate <= s.most_rows
        }
        return tuple(replace(s, ready=s.number in allowed) for s in states) if allowed else states


@dataclass(frozen=True)
class Terms:
    """How a bundle is to be run, as `govern` takes it: what stays when it is replaced by another."""

    governor: Decides
    memory: int | None
    most_rows: int
    waiting_rows: int
    audit: float
    isolated: bool
    model: Any
    name: str

    def __post_init__(self) -> None:
        if not is_number(self.audit) or not 0 <= self.audit <= 1:
            raise UsageError(f"audit is a share, from 0 to 1, but {self.audit!r} was given")
        for name in ("most_rows", "waiting_rows"):
            rows = getattr(self, name)
            if not is_number(rows, Integral) or rows < 1:
                raise UsageError(f"{name} must be a whole number of at least 1, but is {rows!r}")
        if self.isolated not in (True, False):
            raise UsageError(f"isolated must be True or False, but is {self.isolated!r}")
        if self.isolated and self.model is not None:
            raise UsageError("a module of this process can't be run in another; leave out model= or isolated=")


def assemble(
    bundle: Bundle, goal: Goal, terms: Terms, cores: threading.Lock, version: int, old: Company | None = None
) -> Company:
    """The company of a bundle; when this returns, it serves the goal, and the other rungs come by themselves.

    Args:
        cores: held while anything computes.
        version: of the bundle, counted from 1.
        old: from which it takes over, and which serves meanwhile, under the same cap; the other rungs come when that
            has ended, and `residents.fill` is called.

    Raises:
        BundleError: none of its rungs can run here.
        GoalError: the goal makes no sense for its metric, or no rung that can run here keeps it.
        UsageError: the fastest rung alone takes more memory than it may, or the old company leaves too little.
    """
    with ExitStack() as undo:
        if old is not None:
            undo.callback(old.residents.fill)
            old.residents.give_way(old.needed())
        apart = undo.enter_context(closing(Apart(bundle.path, gently=old is not None))) if terms.isolated else None
        residents = Residents(
            bundle, partial(_start, bundle, terms.model, apart), cores, terms.memory, terms.most_rows,
            apart.pid if apart is not None else os.getpid, old.residents if old is not None else None,
        )  # fmt: skip
        end = partial(_end, residents, apart, cores)
        undo.callback(end)
        aims = Aims.of(goal, bundle.ladder)
        company = Company(residents, aims, *_watch(bundle, terms.audit), version, end)
        if terms.model is None:
            for number in (n for n, rung in enumerate(bundle.ladder) if not rung.recipe.backend.portable):
                residents.turn_away(number, "failed", "it runs the original's own code, which is not in the bundle")
        order, urgent = _order(residents, aims)
        residents.begin(order, company.serves, urgent)
        company.check()
        undo.pop_all()
    return company


def _start(bundle: Bundle, model: Any, apart: Apart | None, rung: Rung) -> Runner:
    """Load a rung, in its own process where there is one."""
    return apart.start(rung) if apart is not None else bundle.start(rung, model, spinning=False, shared=True)


def _end(residents: Residents, apart: Apart | None, cores: threading.Lock) -> None:
    """Give back all that a company holds, once what is computed is answered."""
    if apart is not None:
        with cores:
            pass
        apart.close()  # with all that it holds
    residents.close()


def _order(residents: Residents, aims: Aims) -> tuple[list[int], int]:
    """The rungs that can run here, the most urgent first, and how many of them all that is asked may need at once.

    These are the fastest, for bursts; the fastest that keeps the goal's quality, for those that the bank does not bear;
    and the best that the goal allows.  The others follow by quality.
    """
    there = [r.number for r in residents if r.state != "failed"]
    ranked = sorted(there, key=lambda n: (n not in aims.rungs, n))
    keeping = [n for n in there if n in aims.rungs and residents.promise(n) >= aims.quality]
    urgent = dict.fromkeys((*there[-1:], *keeping[-1:], *ranked[:1]))
    return list(dict.fromkeys((*urgent, *ranked))), len(urgent)


def _watch(bundle: Bundle, share: float) -> tuple[Watch | None, Drift | None]:
    """Who looks at a share of the answers, and at the inputs."""
    if share == 0:
        return None, None
    from accelerando.serve.drift import Drift
    from accelerando.serve.watch import Watch

    parity = bundle.parity
    return Watch(bundle, share), Drift(bundle.signature.inputs, parity.inputs if parity else None)
