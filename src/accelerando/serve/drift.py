"""Drift: are the inputs still like those at the start, and like the data of the bundle?

One row of every request is turned into a bounded number of plain figures: its mean and spread, the lengths of its
axes, the means along short axes such as channels, some single values, how much of it lies outside the range seen at
first, and for whole numbers how much was never seen before.  Windows of rows are held against the first ones, figure
by figure, by the distance of Kolmogorov and Smirnov, which is the same test for every distribution.

What counts as usual is what was served first: after a `range` phase of `FIRST` rows, whose values and bounds are
remembered, come `REFERENCE` rows, whose figures are.  Those are held against the rows stored in the bundle too, so
that a client that never sent the right thing, such as pixels of 0 to 255 where 0 to 1 was meant, is noticed as well.

The chance that anything is ever reported although nothing changed is at most 5 %: 1 % for the stored rows, 4 % for
all windows together (the k-th gets 6 / (pi k)^2 of that, its figures equal parts; Bonferroni).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from accelerando.interval import Floats
from accelerando.signature import Array, Port

FIRST, REFERENCE, WINDOW = 128, 384, 256  # rows
MISS_STORED, MISS_WINDOWS = 0.01, 0.04
VALUES = 2048  # of a row at most; of a longer one, evenly spaced ones along each axis
INPUTS, SINGLE_VALUES, SHORT_AXIS = 32, 64, 8  # bounds on the number of figures
KNOWN = 1 << 16  # different whole numbers that are remembered
SHOWN = 3  # figures of an input that are told of, the most changed first


@dataclass(frozen=True)
class _Row:
    """Evenly spaced values along each axis of a row, at most `VALUES`, and the shape that it had."""

    values: Array
    shape: tuple[int, ...]

    @classmethod
    def of(cls, row: Array) -> _Row:
        row = np.asarray(row)
        steps = _steps(row.shape)
        few = row.reshape(-1)[:VALUES] if steps is None else row[tuple(slice(None, None, step) for step in steps)]
        return cls(few.copy(), row.shape)


@dataclass(frozen=True)
class _Usual:
    """What an input's values were at first: least, greatest, and of whole numbers every one."""

    low: float
    high: float
    known: Array | None


@dataclass(frozen=True)
class _Finding:
    distance: float
    text: str


