"""A bundle that is called like the model, and stands on the rung that the goal asks for at this moment."""

from __future__ import annotations

import asyncio
import math
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from accelerando.bundle import Bundle
from accelerando.errors import ClosedError, DataError, DeadlineError, UsageError
from accelerando.goal import Goal
from accelerando.goal_text import BYTES, TIME, amount
from accelerando.ladder import Ladder, Rung
from accelerando.recipe import Runner
from accelerando.serve.aims import Aims, orientation, promise
from accelerando.serve.company import Company
from accelerando.serve.conductor import Conductor
from accelerando.serve.governor import PRESETS, Decides
from accelerando.serve.isolation import Apart
from accelerando.serve.residents import Residents
from accelerando.serve.runtime import MachineWarning, array_of, check_axes, fit, tensor_of
from accelerando.serve.status import RungStatus, Status
from accelerando.serve.tickets import Answer, Explanation, Ticket
from accelerando.signature import Array, Signature

if TYPE_CHECKING:
    from accelerando.serve.drift import Drift
    from accelerando.serve.watch import Watch


# Seconds: what takes less is computed where it was asked, for an event loop is not held up by it, and what else a
# request costs is more, so that load is not hidden from the governor.
AT_ONCE = 1e-4


@dataclass(frozen=True)
class Terms:
    """How a bundle is to be run: what `update` keeps."""

    governor: Decides
    memory: int | None
    most_rows: int
    waiting_rows: int
    audit: float
    isolated: bool
    model: Any
    name: str


