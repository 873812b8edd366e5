"""Bounds on a mean of values in [0, 1]: one that may be looked at after every value, and one for a fixed number.

An interval of a fixed number of values is wrong sooner or later when it is looked at again and again.  A *confidence
sequence* is right at every time at once.  This one bets: against every candidate mean m a gambler starts with a
capital of 1 and stakes a constant share of it on each value, at odds that are fair if m is the mean.  Then his
capital stays below 1 / a for ever with probability 1 - a (Ville, *Étude critique de la notion de collectif*, 1939),
so an m against which somebody grew rich is not the mean.  The capital is split among several shares, for nobody knows
the right one beforehand (Waudby-Smith & Ramdas, *Estimating means of bounded random variables by betting*, Journal of
the Royal Statistical Society B 86, 2024: hedged capital, diversified Kelly betting).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from accelerando.interval import CONFIDENCE, Floats, Interval

# What is staked, as a share of the most that can't ruin: the best one is about how far, relatively, m is off the mean.
# Most of the capital goes to those that find a mean 2 to 25 % off, for that is how far a rung that went bad is.
STAKES = 0.5 ** np.arange(12)
CAPITAL = np.array([1, 2, 4, 4, 4, 4, 4, 2, 1, 1, 1, 1]) / 29
BINS = 1024  # values are rounded to this many steps, in the gambler's disfavour, so that memory is bounded
HALVINGS = 50


class ConfidenceSequence:
    """An interval of a mean that holds at all times at once: it may be looked at, and acted upon, whenever one likes.

    The values lie in [0, 1] and each has the mean in question, given those before it; they need not be alike
    otherwise.  Constant stakes make the capital independent of the values' order, so that counts are all that is
    kept.  And no constant stake ever gains against the mean of what was seen, so that the interval holds that mean.

    Args:
        confidence: that the mean lies in the interval at every time; half of what is missing to 1 for either side.
    """

    def __init__(self, confidence: float = CONFIDENCE) -> None:
        if not 0 < confidence < 1:
            raise ValueError(f"0 < confidence < 1 must hold, but got {confidence}")
        self.confidence = confidence
        self.count = 0
        self._sum = 0.0
        self._up: dict[float, int] = {}  # values rounded up, and how often they were seen
        self._down: dict[float, int] = {}  # 1 - values, rounded up

    def observe(self, value: float) -> None:
        """Take one more value.

        Raises:
            ValueError: it is not in [0, 1].
        """
        if not 0 <= value <= 1:
            raise ValueError(f"a value must lie in [0, 1], but is {value}")
        self.count += 1
        self._sum += value
        for counts, x in ((self._up, value), (self._down, 1 - value)):
            rounded = math.ceil(x * BINS) / BINS
            counts[rounded] = counts.get(rounded, 0) + 1

    @property
    def mean(self) -> float:
        """Of the values so far; 0.5 before the first."""
        return self._sum / self.count if self.count else 0.5

    def below(self, mean: float) -> bool:
        """Whether the interval's upper end lies below this mean."""
        return self.count > 0 and mean > 0 and self._rich(self._up, mean)

    def interval(self) -> Interval:
        """The interval as it is now; [0, 1] before the first value."""
        middle = self.mean
        high = _edge(lambda m: self._rich(self._up, m), middle)
        low = 1 - _edge(lambda m: self._rich(self._down, m), 1 - middle)
        return Interval(min(low, middle), middle, max(high, middle), self.confidence)

    def _rich(self, counts: dict[float, int], mean: float) -> bool:
        """Whether who bets that the values lie below a mean has 2 / (1 - confidence) by now.

        Staking s of the most that can't ruin, one value x multiplies his capital by 1 + s (mean - x) / (1 - mean).
        """
        if mean >= 1:
            return any(x < 1 for x in counts)
        values, times = np.fromiter(counts, np.float64), np.fromiter(counts.values(), np.float64)
        with np.errstate(divide="ignore"):  # who staked all, and saw a 1, has nothing left
            capital = np.log1p(STAKES[:, None] * (mean - values) / (1 - mean)) @ times
        return float(np.logaddexp.reduce(capital + np.log(CAPITAL))) >= math.log(2 / (1 - self.confidence))


def least_mean(values: Floats | Sequence[float], miss: float) -> float:
    """A bound above which the mean lies but with a chance of `miss`, for n independent values in [0, 1].

    Of zeros and ones it is the exact one (Clopper & Pearson, *Biometrika* 26, 1934).  Else it is Chernoff's bound,
    which holds for every distribution on [0, 1] (Hoeffding, *Journal of the American Statistical Association* 58,
    1963, theorem 1).

    Raises:
        ValueError: there are no values, or one is not in [0, 1].
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0 or not ((x >= 0) & (x <= 1)).all():
        raise ValueError(f"at least one value is needed, and all in [0, 1], but got {x.size}")
    n, mean = x.size, float(x.mean())
    if mean == 0:
        return 0.0
    if np.isin(x, (0.0, 1.0)).all():
        tail = _tail(n, int(x.sum()))
        return 1 - _edge(lambda q: tail(1 - q) <= miss, 1 - mean)
    return 1 - _edge(lambda q: n * _divergence(mean, 1 - q) >= -math.log(miss), 1 - mean)


def _tail(n: int, k: int) -> Callable[[float], float]:
    """P(Binomial(n, p) >= k) as a function of p."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    hits, others = np.arange(k, n + 1), np.arange(n - k, -1, -1)
    ways = log_factorial[n] - log_factorial[hits] - log_factorial[others]

    def chance(p: float) -> float:
        return float(np.exp(ways + hits * math.log(p) + others * math.log1p(-p)).sum()) if 0 < p < 1 else float(p >= 1)

    return chance


def _divergence(a: float, b: float) -> float:
    """Kullback and Leibler's, of a coin that falls with chance a from one that does with chance b < a."""
    if b <= 0:
        return math.inf
    return a * math.log(a / b) + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)


def _edge(beyond: Callable[[float], bool], start: float) -> float:
    """The least m in [start, 1] from which on `beyond` is true, to within a rounding; 1 where it never is."""
    low, high = start, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return high
