"""A duel: candidate and original timed in short blocks, in random order, round by round.

The figure is the ratio within a round, so whatever slows the machine for longer than a round slows both.  Rounds
are never dropped; what disturbed them is noted.  A duel ends early when the interval is narrow, or when the
question that was asked of it is answered at a sterner confidence than the one reported, because looking often
makes an honest 95 % into less (Wald 1947; Johari et al., *Operations Research* 70, 2022).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from accelerando.interval import Floats, Interval, median_interval
from accelerando.measure.clock import Activity
from accelerando.trial import FEW_ROUNDS, LUCK

LOOK_CONFIDENCE = 0.99


class Fighter(Protocol):
    """What a duel needs of an arm."""

    @property
    def pid(self) -> int: ...

    def block(self, seconds: float, timeout: float, core: int = 0) -> Floats: ...

    def typical(self, block: Floats) -> float:
        """Seconds per call of a block: its median, or what stands for all inputs where their times differ."""
        ...


@dataclass(frozen=True)
class Effort:
    """How long a duel may be.

    Args:
        least, most: rounds.
        block_seconds: length of one arm's block in a round.
        narrow: the relative width of the interval at which to stop.
        calls: how many calls of the candidate are needed besides, for the quantiles that the goal asks for.
        seconds: the duel ends after this long, whatever is left to do, once it has the least rounds that can give
            an interval: on a busy machine a block may take many times its length.
        timeout: seconds after which a block is taken for a hang.
    """

    least: int
    most: int
    block_seconds: float
    narrow: float = 0.02
    calls: int = 0
    seconds: float = 15.0
    timeout: float = 60.0

    def after(self, rounds: int) -> Effort:
        """What is left of the effort when some rounds were fought already."""
        return replace(self, least=max(2, self.least - rounds), most=self.most - rounds)


SCREEN = Effort(least=6, most=6, block_seconds=0.1)
SELECT = Effort(least=8, most=16, block_seconds=0.1, narrow=0.04, seconds=10.0)
RACE = Effort(least=12, most=40, block_seconds=0.1, narrow=0.02, seconds=25.0)
CERTIFY = Effort(least=20, most=60, block_seconds=0.15)


@dataclass(frozen=True)
class Rounds:
    """What a duel saw: see `Evidence` for the fields."""

    rounds: Floats
    stolen: Floats
    seconds: Floats
    original_seconds: Floats

    @property
    def speedup(self) -> Interval:
        return median_interval(self.rounds[:, 1] / self.rounds[:, 0]).widened(LUCK)

    def __add__(self, other: Rounds) -> Rounds:
        pairs = ((getattr(self, f), getattr(other, f)) for f in self.__dataclass_fields__)
        return Rounds(*(np.concatenate(pair) for pair in pairs))


def duel(
    candidate: Fighter,
    original: Fighter,
    effort: Effort,
    *,
    cores: int,
    seed: int = 0,
    answered: Callable[[Interval], bool] = lambda interval: False,
) -> Rounds:
    """Time a candidate against the original.

    Args:
        cores: how many this machine has, for the share that others took.
        seed: of the random order within rounds.
        answered: whether an interval answers the question for which the duel is fought.

    Raises:
        RefusalError: an arm died, hung or outgrew its memory.
    """
    return contest([candidate], original, effort, cores=cores, seed=seed, answered=answered)[0]


def contest(
    candidates: Sequence[Fighter],
    original: Fighter,
    effort: Effort,
    *,
    cores: int,
    seed: int = 0,
    answered: Callable[[Interval], bool] = lambda interval: False,
) -> list[Rounds]:
    """Time several candidates and the original in the same rounds, in random order; a duel is a contest of one.

    What is close is told apart in the same minutes: load from outside slows some backends more than others, so
    ratios to the original that were taken at different times can't be held against each other.

    Raises:
        RefusalError: an arm died, hung or outgrew its memory.
    """
    rng, start = np.random.default_rng(seed), time.monotonic()
    arms = [*candidates, original]
    pids = [a.pid for a in arms]
    seconds: list[list[Floats]] = [[] for _ in arms]
    rows: list[list[float]] = []
    stolen: list[float] = []
    over = False
    while not over:
        before, figures = Activity.now(pids), [0.0] * len(arms)
        for i in rng.permutation(len(arms)):
            block = arms[i].block(effort.block_seconds, effort.timeout, len(rows))  # all begin on the same core
            seconds[i].append(block)
            figures[i] = arms[i].typical(block)
        stolen.append(before.stolen_until(Activity.now(pids), cores))
        rows.append(figures)
        late = time.monotonic() - start > effort.seconds and len(rows) >= FEW_ROUNDS
        table, calls = np.array(rows), min(sum(map(len, s)) for s in seconds[:-1])
        over = late or all(_over(table[:, [i, -1]], calls, effort, answered) for i in range(len(candidates)))
    table, last = np.array(rows), np.concatenate(seconds[-1])
    return [
        Rounds(table[:, [i, -1]], np.array(stolen), np.concatenate(seconds[i]), last) for i in range(len(candidates))
    ]


def _over(rounds: Floats, calls: int, effort: Effort, answered: Callable[[Interval], bool]) -> bool:
    n = len(rounds)
    if n < effort.least:
        return False
    if n >= effort.most:
        return calls >= effort.calls or n >= 4 * effort.most
    if calls < effort.calls:
        return False
    ratios = rounds[:, 1] / rounds[:, 0]
    return median_interval(ratios).width <= effort.narrow or (
        n % 4 == 0 and answered(median_interval(ratios, LOOK_CONFIDENCE))
    )
