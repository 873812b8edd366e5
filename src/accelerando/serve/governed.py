"""A bundle that is called like the model, and stands on the rung that the goal asks for at this moment."""

from __future__ import annotations

import asyncio
import os
import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerando.bundle import Bundle
from accelerando.errors import ClosedError, GoalError, UsageError
from accelerando.goal import Goal
from accelerando.goal_text import BYTES, amount
from accelerando.serve import reception
from accelerando.serve.account import status_of
from accelerando.serve.aims import Aims
from accelerando.serve.binding import Binding
from accelerando.serve.company import Company, Terms, assemble
from accelerando.serve.conductor import Conductor, Soon
from accelerando.serve.governor import PRESETS, Decides
from accelerando.serve.runtime import MachineWarning
from accelerando.serve.status import Status
from accelerando.serve.tickets import Explanation, Ticket
from accelerando.signature import Array, Signature

# Seconds: what takes less is computed where it was asked, for an event loop is not held up by it, and what else a
# request costs is more, so that load is not hidden from the governor.
AT_ONCE = 1e-4
AWAY = 4e-4  # more where another process computes, for that spares two changes of threads


class GovernedModel:
    """A bundle under a goal, called like the model; made by `accelerando.load(path, goal=...)`.

    Thread-safe, and usable after a fork: a child loads rungs of its own, and leaves its parent's alone.  It should end
    by `os._exit`, for ONNX Runtime may abort or hang in another exit.  Close it, or use it in a `with`.
    """

    def __init__(self, bundle: Bundle, goal: Goal, terms: Terms) -> None:
        self._terms, self._goal = terms, goal
        self._changing = threading.Lock()  # `update` and `close` come one after another; they may take long
        self._conducting = threading.Lock()  # what is conducted changes, by a new goal or bundle; taken last
        self._closed = self._orphaned = False
        _MODELS.add(self)
        self._open(bundle)

    def _open(self, bundle: Bundle) -> None:
        self._cores = threading.Lock()
        self._binding = Binding(bundle.signature)
        company = assemble(bundle, self._goal, self._terms, self._cores, 1)
        self._conductor = Conductor(company, self._terms.governor, self._cores, self._terms.waiting_rows)
        self._finalize = weakref.finalize(self, _end, self._conductor, os.getpid())  # also when the program ends

    # --- what is asked ------------------------------------------------------------------------------------------

    @property
    def goal(self) -> Goal:
        """What is asked for.  Set it, as a text or a `Goal`: it is in force from the next batch on.

        Raises:
            GoalError: it does not parse, contradicts itself, or asks for what no rung promises; the old one stays.
        """
        return self._goal

    @goal.setter
    def goal(self, goal: str | Goal) -> None:
        wanted = goal if isinstance(goal, Goal) else Goal.parse(goal)
        conductor = self._alive()
        with self._conducting:
            company = _aimed(conductor.company, wanted)
            self._goal = wanted
            conductor.conduct(company)

    @property
    def bundle(self) -> Bundle:
        return self._conductor.company.residents.bundle

    @property
    def signature(self) -> Signature:
        """Its inputs and outputs."""
        return self._binding.signature

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
        ticket, tensors = reception.of_call(conductor.company, self._binding, args, kwargs, deadline)
        answer = conductor.answer(ticket)
        return self._binding.answer(answer.leaves, tensors), answer.why

    async def infer(self, *args: Any, deadline: str | float | None = None, **kwargs: Any) -> Any:
        """The answer, awaited; a task that is cancelled takes its request out of the queue."""
        conductor = self._alive()
        ticket, tensors = reception.of_call(conductor.company, self._binding, args, kwargs, deadline)
        conductor.submit(ticket, 0.0 if self._terms.isolated else AT_ONCE)
        answer = await asyncio.wrap_future(ticket.future)
        return self._binding.answer(answer.leaves, tensors)

    def submit(
        self,
        leaves: Sequence[Array],
        *,
        seconds: float | None = None,
        min_quality: float | None = None,
        priority: int = 0,
    ) -> Ticket:
        """Put a request of flat inputs into the queue, never waiting; `ticket.future` gets the answer.

        Args:
            leaves: one array for each input, in the signature's order.
            seconds, min_quality, priority: as `server.repository.Served.submit_soon`, and it raises as that; DataError
                also where one of them is not a number such as it must be.
        """
        conductor = self._alive()
        ticket = reception.of_leaves(conductor.company, self._binding, leaves, seconds, min_quality, priority)
        conductor.submit(ticket, 0.0 if self._terms.isolated else AT_ONCE)
        return ticket

    def submit_soon(
        self,
        leaves: Sequence[Array],
        soon: Soon,
        *,
        seconds: float | None = None,
        min_quality: float | None = None,
        priority: int = 0,
    ) -> Ticket:
        """Put a request of a server into the queue; see `server.repository.Served.submit_soon`."""
        conductor = self._alive()
        ticket = reception.of_bound(conductor.company, leaves, seconds, min_quality, priority)
        conductor.submit_soon(ticket, AT_ONCE + AWAY * self._terms.isolated, soon)
        return ticket

    # --- change -------------------------------------------------------------------------------------------------

    def update(self, path: str | Path) -> None:
        """Go over to another bundle of the same model, which is loaded, proven and warm first; nothing is dropped.

        Raises:
            BundleError: it can't be trusted, or none of its rungs can run here; the old one goes on.
            GoalError: none of its rungs keeps the goal; likewise.
            UsageError: it is called or judged otherwise, or there is no memory for both; likewise.
        """
        bundle = Bundle.open(path, hashes=False)
        if bundle.signature != self.signature:
            raise UsageError(
                f"{path} is called otherwise: it takes {', '.join(map(str, bundle.signature.inputs))}, but "
                f"{', '.join(map(str, self.signature.inputs))} is served; load it under another name"
            )
        ours, theirs = (b.ladder.original.evidence.metric for b in (self.bundle, bundle))
        if ours != theirs:
            raise UsageError(
                f"{path} was judged by {theirs}, but {ours} is what the goal is about; load it under another name"
            )
        self._alive()  # a forked child opens first, which takes the lock
        with self._changing:
            old = self._alive().company
            company = assemble(bundle, self._goal, self._terms, self._cores, old.version + 1, old)
            try:
                with self._conducting:
                    self._conductor.conduct(_aimed(company, self._goal))  # which may be another by now
            except GoalError:
                company.end()
                old.residents.fill()
                raise
            try:
                old.end()
            finally:
                company.residents.fill()

    def close(self) -> None:
        """Answer what was accepted, then give everything back; calls after it raise ClosedError.

        In a callback of a request it does not wait for that, for who is to be answered may wait for the callback.
        """
        self._closed = True  # at once, also where an update has to come to its end first
        self._conductor.apart(self._give_back)

    def _give_back(self) -> None:
        with self._changing:
            if not self._orphaned:  # else all that it has is its parent's
                self._finalize()

    def _alive(self) -> Conductor:
        """The conductor, which after a fork is a new one: threads do not live on in a child."""
        if self._orphaned:
            with self._changing:  # one thread opens, the others wait for it
                if self._orphaned and not self._closed:
                    self._open(Bundle.open(self.bundle.path, hashes=False))
                    self._orphaned = False
        if self._closed:
            raise ClosedError("the model was closed; load it again")
        return self._conductor

    def _orphan(self) -> None:
        """In a child that has just been forked: what it has is its parent's, whose threads may hold any lock."""
        self._orphaned, self._changing, self._conducting = True, threading.Lock(), threading.Lock()

    # --- what it tells ------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """What it tells about itself: plain data."""
        may_ask = self._closed and not self._orphaned  # a parent's locks may be held for ever
        return status_of(self._terms.name, self._conductor if may_ask else self._alive())

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
            takes = f"{rung.seconds * 1e3:.3g} ms, " if rung.seconds else ""
            lines.append(
                f"  {'>' if rung.number == told.standing else ' '} {rung.number} {rung.state}: {rung.recipe}, "
                f"{takes}{told.metric} {rung.quality.mid:.4g}"
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
        governor: `steady`, `balanced` or `responsive` (it climbs a rung after a whole, a quarter or nothing of what a
            request may take), or an object with the same `decide`.
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


def _aimed(company: Company, goal: Goal) -> Company:
    """A company under another goal.  Raises GoalError where it can't keep it."""
    aimed = replace(company, aims=Aims.of(goal, company.residents.bundle.ladder))
    aimed.check()
    return aimed


def _end(conductor: Conductor, pid: int) -> None:
    if pid != os.getpid():
        return  # a forked child ends, but threads, locks and lines are its parent's

    def end() -> None:
        conductor.close()
        conductor.company.end()

    conductor.apart(end)


_MODELS: weakref.WeakSet[GovernedModel] = weakref.WeakSet()  # of this process and its parents


def _orphan_all() -> None:
    for model in list(_MODELS):
        model._orphan()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_orphan_all)