@dataclass(eq=False)
class Drift:
    """Watches the inputs of one model; `observe` is cheap and for every request, `look` is for idle moments.

    The two may be called by two threads; a row that comes while the other looks may be lost.

    Args:
        ports: the model's inputs; of more than 32 the first are watched.
        stored: the inputs of the bundle's stored rows, where it has some (`parity.inputs`).
        seed: which row of a request is taken.
    """

    ports: Sequence[Port]
    stored: Sequence[Array] | None = None
    seed: int = 0
    findings: tuple[str, ...] = ()  # of the last window, after those against the stored rows
    windows: int = 0  # that were looked at
    _rows: list[list[_Row]] = field(default_factory=list)
    _usual: list[_Usual] = field(default_factory=list)
    _reference: Floats | None = None
    _lasting: tuple[str, ...] = ()
    _news: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.ports = self.ports[:INPUTS]
        self._random = random.Random(self.seed)
        self._figures = [_Figures(port, SINGLE_VALUES // len(self.ports)) for port in self.ports]

    @property
    def _wanted(self) -> int:
        return FIRST if not self._usual else REFERENCE if self._reference is None else WINDOW

    def observe(self, leaves: Sequence[Array]) -> None:
        """Take one row of a request's flat inputs; let it go while a full window waits to be looked at."""
        if len(self._rows) < self._wanted and len(leaves[0]):
            row = self._random.randrange(len(leaves[0]))
            self._rows.append([_Row.of(x[row]) for x in leaves[: len(self.ports)]])

    def look(self) -> tuple[str, ...] | None:
        """What has drifted, a sentence each, where enough rows have come since the last look; else None."""
        if len(self._rows) < self._wanted:
            return None
        rows, self._rows = self._rows[: self._wanted], []  # another thread may be adding one
        columns = [[row[i] for row in rows] for i in range(len(self.ports))]
        if not self._usual:
            self._usual = [_usual(column) for column in columns]
            return None
        table = self._table(columns)
        if self._reference is None:
            self._reference = table
            self._lasting = self._against_stored(table)
        else:
            self.windows += 1
            miss = MISS_WINDOWS * 6 / (math.pi * self.windows) ** 2
            self._news = self._changes(self._reference, table, miss, range(table.shape[1]))
        self.findings = (*self._lasting, *self._news)
        return self.findings

    def _table(self, columns: Sequence[Sequence[_Row]]) -> Floats:
        """(rows, figures) of thinned rows, input by input."""
        parts = [
            np.array([figures(row, usual) for row in column])
            for figures, usual, column in zip(self._figures, self._usual, columns, strict=True)
        ]
        return np.concatenate(parts, axis=1)

    def _against_stored(self, table: Floats) -> tuple[str, ...]:
        if not self.stored or not len(self.stored[0]):
            return ()
        columns = [[_Row.of(row) for row in x] for x in self.stored[: len(self.ports)]]
        stored = np.unique(self._table(columns), axis=0)  # rows may be taken round and round
        summaries = [i for i, name in enumerate(self._names) if name[2]]
        found = self._changes(stored, table, MISS_STORED, summaries)
        return tuple(f"unlike the rows stored in the bundle: {text}" for text in found)

    @property
    def _names(self) -> list[tuple[str, str, bool]]:
        """Of every figure: its input, what it is, and whether it sums up a whole row."""
        return [(f.port.name, name, summary) for f in self._figures for name, summary in f.names]

    def _changes(self, before: Floats, now: Floats, miss: float, which: Sequence[int]) -> tuple[str, ...]:
        """Sentences on the figures that changed, input by input."""
        names, found = self._names, dict[str, list[_Finding]]()
        least = least_distance(len(before), len(now), miss / len(which))
        for i in which:
            if (far := distance(before[:, i], now[:, i])) >= least:
                source, name, _ = names[i]
                found.setdefault(source, []).append(_Finding(far, _words(name, before[:, i], now[:, i], far)))
        return tuple(text for source, changes in found.items() for text in _told(source, changes))


class _Figures:
    """The figures of one row of an input."""

    def __init__(self, port: Port, singles: int) -> None:
        self.port = port
        shape = [axis for axis in port.shape[1:] if isinstance(axis, int)]
        fixed = len(shape) == len(port.shape) - 1
        steps = _steps(shape) if fixed else None
        small = [-(-n // step) for n, step in zip(shape, steps, strict=True)] if steps is not None else []
        size = math.prod(small) if steps is not None else 0
        kind = np.dtype(port.dtype).kind
        self._lengths = [(i, axis) for i, axis in enumerate(port.shape[1:]) if isinstance(axis, str)]
        self._floats, self._ids = kind == "f", kind in "iu" and port.dtype != "uint8"
        self._many = size != 1
        numbers = self._floats or port.dtype == "uint8"
        places = np.linspace(0, size - 1, min(size, singles)).astype(int) if numbers and size else np.array([], int)
        self._picked: list[int] = np.unique(places).tolist()
        self._axes = [i for i, length in enumerate(small) if len(small) > 1 and 2 <= length <= SHORT_AXIS]

        def place(index: int) -> str:
            where = [int(i) * step for i, step in zip(np.unravel_index(index, small), steps or (), strict=True)]
            return f"feature {where[0] if len(where) == 1 else tuple(where)}" if where else "the value"

        self.names: list[tuple[str, bool]] = [
            *((f"the length of {axis}", True) for _, axis in self._lengths),
            *([("the mean of a row", True), ("the spread within a row", True)] if self._many else []),
            ("the share of values outside the range seen at first", True),
            *([("the share of values that are not finite", True)] if self._floats else []),
            *([("the share of values never seen at first", True)] if self._ids else []),
            *((f"the mean at {j} of axis {i + 1}", True) for i in self._axes for j in range(small[i])),
            *((place(index), False) for index in self._picked),
        ]

    def __call__(self, kept: _Row, usual: _Usual) -> list[float]:
        """In the order of `names`."""
        row = kept.values
        flat = row.reshape(-1).astype(np.float64)
        finite = flat[np.isfinite(flat)]
        count = max(1, flat.size)
        found = [float(kept.shape[i]) for i, _ in self._lengths]
        if self._many:
            found += [float(finite.mean()), float(finite.std())] if finite.size else [0.0, 0.0]
        found.append(float(((finite < usual.low) | (finite > usual.high)).sum()) / count)
        if self._floats:
            found.append(1 - finite.size / count)
        if self._ids:
            found.append(0.0 if usual.known is None else float(np.isin(row, usual.known, invert=True).sum()) / count)
        clean = np.nan_to_num(flat, nan=0.0, posinf=1e300, neginf=-1e300)
        for axis in self._axes:
            others = tuple(i for i in range(row.ndim) if i != axis)
            found += (clean.reshape(row.shape) / row.size * row.shape[axis]).sum(axis=others).tolist()
        return found + clean[self._picked].tolist() if self._picked else found


def _steps(shape: Sequence[int]) -> tuple[int, ...] | None:
    """Which values of a row are kept: every so many-th along each axis; short axes whole.  None: the first `VALUES`,
    where there are too many short axes."""
    step = 1
    while math.prod(-(-n // step) if n > SHORT_AXIS else n for n in shape) > VALUES:
        if step > max(shape):
            return None
        step += 1
    return tuple(step if n > SHORT_AXIS else 1 for n in shape)


def distance(a: Floats, b: Floats) -> float:
    """The greatest difference of two samples' distribution functions (Kolmogorov and Smirnov), in [0, 1]."""
    a, b = np.sort(a), np.sort(b)
    points = np.concatenate([a, b])
    below_a, below_b = (np.searchsorted(x, points, side="right") / len(x) for x in (a, b))
    return float(np.abs(below_a - below_b).max())


def least_distance(n: int, m: int, miss: float) -> float:
    """The distance that two samples of n and m from one distribution, whatever it is, exceed with a chance of `miss`
    at most.

    Dvoretzky, Kiefer and Wolfowitz's inequality for two samples with e where Massart has 2 (Wei & Dudley, *Statistics
    & Probability Letters* 82, 2012).
    """
    return math.sqrt(math.log(math.e / miss) * (n + m) / (2 * n * m))


def _usual(rows: Sequence[_Row]) -> _Usual:
    values = np.concatenate([row.values.reshape(-1) for row in rows])
    known = np.unique(values)[:KNOWN] if values.dtype.kind in "iu" else None
    finite = values[np.isfinite(values)].astype(np.float64)
    return _Usual(float(finite.min(initial=np.inf)), float(finite.max(initial=-np.inf)), known)


def _words(name: str, before: Floats, now: Floats, far: float) -> str:
    """One change, by what of it is largest: where the values lie, how they spread, or else their distribution."""
    spread, shift = float(before.std()), float(now.mean() - before.mean())
    if spread == 0:
        return f"{name} is {now.mean():.4g} on average, and was always {before.mean():.4g}"
    if abs(shift) >= spread / 2:
        far_off = f"{abs(shift) / spread:.1f} reference standard deviations {'above' if shift > 0 else 'below'}"
        return f"{name} is {far_off} what it was on average ({now.mean():.4g}, was {before.mean():.4g})"
    ratio = float(now.std()) / spread
    if not 2 / 3 < ratio < 3 / 2:
        return f"{name} varies {ratio:.2g} times as much as it did"
    return f"{name} is distributed otherwise than it was (distance {far:.2f})"


def _told(source: str, changes: Sequence[_Finding]) -> list[str]:
    """The greatest changes of an input, and how many more there are."""
    ordered = sorted(changes, key=lambda change: -change.distance)
    told = [f"input {source!r}: {change.text}" for change in ordered[:SHOWN]]
    more = len(ordered) - SHOWN
    return [*told, f"input {source!r}: {more} more figures changed"] if more > 0 else told