class GovernedModel:
    """A bundle under a goal, called like the model; made by `accelerando.load(path, goal=...)`.

    Thread-safe, and usable after a fork (a child loads its own rungs).  Close it, or use it in a `with`.
    """

    def __init__(self, bundle: Bundle, goal: Goal, terms: Terms) -> None:
        self._terms, self._goal = terms, goal
        self._changing = threading.Lock()  # `goal`, `update` and `close` come one after another
        self._closed = False
        self._open(bundle)

    def _open(self, bundle: Bundle) -> None:
        self._pid = os.getpid()
        self._cores = threading.Lock()
        self._signature = bundle.signature
        company = self._company(bundle, 1)
        self._conductor = Conductor(company, self._terms.governor, self._cores, self._terms.waiting_rows)
        self._finalize = weakref.finalize(self, _end, self._conductor)  # also when the program ends

    def _company(self, bundle: Bundle, version: int) -> Company:
        """The loaded rungs of a bundle."""
        terms = self._terms
        apart = Apart(bundle.path) if terms.isolated else None

        def start(rung: Rung) -> Runner:
            if apart is not None:
                return apart.start(rung)
            return bundle.start(rung, terms.model, spinning=False)

        def end() -> None:
            residents.close()
            if apart is not None:
                apart.close()

        pid = apart.pid if apart is not None else os.getpid
        residents = Residents(bundle, start, self._cores, terms.memory, terms.most_rows, pid)
        aims = Aims.of(self._goal, bundle.ladder)
        try:
            residents.begin(_order(residents, aims))
        except BaseException:
            end()
            raise
        return Company(residents, aims, *_watch(bundle, terms.audit), version, end)

    # --- what is asked ------------------------------------------------------------------------------------------

    @property
    def goal(self) -> Goal:
        """What is asked for.  Set it, as a text or a `Goal`: it is in force from the next batch on.

        Raises:
            GoalError: it does not parse, or contradicts itself; the old one stays.
        """
        return self._goal

    @goal.setter
    def goal(self, goal: str | Goal) -> None:
        wanted = goal if isinstance(goal, Goal) else Goal.parse(goal)
        with self._changing:
            company = self._alive().company
            self._goal = wanted
            aims = Aims.of(wanted, company.residents.bundle.ladder)
            self._conductor.conduct(replace(company, aims=aims))

    @property
    def bundle(self) -> Bundle:
        return self._conductor.company.residents.bundle

    @property
    def signature(self) -> Signature:
        """Its inputs and outputs."""
        return self._signature

    @property
    def version(self) -> int:
        """Of its bundle, counted from 1 by `update`."""
        return self._conductor.company.version

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return not self._closed and self._conductor.company.residents.ready

    # --- calls --------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, deadline: str | float | None = None, **kwargs: Any) -> Any:
        """The answer to one batch, in the original's structure.

        Args:
            deadline: until then an answer is of use: seconds from now, or a text such as "3ms"; without it, what the
                goal allows.

        Raises:
            DataError: the arguments are not those of the model.
            OverloadedError, DeadlineError: it could not be, or was not, answered in time.
            RowsError: the model failed on it.
            ClosedError: it was closed.
        """
        return self.explain(*args, deadline=deadline, **kwargs)[0]

    def explain(self, *args: Any, deadline: str | float | None = None, **kwargs: Any) -> tuple[Any, Explanation]:
        """The answer, and how it came about: the rung, its certified quality, the times, the batch, the reason."""
        conductor = self._alive()
        ticket, tensors = self._ticket(args, kwargs, deadline)
        answer = conductor.answer(ticket)
        return self._shaped(answer, tensors), answer.why

    async def infer(self, *args: Any, deadline: str | float | None = None, **kwargs: Any) -> Any:
        """The answer, awaited; a task that is cancelled takes its request out of the queue."""
        conductor = self._alive()
        ticket, tensors = self._ticket(args, kwargs, deadline)
        conductor.submit(ticket, 0.0 if self._terms.isolated else AT_ONCE)
        return self._shaped(await asyncio.wrap_future(ticket.future), tensors)

    def submit(
        self,
        leaves: Sequence[Array],
        *,
        seconds: float | None = None,
        min_quality: float | None = None,
        priority: int = 0,
    ) -> Ticket:
        """Put a request of flat inputs into the queue; see `server.repository.Served.submit`."""
        conductor = self._alive()
        ports = self._signature.inputs
        if len(leaves) != len(ports):
            raise DataError(f"{len(leaves)} inputs were given, but the model takes {', '.join(map(str, ports))}")
        fitted = [fit(leaf, port) for leaf, port in zip(leaves, ports, strict=True)]
        check_axes(fitted, ports)
        ticket = self._of_leaves(fitted, seconds, min_quality, priority)
        conductor.submit(ticket, 0.0 if self._terms.isolated else AT_ONCE)
        return ticket

    def _ticket(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], deadline: str | float | None
    ) -> tuple[Ticket, Sequence[Any]]:
        """The request of a call, and the tensors among what was given."""
        given = self._signature.bind(args, kwargs)
        torch = sys.modules.get("torch")  # there can be no tensor where nobody imported it
        tensors = [x for x in given if isinstance(x, torch.Tensor)] if torch else []
        arrays = [array_of(torch, x) for x in given] if tensors else given
        leaves = [fit(x, port) for x, port in zip(arrays, self._signature.inputs, strict=True)]
        check_axes(leaves, self._signature.inputs)
        return self._of_leaves(leaves, _seconds(deadline)), tensors

    def _of_leaves(
        self, leaves: Sequence[Array], seconds: float | None, min_quality: float | None = None, priority: int = 0
    ) -> Ticket:
        rows = len(leaves[0]) if leaves and leaves[0].ndim else 1
        if rows == 0:
            raise DataError("a batch of no rows was given; give at least one")
        if seconds is not None and not seconds > 0:
            raise DeadlineError(f"the deadline was {seconds:g} s from now: it has passed; give more than 0")
        company = self._conductor.company
        now = time.monotonic()
        patience = company.aims.patience if seconds is None else seconds
        ladder = company.residents.bundle.ladder
        floor = -math.inf if min_quality is None else self._floor(ladder, min_quality)
        return Ticket(leaves, rows, now, now + patience, floor, priority)

    @staticmethod
    def _floor(ladder: Ladder, quality: float) -> float:
        """A wanted quality, oriented; one that no rung promises is a mistake, not a matter of load."""
        floor = orientation(ladder) * quality
        if floor > (best := max(promise(rung, ladder) for rung in ladder)):
            promised = orientation(ladder) * best
            raise DataError(f"a quality of {quality:g} was asked for, but no rung promises better than {promised:.4g}")
        return floor

    def _shaped(self, answer: Answer, tensors: Sequence[Any]) -> Any:
        leaves: list[Any] = answer.leaves
        if tensors:
            leaves = [tensor_of(sys.modules["torch"], x, tensors[0].device) for x in leaves]
        return self._signature.answer(leaves)

    # --- change -------------------------------------------------------------------------------------------------

    def update(self, path: str | Path) -> None:
        """Go over to another bundle of the same model, which is loaded, proven and warm first; nothing is dropped.

        Raises:
            BundleError: it can't be trusted, or none of its rungs can run here; the old one goes on.
            UsageError: it is called otherwise.
        """
        bundle = Bundle.open(path, hashes=False)
        if bundle.signature != self._signature:
            raise UsageError(
                f"{path} is called otherwise: it takes {', '.join(map(str, bundle.signature.inputs))}, but "
                f"{', '.join(map(str, self._signature.inputs))} is served; load it under another name"
            )
        with self._changing:
            old = self._alive().company
            self._conductor.conduct(self._company(bundle, old.version + 1))
        old.end()

    def close(self) -> None:
        """Answer what was accepted, then give everything back; calls after it raise ClosedError."""
        with self._changing:
            self._closed = True
            if self._pid == os.getpid():
                self._finalize()

    def _alive(self) -> Conductor:
        """The conductor, which after a fork is a new one: threads do not live on in a child."""
        if self._closed:
            raise ClosedError("the model was closed; load it again")
        if self._pid != os.getpid():
            self._changing = threading.Lock()
            self._open(Bundle.open(self._conductor.company.residents.bundle.path, hashes=False))
        return self._conductor

    # --- what it tells ------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """What it tells about itself: plain data."""
        conductor = self._conductor
        company, tally = conductor.company, conductor.tally
        residents, bundle = company.residents, company.residents.bundle
        rate, slowdown, utilisation = conductor.figures()
        requests = tally.requests
        return Status(
            name=self._terms.name,
            version=company.version,
            goal=str(company.aims.goal),
            metric=bundle.ladder.original.evidence.metric,
            rungs=tuple(self._rung_status(company, number) for number in range(len(bundle.ladder))),
            standing=conductor.standing,
            stands=tuple(conductor.stands),
            queue_rows=conductor.waiting_rows,
            rate=rate,
            slowdown=slowdown,
            utilisation=utilisation,
            rows=tally.rows,
            answered=requests["answered"],
            late=requests["late"],
            refused=requests["refused"],
            expired=requests["expired"],
            failed=requests["failed"],
            cancelled=requests["cancelled"],
            switches=tally.switches,
            attainment=tally.attainment,
            effective_quality=tally.effective_quality * orientation(bundle.ladder),
            queued=tally.queued,
            computed=tally.computed,
            memory_bytes=residents.memory,
            memory_cap=residents.cap,
            audited=company.watch.audited if company.watch else 0,
            batches=tally.batches,
            latest=tally.latest,
            drift=company.drift.findings if company.drift else (),
        )

    def _rung_status(self, company: Company, number: int) -> RungStatus:
        residents, resident = company.residents, company.residents[number]
        state = next((s for s in residents.states if s.number == number), None)
        return RungStatus(
            number, resident.text, resident.state, resident.why, resident.rung.quality, resident.rung.drop,
            resident.rung.speedup, state.seconds(1) if state else 0.0, residents.bytes_of(number),
            self._conductor.tally.rows_of[number], company.watch.agreement(number) if company.watch else None,
        )  # fmt: skip

    def __enter__(self) -> GovernedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> GovernedModel:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.close)

    def __repr__(self) -> str:
        if self._closed:
            return "GovernedModel(closed)"
        told = self.status()
        lines = [f"GovernedModel({self.bundle.path}), goal {told.goal}, stands on rung {told.standing}"]
        for rung in reversed(told.rungs):
            lines.append(
                f"  {'>' if rung.number == told.standing else ' '} {rung.number} {rung.state}: {rung.recipe}, "
                f"{rung.seconds * 1e3:.3g} ms, {told.metric} {rung.quality.mid:.4g}"
            )
        return "\n".join(lines)


