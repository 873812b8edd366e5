"""The simulator: replays arrivals against the measured times of a ladder, on a clock of its own.  No model runs.

It is the conductor's loop without threads: the same `decide`, the same estimates, the same discipline of the queue
(what can't be in time is refused when it comes, what has expired is dropped first, the earliest deadline goes first; as
all requests have the same patience, that is the oldest).  Times are drawn from those that were recorded.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from accelerando.bundle import Bundle
from accelerando.errors import UsageError
from accelerando.goal import Goal
from accelerando.interval import Floats
from accelerando.serve.aims import Aims, banked, promise
from accelerando.serve.costs import tail
from accelerando.serve.estimates import ArrivalRate, Slowdown
from accelerando.serve.governor import GLANCE, Decision, RungState, Signal, soonest
from accelerando.serve.policies import Entrant, clairvoyant, usual
from accelerando.serve.traces import Trace, find

DRAWS = 4096  # of a rung's times, taken in turn
COURSE = 120  # stretches of time that are told


@dataclass(frozen=True)
class Terms:
    """What is asked for.

    Args:
        patience: seconds until a request's deadline; infinite where none has one.
        floor: the least quality that will do for a request, oriented like `RungState.quality`.
        asked: the mean quality that is asked for, likewise.

    Raises:
        UsageError: the patience is not above 0.
    """

    patience: float
    floor: float = -math.inf
    asked: float = -math.inf

    def __post_init__(self) -> None:
        if not self.patience > 0:
            raise UsageError(f"the patience must be above 0 s, but is {self.patience!r}")


@dataclass(frozen=True)
class Moment:
    """A stretch of the time: when it begins, rows that came in it a second, and how they fared.

    `on_time` is the share of those rows that were answered on time, `quality` their effective one (0 for the others).
    """

    at: float
    rate: float
    on_time: float
    quality: float


@dataclass(frozen=True)
class Outcome:
    """How a policy fared.  Counts are of requests; qualities are means over rows, in the metric's own unit.

    Args:
        late: answered after their deadline; `refused` before anything was computed, `expired` while they waited.
        quality: of what was answered on time; `effective_quality` over everything, 0 for what was not; NaN where less
            of the metric is better, for an answer that never came has no error that it could count as.
        p50, p99: seconds from arrival to answer, of what was answered.
        utilisation: share of the time in which something ran.
        shares: of the rows that were answered, by the number of the rung that did.
    """

    policy: str
    requests: int
    on_time: int
    late: int
    refused: int
    expired: int
    quality: float
    effective_quality: float
    switches_per_second: float
    p50: float
    p99: float
    utilisation: float
    shares: tuple[tuple[int, float], ...]
    course: tuple[Moment, ...] = field(repr=False, default=())

    @property
    def attainment(self) -> float:
        """Share of the requests that were answered on time."""
        return self.on_time / self.requests

    @property
    def misses(self) -> int:
        """Requests that were not answered on time, for whatever reason."""
        return self.requests - self.on_time


@dataclass(frozen=True)
class Simulation:
    """A trace, what was asked, how each policy fared, and the most effective quality that any could have reached.

    `left_out` are the numbers of the rungs that run the original's own code, which a server has not.
    """

    trace: Trace
    terms: Terms
    rungs: tuple[RungState, ...]
    outcomes: tuple[Outcome, ...]
    most_quality: float
    metric: str = "quality"
    higher_is_better: bool = True
    left_out: tuple[int, ...] = ()


def simulate(
    rungs: Sequence[RungState],
    trace: Trace,
    terms: Terms,
    entrants: Iterable[Entrant] | None = None,
    *,
    times: Sequence[Floats] | None = None,
    seed: int = 0,
    metric: str = "quality",
    higher_is_better: bool = True,
) -> Simulation:
    """Replay a trace with each policy.

    Args:
        rungs: their qualities oriented, so that greater is better: below 0 where the metric is an error.
        entrants: the policies; the `usual` ones, without it.
        times: for each rung, what calls took as multiples of its usual time, to be drawn from; all 1 without it.
        seed: of the draws; all policies meet the same luck, call by call.
        metric: the quality's name, and whether higher values of it are better.

    Raises:
        UsageError: there is no rung, or not as many `times`.
    """
    rungs = tuple(rungs)
    if not any(r.ready for r in rungs):
        raise UsageError("a simulation needs at least one rung that is ready")
    if times is not None and len(times) != len(rungs):
        raise UsageError(f"there must be times for each of the {len(rungs)} rungs, but there are {len(times)}")
    rng = np.random.default_rng(seed)
    luck = {
        rung.number: rng.choice(times[i], DRAWS) if times is not None else np.ones(DRAWS)
        for i, rung in enumerate(rungs)
    }
    entrants = usual(rungs) if entrants is None else tuple(entrants)
    outcomes = tuple(_Replay(rungs, trace, terms, entrant, luck).run() for entrant in entrants)
    if higher_is_better:
        return Simulation(trace, terms, rungs, outcomes, clairvoyant(rungs, trace, terms.patience), metric)
    outcomes = tuple(_of_errors(outcome) for outcome in outcomes)
    return Simulation(trace, terms, rungs, outcomes, math.nan, metric, higher_is_better)


def simulate_bundle(
    path: str | Path,
    trace: str | Path | Trace,
    goal: str | None = None,
    *,
    with_original: bool = False,
    seed: int = 0,
) -> Simulation:
    """Replay a trace against a bundle's recorded times.

    Args:
        trace: a file, or a text such as `gamma(rate=200, cv2=4, seconds=60)`: see `traces`.
        goal: what is asked for; the bundle's own goal, without it.  It must bound the latency.
        with_original: keep the rungs in that run the original's own code, as `load(path, goal=..., model=...)` does;
            a server can't.

    Raises:
        BundleError, GoalError: the bundle or the goal can't be read.
        UsageError: the trace can't be read, the goal bounds no latency, or no rung is left.
    """
    bundle = Bundle.open(path, hashes=False)
    asked = bundle.goal if goal is None else Goal.parse(goal)
    aims = Aims.of(asked, bundle.ladder)
    if aims.patience == math.inf:
        raise UsageError(
            f"without a deadline there is nothing to simulate: the goal {str(asked)!r} must bound the latency, as in "
            "--goal 'p99 <= 300ms'"
        )
    left_out = () if with_original else _own_code(bundle)
    timed = zip(rung_states(bundle), recorded_times(bundle), strict=True)
    rungs = [(r, t) for r, t in timed if r.number not in left_out]
    if not rungs:
        raise UsageError(
            f"every rung of {bundle.path} runs the original's own code, which a server has not; simulate it "
            "with_original, as load(..., model=model) can run it"
        )
    allowed = [(r, t) for r, t in rungs if r.number in aims.rungs]
    may = [(r, t) for r, t in allowed if r.seconds(r.most_rows) * aims.least_rate <= r.most_rows]
    states, times = zip(*(may or rungs), strict=True)
    judged = bundle.ladder.original.evidence
    found = trace if isinstance(trace, Trace) else find(trace)
    simulation = simulate(
        states, found, Terms(aims.patience, asked=aims.quality), times=times, seed=seed, metric=judged.metric,
        higher_is_better=judged.higher_is_better,
    )  # fmt: skip
    return replace(simulation, left_out=left_out)


def _own_code(bundle: Bundle) -> tuple[int, ...]:
    """The numbers of the rungs that run the original's own code."""
    return tuple(number for number, rung in enumerate(bundle.ladder) if not rung.recipe.backend.portable)


