"""The models that a server has: which are loaded, and their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from accelerando.serve.status import Status
from accelerando.serve.tickets import Ticket
from accelerando.signature import Array, Signature


class Served(Protocol):
    """A model that is loaded: what the protocols ask of it.  Thread-safe."""

    @property
    def signature(self) -> Signature:
        """Its inputs and outputs: names, numpy dtypes, shapes."""

    @property
    def ready(self) -> bool:
        """Whether it answers: a model whose rungs were all given up does not."""

    def submit_soon(
        self,
        leaves: list[Array],
        soon: Callable[..., object],
        *,
        seconds: float | None = None,
        min_quality: float | None = None,
        priority: int = 0,
    ) -> Ticket:
        """Put a request into the queue, never waiting; `ticket.future` gets the answer once the caller's turn is over.

        Args:
            leaves: one array for each input, as `tensors.bind` gives them: they are not checked again.
            soon: the `call_soon` of the event loop that this is called in; what comes in one turn of it may be
                answered together in the next.
            seconds: until its deadline, from now; without it, what the goal allows.
            min_quality: the least certified quality that will do, in the metric's own unit.
            priority: 1 goes first; 0, the usual, counts as the lowest.

        Raises:
            DataError: no rung promises that quality.
            OverloadedError: it can't be answered in time, or the queue is full.
            DeadlineError: `seconds` is not above 0.
            ClosedError: the model was closed.
        """

    def status(self) -> Status:
        """What it tells about itself."""


@dataclass(frozen=True)
class Entry:
    """One line of the repository's index.  `state` is READY, LOADING, UNAVAILABLE; `reason` why, where it is not."""

    name: str
    version: str
    state: str
    reason: str = ""


class Repository(Protocol):
    """The models by name.  Thread-safe; `load` and `unload` take a while and are called off the event loop."""

    def find(self, name: str, version: str | None = None) -> Served:
        """A model that is loaded; of its versions the newest, unless one is named.

        Raises:
            UnknownModelError: there is none of this name, or no such version.
            ClosedError: it is there, but not loaded.
        """

    def versions(self, name: str) -> tuple[str, ...]:
        """The versions of a model, the oldest first.  Raises UnknownModelError."""

    def index(self) -> tuple[Entry, ...]:
        """Every model, whether loaded or not."""

    def load(self, name: str, parameters: Mapping[str, object] | None = None) -> None:
        """Load a model or load it anew; the old one answers until the new one is warm.

        Raises:
            UnknownModelError: no bundle has this name.
            BundleError, UsageError: it can't be loaded; the old one goes on.
        """

    def unload(self, name: str) -> None:
        """Unload a model once what it has accepted is answered.  Raises UnknownModelError."""

    def set_goal(self, name: str, goal: str) -> None:
        """Change a model's goal, from its next batch on.  Raises UnknownModelError, GoalError."""

    @property
    def ready(self) -> bool:
        """Whether every model that should be loaded is, and the server is not draining."""