def govern(
    path: str | Path,
    *,
    goal: str | Goal | None = None,
    memory: str | int | None = None,
    governor: str | Decides = "balanced",
    most_rows: int = 64,
    waiting_rows: int = 10_000,
    audit: float = 0.01,
    isolated: bool = False,
    model: Any = None,
    name: str | None = None,
) -> GovernedModel:
    """A bundle under a goal.

    Args:
        path: the folder.
        goal: what is asked for; without it, what the bundle was made for.
        memory: that the loaded rungs may hold: bytes, or a text such as "200MB"; without it, no limit.
        governor: `steady`, `balanced` or `responsive` (it climbs after 0.5, 0.25 or 0 s), or an object with the
            same `decide`.
        most_rows: of a batch.
        waiting_rows: that the queue takes.
        audit: the share of requests that are asked of the best rung too, when nothing else is to be done; 0 for none.
        isolated: compute in a process of its own, so that a backend that crashes or hangs costs one request.
        model: the original module, which rungs that run its own code need.
        name: by which it tells of itself; the folder's, without it.

    Raises:
        BundleError: it can't be trusted, or none of its rungs can run here.
        GoalError, UsageError: something that was given is not what it must be.
    """
    bundle = Bundle.open(path, hashes=False)  # each rung is hashed when it is loaded
    chosen = PRESETS.get(governor) if isinstance(governor, str) else governor
    if chosen is None or not hasattr(chosen, "decide"):
        raise UsageError(f"the governor must be one of {', '.join(PRESETS)}, or have a decide(), but is {governor!r}")
    if not 0 <= audit <= 1:
        raise UsageError(f"audit is a share, from 0 to 1, but {audit!r} was given")
    if most_rows < 1 or waiting_rows < 1:
        raise UsageError(f"most_rows and waiting_rows must be at least 1, but are {most_rows} and {waiting_rows}")
    if isolated and model is not None:
        raise UsageError("a module of this process can't be run in another; leave out model= or isolated=")
    wanted = bundle.goal if goal is None else goal if isinstance(goal, Goal) else Goal.parse(goal)
    cap = amount(memory, BYTES, "memory") if memory is not None else None
    terms = Terms(
        chosen, None if cap is None else int(cap), most_rows, waiting_rows, audit, isolated, model,
        name or Path(path).resolve().name,
    )  # fmt: skip
    if differences := bundle.differences():
        warnings.warn(
            f"{bundle.path} was measured elsewhere ({'; '.join(differences)}): its rungs are timed here as they are "
            "loaded, but their certified speedups may not hold",
            MachineWarning,
            stacklevel=3,
        )
    return GovernedModel(bundle, wanted, terms)


def _end(conductor: Conductor) -> None:
    conductor.close()
    conductor.company.end()


def _watch(bundle: Bundle, share: float) -> tuple[Watch | None, Drift | None]:
    """Who looks at a share of the answers, and at the inputs."""
    if share == 0:
        return None, None
    from accelerando.serve.drift import Drift
    from accelerando.serve.watch import Watch

    parity = bundle.parity
    return Watch(bundle, share), Drift(bundle.signature.inputs, parity.inputs if parity else None)


def _order(residents: Residents, aims: Aims) -> list[int]:
    """The fastest, for bursts; then the best of those that the goal allows; the others by quality."""
    rest = sorted(range(len(residents.bundle.ladder) - 1), key=lambda n: (n not in aims.rungs, n))
    return [len(residents.bundle.ladder) - 1, *rest]


def _seconds(deadline: str | float | None) -> float | None:
    return None if deadline is None else amount(deadline, TIME, "deadline")
