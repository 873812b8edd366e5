"""How time and memory grow with the batch: T(n) and M(n), fitted by a + b * n^c."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Any

import numpy as np

from accelerando.interval import CONFIDENCE, Floats, Interval, median_interval
from accelerando.machine import Machine
from accelerando.profile.layers import Subject, call_seconds

MOST_ROWS = 256
VISIT = 0.005  # seconds: short calls are repeated this long per visit, and their median is the visit's figure
MOST_VISITS = 200
RESAMPLES = 400
EXPONENTS = np.arange(0, 3.001, 0.01)
FEW_VISITS = 5
VAGUE = 1.5  # between the ends of an interval that answers nothing
LEAST_BATCHES = 4  # fewer can't tell the fixed cost from the exponent: worth some overtime on a busy machine


@dataclass(frozen=True)
class Curve:
    """a + b * n^c: `fixed` a, `per_unit` b, `exponent` c; and by how much the last doubling multiplies it."""

    fixed: Interval
    per_unit: Interval
    exponent: Interval
    doubling: Interval

    @classmethod
    def fit(cls, sizes: Sequence[int], values: Sequence[Floats], seed: int = 0) -> Curve | None:
        """Fit the medians of repeated values, (repeats,) for each size, by least squares of relative errors.

        a and b are never negative; c is sought on a grid from 0 to 3, for given c the rest is linear.  With fewer than
        four sizes a is 0, for three numbers can't be told from three points.  Intervals: percentile bootstrap over
        the repeats of every size (Efron & Tibshirani 1993, chapter 13).

        Returns:
            None where there are fewer than two sizes.
        """
        if len(sizes) < 2:
            return None
        rng = np.random.default_rng(seed)
        medians = [[float(np.median(v)) for v in values]]
        if any(len(v) > 1 for v in values):
            draws = [np.median(rng.choice(v, (RESAMPLES, len(v))), axis=1) for v in values]
            medians += np.stack(draws, axis=1).tolist()
        a, b, c = _fit(np.asarray(sizes, dtype=np.float64), np.array(medians), free=len(sizes) >= 4)
        last, before = (a + b * float(n) ** c for n in (sizes[-1], sizes[-2]))
        step = np.log2(sizes[-1] / sizes[-2])
        sure = 1.0 if len(medians) == 1 else CONFIDENCE
        return cls(*(_spread(x, sure) for x in (a, b, c, (last / before) ** (1 / step))))

    def at(self, size: float) -> float:
        """The curve's value."""
        return float(self.fixed.mid + self.per_unit.mid * size**self.exponent.mid)

    def to_json(self) -> dict[str, Any]:
        return {name: interval.to_json() for name, interval in vars(self).items()}


def _spread(values: Floats, confidence: float) -> Interval:
    """The estimate, which comes first, with the percentiles of its resamples."""
    middle, tail = float(values[0]), (1 - CONFIDENCE) / 2
    low, high = (float(x) for x in np.quantile(values, [tail, 1 - tail]))
    return Interval(min(low, middle), middle, max(high, middle), confidence)


def _fit(sizes: Floats, values: Floats, free: bool) -> tuple[Floats, Floats, Floats]:
    """a, b, c of every row of values (rows, sizes)."""
    powers = sizes[None, :] ** EXPONENTS[:, None]  # (exponents, sizes)
    inverse = 1 / np.maximum(values, 1e-15)
    weights = inverse**2
    ones, first, second = weights.sum(1, keepdims=True), weights @ powers.T, weights @ (powers**2).T
    y, xy = inverse.sum(1, keepdims=True), inverse @ powers.T
    determinant = ones * second - first**2
    sound = determinant > 1e-12 * ones * second
    safe = np.where(sound, determinant, 1.0)
    a = np.where(sound & free, (second * y - first * xy) / safe, 0.0)
    b = np.where(sound & free, (ones * xy - first * y) / safe, xy / second)
    b = np.where(a < 0, xy / second, b)
    a = np.maximum(a, 0.0)
    a = np.where(b < 0, y / ones, a)
    b = np.maximum(b, 0.0)
    loss = a**2 * ones + 2 * a * b * first + b**2 * second - 2 * (a * y + b * xy)
    best = loss.argmin(axis=1)
    row = np.arange(len(values))
    return a[row, best], b[row, best], EXPONENTS[best]