def rung_states(bundle: Bundle) -> tuple[RungState, ...]:
    """The rungs of a bundle as its evidence knows them.

    Times were recorded at one batch size, so that nothing is known of a part that does not grow with the rows: it is
    taken for 0.
    """
    return tuple(
        RungState(
            number,
            promise(rung, bundle.ladder),
            fixed=0.0,
            per_row=rung.evidence.latency().mid / rung.evidence.batch,
            tail=tail(rung.evidence),
        )
        for number, rung in enumerate(bundle.ladder)
    )


def recorded_times(bundle: Bundle) -> tuple[Floats, ...]:
    """For each rung, its recorded calls as multiples of their median."""
    return tuple(rung.evidence.seconds / rung.evidence.latency().mid for rung in bundle.ladder)


def _of_errors(outcome: Outcome) -> Outcome:
    """An outcome whose qualities are errors with their sign turned, told in the metric's own unit."""
    course = tuple(replace(moment, quality=math.nan) for moment in outcome.course)
    return replace(outcome, quality=-outcome.quality, effective_quality=math.nan, course=course)


class _Replay:
    """One policy on one trace."""

    def __init__(
        self, rungs: tuple[RungState, ...], trace: Trace, terms: Terms, entrant: Entrant, luck: dict[int, Floats]
    ) -> None:
        self.rungs = tuple(r for r in rungs if entrant.only in (None, r.number))
        self.states = {r.number: r for r in self.rungs}
        self.trace, self.terms, self.entrant = trace, terms, entrant
        self.arrivals, self.rows = trace.arrivals.tolist(), [int(n) for n in trace.rows]
        self.luck = {number: draws.tolist() for number, draws in luck.items()}
        self.rate, self.slowdown = ArrivalRate(entrant.tau), Slowdown()
        self.queue: deque[int] = deque()
        self.waiting = self.calls = self.switches = 0
        self.last: Decision | None = None
        self.bank = self.worked = 0.0
        self.expected_at = self.free_at = 0.0  # when the executor should be free, and when it is
        self.fate: Counter[str] = Counter()
        self.answered: Counter[int] = Counter()
        self.took: list[float] = []
        self.earned = np.zeros(len(trace))  # the quality that each row of a request was answered with, on time
        self.timely = np.zeros(len(trace), dtype=bool)

    def run(self) -> Outcome:
        now, coming = 0.0, 0
        while coming < len(self.arrivals) or self.queue:
            if not self.queue:
                now = max(now, self.arrivals[coming])
            while coming < len(self.arrivals) and self.arrivals[coming] <= now:
                self._arrive(coming)
                coming += 1
            while self.queue and self.arrivals[self.queue[0]] + self.terms.patience < now:
                self._leave("expired")
            if self.queue:
                now = self._serve(now)
        return self._outcome(max(now, self.trace.seconds))

    def _arrive(self, request: int) -> None:
        at, rows = self.arrivals[request], self.rows[request]
        self.rate.observe(at, rows, waits=self.free_at > at or bool(self.queue))
        wait = max(self.expected_at - at, 0.0) if self.free_at > at else 0.0
        if (
            soonest(self.rungs, rows, self.waiting, wait, self.slowdown.factor(), self.terms.floor)
            > self.terms.patience
        ):
            self.fate["refused"] += 1
            return
        self.queue.append(request)
        self.waiting += rows

    def _leave(self, fate: str | None = None) -> int:
        """The head leaves the queue."""
        request = self.queue.popleft()
        self.waiting -= self.rows[request]
        if fate:
            self.fate[fate] += 1
        return request

    def _serve(self, now: float) -> float:
        """Run one batch, or refuse the head; when that is done."""
        decision = self._decide(now)
        if decision.rung is None:
            self._leave("refused")
            return now
        if self.last is not None and self.last.rung != decision.rung:
            self.switches += 1
        self.last, rung = decision, self.states[decision.rung]
        batch = [self._leave()]
        rows = self.rows[batch[0]]
        while self.queue and rows + self.rows[self.queue[0]] <= decision.rows:
            rows += self.rows[self.queue[0]]
            batch.append(self._leave())
        usual = rung.seconds(rows)
        took = usual * self.luck[rung.number][self.calls % DRAWS]
        self.calls += 1
        self.worked += took
        self.expected_at, self.free_at = now + usual * self.slowdown.factor(), now + took
        self.slowdown.observe(usual, took)
        for request in batch:
            self._answer(request, now + took, rung)
        return now + took

    def _decide(self, now: float) -> Decision:
        patience, floor = self.terms.patience, self.terms.floor
        glance = tuple(
            (self.arrivals[self.queue[i]] + patience - now, self.rows[self.queue[i]], floor)
            for i in range(min(GLANCE, len(self.queue)))
        )
        rate = self.rate.at(now) if self.entrant.every_arrival else self.rate.pressing(now)
        bank = self.bank if self.terms.asked > -math.inf else math.inf
        factor = self.slowdown.factor()
        signal = Signal(now, self.waiting, glance, rate, factor, patience, bank, self.terms.asked)
        return self.entrant.policy.decide(self.last, signal, self.rungs)

    def _answer(self, request: int, now: float, rung: RungState) -> None:
        rows, took = self.rows[request], now - self.arrivals[request]
        self.took.append(took)
        self.answered[rung.number] += rows
        if self.terms.asked > -math.inf:
            self.bank = banked(self.bank, rung.quality - self.terms.asked, rows)
        if took <= self.terms.patience:
            self.timely[request], self.earned[request] = True, rung.quality
        else:
            self.fate["late"] += 1

    def _outcome(self, end: float) -> Outcome:
        rows, timely = self.trace.rows, self.timely
        total = sum(self.answered.values())
        p50, p99 = np.quantile(self.took, (0.5, 0.99)) if self.took else (math.nan, math.nan)
        on_time = float(rows[timely].sum())
        return Outcome(
            policy=self.entrant.name,
            requests=len(self.trace),
            on_time=int(timely.sum()),
            late=self.fate["late"],
            refused=self.fate["refused"],
            expired=self.fate["expired"],
            quality=float((self.earned * rows).sum()) / on_time if on_time else math.nan,
            effective_quality=float((self.earned * rows).sum() / rows.sum()),
            switches_per_second=self.switches / end if end > 0 else 0.0,
            p50=float(p50),
            p99=float(p99),
            utilisation=self.worked / end if end > 0 else 0.0,
            shares=tuple((r.number, self.answered[r.number] / total if total else 0.0) for r in self.rungs),
            course=self._course(),
        )

    def _course(self) -> tuple[Moment, ...]:
        """The trace in even stretches of time."""
        edges = np.linspace(0.0, max(self.trace.seconds, 1e-9), min(COURSE, len(self.trace)) + 1)
        where = np.clip(np.searchsorted(edges, self.trace.arrivals, side="right") - 1, 0, len(edges) - 2)
        rows = np.bincount(where, self.trace.rows, len(edges) - 1)
        quality = np.bincount(where, self.earned * self.trace.rows, len(edges) - 1)
        timely = np.bincount(where, self.timely * self.trace.rows, len(edges) - 1)
        width = edges[1] - edges[0]
        return tuple(
            Moment(float(at), float(n / width), float(on_time / n) if n else math.nan, float(q / n) if n else math.nan)
            for at, n, on_time, q in zip(edges, rows, timely, quality, strict=False)
        )
