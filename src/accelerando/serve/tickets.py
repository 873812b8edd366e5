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
        future: gets an `Answer`, or a `ServingError`; a caller that gives up cancels it, and its rows leave the queue.
    """

    leaves: Sequence[Array]
    rows: int
    arrived: float
    deadline: float = math.inf
    floor: float = -math.inf
    priority: int = 0
    future: Future[Answer] = field(default_factory=Future)

    def settle(self, outcome: Answer | Exception) -> None:
        """Tell its caller what became of it; whatever a callback of the future raises concerns nobody else."""
        try:
            if isinstance(outcome, Exception):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)
        except BaseException as error:
            if is_interrupt(error):
                raise
            log.exception("a callback of a request failed")

    @property
    def likeness(self) -> tuple[tuple[int, ...], ...]:
        """What requests must share to share a batch: the lengths of all axes but the first."""
        return tuple(leaf.shape[1:] for leaf in self.leaves)