@dataclass(frozen=True)
class Growth:
    """What was measured: for each batch, seconds of every visit and the peak bytes of activations."""

    batches: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    peak_bytes: tuple[int, ...]
    stopped: str

    @classmethod
    def measure(cls, subject: Subject, machine: Machine, seconds: float) -> Growth:
        """Time batches of 1, 2, 4, ... rows in turn, until the time, the rows or the memory are used up."""
        begin = perf_counter()
        batches: list[int] = []
        visits: list[list[float]] = []
        peaks: list[int] = []
        fastest: list[float] = []
        batch, stopped = 1, f"{MOST_ROWS} rows were enough"
        while batch <= MOST_ROWS:
            if peaks and 2 * peaks[-1] > machine.memory_bytes / 4:
                stopped = "more rows could fill the memory"
                break
            late = len(batches) >= LEAST_BATCHES and perf_counter() - begin > seconds / 3
            if visits and (late or 2 * fastest[-1] * (FEW_VISITS + 2) > seconds / 2):
                stopped = "more rows take too long"
                break
            peaks.append(subject.peak_bytes(batch))
            times = call_seconds(subject.call(batch), VISIT, FEW_VISITS)
            visits.append([float(np.median(part)) for part in np.array_split(times, FEW_VISITS)])
            fastest.append(float(times.min()))  # one disturbed call must not end the ladder of batches
            batches.append(batch)
            batch *= 2
        calls = [subject.call(n) for n in batches]
        round_seconds = sum(2 * t + VISIT for t in fastest)
        while perf_counter() - begin + round_seconds < seconds and len(visits[0]) < MOST_VISITS:
            for mine, call in zip(visits, calls, strict=True):  # in turn, so that a drift touches every batch alike
                mine.append(float(np.median(call_seconds(call, VISIT, 1))))
        return cls(tuple(batches), tuple(map(tuple, visits)), tuple(peaks), stopped)

    @cached_property
    def time(self) -> Curve | None:
        return Curve.fit(self.batches, [np.array(s) for s in self.seconds])

    @cached_property
    def memory(self) -> Curve | None:
        """Counted, not sampled: its intervals have no width."""
        return Curve.fit(self.batches, [np.array([max(m, 1)]) for m in self.peak_bytes])

    @property
    def medians(self) -> tuple[Interval, ...]:
        return tuple(median_interval(np.array(s)) for s in self.seconds)

    @property
    def best_batch(self) -> int:
        """The smallest batch whose time per row is within 5 % of the least."""
        per_row = [m.mid / n for m, n in zip(self.medians, self.batches, strict=True)]
        return next(n for n, t in zip(self.batches, per_row, strict=True) if t <= 1.05 * min(per_row))

    def words(self) -> tuple[str, ...]:
        """The answers, as sentences."""
        if self.time is None or self.memory is None:
            return (f"growth with the batch is not known: only {len(self.batches)} batch was timed, {self.stopped}",)
        before, last = self.batches[-2:]
        t, m = self.time, self.memory
        gain = self.medians[0].mid / (self.medians[self.batches.index(self.best_batch)].mid / self.best_batch)
        found = [
            f"doubling the batch from {before} to {last} multiplies the time by {t.doubling.mid:.2f} "
            f"({t.doubling.low:.2f} to {t.doubling.high:.2f})",
            f"T(n) = {_short(t.fixed.mid)} + {_short(t.per_unit.mid)} * n^{t.exponent.mid:.2f}, "
            f"the exponent between {t.exponent.low:.2f} and {t.exponent.high:.2f}",
            f"the activations' memory M(n) grows as n^{m.exponent.mid:.2f}: doubling the batch multiplies it by "
            f"{m.doubling.mid:.2f}",
            f"a row is cheapest from batch {self.best_batch} on: {gain:.2f}x as many rows per second as one by one",
        ]
        if t.doubling.high > VAGUE * t.doubling.low:
            found.append("doubt: the machine was too busy, or the time too short, to tell how the time grows")
        if len(self.seconds[0]) <= FEW_VISITS:
            found.append("doubt: every batch was timed in one go, so a drift of the machine looks like growth")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        return {
            "batches": list(self.batches),
            "seconds": [list(s) for s in self.seconds],
            "peak_bytes": list(self.peak_bytes),
            "stopped": self.stopped,
            "medians": [m.to_json() for m in self.medians],
            "time": self.time.to_json() if self.time else None,
            "memory": self.memory.to_json() if self.memory else None,
            "words": list(self.words()),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Growth:
        return cls(
            tuple(data["batches"]),
            tuple(tuple(s) for s in data["seconds"]),
            tuple(data["peak_bytes"]),
            data["stopped"],
        )


def _short(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
