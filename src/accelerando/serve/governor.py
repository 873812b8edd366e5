"""The governor: on which rung to stand for the next batch.

`decide` is pure: the same last decision, signal and rungs give the same decision.  Nothing here reads a clock, runs a
model or keeps state, so the simulator runs the same code as the server.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple, Protocol

from accelerando.errors import UsageError

GLANCE = 16  # requests at the head of the queue that the governor looks at one by one; more change nothing
UNHURRIED = 1.0  # seconds: what counts as the patience where no latency is asked for


@dataclass(frozen=True)
class RungState:
    """What the governor knows of one rung.

    Args:
        number: on the ladder; 0 is the original.
        quality: what its certificate promises: the low end of its quality's interval, in the metric's unit, with the
            sign turned where lower is better, so that greater is always better.
        fixed: seconds that a call takes however few its rows.
        per_row: seconds more for each row.
        tail: how many times longer than that its p95 is; at least 1.
        most_rows: the greatest batch that it takes.
        ready: it is loaded, warm, and not quarantined.
    """

    number: int
    quality: float
    fixed: float
    per_row: float
    tail: float = 1.0
    most_rows: int = 64
    ready: bool = True

    def seconds(self, rows: int) -> float:
        """What a batch usually takes, in seconds."""
        return self.fixed + self.per_row * rows


# Tuples, for each decision makes both: a frozen dataclass takes 1.6 to 3.5 times as long to make.
class Signal(NamedTuple):
    """What is seen when the executor is free.

    Args:
        now: seconds of a monotonic clock.
        rows: rows in the queue.
        queue: the requests at the head of the queue, earliest deadline first: (seconds left until its deadline, its
            rows, the quality that it asks for at least).  At most `GLANCE` of them, then `rows` tells of the rest.
        rate: rows that arrive per second while others run or wait, averaged over about half a second.  (A caller that
            waits for each answer before it asks again is no load, however often it asks.)
        slowdown: how many times slower than its cost a call takes just now; 1 on a quiet machine.
        patience: seconds that an answer may take by the goal; infinite where no latency is asked for.
        bank: how far the mean quality of what was answered lies above what is asked for, times the rows counted;
            infinite where no mean quality is asked for.
        asked: the mean quality that is asked for, oriented like `RungState.quality`.
    """

    now: float
    rows: int
    queue: tuple[tuple[float, int, float], ...]
    rate: float = 0.0
    slowdown: float = 1.0
    patience: float = float("inf")
    bank: float = float("inf")
    asked: float = float("-inf")


class Decision(NamedTuple):
    """Where to stand.

    Args:
        rung: its number on the ladder; None where the head of the queue can't be answered in time by any rung, so that
            it must be refused.
        rows: how many rows the next batch holds at most.
        since: when this rung was first stood on, seconds of the signal's clock.
        why: in words.
        pressed: when this rung or a faster one was last all that could be afforded; climbing counts from then.
    """

    rung: int | None
    rows: int
    since: float
    why: str
    pressed: float = float("-inf")


class Decides(Protocol):
    """What the executor and the simulator ask of a governor; any object with this method will do."""

    def decide(self, last: Decision | None, signal: Signal, rungs: tuple[RungState, ...]) -> Decision:
        """Where to stand for the next batch, after the `last` decision that named a rung."""


@dataclass(frozen=True)
class Governor:
    """The drain law, with deadlines, quality and a dwell.  `docs/why/governor.md` says where it comes from.

    With L rows waiting, lambda more a second and D seconds of patience, a row may cost

        B = (wait + horizon) * D / (L + lambda * horizon * D)

    seconds.  The best rung is taken whose cost per row, times the slow-down, is at most B, if

    1. its p95 for the head fits the head's slack;
    2. the rest stays feasible: were the other requests that `Signal.queue` shows then run in turn, each alone on the
       fastest ready rung that keeps its floor (in full batches where joining pays), at its usual cost, each would be
       in time.  Rows that are not shown, or yet to come, are B's business, and the bank is not asked on their behalf;
    3. it keeps the head's floor, and the bank bears it.

    If there is none: the fastest that keeps 3, if the head can be in time at all; else the head is refused.
    Requests join a batch where that makes rows cheaper; it never waits for more of them.

    Where no latency is asked for, `UNHURRIED` takes the place of D in B: the queue is to be gone within that time, so
    it does not grow while a faster rung is there.

    It falls at once, and climbs one rung for every `dwell` during which more could have been afforded throughout.

    Args:
        dwell: in units of the patience, like all that follows; 0 climbs at once.
        horizon: how far ahead arrivals are counted.
        wait: how long rows wait under a steady load that no rung carries exactly.
        block: the longest that a batch of several requests may take.
        gain: how many times cheaper a row must be in a full batch than alone, so that requests are joined.
        allowance: how far the bank may be overdrawn, in units of quality times rows.

    Raises:
        UsageError: a figure is not finite, below 0, or above 1 where it is a share of the patience.
    """

    dwell: float = 0.25
    horizon: float = 0.5
    wait: float = 0.4
    block: float = 0.5
    gain: float = 1.2
    allowance: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{name} of a governor must be a number of at least 0, but is {value!r}")
        if not (0 < self.wait <= 1 and 0 < self.block <= 1):
            raise UsageError(f"wait and block are shares of the patience: above 0, at most 1; got {self}")

    def decide(self, last: Decision | None, signal: Signal, rungs: tuple[RungState, ...]) -> Decision:
        """Where to stand for the next batch, after the `last` decision that named a rung."""
        if not signal.queue:
            return (last or Decision(None, 0, signal.now, "", signal.now))._replace(rows=0, why="nothing waits")
        slack, rows, floor = signal.queue[0]
        ready = list(filter(_READY, rungs))
        least = max(floor, self._borne(signal, rows))
        able = [r for r in ready if r.quality >= least and r.most_rows >= rows]
        able.sort(key=_QUALITY, reverse=True)
        for rung in reversed(able):  # the last is the fastest
            if rung.seconds(rows) * signal.slowdown <= slack:
                break
        else:
            return Decision(None, 0, signal.now, _refusal(signal, ready, able))
        limits = _Limits(self, signal, ready)
        best = limits.best(able)
        if best is not None:
            dwell = self.dwell * limits.unit
            rung, pressed = self._stand(last, signal.now, dwell, limits, ready, rungs, able, best)
            why = _why(limits, able, rung, best, dwell)
        else:
            in_time = [r for r in able if r.seconds(rows) * signal.slowdown <= slack]
            rung, pressed = min(in_time, key=limits.cost), signal.now
            why = f"the fastest that is left: even so, {limits.objection(rung)}"
        since = last.since if last is not None and last.rung == rung.number else signal.now
        return Decision(rung.number, self._batch(signal, limits, rung), since, why, pressed)

    def _borne(self, signal: Signal, rows: int) -> float:
        """The least quality of which the bank bears so many rows."""
        return signal.asked - max(signal.bank + self.allowance, 0.0) / rows

    def _batch(self, signal: Signal, limits: _Limits, rung: RungState) -> int:
        """Rows of the next batch: the head's, and those of the next requests that fit, where joining pays."""
        rows = limits.rows
        full = limits.full(rung) if signal.rows > rows else 0
        if not full:
            return rows
        longest = min(limits.slack, self.block * signal.patience)
        for k, (_, more, floor) in enumerate(signal.queue[1:], 2):
            joined = rows + more
            most = rung.seconds(joined) * rung.tail * signal.slowdown
            least = max(floor, self._borne(signal, joined))
            if least > rung.quality or joined > rung.most_rows or most > min(longest, limits.spare[k]):
                return rows
            rows = joined
        more = min(full, signal.rows)
        fits = rung.seconds(more) * rung.tail * signal.slowdown <= longest
        return max(rows, more) if fits and rung.quality >= self._borne(signal, more) else rows

    def _stand(
        self, last: Decision | None, now: float, dwell: float, limits: _Limits, ready: list[RungState],
        rungs: tuple[RungState, ...], able: list[RungState], best: RungState,
    ) -> tuple[RungState, float]:  # fmt: skip
        """The rung to stand on among those that fit, of which one is the best; and since when none better fitted."""
        if last is None or dwell == 0 or last.rung == best.number:
            return best, now
        here = next((r for r in rungs if r.number == last.rung), None)
        if here is None or best.quality <= here.quality:
            return best, now
        steps = int(min((now - last.pressed) / dwell, len(rungs)))
        better = sorted({r.quality for r in ready if r.quality > here.quality})
        most = ([here.quality, *better])[min(max(steps, 0), len(better))]
        rung = limits.best([r for r in able if r.quality <= most])
        if rung is None:
            rung = next(r for r in reversed(able) if not limits.reached(r))
        if rung is best:
            return rung, now
        climbed = sum(1 for q in better if q <= rung.quality)
        return rung, max(last.pressed, now - dwell * (len(rungs) + 1)) + climbed * dwell


