"""A request on its way through the runtime, and what comes back."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from accelerando.interval import Interval
from accelerando.serve.interrupts import is_interrupt
from accelerando.signature import Array

MOST_PRIORITY = 2**32 - 1  # as the protocols have it
log = logging.getLogger(__name__)


class Explanation(NamedTuple):
    """How an answer came about.

    Args:
        rung: its number on the ladder; `recipe` how that rung was made, `quality` what its certificate says.
        queued: seconds that the request waited; `computed` seconds that its batch took.
        rows: rows of the batch that it was part of.
        reason: why the governor stood on that rung.
        version: of the bundle, counted from 1 by `update`.
    """

    rung: int
    recipe: str
    quality: Interval
    queued: float
    computed: float
    rows: int
    reason: str
    version: int = 1


class Answer(NamedTuple):
    """The flat outputs of one request, in the signature's order, and how they came about."""

    leaves: list[Array]
    why: Explanation


@dataclass(eq=False)
class Ticket:
    """A request that waits, or runs.

    Args:
        leaves: flat inputs as the model takes them (`Binding.fit`), rows on axis 0 of each.
        rows: how many.
        arrived: seconds of the monotonic clock; `deadline` likewise, infinite where there is none.
        floor: the least quality that will do, oriented like `RungState.quality`.
        priority: 1 goes first, `MOST_PRIORITY` last but one; 0 is the usual, and counts as the lowest.
    """

    leaves: Sequence[Array]
    rows: int
    arrived: float
    deadline: float = math.inf
    floor: float = -math.inf
    priority: int = 0
    _future: Future[Answer] | None = field(default=None, init=False)
    _outcome: Answer | Exception | None = field(default=None, init=False)  # where there is no future to hold it

    @property
    def future(self) -> Future[Answer]:
        """Gets an `Answer`, or a `ServingError`; a caller that gives up cancels it, and its rows leave the queue.

        Made when it is first asked for, which must be before another thread knows of the request: a caller that runs
        its own request needs none, and would pay for its lock and its condition.
        """
        if self._future is None:
            self._future = Future()
            if self._outcome is not None:
                self.settle(self._outcome)
        return self._future

    def begin(self) -> bool:
        """Whether its caller is still there; from now on it can't give up any more.  Once for each."""
        return self._future is None or self._future.set_running_or_notify_cancel()

    def settle(self, outcome: Answer | Exception) -> None:
        """Tell its caller what became of it; whatever a callback of the future raises concerns nobody else."""
        if self._future is None:
            self._outcome = outcome
            return
        try:
            if isinstance(outcome, Exception):
                self._future.set_exception(outcome)
            else:
                self._future.set_result(outcome)
        except BaseException as error:
            if is_interrupt(error):
                raise
            log.exception("a callback of a request failed")

    def is_open(self) -> bool:
        """Whether it began, and has not been settled."""
        return self._outcome is None if self._future is None else self._future.running()

    def result(self) -> Answer:
        """The answer, waited for.  Raises what it was settled with."""
        if self._future is not None or self._outcome is None:
            return self.future.result()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    @property
    def likeness(self) -> tuple[tuple[int, ...], ...]:
        """What requests must share to share a batch: the lengths of all axes but the first."""
        return tuple(leaf.shape[1:] for leaf in self.leaves)
