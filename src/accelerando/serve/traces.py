"""Arrival traces: read from a file, or made by a seed.

A file is one of

    .csv            one request a line: `seconds` or `ms`, and `rows` if it has a second column.  A first line with
                    these names says which; without it the first column is seconds.
    .jsonl, .ndjson one JSON value a line: a number of seconds, or {"seconds": 1.25, "rows": 4} or {"ms": 1250}

with arrivals in order, from any origin: only the differences count.  Lines that are empty are skipped.

Made ones, all by a seed, `rate` in requests a second:

    poisson(rate=200, seconds=60)                   independent arrivals
    gamma(rate=200, cv2=4, seconds=60)              bursty: gaps by the gamma law, whose squared coefficient of
                                                    variation is cv2 (1 is Poisson)
    bursts(rate=100, peak=600, calm=5, burst=1)     a base rate, and bursts at the peak rate; both last for times by the
                                                    exponential law with these means (a Markov-modulated process)
    ramp(low=10, high=400, seconds=60)              the rate grows evenly
    overload(rate=50, peak=900, seconds=60)         the middle third at the peak rate
"""

from __future__ import annotations

import csv
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from accelerando.errors import UsageError
from accelerando.interval import Floats

MOST_BYTES = 64 * 2**20
MOST_REQUESTS = 1_000_000
MOST_ROWS = 1_000_000  # of one request
MOST_FIGURE = 10**9  # of a made trace
PEAK_SECONDS = 1.0
TIMES = {"seconds": 1.0, "ms": 1e-3}


@dataclass(frozen=True, eq=False)
class Trace:
    """When requests arrive.

    Args:
        arrivals: (n,) seconds, in order; the first is 0.
        rows: (n,) whole numbers, rows of each request.
        name: where it is from.

    Raises:
        UsageError: there are none, they are not in order, or not as many rows.
    """

    arrivals: Floats
    rows: Floats
    name: str = "a trace"

    def __post_init__(self) -> None:
        if len(self.arrivals) == 0 or len(self.arrivals) != len(self.rows):
            raise UsageError(
                f"{self.name} must hold a request at least, and rows for each, but has {len(self.arrivals)} arrivals "
                f"and {len(self.rows)} rows"
            )
        if not np.isfinite(self.arrivals).all() or (np.diff(self.arrivals) < 0).any() or (self.rows < 1).any():
            raise UsageError(f"arrivals of {self.name} must be finite and in order, and rows at least 1")

    @classmethod
    def of(cls, arrivals: Floats, rows: Floats | None = None, name: str = "a trace") -> Trace:
        """A trace of arrivals from any origin; one row each, unless `rows` says otherwise."""
        arrivals = np.asarray(arrivals, dtype=np.float64)
        rows = np.ones(len(arrivals)) if rows is None else np.asarray(rows, dtype=np.float64)
        return cls(arrivals - arrivals[:1], rows, name)

    def __len__(self) -> int:
        return len(self.arrivals)

    @property
    def seconds(self) -> float:
        """From the first arrival to the last."""
        return float(self.arrivals[-1])

    @property
    def rate(self) -> float:
        """Rows per second, in the mean; 0 for a single moment."""
        return float(self.rows.sum()) / self.seconds if self.seconds > 0 else 0.0

    @property
    def cv2(self) -> float:
        """Squared coefficient of variation of the gaps: 0 for a clock, 1 for Poisson."""
        gaps = np.diff(self.arrivals)
        return float(gaps.var() / gaps.mean() ** 2) if len(gaps) > 1 and gaps.mean() > 0 else 0.0

    @property
    def peak(self) -> float:
        """Rows that arrived within the fullest second."""
        sums = np.concatenate([[0.0], np.cumsum(self.rows)])
        ends = np.searchsorted(self.arrivals, self.arrivals + PEAK_SECONDS, side="left")
        return float((sums[ends] - sums[:-1]).max())

    def __str__(self) -> str:
        return (
            f"{self.name}: {len(self):,} requests in {self.seconds:.4g} s, {self.rate:.4g} rows/s, "
            f"{self.peak:.4g} in the fullest second, CV2 of the gaps {self.cv2:.3g}"
        )


def find(text: str | Path) -> Trace:
    """The trace of a file, or of a text such as `gamma(rate=200, cv2=4, seconds=60, seed=0)`.

    Raises:
        UsageError: it is neither; the message says what is wrong, and in a file in which line.
    """
    call = re.fullmatch(r"\s*([a-z]+)\s*\((.*)\)\s*", str(text), re.DOTALL)
    return _make(call[1], call[2]) if call else read(text)