_QUALITY, _READY = attrgetter("quality"), attrgetter("ready")  # quicker than comprehensions
STEADY = Governor(dwell=1.0)
BALANCED = Governor(dwell=0.25)
RESPONSIVE = Governor(dwell=0.0)
PRESETS: Mapping[str, Governor] = {"steady": STEADY, "balanced": BALANCED, "responsive": RESPONSIVE}


def soonest(rungs: Iterable[RungState], rows: int, ahead: int, busy: float, slowdown: float, floor: float) -> float:
    """How many seconds until a request that comes now could be answered at the earliest; infinite where it never is.

    An optimist's figure, for admission: what it finds too late is too late.

    Args:
        rows: of the request; `floor` the least quality that will do for it.
        ahead: rows whose turn comes first.
        busy: seconds until the executor is free.
    """
    ready = [r for r in rungs if r.ready]
    alone = min((r.seconds(rows) for r in ready if r.quality >= floor and r.most_rows >= rows), default=math.inf)
    row = min((r.seconds(r.most_rows) / r.most_rows for r in ready), default=0.0)
    return busy + slowdown * max(alone, row * (ahead + rows))


_NOBODY_BEHIND = [-math.inf, math.inf]


class _Limits:
    """What bounds the choice for one signal.  Every decision comes by here, so sums of `RungState` are written out.

    Attributes:
        unit: the seconds of which the governor's figures are multiples.
        budget: what a row may cost, by the drain law.
        spare: [k]: how many seconds the first k requests, at least one, may take so that those behind are in time.
    """

    __slots__ = (
        "_dearest", "_gain", "_joint", "_known", "_longest", "budget", "rows", "signal", "slack", "spare", "unit"
    )  # fmt: skip

    def __init__(self, governor: Governor, signal: Signal, ready: list[RungState]) -> None:
        self.signal, slowdown, patience = signal, signal.slowdown, signal.patience
        self.slack, self.rows, _ = signal.queue[0]
        self.unit = unit = patience if patience < math.inf else UNHURRIED
        load = max(signal.rows, self.rows) + signal.rate * governor.horizon * unit
        self.budget = (governor.wait + governor.horizon) * unit / load
        # Of a quiet machine, as the rungs' own seconds are: a batch of several requests, and the head.
        self._gain, self._joint = governor.gain, governor.block * patience / slowdown
        self._known: dict[int, tuple[float, float, int]] = {}
        self.spare = self._look_behind(ready) if len(signal.queue) > 1 else _NOBODY_BEHIND
        self._dearest = self.budget * self.rows / slowdown
        self._longest = min(self.slack, self.spare[1]) / slowdown

    def full(self, rung: RungState) -> int:
        """How many rows a full batch of this rung holds; 0 where joining requests does not pay."""
        return self._shared(rung)[2]

    def _shared(self, rung: RungState) -> tuple[float, float, int]:
        """Usual seconds of a rung where requests are many, for each request and for each of its rows; and `full`."""
        known = self._known.get(rung.number)
        if known is not None:
            return known
        once, each, most, gain = rung.fixed, rung.per_row, rung.most_rows, self._gain
        known = once, each, 0
        if once >= (gain - 1) * each:  # else joining would not pay in a batch without end
            usual = self._joint / rung.tail
            if once + each * most > usual:
                most = int((usual - once) / each) if each > 0 else 0
            if most > 1 and (once + each) * most >= gain * (once + each * most):
                known = 0.0, each + once / most, most
        self._known[rung.number] = known
        return known

    def cost(self, rung: RungState) -> float:
        """Usual seconds that the head adds."""
        once, each, _ = self._shared(rung)
        return (once + each * self.rows) * self.signal.slowdown

    def _look_behind(self, ready: list[RungState]) -> list[float]:
        """`spare`, from the last request on; nothing stands before the first."""
        slowdown = self.signal.slowdown
        fastest: dict[float, tuple[float, float]] = {}  # by floor
        left = math.inf
        spare = [left]
        for slack, rows, floor in self.signal.queue[:0:-1]:
            if floor not in fastest:
                fastest[floor] = self._least(ready, floor)
            once, each = fastest[floor]
            if slack < left:
                left = slack
            left -= (once + each * rows) * slowdown
            spare.append(left)
        spare.append(-math.inf)
        spare.reverse()
        return spare

    def _least(self, ready: list[RungState], floor: float) -> tuple[float, float]:
        """Usual seconds of the rung that is the fastest with one row, of those that keep a floor."""
        least, found = math.inf, (0.0, 0.0)  # where none keeps it: it will be refused
        for rung in ready:
            if rung.quality >= floor:
                once, each, _ = self._shared(rung)
                if once + each < least:
                    least, found = once + each, (once, each)
        return found

    def best(self, rungs: list[RungState]) -> RungState | None:
        """The first that is not too slow for the head of the queue."""
        for rung in rungs:  # not by `next`, which takes longer
            if not self.reached(rung):
                return rung
        return None

    def reached(self, rung: RungState) -> bool:
        """Whether a rung is too slow for the head of the queue."""
        rows = self.rows
        alone = rung.fixed + rung.per_row * rows
        if alone * rung.tail > self._longest:
            return True
        if rows == 1 and alone <= self._dearest:
            return False  # in company a row costs no more than alone: what exactly need not be reckoned
        once, each, _ = self._shared(rung)
        return once + each * rows > self._dearest

    def _most(self, rung: RungState) -> float:
        """The p95 of its seconds for the head."""
        return rung.seconds(self.rows) * rung.tail * self.signal.slowdown

    def objection(self, rung: RungState) -> str:
        """The limit that a rung reaches, in words."""
        signal, cost, most = self.signal, self.cost(rung), self._most(rung)
        each = _time(cost / self.rows)
        if cost > self.budget * self.rows:
            return (
                f"{each} a row, and {signal.rows} rows waiting with {signal.rate:.3g} a second to come leave "
                f"{_time(self.budget)}"
            )
        if most > self.slack:
            return f"up to {_time(most)}, and the first deadline is in {_time(self.slack)}"
        if most > self.spare[1]:
            return f"up to {_time(most)}, and those that wait behind can spare {_time(max(self.spare[1], 0.0))}"
        return f"{each} a row"


