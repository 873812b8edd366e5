"""Policies to hold the governor against: what others do, and what nobody could do better.

Each has the governor's `decide`, so that the simulator runs them alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from accelerando.interval import Floats
from accelerando.serve.estimates import RECENT
from accelerando.serve.governor import PRESETS, Decides, Decision, RungState, Signal
from accelerando.serve.traces import Trace


@dataclass(frozen=True)
class Entrant:
    """A policy in the simulator.

    Args:
        name: as it is shown.
        only: the one rung that it has; without it, all of them.
        tau: seconds over which arrivals are averaged for it.
        every_arrival: it is told of all arrivals, not only of those that had to wait.
    """

    name: str
    policy: Decides
    only: int | None = None
    tau: float = RECENT
    every_arrival: bool = False


def usual(rungs: Sequence[RungState]) -> tuple[Entrant, ...]:
    """Each rung by itself, slack only, a controller that looks every 10 s, and the governor's presets."""
    ready = [r.number for r in rungs if r.ready]
    return (
        *(Entrant(f"rung {n} always", Fixed(n), only=n) for n in ready),
        Entrant("slack only", SlackFit()),
        Entrant("rate every 10 s", RateController(), tau=10.0, every_arrival=True),
        *(Entrant(f"governor, {name}", governor) for name, governor in PRESETS.items()),
    )


@dataclass(frozen=True)
class Fixed:
    """One rung, always: what a server with a single model does.  Joins requests where that pays."""

    rung: int

    def decide(self, last: Decision | None, signal: Signal, rungs: tuple[RungState, ...]) -> Decision:
        return _stand(next(r for r in rungs if r.number == self.rung), signal, signal.now, "it is the only one")


@dataclass(frozen=True)
class SlackFit:
    """SuperServe's policy: the slack of the head of the queue decides, and nothing else (Khare et al., NSDI 2025).

    Rungs with their batches are put into buckets, evenly spaced by latency; of the last bucket that fits the slack, the
    greatest batch is taken, and of these the best quality.  A batch is never greater than the queue, and only where
    joining pays on the rung, which on processors is seldom: the paper's were GPUs.
    """

    buckets: int = 16

    def decide(self, last: Decision | None, signal: Signal, rungs: tuple[RungState, ...]) -> Decision:
        slack, rows, _ = signal.queue[0]
        ready = [r for r in rungs if r.ready]
        choices = []
        for rung in ready:
            batch = rows
            while batch <= min(rung.most_rows, max(signal.rows, rows)):
                choices.append((rung.seconds(batch) * rung.tail * signal.slowdown, batch, rung))
                if not _joins(rung):
                    break
                batch *= 2
        low, high = min(c[0] for c in choices), max(c[0] for c in choices)
        width = max(high - low, 1e-12) / self.buckets
        fit = [(int((seconds - low) / width), batch, rung) for seconds, batch, rung in choices if seconds <= slack]
        if not fit:
            return _stand(min(ready, key=lambda r: r.seconds(rows)), signal, signal.now, "nothing fits the slack")
        bucket, batch, rung = max(fit, key=lambda c: (c[0], c[1], c[2].quality))
        return Decision(rung.number, batch, signal.now, f"latency bucket {bucket} fits the slack")


@dataclass(frozen=True)
class RateController:
    """The best rung whose throughput exceeds the arrival rate, chosen anew every so often.

    What Proteus does on a single worker (Ahmad et al., ASPLOS 2024): it solves for the rate every 10 s, with 5 % to
    spare, among variants whose latency is below half the patience; it refuses the head where it would be late.
    """

    seconds: float = 10.0
    spare: float = 1.05

    def decide(self, last: Decision | None, signal: Signal, rungs: tuple[RungState, ...]) -> Decision:
        ready = [r for r in rungs if r.ready]
        if last is not None and signal.now - last.pressed < self.seconds:
            kept = [r for r in ready if r.number == last.rung]
            if kept:
                return _stand(kept[0], signal, last.pressed, last.why)
        wanted = signal.rate * self.spare
        enough = [r for r in ready if _throughput(r) >= wanted and r.seconds(1) <= signal.patience / 2]
        rung = max(enough, key=lambda r: r.quality) if enough else max(ready, key=_throughput)
        return _stand(rung, signal, signal.now, f"it carries {wanted:.3g} rows/s")


