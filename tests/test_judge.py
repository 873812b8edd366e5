"""The judge for real, in fresh processes.  `scripts/bench judge` does the same with 200 duels and long blocks.

With so few duels the bounds are those that an honest judge breaks once in a thousand runs of this test.  No other test
runs beside it: the judge is on trial, and not what it makes of a machine that is busy with something else.
"""

from __future__ import annotations

import numpy as np
import pytest

from accelerando.measure.rounds import Effort
from benchmarks.judge import duels, losses

SHORT = Effort(least=12, most=24, block_seconds=0.03)


@pytest.mark.alone
def test_equals_are_hardly_ever_called_faster() -> None:
    assert sum(s.low > 1 for s in duels(30, 1.0, SHORT)) <= 6  # P(more of 30 at 5 %) < 0.001


@pytest.mark.alone
def test_what_is_slower_is_not_called_faster_and_what_is_thrice_as_slow_is_seen() -> None:
    assert sum(s.low > 1 for s in duels(10, 1.05, SHORT)) <= 1
    assert sum(s.high < 1 for s in duels(10, 3.0, SHORT)) >= 8


def test_a_planted_loss_of_one_point_is_seen() -> None:
    assert losses(60) >= 0.9


def test_no_loss_is_hardly_ever_seen_where_there_is_none() -> None:
    assert losses(60, loss=0.0) <= 0.1


def test_sabotage_scores_that_are_not_paired_hide_the_loss() -> None:
    """The same loss, judged as if the two had seen different samples, is seen far less often."""
    rng, seen = np.random.default_rng(0), 0
    for _ in range(60):
        ours, theirs = (rng.random(6000) < p for p in (0.94, 0.95))
        spread = 1.96 * np.sqrt(ours.var() / 6000 + theirs.var() / 6000)
        seen += theirs.mean() - ours.mean() - spread > 0
    assert seen / 60 < 0.9