def _why(limits: _Limits, able: list[RungState], rung: RungState, target: RungState, dwell: float) -> str:
    if target.quality > rung.quality:
        return f"there is time for rung {target.number}, but it climbs one rung for every {_time(dwell)} of calm"
    if able[0].quality <= rung.quality:
        return "there is time for the best rung that is ready and keeps what is asked for"
    better = [r for r in able if r.quality > rung.quality][-1]
    return f"the best in time: rung {better.number} takes {limits.objection(better)}"


def _refusal(signal: Signal, ready: list[RungState], able: list[RungState]) -> str:
    slack, rows, floor = signal.queue[0]
    if not ready:
        return "no rung is ready"
    if slack <= 0:
        return "its deadline has passed"
    if able:
        needed, fastest = min((r.seconds(rows) * signal.slowdown, r.number) for r in able)
        return (
            f"its deadline is in {_time(slack)}, but the fastest rung that may answer, {fastest}, takes {_time(needed)}"
        )
    if all(r.most_rows < rows for r in ready):
        return f"it has {rows} rows, but no rung takes more than {max(r.most_rows for r in ready)} at once"
    best = max(r.quality for r in ready if r.most_rows >= rows)
    if best < floor:
        return f"it asks for a quality of {floor:.4g}, but no rung that is ready promises more than {best:.4g}"
    return (
        f"answers are to have a quality of {signal.asked:.4g} in the mean; none of the rungs that keep its floor "
        f"reaches that, and the {signal.bank:.3g} that better answers have earned do not bear it"
    )


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if abs(seconds) >= 1 else f"{seconds * 1e3:.3g} ms"
