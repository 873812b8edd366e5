"""A server's models without bundles, backends or a governor: a `Repository` and `Served` made of plain functions.

served = FakeServed(SIMPLE, sum_and_difference)                  # answers before `submit_soon` returns
held = FakeServed(SIMPLE, sum_and_difference, answers="held")    # answers when `held.release()` is called
shelf = FakeShelf({"simple": served})
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from accelerando.errors import ClosedError, DeadlineError, GoalError, RowsError, ServingError, UnknownModelError
from accelerando.interval import Interval
from accelerando.serve.binding import check_axes, fit
from accelerando.serve.status import BUCKETS, Histogram, RungStatus, Stand, Status
from accelerando.serve.tickets import Answer, Explanation, Ticket
from accelerando.server.repository import Entry
from accelerando.signature import Array, Port, Signature

Function = Callable[[list[Array]], list[Array]]
Ports = Mapping[str, tuple[str, tuple[int | str, ...]]]  # name -> (numpy dtype, shape with the batch at axis 0)


def signature_of(inputs: Ports, outputs: Ports) -> Signature:
    """A flat signature: every input is a parameter of its own, and the outputs are a tuple."""
    names = tuple(inputs)
    return Signature(
        inputs=tuple(Port(name, *rest) for name, rest in inputs.items()),
        outputs=tuple(Port(name, *rest) for name, rest in outputs.items()),
        parameters=names,
        positional=len(names),
        arguments={name: {"leaf": i} for i, name in enumerate(names)},
        result={"tuple": [{"leaf": i} for i in range(len(outputs))]},
    )


# The model that the examples of other people's clients ask for.
SIMPLE = signature_of(
    {"INPUT0": ("int32", ("batch", 16)), "INPUT1": ("int32", ("batch", 16))},
    {"OUTPUT0": ("int32", ("batch", 16)), "OUTPUT1": ("int32", ("batch", 16))},
)
DOUBLE = signature_of({"x": ("float32", ("batch", 4))}, {"y": ("float32", ("batch", 4))})


def sum_and_difference(leaves: list[Array]) -> list[Array]:
    """What the model `simple` answers."""
    return [leaves[0] + leaves[1], leaves[0] - leaves[1]]


def double(leaves: list[Array]) -> list[Array]:
    """The answer of `DOUBLE`: y = 2 x."""
    return [leaves[0] * np.float32(2)]


WHY = Explanation(
    rung=1,
    recipe="fake(level=1)",
    quality=Interval(0.91, 0.93, 0.95),
    queued=0.0005,
    computed=0.002,
    rows=1,
    reason="a fake stands where it is told",
)


def fake_status(name: str = "simple", **changed: object) -> Status:
    """A quiet model of two rungs that stands on the second; further arguments replace fields."""
    exact = Interval.exactly
    rungs = (
        RungStatus(0, "original", "ready", "", Interval(0.95, 0.96, 0.97), exact(0.0), exact(1.0), 0.010, 4_000_000, 0),
        RungStatus(1, "fake(level=1)", "ready", "", WHY.quality, exact(0.03), exact(5.0), 0.002, 1_000_000, 0),
    )
    nothing = Histogram((0,) * (len(BUCKETS) + 1), 0.0)
    status = Status(
        name=name, version=1, goal="p99 <= 20ms", metric="accuracy", rungs=rungs, standing=1,
        stands=(Stand(1_700_000_000.0, 1, "the start"),), queue_rows=0, rate=0.0, slowdown=1.0, utilisation=0.0, rows=0,
        all_rows=0, answered=0, late=0, refused=0, expired=0, failed=0, cancelled=0, switches=0, attainment=1.0,
        effective_quality=0.93, queued=nothing, computed=nothing, memory_bytes=5_000_000, memory_cap=None,
    )  # fmt: skip
    return dataclasses.replace(status, **changed)  # type: ignore[arg-type]


class FakeServed:
    """A model made of a plain function.

    Args:
        function: flat inputs to flat outputs; a ServingError that it raises reaches the caller as it is, any other
            error as a RowsError.
        status: what `status()` tells before anything is counted.
        answers: `now`, before `submit_soon` returns; `thread`, from another thread; `held`, when `release` is called.
        why: what every answer says about itself, but for its rows.
        refusal: raised by `submit_soon`, in place of any answer.

    Attributes:
        asked: the keyword arguments of every one, in order, with its `leaves`.
        tickets: all that were given out.
    """

    def __init__(
        self,
        signature: Signature = SIMPLE,
        function: Function = sum_and_difference,
        *,
        status: Status | None = None,
        answers: Literal["now", "thread", "held"] = "now",
        why: Explanation = WHY,
        refusal: Exception | None = None,
    ) -> None:
        self._signature, self.function, self.why, self.refusal = signature, function, why, refusal
        self.answers: Literal["now", "thread", "held"] = answers
        self.ready = True
        self.base = status or fake_status()
        self.asked: list[dict[str, object]] = []
        self.tickets: list[Ticket] = []
        self.counts = {"answered": 0, "failed": 0, "cancelled": 0, "rows": 0, "batches": 0}
        self._held: list[Ticket] = []
        self._lock = threading.Lock()

    @property
    def signature(self) -> Signature:
        return self._signature

    def submit_soon(
        self,
        leaves: list[Array],
        soon: Callable[..., object],
        *,
        seconds: float | None = None,
        min_quality: float | None = None,
        priority: int = 0,
    ) -> Ticket:
        if self.refusal is not None:
            raise self.refusal
        if seconds is not None and not seconds > 0:
            raise DeadlineError(f"the deadline was {seconds} seconds from now; it must be above 0")
        leaves = [fit(leaf, port) for leaf, port in zip(leaves, self._signature.inputs, strict=True)]
        check_axes(leaves, self._signature.inputs)
        now = time.monotonic()
        ticket = Ticket(
            leaves=leaves,
            rows=len(leaves[0]),
            arrived=now,
            deadline=float("inf") if seconds is None else now + seconds,
            floor=float("-inf") if min_quality is None else min_quality,
            priority=priority,
        )
        with self._lock:
            self.asked.append({"leaves": leaves, "seconds": seconds, "min_quality": min_quality, "priority": priority})
            self.tickets.append(ticket)
            if self.answers == "held":
                self._held.append(ticket)
        if self.answers == "now":
            self._answer(ticket)
        elif self.answers == "thread":
            threading.Thread(target=self._answer, args=(ticket,)).start()
        return ticket

    def release(self) -> int:
        """Answer all that are held; how many of them were not cancelled."""
        with self._lock:
            held, self._held = self._held, []
        return sum(map(self._answer, held))

    def _answer(self, ticket: Ticket) -> bool:
        if not ticket.future.set_running_or_notify_cancel():
            self._count(cancelled=1)
            return False
        try:
            answer = Answer(self.function(list(ticket.leaves)), self.why._replace(rows=ticket.rows))
        except Exception as error:  # noqa: BLE001  as the runtime does: one poisonous request must not end the thread
            self._count(failed=1)
            ticket.future.set_exception(error if isinstance(error, ServingError) else RowsError(str(error)))
        else:
            self._count(answered=1, rows=ticket.rows, batches=1)
            ticket.future.set_result(answer)
        return True

    def _count(self, **more: int) -> None:
        with self._lock:
            for key, value in more.items():
                self.counts[key] += value

    def status(self) -> Status:
        with self._lock:
            return dataclasses.replace(self.base, **self.counts)


class FakeShelf:
    """A repository of fakes.

    Args:
        models: by name; each is version 1, or give {name: {"1": served, "2": served}}.
        out: names that are known but not loaded; `load` makes them ready with the model that they are given here.

    Attributes:
        reasons: why the bundle of a model that is ready could not be loaded anew.
    """

    def __init__(
        self,
        models: Mapping[str, FakeServed | Mapping[str, FakeServed]],
        *,
        out: Mapping[str, FakeServed] | None = None,
        ready: bool = True,
    ) -> None:
        self.models = {n: {"1": m} if isinstance(m, FakeServed) else dict(m) for n, m in models.items()}
        self.out = dict(out or {})
        self.is_ready = ready
        self.goals: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.loads: list[tuple[str, dict[str, object]]] = []

    def find(self, name: str, version: str | None = None) -> FakeServed:
        if name in self.out:
            raise ClosedError(f"the model {name!r} is not loaded")
        versions = self._versions(name)
        if version is None:
            return versions[max(versions, key=int)]
        if version not in versions:
            raise UnknownModelError(f"{name!r} has no version {version!r}; there are {', '.join(versions)}")
        return versions[version]

    def versions(self, name: str) -> tuple[str, ...]:
        return ("1",) if name in self.out else tuple(sorted(self._versions(name), key=int))

    def index(self) -> tuple[Entry, ...]:
        versions = [(name, version) for name in self.models for version in self.versions(name)]
        ready = [Entry(name, version, "READY", self.reasons.get(name, "")) for name, version in versions]
        return (*ready, *(Entry(name, "1", "UNAVAILABLE", "not loaded") for name in self.out))

    def load(self, name: str, parameters: Mapping[str, object] | None = None) -> None:
        self.loads.append((name, dict(parameters or {})))
        if name in self.out:
            self.models[name] = {"1": self.out.pop(name)}
        else:
            self._versions(name)

    def unload(self, name: str) -> None:
        if name not in self.out:
            self.out[name] = self.find(name)
            del self.models[name]

    def set_goal(self, name: str, goal: str) -> None:
        self._versions(name)
        if "<=" not in goal and ">=" not in goal:
            raise GoalError(f"{goal!r} is not a goal; a goal is like 'p99 <= 5ms'")
        self.goals[name] = goal

    @property
    def ready(self) -> bool:
        return self.is_ready

    def _versions(self, name: str) -> dict[str, FakeServed]:
        if name not in self.models:
            raise UnknownModelError(f"there is no model {name!r}; there are {', '.join([*self.models, *self.out])}")
        return self.models[name]
