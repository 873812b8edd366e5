"""The budget: how long a search may take, and what is left of it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from accelerando.errors import UsageError

UNITS = {"s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "minute": 60, "h": 3600, "hour": 3600}
LEAST_SECONDS = 5.0
# What is kept of the whole, and the most that it is worth in seconds, however long the whole.
PROFILE = (0.08, 20.0)  # for the original's profile
CERTIFY = (0.2, 150.0)  # for the figures that are printed
RACE = (0.12, 60.0)  # for telling the best apart


@dataclass(frozen=True)
class Budget:
    """Wall-clock seconds from `started`, on a clock that only goes forward."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    started: float = field(default=-1.0)

    def __post_init__(self) -> None:
        if not self.seconds >= LEAST_SECONDS:
            raise UsageError(f"a budget of at least {LEAST_SECONDS:.0f} s is needed, but got {self.seconds:g} s")
        if self.started < 0:
            object.__setattr__(self, "started", self.clock())

    @classmethod
    def parse(cls, text: str | float, clock: Callable[[], float] = time.monotonic) -> Budget:
        """`"6min"`, `"1h 30m"`, `"90s"`, or a number of seconds.

        Raises:
            UsageError: it is none of these.
        """
        if not isinstance(text, str):
            return cls(float(text), clock)
        parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
        rebuilt = re.sub(r"\s+", "", "".join(a + b for a, b in parts))
        names = [unit.rstrip("s") or "s" for _, unit in parts]
        if not parts or rebuilt != re.sub(r"\s+", "", text.lower()) or any(n not in UNITS for n in names):
            raise UsageError(f'a budget is a time such as "90s", "6min" or "1h 30m", but got {text!r}')
        return cls(sum(float(a) * UNITS[n] for (a, _), n in zip(parts, names, strict=True)), clock)

    @property
    def used(self) -> float:
        return self.clock() - self.started

    @property
    def left(self) -> float:
        """Seconds left of the whole; negative when it is overdrawn."""
        return self.seconds - self.used

    @property
    def to_explore(self) -> float:
        """Seconds left for trying new recipes: racing and certifying have their shares."""
        return self.to_race - self._kept(RACE)

    @property
    def to_race(self) -> float:
        """Seconds left for telling the best apart: certifying has its share."""
        return self.to_certify - self._kept(CERTIFY)

    @property
    def to_certify(self) -> float:
        """Seconds left for certifying: the profile has its share."""
        return self.left - self._kept(PROFILE)

    def _kept(self, purpose: tuple[float, float]) -> float:
        share, most = purpose
        return min(self.seconds * share, most)