# --- files ------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> Trace:
    """The trace of a file.

    Raises:
        UsageError: it can't be read; the message names the line.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".jsonl", ".ndjson"):
        raise UsageError(
            f"a trace is a file that ends in .csv or .jsonl, or one of {', '.join(MADE)} with its figures, as in "
            f"'gamma(rate=200, cv2=4, seconds=60)'; got {str(path)!r}"
        )
    try:
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        lines = content.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the trace {path} can't be read: {error}") from error
    if len(content) > MOST_BYTES:
        raise UsageError(f"the trace {path} has more than {MOST_BYTES:,} bytes; give a part of it")
    found: list[tuple[float, float]] = []
    columns: list[str] | None = None if path.suffix == ".csv" else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if columns is None:
                columns = _columns(line)
                if columns:
                    continue
            request = _of_csv(line, columns) if path.suffix == ".csv" else _of_json(line)
            found.append(_checked(*request, found[-1][0] if found else -math.inf))
            if len(found) > MOST_REQUESTS:
                raise ValueError(f"at most {MOST_REQUESTS:,} requests are replayed; give a part of the trace")
        except (ValueError, csv.Error, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: {error}") from error
    if not found:
        raise UsageError(f"the trace {path} holds no request")
    arrivals, rows = np.array(found, dtype=np.float64).T
    return Trace.of(arrivals, rows, path.name)


def _columns(line: str) -> list[str]:
    """The names of a CSV file's columns; none where its first line holds numbers already."""
    names = [name.strip().lower() for name in next(csv.reader([line]))]
    try:
        [float(name) for name in names]
    except ValueError:
        if sum(name in TIMES for name in names) != 1:
            raise ValueError(f"one column must be {' or '.join(TIMES)}, but they are {line[:80]!r}") from None
        return names
    return []


def _of_csv(line: str, columns: list[str]) -> tuple[float, float]:
    fields = next(csv.reader([line]))
    named = dict(zip(columns or ["seconds", "rows"], fields, strict=False))
    if columns and len(fields) != len(columns):
        raise ValueError(f"{len(columns)} fields are expected, but there are {len(fields)}")
    return _request({name: _number(name, text) for name, text in named.items() if name in (*TIMES, "rows")})


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} must be a number, but is {text[:80]!r}") from None


def _of_json(line: str) -> tuple[float, float]:
    value = json.loads(line)
    given = value if isinstance(value, dict) else {"seconds": value}
    kept = {name: figure for name, figure in given.items() if name in (*TIMES, "rows")}
    for name, figure in kept.items():
        if isinstance(figure, bool) or not isinstance(figure, (int, float)):
            raise ValueError(f"{name} must be a number, but is {str(figure)[:80]!r}")
    return _request(kept)


def _request(given: Mapping[str, float]) -> tuple[float, float]:
    times = [given[name] * scale for name, scale in TIMES.items() if name in given]
    if len(times) != 1:
        raise ValueError(f"a request has one time, in {' or '.join(TIMES)}; got {', '.join(given) or 'neither'}")
    return times[0], given.get("rows", 1)


def _checked(at: float, rows: float, before: float) -> tuple[float, float]:
    if not (math.isfinite(at) and abs(at) < 1e15):
        raise ValueError(f"the time must be a finite number, but is {at}")
    if at < before:
        raise ValueError(f"{at:.15g} s comes after {before:.15g} s; sort the requests by time")
    if not (1 <= rows <= MOST_ROWS and rows == int(rows)):
        raise ValueError(f"rows must be a whole number from 1 to {MOST_ROWS:,}, but is {rows:g}")
    return at, rows


# --- made by a seed ---------------------------------------------------------------------------------------------


def poisson(rate: float, seconds: float, seed: int = 0) -> Trace:
    """Independent arrivals."""
    return gamma(rate, 1.0, seconds, seed)


def gamma(rate: float, cv2: float, seconds: float, seed: int = 0) -> Trace:
    """Gaps by the gamma law of mean 1 / rate and squared coefficient of variation cv2."""
    warped = _unit_arrivals(rate * seconds, cv2, seed)
    return Trace.of(warped / rate, name=f"gamma(rate={rate:g}, cv2={cv2:g}, seconds={seconds:g}, seed={seed})")


