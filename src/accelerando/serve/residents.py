"""The rungs that are in memory: loaded and proven off the request path, evicted under a hard cap.

The fastest rung is pinned: it is what a burst falls back to.

While one bundle takes over from another, the cap is of what both hold: the elder's rungs make room for the heir's,
the idlest first, but for those that it can't serve without.

The cores are never waited for, nor is a runner closed, under a lock of theirs; an heir's lock may be held when its
elder's is taken, not the other way round.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from accelerando.bundle import Bundle
from accelerando.errors import AccelerandoError, BundleError, UsageError
from accelerando.ladder import Rung
from accelerando.memory import give_back, resident_bytes
from accelerando.recipe import Runner
from accelerando.serve import costs
from accelerando.serve.aims import promise
from accelerando.serve.batches import joinable
from accelerando.serve.governor import RungState
from accelerando.serve.interrupts import is_interrupt
from accelerando.serve.isolation import Remote
from accelerando.serve.sizes import Sizes
from accelerando.serve.stored_rows import StoredRows
from accelerando.signature import Array

VOTES, VOTE_SECONDS = 10, 5.0  # a rung that is out must be missed this often, for this long, before another makes room
Start = Callable[[Rung], Runner]


@dataclass
class Resident:
    """A rung, and what has become of it here.  `state` as in `RungStatus`."""

    number: int
    rung: Rung
    state: str = "out"
    why: str = ""
    runner: Runner | None = None
    cost: costs.Cost | None = None
    used: float = 0.0  # when last, by the monotonic clock
    answered: int = 0  # rows
    missed: int = 0
    missed_since: float = 0.0

    @cached_property
    def text(self) -> str:
        """How the rung was made, in words."""
        return str(self.rung.recipe)


class Residents:
    """The rungs of one bundle.  Thread-safe.

    Args:
        bundle: opened.
        start: loads a rung, in this process or another.
        cores: held by whoever computes: one at a time, so that rungs never fight over the cores.
        cap: bytes that the loaded rungs may hold, None for no limit.
        most_rows: of a batch.
        pid: of the process that holds them.
        elder: those of the bundle from which it takes over, until `fill`.

    Raises:
        UsageError: the fastest rung alone is over the cap.
    """

    def __init__(
        self,
        bundle: Bundle,
        start: Start,
        cores: threading.Lock,
        cap: int | None = None,
        most_rows: int = 64,
        pid: Callable[[], int] = os.getpid,
        elder: Residents | None = None,
    ) -> None:
        self.bundle, self.cap = bundle, cap
        self._start, self._cores, self._pid = start, cores, pid
        self.most_rows = most_rows if joinable(bundle.signature) else bundle.signature.fixed_batch or 1
        self._lock = threading.RLock()
        self._all = [Resident(i, rung) for i, rung in enumerate(bundle.ladder)]
        self._promises = [promise(rung, bundle.ladder) for rung in bundle.ladder]
        self._tails = [costs.tail(rung.evidence) for rung in bundle.ladder]
        self._sizes = Sizes(bundle.ladder.rungs)
        self._stored = StoredRows(bundle)
        self._row = self._one_row()
        self._wanted: list[int] = []
        self._loader: threading.Thread | None = None
        self._closed = False
        self._elder, self._yields = elder, False
        self._pinned = self._kept = frozenset({len(self._all) - 1})  # `_kept` makes no room for others
        self._order: tuple[int, ...] = ()
        self._before: int = elder._before if elder is not None and elder._pid() == pid() else resident_bytes(pid())
        self.states: tuple[RungState, ...] = ()  # of all that did not fail; replaced as a whole, never changed
        self.ready = False  # whether there is a rung to stand on
        if cap is not None and (least := self._foreseen(self._pinned)) > cap:
            raise UsageError(
                f"a memory of {cap:,} bytes was allowed, but the fastest rung, {self._all[-1].rung.recipe}, takes "
                f"about {least:,}; allow more"
            )

    def __iter__(self) -> Iterator[Resident]:
        return iter(self._all)

    def __getitem__(self, number: int) -> Resident:
        return self._all[number]

    @property
    def memory(self) -> int:
        """Bytes that the process holds more than before the first rung of this bundle was loaded.

        Of the whole process: what else it took or gave back since then counts too, and what was there already, such as
        the backend's library and arena that another model has loaded, does not.  So it can be 0 for the second model of
        one process; where rungs have a process of their own (`isolated`), it is theirs alone.
        """
        return max(resident_bytes(self._pid()) - self._before, 0)

    def may_come(self, number: int) -> bool:
        """Whether a rung is ready or may be yet: it was not turned away, and has room beside the fastest."""
        if self._all[number].state in ("failed", "quarantined"):
            return False
        return self.cap is None or self._foreseen(self._pinned | {number}) <= self.cap

    # --- loading and evicting -----------------------------------------------------------------------------------

    def begin(self, order: Sequence[int], serves: Callable[[], bool] = lambda: True, first: int = 2) -> None:
        """Load these rungs: the first before this returns, the rest by themselves, where it has an elder after `fill`.

        Args:
            order: numbers, the most urgent first.
            serves: whether the rungs that are ready do what is asked of them.
            first: how many are to be ready before this returns; more where they do not serve, and in the end all are
                tried.

        Raises:
            BundleError: `no-rung`: none can be loaded here; the message holds the reason of each.
            UsageError: what it needs has no room beside its elder.
        """
        self._order, rest = tuple(order), list(order)
        while rest and not (sum(s.ready for s in self.states) >= first and serves()):
            self.load(rest.pop(0))
        if self._elder is not None and not (self.ready and serves()) and any(r.state == "out" for r in self._all):
            raise UsageError(
                f"a memory of {self.cap:,} bytes was allowed, and the bundle that is served leaves too little of it to "
                f"load {self.bundle.path} meanwhile; allow more, or unload the one before you load the other"
            )
        if not self.ready:
            why = "; ".join(f"rung {r.number}: {r.why}" for r in self._all if r.why)
            raise BundleError("no-rung", f"no rung of {self.bundle.path} can run here: {why}")
        if self._elder is None:
            self.want(*rest)

    def give_way(self, but: Collection[int]) -> None:
        """An heir comes: load nothing more, and let it have the room of all rungs but these, until `fill`."""
        with self._lock:
            self._yields, self._kept = True, self._pinned | frozenset(but)
            self._wanted.clear()

    def fill(self) -> None:
        """There is neither an elder nor an heir any more: load what is out, as far as there is room."""
        with self._lock:
            self._elder, self._yields, self._kept = None, False, self._pinned
        self.want(*(n for n in self._order if self._all[n].state == "out"))

    def want(self, *numbers: int) -> None:
        """Load these when there is time; none of them makes room by evicting."""
        with self._lock:
            self._wanted += [n for n in numbers if n not in self._wanted]
            if self._wanted and self._loader is None and not self._closed:
                self._begin_thread(self._load_wanted)

    def _begin_thread(self, work: Callable[..., None], *args: int) -> None:
        self._loader = threading.Thread(target=work, args=args, name="accelerando-loader", daemon=True)
        self._loader.start()

    def _load_wanted(self) -> None:
        while True:
            with self._lock:
                if self._closed or not self._wanted:
                    self._loader = None
                    return
                number = self._wanted.pop(0)
            self.load(number)

    def load(self, number: int, evict: bool = False) -> bool:
        """Load a rung, prove that it answers as certified, and measure what its calls take; whether it is ready.

        Args:
            evict: let rungs that were not used for longest make room.
        """
        resident = self._all[number]
        with self._lock:
            if self._closed or self._yields or resident.state in ("ready", "loading", "quarantined"):
                return resident.state == "ready"
            leaving = self._made_room(number, evict)
            if leaving is None:
                resident.why = f"there is no room for it under the cap of {self.cap:,} bytes"
                return False
            resident.state, resident.why = "loading", ""
        self._give_back(leaving)
        try:
            runner = self._start(resident.rung)
            cost = self._proven(resident.rung, _aside(runner))
        except AccelerandoError as error:
            return self._leave(resident, "failed", str(error))
        except BaseException as error:  # whatever a backend raises: the other rungs go on
            if is_interrupt(error):
                raise
            return self._leave(resident, "failed", f"{type(error).__name__}: {error}")
        if not self._keep(resident, runner, cost):
            runner.close()
        return resident.state == "ready"

    def _keep(self, resident: Resident, runner: Runner, cost: costs.Cost) -> bool:
        """Let the governor see a rung that was loaded; not where all was closed meanwhile."""
        with self._lock:
            if not self._closed:
                resident.runner, resident.cost, resident.state = runner, cost, "ready"
                resident.used, resident.missed = time.monotonic(), 0
                self._publish()
            return not self._closed

    def _proven(self, rung: Rung, runner: Runner) -> costs.Cost:
        """The cost of a rung that answers as it did when it was certified.

        Only the calls that are timed hold the cores.  The first calls may have to build a second session, which takes
        many times as long as a call: a request that waited for them would wait for all of that, while one that runs
        beside them is merely slower.  Nobody else knows of the runner yet, so no lock is needed for its sake.
        """
        parity, key = self._stored.parity, rung.recipe.key
        if parity and (wrong := self._stored.deviation(key, runner(parity.inputs))):
            runner.close()
            raise BundleError("differs", f"it does not answer as it did when it was certified: {wrong}")
        return self._cost(runner)

    def _cost(self, runner: Runner) -> costs.Cost:
        """What its calls take, timed against the fastest rung that is ready."""
        measure = partial(costs.measure, runner, self._row, self.most_rows, self._cores)
        known = next((r for r in reversed(self._all) if r.state == "ready"), None)
        other, cost = (known.runner, known.cost) if known else (None, None)
        if known is None or other is None or cost is None:
            return measure()
        try:
            return measure((_aside(other), cost))
        except Exception:
            if known.runner is other:
                raise
            return measure()  # it has left meanwhile

    def _one_row(self) -> list[Array]:
        """Inputs of one row, or of the one batch that the model takes."""
        signature = self.bundle.signature
        if parity := self._stored.parity:
            return [leaf[: signature.fixed_batch or 1] for leaf in parity.inputs]
        shapes = [[axis if isinstance(axis, int) else 1 for axis in port.shape] for port in signature.inputs]
        return [np.zeros(shape, port.dtype) for shape, port in zip(shapes, signature.inputs, strict=True)]

    def _made_room(self, number: int, evict: bool) -> list[Runner] | None:
        """The runners of those that leave, so that a rung fits beside the others; None where it can't, and all stay."""
        if self.cap is None:
            return []
        ours, theirs = self._held() | {number}, self._elder._held() if self._elder else set()
        idle = [(self._elder, theirs, n) for n in self._elder._idlest()] if self._elder else []
        idle += [(self, ours, n) for n in self._idlest()] if evict else []
        leaving: list[tuple[Residents, int]] = []
        while self._foreseen(ours, theirs) > self.cap:
            if not idle:
                return None
            whose, held, out = idle.pop(0)
            held.discard(out)
            leaving.append((whose, out))
        return [runner for whose, out in leaving for runner in whose._taken_out(out)]

    def _held(self) -> set[int]:
        return {r.number for r in self._all if r.state in ("ready", "loading")}

    def _idlest(self) -> list[int]:
        """Numbers of the rungs that could make room, those first that were not used for longest."""
        leavable = [r for r in self._all if r.state == "ready" and r.number not in self._kept]
        return [r.number for r in sorted(leavable, key=lambda r: r.used)]

    def evict(self, number: int) -> None:
        """Take a rung out of memory once nothing computes with it."""
        self._give_back(self._taken_out(number))

    def _taken_out(self, number: int, state: str = "out", why: str = "") -> list[Runner]:
        """The runner of a rung with which nobody can begin to compute any more; none where it had none."""
        resident = self._all[number]
        with self._lock:
            runner, resident.runner = resident.runner, None
            if state != "out" or resident.state == "ready":
                resident.state, resident.why = state, why
            self._publish()
        return [] if runner is None else [runner]

    def _give_back(self, runners: list[Runner]) -> None:
        """Close runners that were taken out, once nothing computes with them.  Called without the lock."""
        if not runners:
            return
        with self._cores:
            pass
        here = any(not isinstance(runner, Remote) for runner in runners)
        while runners:
            runners.pop().close()
        if here:  # another process gives its own back, and looking through this one holds it up for some 20 ms
            give_back()

    def missed(self, number: int, now: float) -> None:
        """Told that a rung would have been stood on, were it loaded; missed often enough, it is loaded."""
        resident = self._all[number]
        with self._lock:
            if resident.state != "out":
                return
            if resident.missed == 0:
                resident.missed_since = now
            resident.missed += 1
            if resident.missed < VOTES or now - resident.missed_since < VOTE_SECONDS or self._loader:
                return
            resident.missed = 0
            self._loader = threading.Thread(
                target=self._swap_in, args=(number,), name="accelerando-loader", daemon=True
            )
            self._loader.start()

    def _swap_in(self, number: int) -> None:
        try:
            self.load(number, evict=True)
        finally:
            with self._lock:
                self._loader = None
        self.want()

    def turn_away(self, number: int, state: str, why: str) -> None:
        """Stand on a rung no more: it is `quarantined` for its answers, or it `failed`."""
        self._give_back(self._taken_out(number, state, why))

    def _leave(self, resident: Resident, state: str, why: str) -> bool:
        with self._lock:
            resident.state, resident.why = state, why
            self._publish()
        return False

    def _publish(self) -> None:
        """Make the states anew: what the governor sees is never half changed."""
        known = [(r.cost.seconds(1) / _recorded(r.rung), r.cost) for r in self._all if r.cost is not None]
        here = float(np.median([ratio for ratio, _ in known])) if known else 1.0  # this machine against that one
        costs_here = [r.cost or costs.Cost(0.0, here * _recorded(r.rung)) for r in self._all]
        self.states = tuple(
            RungState(
                r.number, self._promises[r.number], cost.fixed, cost.per_row, self._tails[r.number], self.most_rows,
                r.state == "ready",
            )
            for r, cost in zip(self._all, costs_here, strict=True)
            if r.state != "failed"
        )  # fmt: skip
        self.ready = any(s.ready for s in self.states)

    def close(self) -> None:
        """Give everything back, once nothing computes with it."""
        with self._lock:
            self._closed = True
            runners = [r.runner for r in self._all if r.runner is not None]
            for resident in self._all:
                resident.runner, resident.state = None, "out"
            loader = self._loader
        if loader is not None and loader is not threading.current_thread():
            loader.join()
        self._give_back(runners)

    def promise(self, number: int) -> float:
        """The quality that a rung's certificate promises, oriented (`aims.promise`)."""
        return self._promises[number]

    def bytes_of(self, number: int) -> int:
        """What a rung adds to those that are loaded, in bytes, as far as its certificate tells."""
        return self._sizes.added(number)

    def _foreseen(self, numbers: Collection[int], elders: Collection[int] = ()) -> int:
        """Bytes of these rungs together, and of these of the elder."""
        held = self._sizes.together(numbers)
        if self._elder is not None:
            shared = self._elder._pid() == self._pid()
            held = held.beside(self._elder._sizes.together(elders), shared=shared)
        return held.bytes


def _aside(runner: Runner) -> Runner:
    """A rung, asked while others are served."""
    return runner.aside() if isinstance(runner, Remote) else runner


def _recorded(rung: Rung) -> float:
    """Seconds of a row, as certified."""
    return rung.evidence.latency(0.5).mid / rung.evidence.batch
