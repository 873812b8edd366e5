"""Intervals, and the three ways in which they are found here.  Numpy only.

Every figure that a user sees is an `Interval`.  Speed ratios and latencies get distribution-free
order-statistic intervals, whose coverage is exact for few rounds where a percentile bootstrap of the median is
too narrow (Conover, *Practical Nonparametric Statistics*, 3rd ed., section 3.2).  Quality is paired and
bootstrapped over samples (Efron & Tibshirani 1993, chapter 13); where the scores are right-or-wrong, half a
count is added to each cell of the two-by-two table (Agresti & Min, *Statistics in Medicine* 24, 2005), because
a plain bootstrap of "nothing differed" is an interval of no width, which would be a lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided confidence bounds: low <= mid <= high.

    Raises:
        ValueError: the three are not in order.
    """

    low: float
    mid: float
    high: float
    confidence: float = CONFIDENCE

    def __post_init__(self) -> None:
        if not self.low <= self.mid <= self.high:
            raise ValueError(f"low <= mid <= high must hold, but got ({self.low=}, {self.mid=}, {self.high=})")

    @property
    def width(self) -> float:
        """How wide the interval is relative to its middle (0 where both are 0)."""
        return (self.high - self.low) / abs(self.mid) if self.mid else math.inf if self.high > self.low else 0.0

    def map(self, function: Callable[[float], float]) -> Interval:
        """The interval of a monotone function of the figure, rising or falling."""
        a, m, b = function(self.low), function(self.mid), function(self.high)
        return Interval(min(a, m, b), m, max(a, m, b), self.confidence)

    def widened(self, share: float) -> Interval:
        """The interval with this share of each end added beyond it; for figures above 0."""
        return Interval(self.low / (1 + share), self.mid, self.high * (1 + share), self.confidence)

    def to_json(self) -> dict[str, float]:
        return {"low": self.low, "mid": self.mid, "high": self.high, "confidence": self.confidence}

    @classmethod
    def from_json(cls, data: dict[str, float]) -> Interval:
        return cls(data["low"], data["mid"], data["high"], data["confidence"])

    @classmethod
    def exactly(cls, value: float) -> Interval:
        """A figure without uncertainty, such as a size on disk."""
        return cls(value, value, value, 1.0)


def quantile_interval(values: Floats, quantile: float, confidence: float = CONFIDENCE) -> Interval:
    """The order-statistic interval of a quantile; `values` (n,) independent observations, 0 < quantile < 1.

    Where n is too small for the confidence asked for, the bound on that side is the extreme value and the
    interval's `confidence` says what was really reached; `sides_known` says which side is wanting.

    Raises:
        ValueError: there are no values, or there is no such quantile.
    """
    if len(values) == 0:
        raise ValueError("an interval needs at least one value, but got none")
    _check_quantile(quantile)
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n, tail = len(ordered), (1 - confidence) / 2
    # [i] = P(at most i values lie below the quantile) = P(the quantile <= ordered[i])
    cumulative = _binomial_cumulative(n, quantile)
    low = int(np.searchsorted(cumulative, tail, side="right")) - 1  # the last i with P <= tail
    high = int(np.searchsorted(cumulative, 1 - tail, side="left"))  # the first i with P >= 1 - tail
    clipped = low < 0 or high > n - 1
    low, high = max(low, 0), min(high, n - 1)
    middle = float(np.quantile(ordered, quantile))
    reached = max(0.0, float(cumulative[high] - cumulative[low]))
    return Interval(
        min(float(ordered[low]), middle),
        middle,
        max(float(ordered[high]), middle),
        min(reached, confidence) if clipped else confidence,
    )


def sides_known(n: int, quantile: float, confidence: float = CONFIDENCE) -> tuple[bool, bool]:
    """Whether n values suffice for the lower and for the upper bound of a quantile's interval."""
    tail = (1 - confidence) / 2 * (1 + 1e-9)
    return (1 - quantile) ** n <= tail, quantile**n <= tail


