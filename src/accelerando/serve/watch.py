"""The quality watch: does a rung still answer as its certificate promises?

A share of the requests is answered once more, by the best rung, while nothing else is to be done.  How alike the two
answers are is a value in [0, 1]; its mean gets an interval that holds at all times at once, and a rung is quarantined
once that interval lies below what its evidence promises.  It is driven by the executor and runs nothing by itself:

    if watch.wants(rung):
        watch.add(leaves, answers, rung)
    ...                                                    # later, when the queue is empty
    if (verdict := watch.audit(best_runner)) and verdict.quarantine: ...
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np

from accelerando.bundle import Bundle
from accelerando.interval import CONFIDENCE, Interval
from accelerando.serve.anytime import ConfidenceSequence
from accelerando.serve.likeness import Likeness, Promise
from accelerando.serve.stored_rows import StoredRows
from accelerando.signature import Array

SHARE = 0.01  # of the requests are audited
ROWS = 4  # of a request at most: the best rung is slow, and whoever comes meanwhile must wait
MOST, MOST_BYTES = 256, 64 * 2**20  # of requests that wait for their audit
EVERY = 50  # audits of a rung: then it is asked the stored rows too
Run = Callable[[list[Array]], Sequence[Array]]


@dataclass(frozen=True)
class Verdict:
    """What one audit found.

    Args:
        rung: its number.
        quarantine: it must not answer any more; `why` in words, empty else.
    """

    rung: int
    quarantine: bool = False
    why: str = ""


@dataclass(frozen=True)
class _Track:
    """What is known of one rung, compared with one reference."""

    sequence: ConfidenceSequence
    promise: Promise | None


@dataclass(frozen=True)
class _Pending:
    """One request that waits for its audit."""

    leaves: list[Array]
    answers: list[Array]
    rung: int

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (*self.leaves, *self.answers))


class Watch:
    """Audits a bundle's rungs.  Thread-safe; `audit` is for one thread at a time.

    Over the life of a rung, compared with one reference, a false quarantine happens with a chance of at most 5 %: half
    of it is that the certificate promised too much by chance, half that the interval misses at any time.

    Args:
        share: of the requests that are audited, drawn by `seed`.
        reference: the number of the rung with which the others are compared, the best that can run here.
        rows: of a request that are audited at most; all, where the model's batch is fixed.
        most, most_bytes: requests that wait for their audit; more are let go, and counted in `missed`.

    Raises:
        ValueError: the share is not in [0, 1].
        BundleError: the stored rows are damaged.
    """

    def __init__(
        self,
        bundle: Bundle,
        share: float = SHARE,
        seed: int = 0,
        *,
        reference: int = 0,
        rows: int = ROWS,
        most: int = MOST,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"a share must lie in [0, 1], but is {share}")
        self.share, self.reference = share, reference
        self.audited = self.missed = 0
        self._bundle, self._stored = bundle, StoredRows(bundle)
        self._likeness = Likeness(bundle, self._stored.parity)
        self._rows = None if bundle.signature.fixed_batch else rows
        self._most, self._most_bytes = most, most_bytes
        self._random = random.Random(seed)
        self._queue: deque[_Pending] = deque()
        self._bytes = 0
        self._tracks: dict[tuple[int, int], _Track] = {}  # by reference and rung
        self._quarantined: set[int] = set()
        self._lock = Lock()

    def wants(self, rung: int) -> bool:
        """Whether a request that this rung has just answered is to be audited: the draw, blind to what it holds."""
        return self._random.random() < self.share and rung != self.reference and rung not in self._quarantined

    def add(self, leaves: Sequence[Array], answers: Sequence[Array], rung: int) -> None:
        """Keep a request for its audit: its flat inputs and outputs, rows on axis 0; they are copied."""
        count = len(leaves[0])
        if self._rows is None or count <= self._rows:
            picked: Array | slice = slice(None)
        else:
            picked = np.array(sorted(self._random.sample(range(count), self._rows)))
        kept = _Pending([np.array(x[picked]) for x in leaves], [np.array(x[picked]) for x in answers], rung)
        with self._lock:
            if len(self._queue) >= self._most or self._bytes + kept.bytes > self._most_bytes:
                self.missed += 1
                return
            self._queue.append(kept)
            self._bytes += kept.bytes

    @property
    def pending(self) -> int:
        """How many requests wait for their audit."""
        return len(self._queue)

    def audit(
        self, run_best: Run, best: int | None = None, run: Callable[[int, list[Array]], Sequence[Array]] | None = None
    ) -> Verdict | None:
        """Audit the request that has waited longest; None where none waits.

        Before a rung is quarantined the reference answers the stored rows (`recheck`): where it does so otherwise than
        when it was certified, the verdict is on the reference, and what was held against the others is forgotten.

        Args:
            run_best: the reference rung, flat inputs to flat outputs.  What it raises is passed on, and the request
                is not tried again.
            best: the number of that rung, where it may have changed; as `refer_to`.
            run: any rung that is loaded, by its number, all rows in one call, as they were asked when they were stored;
                with it, the audited rung is asked the stored rows too, at its first audit and at every 50th after it.
        """
        if best is not None:
            self.refer_to(best)
        with self._lock:
            if not self._queue:
                return None
            item = self._queue.popleft()
            self._bytes -= item.bytes
        reference = self.reference
        alike = self._likeness(item.answers, run_best(item.leaves))
        with self._lock:
            if reference != self.reference or not len(alike):
                return None
            self.audited += 1
            track = self._track(item.rung)
            track.sequence.observe(float(alike.mean()))
            due, promise = track.sequence.count % EVERY == 1, track.promise
            low = promise is not None and track.sequence.below(promise.least)
            why = self._why(track.sequence, promise) if low and promise else ""
        if run is not None and due and (fault := self.recheck(item.rung, lambda leaves: run(item.rung, leaves))):
            return fault
        if not why:
            return Verdict(item.rung)
        if fault := self.recheck(reference, run_best if run is None else lambda leaves: run(reference, leaves)):
            return fault
        with self._lock:
            self._quarantined.add(item.rung)
            self._keep(lambda other: other.rung != item.rung)
        return Verdict(item.rung, True, why)

    def recheck(self, rung: int, run: Run) -> Verdict | None:
        """Ask a rung the stored rows: a verdict where it answers otherwise than when it was certified, else None.

        It needs no audits, and sees a changed weight at once; it does not see that the requests have changed.

        Args:
            run: the rung, flat inputs to flat outputs; what it raises is passed on.
        """
        key = self._bundle.ladder.rungs[rung].recipe.key
        parity = self._stored.parity
        if parity is None or key not in parity.rungs:
            return None
        wrong = self._stored.deviation(key, list(run(list(parity.inputs))))
        if wrong is None:
            return None
        with self._lock:
            self._tracks = {pair: track for pair, track in self._tracks.items() if pair[0] != rung}
            self._quarantined.add(rung)
            self._keep(lambda item: item.rung != rung)
        why = f"it answers the stored rows otherwise than when it was certified: {wrong}; load it again"
        return Verdict(rung, True, why)

    def agreement(self, rung: int) -> Interval | None:
        """How alike a rung's answers are to the reference's, by 95 % at all times; None before its first audit."""
        with self._lock:
            track = self._tracks.get((self.reference, rung))
            return track.sequence.interval() if track and track.sequence.count else None

    def promised(self, rung: int) -> Promise | None:
        """What a rung's certificate promises of that agreement; None where it promises nothing."""
        with self._lock:
            return self._track(rung).promise

    def released(self, rung: int) -> None:
        """A rung was loaded anew, or let out of quarantine: what was held against it is forgotten."""
        with self._lock:
            self._quarantined.discard(rung)
            self._tracks = {pair: track for pair, track in self._tracks.items() if rung not in pair}
            self._keep(lambda item: item.rung != rung)

    def refer_to(self, reference: int) -> None:
        """Compare with another rung from now on: another agreement, which is counted apart."""
        with self._lock:
            if reference != self.reference:
                self.reference = reference
                self._keep(lambda item: item.rung != reference)

    # --- with the lock held ---

    def _track(self, rung: int) -> _Track:
        pair = (self.reference, rung)
        if pair not in self._tracks:
            promise = self._likeness.promised(rung, self.reference, (1 - CONFIDENCE) / 2)
            self._tracks[pair] = _Track(ConfidenceSequence(), promise)
        return self._tracks[pair]

    def _keep(self, wanted: Callable[[_Pending], bool]) -> None:
        self._queue = deque(filter(wanted, self._queue))
        self._bytes = sum(item.bytes for item in self._queue)

    def _why(self, sequence: ConfidenceSequence, promise: Promise) -> str:
        found = sequence.interval()
        return (
            f"in {sequence.count} audited requests its answers were {found.mid:.1%} like those of rung "
            f"{self.reference} ({found.low:.1%} to {found.high:.1%}), but its certificate, by {promise.grounds}, "
            f"promises at least {promise.least:.1%}; either it is not what was certified, or the requests are unlike "
            f"the data that it was certified on: load it again, or make a bundle from data like these"
        )
