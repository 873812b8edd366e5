"""What a call of a rung takes on this machine, by its rows: measured when the rung is loaded.

The certificate's figures are of one batch size and of the machine where they were gathered; a governor needs those of
this one.  A call takes `fixed + per_row * rows` seconds: on processors that is close to the truth, and two numbers
can be measured in a fraction of a second.

Rungs are loaded at different times, and a machine that others use too runs at half its speed for minutes.  So a rung is
timed in turns with one whose cost is known, and their ratio counts: a duel, not two stopwatches.  The other one is only
a yardstick: a single row of it will do, and hardly holds up those who are served.  How fast the machine is just now,
the slow-down tells.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from accelerando.serve.batches import Run
from accelerando.signature import Array
from accelerando.trial import Evidence

SIZES = (1, 4, 16)  # rows; far apart, for a line needs no more, and more of them hold up those who are served
CALLS = 7  # of each size: the median of seven is not moved by three that were disturbed
SECONDS = 0.4  # for all sizes together, but for the first
PAUSE = 1e-3  # seconds between calls: a request that waits for the cores wakes up and takes them
LONG_PAUSE = 0.03  # at most, beside another rung: who has one may be serving, and gets as much time as this takes
MOST_TAIL = 3.0  # a longer tail is the machine's, and is seen in the slow-down


@dataclass(frozen=True)
class Cost:
    """Seconds of a call: `fixed`, and `per_row` more for each row."""

    fixed: float
    per_row: float

    def seconds(self, rows: int) -> float:
        return self.fixed + self.per_row * rows


def measure(
    run: Run,
    row: Sequence[Array],
    most_rows: int,
    cores: AbstractContextManager[Any],
    beside: tuple[Run, Cost] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Cost:
    """The cost of a loaded rung.

    Args:
        run: the rung, flat inputs to flat outputs.
        row: the inputs of one row, or of the one batch that the model takes where `most_rows` is that.
        most_rows: the greatest batch to try.
        cores: held during each timed call and the one that warms it, and no longer: the first call of a size, which may
            have to make room for it or to build a session, is not timed and needs no quiet.
        beside: another rung and its cost, against which it is timed.
    """

    def timed(arm: Run, leaves: Sequence[Array]) -> float:
        with cores:
            arm(row)  # after a pause, or another rung, caches are cold, and a virtual machine's core may be asleep
            start = clock()
            arm(leaves)
            return clock() - start

    def turn(leaves: Sequence[Array]) -> float:
        """Seconds of a call, on the machine as it was when the other rung's cost was found, where there is one."""
        if beside is None:
            seconds = timed(run, leaves)
            time.sleep(PAUSE)
            return seconds
        began = clock()
        other, seconds = timed(beside[0], row), timed(run, leaves)
        time.sleep(min(max(clock() - began, PAUSE), LONG_PAUSE))
        return seconds * beside[1].seconds(given) / max(other, 1e-9)

    batches, turns = dict[int, Sequence[Array]](), dict[int, list[float]]()
    given, takes = len(row[0]), list[float]()
    if beside is not None:
        beside[0](row)
    for size in (n for n in SIZES if n <= most_rows) if given == 1 else (given,):
        leaves: Sequence[Array] = [np.repeat(leaf, size // given, axis=0) for leaf in row]
        run(leaves)
        first = turn(leaves)
        one = min(first, 2 * takes[-1]) if takes else first  # or it was disturbed: it has twice the rows
        takes = [min(before, one) for before in takes] + [one]
        if batches and CALLS * sum(takes) > SECONDS:
            break
        batches[size], turns[size] = leaves, [first]
    for _ in range(CALLS - 1):  # size by size in each round, so that what disturbs one disturbs them all
        for size, leaves in batches.items():
            turns[size].append(turn(leaves))
    return fit([(size, float(np.median(taken))) for size, taken in turns.items()])


def fit(known: Sequence[tuple[int, float]]) -> Cost:
    """The line through (rows, seconds) that errs least in proportion; neither part is below 0."""
    rows, seconds = (np.array(column, dtype=float) for column in zip(*known, strict=True))
    if len(known) == 1:
        return Cost(0.0, float(seconds[0] / rows[0]))
    design = np.stack([np.ones_like(rows), rows], axis=1) / seconds[:, None]
    (fixed, per_row), *_ = np.linalg.lstsq(design, np.ones_like(rows), rcond=None)
    if per_row <= 0:
        return Cost(float(np.median(seconds)), 0.0)
    if fixed < 0:
        return Cost(0.0, float(np.median(seconds / rows)))
    return Cost(float(fixed), float(per_row))


def tail(evidence: Evidence) -> float:
    """How many times its median a call's p95 takes, as certified."""
    return float(np.clip(evidence.latency(0.95).mid / evidence.latency(0.5).mid, 1.0, MOST_TAIL))
