"""The rungs of one bundle with all that belongs to them while they serve, and how they come together."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from accelerando.bundle import Bundle
from accelerando.errors import RowsError
from accelerando.goal import Goal
from accelerando.ladder import Rung
from accelerando.recipe import Runner
from accelerando.serve.aims import Aims
from accelerando.serve.batches import run_within
from accelerando.serve.governor import Decides, RungState
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

    def run(self, number: int, leaves: Sequence[Array], patience: float = math.inf) -> list[Array]:
        """The answers of a rung, no more rows at a time than it takes; the caller holds the cores.

        Args:
            patience: seconds that the caller can wait where another process computes.

        Raises:
            GoneError: the rung is not in memory (any longer).
            Unfinished: it takes longer.
        """
        runner, most = self._runner(number), self.residents.most_rows
        return runner.run(leaves, most, patience) if isinstance(runner, Remote) else run_within(runner, leaves, most)

    def _runner(self, number: int) -> Runner:
        runner = self.residents[number].runner
        if runner is None:
            raise GoneError(f"rung {number} has just left the memory")
        return runner

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
                return self._runner(number)(leaves)

        try:
            if self.drift is not None:
                self.drift.look()
            found = self.watch.audit(run, best=best.number, run=run_whole)
        except Exception as error:  # noqa: BLE001  a request that fails again was told to its caller: no news of a rung
            log.debug("an audit failed: %s", error)
            return
        if found is not None and found.quarantine:
            log.warning("quarantined", extra={"rung": found.rung, "reason": found.why})
            self.residents.turn_away(found.rung, "quarantined", found.why)

    def note(self, ticket: Ticket, leaves: list[Array], number: int) -> None:
        """Keep what is to be looked at later; what goes wrong there is no caller's concern."""
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


def assemble(bundle: Bundle, goal: Goal, terms: Terms, cores: threading.Lock, version: int) -> Company:
    """The company of a bundle; its most urgent rungs are loaded when this returns, the others come by themselves.

    Args:
        cores: held while anything computes.
        version: of the bundle, counted from 1.

    Raises:
        BundleError: none of its rungs can run here.
        UsageError: the fastest rung alone takes more memory than it may.
    """
    apart = Apart(bundle.path, gently=version > 1) if terms.isolated else None

    def start(rung: Rung) -> Runner:
        if apart is not None:
            return apart.start(rung)
        return bundle.start(rung, terms.model, spinning=False, shared=True)

    def end() -> None:
        if apart is not None:
            with cores:
                pass  # what it computes is answered first
            apart.close()  # with all that it holds
        residents.close()

    pid = apart.pid if apart is not None else os.getpid
    residents = Residents(bundle, start, cores, terms.memory, terms.most_rows, pid)
    aims = Aims.of(goal, bundle.ladder)
    try:
        residents.begin(_order(residents, aims))
    except BaseException:
        end()
        raise
    return Company(residents, aims, *_watch(bundle, terms.audit), version, end)


def _order(residents: Residents, aims: Aims) -> list[int]:
    """The fastest, for bursts; then the best of those that the goal allows; the others by quality."""
    rest = sorted(range(len(residents.bundle.ladder) - 1), key=lambda n: (n not in aims.rungs, n))
    return [len(residents.bundle.ladder) - 1, *rest]


def _watch(bundle: Bundle, share: float) -> tuple[Watch | None, Drift | None]:
    """Who looks at a share of the answers, and at the inputs."""
    if share == 0:
        return None, None
    from accelerando.serve.drift import Drift
    from accelerando.serve.watch import Watch

    parity = bundle.parity
    return Watch(bundle, share), Drift(bundle.signature.inputs, parity.inputs if parity else None)