def bursts(
    rate: float, peak: float, seconds: float, calm: float = 5.0, burst: float = 1.0, cv2: float = 1.0, seed: int = 0
) -> Trace:
    """A base rate, and bursts at the peak rate; both last for exponential times of these means."""
    rng = np.random.default_rng([seed, 1])
    count = 2 * math.ceil(seconds / (calm + burst) * 2 + 20)
    lengths = rng.exponential(np.tile([calm, burst], count // 2))
    levels = np.tile([rate, peak], count // 2)
    name = f"bursts(rate={rate:g}, peak={peak:g}, seconds={seconds:g}, seed={seed})"
    return _under(np.concatenate([[0.0], np.cumsum(lengths)]), levels, levels, seconds, cv2, seed, name)


def ramp(low: float, high: float, seconds: float, cv2: float = 1.0, seed: int = 0) -> Trace:
    """A rate that grows evenly, or falls."""
    ends = np.linspace(0, seconds, 101)
    levels = np.linspace(low, high, 101)
    name = f"ramp(low={low:g}, high={high:g}, seconds={seconds:g}, seed={seed})"
    return _under(ends, levels[:-1], levels[1:], seconds, cv2, seed, name)


def overload(rate: float, peak: float, seconds: float, cv2: float = 1.0, seed: int = 0) -> Trace:
    """The peak rate in the middle third."""
    ends, levels = np.linspace(0, seconds, 4), np.array([rate, peak, rate])
    name = f"overload(rate={rate:g}, peak={peak:g}, seconds={seconds:g}, seed={seed})"
    return _under(ends, levels, levels, seconds, cv2, seed, name)


MADE: Mapping[str, Callable[..., Trace]] = {f.__name__: f for f in (poisson, gamma, bursts, ramp, overload)}


def _unit_arrivals(expected: float, cv2: float, seed: int) -> Floats:
    """Arrivals of a renewal process of rate 1, up to `expected`."""
    if expected > MOST_REQUESTS:
        raise UsageError(f"at most {MOST_REQUESTS:,} requests are made, but about {expected:,.0f} were asked for")
    rng, parts, end = np.random.default_rng(seed), [np.zeros(1)], 0.0
    while end < expected:
        parts.append(end + np.cumsum(rng.gamma(1 / cv2, cv2, 4096)))
        end = float(parts[-1][-1])
    arrivals = np.concatenate(parts)
    return arrivals[arrivals <= expected]


def _under(ends: Floats, left: Floats, right: Floats, seconds: float, cv2: float, seed: int, name: str) -> Trace:
    """Arrivals under a rate that goes from `left` to `right` in each stretch: a process of rate 1 with its time warped.

    The integral of the rate is taken on a fine grid and turned round.
    """
    grid = np.linspace(0.0, seconds, max(1000, min(200_000, int(seconds * 200))) + 1)
    stretch = np.clip(np.searchsorted(ends, grid, side="right") - 1, 0, len(left) - 1)
    share = (grid - ends[stretch]) / np.maximum(ends[stretch + 1] - ends[stretch], 1e-12)
    rate = left[stretch] + np.clip(share, 0, 1) * (right[stretch] - left[stretch])
    whole = np.concatenate([[0.0], np.cumsum((rate[1:] + rate[:-1]) / 2 * np.diff(grid))])
    return Trace.of(np.interp(_unit_arrivals(float(whole[-1]), cv2, seed), whole, grid), name=name)


def _make(kind: str, text: str) -> Trace:
    """A made trace from its words."""
    if kind not in MADE:
        raise UsageError(f"there is no trace {kind!r}; those that can be made are {', '.join(MADE)}")
    parameters = inspect.signature(MADE[kind]).parameters
    needed = [name for name, p in parameters.items() if p.default is p.empty]
    given: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, figure = (piece.strip() for piece in part.partition("="))
        try:
            given[name] = int(figure) if name == "seed" else float(figure)
        except ValueError:
            raise UsageError(f"{part!r} in {kind}({text}) must be a name and a number, as in 'rate=200'") from None
        if name not in parameters:
            raise UsageError(f"{kind} takes {', '.join(parameters)}, but got {name!r}")
        least = "from" if name in ("seed", "low", "high") else "above"
        if not (0 <= given[name] < MOST_FIGURE and (given[name] > 0 or least == "from")):
            raise UsageError(f"{name} of {kind} must be a number {least} 0 and below {MOST_FIGURE:,}, but is {figure}")
    if missing := [name for name in needed if name not in given]:
        raise UsageError(
            f"{kind} needs {', '.join(missing)} too, as in '{kind}({', '.join(f'{n}=1' for n in needed)})'"
        )
    return MADE[kind](**given)