def least_count(quantile: float, confidence: float = CONFIDENCE) -> int:
    """The fewest values for which a quantile's order-statistic interval exists: 6 for p50, 72 for p95, 368 for p99."""
    _check_quantile(quantile)
    return math.ceil(math.log((1 - confidence) / 2) / math.log(max(quantile, 1 - quantile)) - 1e-9)


def _check_quantile(quantile: float) -> None:
    if not 0 < quantile < 1:
        raise ValueError(f"0 < quantile < 1 must hold, but got {quantile}")


@lru_cache(maxsize=64)
def _binomial_cumulative(n: int, p: float) -> Floats:
    """P(Binomial(n, p) <= i) for i in 0..n-1, by logarithms so that large n does not underflow; read only."""
    i = np.arange(n + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log_p = log_factorial[n] - log_factorial[i] - log_factorial[n - i] + i * math.log(p) + (n - i) * math.log1p(-p)
    cumulative = np.cumsum(np.exp(log_p))[:n]
    cumulative.flags.writeable = False
    return cumulative


def median_interval(values: Floats, confidence: float = CONFIDENCE) -> Interval:
    """The order-statistic (sign-test) interval of the median."""
    return quantile_interval(values, 0.5, confidence)


def paired_bootstrap(
    ours: Floats,
    theirs: Floats,
    figure: Callable[[Floats, Floats], Floats],
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The interval of a figure of two sets of per-sample statistics, resampled together.

    It covers what it says for 10 samples of even spread and for 300 of errors as skewed as an exponential's; with
    50 to 100 of those it was seen to cover 93 % where 95 % is said.  Statistics that are not right-or-wrong and
    differ in no sample give an interval of no width.

    Args:
        ours, theirs: (n, k) statistics of the same n samples.
        figure: maps the means of both, each (..., k), to values (...): it must work on many resamples at once.
        seed: resampling is repeatable.

    Raises:
        ValueError: the shapes differ, or there are no samples.
    """
    if ours.shape != theirs.shape or ours.ndim != 2 or len(ours) == 0:
        raise ValueError(f"paired statistics must share a shape (n >= 1, k), but got {ours.shape} and {theirs.shape}")
    rng = np.random.default_rng(seed)
    n, k = ours.shape
    joint = np.concatenate([ours, theirs], axis=1)
    tail = (1 - confidence) / 2
    if k == 1 and bool(np.isin(joint, (0.0, 1.0)).all()):
        cells = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=np.float64)
        counts = np.array([np.sum((joint == cell).all(axis=1)) for cell in cells]) + 0.5  # Agresti & Min
        draws = rng.multinomial(n, counts / counts.sum(), size=resamples) @ cells / n
    else:
        tail = _expanded(tail, n)
        step = max(1, 2_000_000 // n)
        draws = np.concatenate(
            [_resampled_means(joint, min(step, resamples - start), rng) for start in range(0, resamples, step)]
        )
    values = figure(draws[:, :k], draws[:, k:])
    middle = float(figure(ours.mean(axis=0), theirs.mean(axis=0)))
    low, high = (float(v) for v in np.quantile(values, [tail, 1 - tail]))
    return Interval(min(low, middle), middle, max(high, middle), confidence)


def _resampled_means(rows: Floats, count: int, rng: np.random.Generator) -> Floats:
    """The means (count, k) of `count` draws with replacement from rows (n, k)."""
    n = len(rows)
    drawn = rng.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
    times = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
    return times.astype(np.float64) @ rows / n


def _expanded(tail: float, n: int) -> float:
    """The tail at which a percentile bootstrap of n values is as wide as Student's t asks for.

    A plain one is too narrow by sqrt((n - 1) / n) and by the normal's thinner tails (Hesterberg, *What Teachers
    Should Know About the Bootstrap*, The American Statistician 69, 2015, section 5.3).
    """
    if n < 3:
        return 0.0
    normal = NormalDist()
    z, v = normal.inv_cdf(1 - tail), n - 1
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)  # Cornish & Fisher
    return normal.cdf(-math.sqrt(n / v) * t)
