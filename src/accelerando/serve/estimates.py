"""What the governor has to estimate while it runs: how fast rows arrive, and how slow the machine is just now.

Both are fed by the executor, in one thread; neither reads a clock.
"""

from __future__ import annotations

import math

RECENT = 0.5  # seconds over which arrivals are averaged
WEIGHT = 0.15  # of the newest call in the slow-down
USUAL_NOISE = 0.05  # standard deviation of log(observed / predicted) that is taken for granted before calls tell
LEAST_NOISE = 0.02
FAR = 3.0  # standard deviations beyond which a call counts as a stall, until a second one confirms it
BOUNDS = (math.log(0.05), math.log(1000.0))  # no machine gets faster or slower than that; a broken clock may say so


class ArrivalRate:
    """Rows that arrive per second: the sum over arrivals of rows * exp(-age / tau) / tau.

    That is the exponential average of the arrivals themselves and not of samples at ticks, so it is exact however
    irregular they are: under a steady rate its mean is that rate, and it fades while none come.

    Those that find the executor busy are counted by themselves too.  A caller that waits for each answer before it asks
    again arrives as often as it is answered, at any rung: it never finds the executor busy, and does not press.

    Args:
        tau: seconds over which it averages.
    """

    def __init__(self, tau: float = RECENT) -> None:
        if not (tau > 0 and math.isfinite(tau)):
            raise ValueError(f"tau must be a number of seconds above 0, but got {tau!r}")
        self.tau = tau
        self._all = self._pressing = 0.0
        self._at = 0.0  # when both were right

    def observe(self, now: float, rows: int = 1, *, waits: bool = True) -> None:
        """A request of so many rows arrived, `now` in seconds of a monotonic clock; `waits`: others run or wait."""
        fade = self._fade(now)
        self._all = self._all * fade + rows / self.tau
        self._pressing = self._pressing * fade + (rows / self.tau if waits else 0.0)
        self._at = max(now, self._at) if self._all else now

    def at(self, now: float) -> float:
        """Rows per second, as it looks now."""
        return self._all * self._fade(now)

    def pressing(self, now: float) -> float:
        """Rows per second of those that had to wait: `Signal.rate`."""
        return self._pressing * self._fade(now)

    def _fade(self, now: float) -> float:
        return math.exp(-max(0.0, now - self._at) / self.tau)


class Slowdown:
    """How many times longer than predicted calls take just now: one factor for all rungs.

    An exponentially weighted mean of log(observed / predicted) and of its squared deviation; the steady state of a
    Kalman filter whose noise is learned.  One factor for all configurations is ALERT's idea (Wan et al., USENIX ATC
    2020): what slows a machine down (heat, neighbours) slows all its models down.

    A call far beyond the usual noise moves the mean only by as much as the farthest usual one would; where the next
    one lies as far on the same side, both are believed.  So one stall hardly counts, and a lasting change is known
    after two calls.
    """

    def __init__(self, weight: float = WEIGHT) -> None:
        if not 0 < weight <= 1:
            raise ValueError(f"the weight of the newest call must lie between 0 and 1, but got {weight!r}")
        self.weight = weight
        self._spread = weight / (2 - weight)  # variance of the mean, as a share of that of one call
        self._mean = 0.0
        self._variance = USUAL_NOISE**2
        self._last_far = 0.0  # how far beyond, where the last call was far off; its sign is the side

    def observe(self, predicted_seconds: float, observed_seconds: float) -> None:
        """A call was predicted to take so long on a quiet machine, and took so long; both above 0, or it is ignored."""
        if not (predicted_seconds > 0 and observed_seconds > 0):
            return
        seen = min(max(math.log(observed_seconds / predicted_seconds), BOUNDS[0]), BOUNDS[1])
        off = seen - self._mean
        most = FAR * math.sqrt(self._variance)
        if abs(off) <= most:
            self._last_far = 0.0
            self._mean += self.weight * off
            self._variance += self.weight * (off * off - self._variance)
        elif self._last_far * off > 0:  # the second in a row is no stall: the machine has changed
            self._mean += math.copysign(min(abs(off), abs(self._last_far)), off)
            self._last_far = 0.0
        else:
            self._last_far = off
            self._mean += self.weight * math.copysign(most, off)
            self._variance += self.weight * (most * most - self._variance)
        self._variance = max(self._variance, LEAST_NOISE**2)

    @property
    def mean(self) -> float:
        """The factor itself; 1 on a quiet machine."""
        return math.exp(self._mean)

    def factor(self, deviations: float = 1.0) -> float:
        """The factor to plan with: the mean and so many of its standard deviations more."""
        return math.exp(self._mean + deviations * math.sqrt(self._variance * self._spread))
