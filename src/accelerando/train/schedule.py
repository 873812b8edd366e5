"""How the learning rate goes over the budget of time, and how its peak is found."""

from __future__ import annotations

import math
from collections.abc import Callable

WARM_UP = 0.08  # of the budget
FRESH_STEPS = 20  # an optimizer without a memory, as after a resumption, begins gently
LEAST_TRIALS, MOST_TRIALS = 24, 80  # steps of a range test
SMOOTHING = 0.85

# (first and last rate that is tried, least and greatest that is taken, the usual one)
RANGES = {"adamw": (1e-5, 1e-1, 3e-4, 1e-2, 1e-3), "sgd": (1e-3, 3.0, 5e-3, 0.5, 0.03)}


def height(progress: float, steps: int) -> float:
    """The learning rate as a share of its peak: up a straight line, then down one to zero.

    A straight line down to zero at the end of the budget is the best known schedule where the budget is what is
    given (Li et al., "Budgeted Training", ICLR 2020); with the line up it is one cycle (Smith 2018).

    Args:
        progress: the share of the budget that is spent.
        steps: that the optimizer has made since it was new.
    """
    up = min(1.0, 0.05 + progress / WARM_UP)
    down = max(0.0, (1 - progress) / (1 - WARM_UP))
    return min(up, down) * min(1.0, (steps + 1) / FRESH_STEPS)


def range_test(step: Callable[[float], float], optimizer: str, trials: int) -> float:
    """The peak of the learning rate, by steps with growing rates (Smith 2017): a third of where the loss was least.

    Args:
        step: a training step at a rate -> its loss, which may be NaN.
        trials: how many steps to make; it ends sooner where the loss explodes.
    """
    first, last, least, greatest, _ = RANGES[optimizer]
    smooth, best, at, norm = 0.0, math.inf, first, 0.0
    for i in range(trials):
        rate = first * (last / first) ** (i / (trials - 1))
        loss = step(rate)
        if not math.isfinite(loss):
            break
        smooth, norm = SMOOTHING * smooth + (1 - SMOOTHING) * loss, SMOOTHING * norm + (1 - SMOOTHING)
        if smooth / norm > 3 * max(best, 1e-12):
            break
        if smooth / norm < best:
            best, at = smooth / norm, rate
    return min(max(at / 3, least), greatest)


def usual(optimizer: str) -> float:
    """The rate where there is no time for a range test."""
    return RANGES[optimizer][-1]


def gentle(optimizer: str) -> float:
    """The rate for a student that knows nearly everything already: the usual one would make it forget first."""
    return RANGES[optimizer][2]