def _stand(rung: RungState, signal: Signal, chosen: float, why: str) -> Decision:
    """On this rung with as many rows as are in time; refuse the head where it would be late."""
    slack, rows, _ = signal.queue[0]
    if rung.seconds(rows) * signal.slowdown > slack:
        return Decision(None, 0, signal.now, "it would be late", chosen)
    if _joins(rung) and rung.per_row > 0:
        longest = min(slack, signal.patience / 2) / (rung.tail * signal.slowdown)
        fits = (longest - rung.fixed) / rung.per_row
        rows = max(rows, int(min(signal.rows, rung.most_rows, fits)))
    return Decision(rung.number, rows, signal.now, why, chosen)


def _joins(rung: RungState) -> bool:
    """Whether a row is clearly cheaper in a full batch than alone."""
    return rung.seconds(1) * rung.most_rows >= 1.2 * rung.seconds(rung.most_rows)


def _throughput(rung: RungState) -> float:
    rows = rung.most_rows if _joins(rung) else 1
    return rows / rung.seconds(rows)


# --- what nobody could do better --------------------------------------------------------------------------------


def clairvoyant(rungs: Sequence[RungState], trace: Trace, patience: float) -> float:
    """The greatest effective quality (mean over all requests, 0 for what is late) that any policy could have.

    It knows every arrival in advance, may mix rungs within a request, and meets no noise.  A request may run from its
    arrival to its deadline; quality is a concave function of the seconds that it gets (the upper hull of the rungs,
    and of refusing it), and so the seconds are best shared out along the shortest path between the curve of arrivals
    and that of deadlines: the taut string (Davies & Kovac, *Annals of Statistics* 29, 2001; for speed scaling, Yao,
    Demers & Shenker, FOCS 1995).
    """
    costs = [(r.seconds(r.most_rows) / r.most_rows if _joins(r) else r.seconds(1), r.quality) for r in rungs if r.ready]
    seconds, quality = _hull([(0.0, 0.0), *costs])
    if patience == math.inf:
        return float(quality.max())
    values: list[Floats] = []
    apart = np.flatnonzero(np.diff(trace.arrivals) > patience) + 1
    for arrivals, rows in zip(np.split(trace.arrivals, apart), np.split(trace.rows, apart), strict=True):
        values.append(np.interp(_taut(arrivals, rows, patience), seconds, quality))
    return float(np.concatenate(values).mean())


def _hull(points: list[tuple[float, float]]) -> tuple[Floats, Floats]:
    hull: list[tuple[float, float]] = []
    for x, y in sorted(points):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-1][0]) <= (y - hull[-1][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    while len(hull) > 1 and hull[-1][1] <= hull[-2][1]:  # dearer, and no better
        hull.pop()
    xs, ys = zip(*hull, strict=True)
    return np.array(xs), np.array(ys)


def _taut(arrivals: Floats, rows: Floats, patience: float) -> Floats:
    """(n,) seconds per row that each request gets, on the shortest path by the rows served so far."""
    at = np.concatenate([[0.0], np.cumsum(rows)]).tolist()
    low = [*arrivals.tolist(), float(arrivals[-1]) + patience]  # [k]: request k starts no sooner
    high = [float(arrivals[0]), *(arrivals + patience).tolist()]  # [k]: k requests are done by then
    slopes: list[float] = []
    k, time = 0, high[0]
    while k < len(arrivals):
        least, most, below, above = -math.inf, math.inf, k, k
        for j in range(k + 1, len(arrivals) + 1):
            down, up = (low[j] - time) / (at[j] - at[k]), (high[j] - time) / (at[j] - at[k])
            if down > most:
                turn, end = above, high[above]
                break
            if up < least:
                turn, end = below, low[below]
                break
            if down >= least:
                least, below = down, j
            if up <= most:
                most, above = up, j
        else:
            turn, end = len(arrivals), high[-1]
        slopes += [(end - time) / (at[turn] - at[k])] * (turn - k)
        k, time = turn, end
    return np.array(slopes)
