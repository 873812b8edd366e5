"""Intervals hold what they say: coverage is checked by drawing from known distributions with fixed seeds."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelerando.interval import (
    Interval,
    least_count,
    median_interval,
    paired_bootstrap,
    quantile_interval,
    sides_known,
)

DRAWS = 300
LEAST_COVERAGE = 0.93


def coverage(make: Callable[[np.random.Generator], tuple[Interval, float]]) -> float:
    """The share of seeds for which the interval holds the truth."""
    hits = 0
    for seed in range(DRAWS):
        interval, truth = make(np.random.default_rng(seed))
        hits += interval.low - 1e-9 <= truth <= interval.high + 1e-9
    return hits / DRAWS


def difference(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return (theirs - ours)[..., 0]


def right_or_wrong(rng: np.random.Generator, n: int, lost: float, gained: float) -> tuple[Interval, float]:
    theirs = (rng.random(n) < 0.9).astype(np.float64)
    draw = rng.random(n)
    ours = np.where(theirs == 1, draw >= lost / 0.9, draw < gained / 0.1).astype(np.float64)
    return paired_bootstrap(ours[:, None], theirs[:, None], difference, resamples=500), lost - gained


def errors(rng: np.random.Generator, n: int, skewed: bool) -> tuple[Interval, float]:
    theirs = rng.normal(size=n)
    noise = rng.exponential(size=n) - 1 if skewed else rng.normal(size=n)
    return paired_bootstrap((theirs - 0.3 - noise)[:, None], theirs[:, None], difference, resamples=500), 0.3


@pytest.mark.parametrize("n", [6, 7, 9, 20, 51])
def test_median_interval_covers(n: int) -> None:
    assert coverage(lambda rng: (median_interval(rng.lognormal(0, 0.5, n)), 1.0)) >= LEAST_COVERAGE


@pytest.mark.parametrize(("quantile", "n"), [(0.95, 72), (0.95, 300), (0.99, 368), (0.99, 1000), (0.1, 60)])
def test_quantile_interval_covers(quantile: float, n: int) -> None:
    truth = -math.log(1 - quantile)
    found = coverage(lambda rng: (quantile_interval(rng.exponential(size=n), quantile), truth))
    assert found >= LEAST_COVERAGE


@pytest.mark.parametrize("n", [20, 100, 300])
@pytest.mark.parametrize(("lost", "gained"), [(0.0, 0.0), (0.01, 0.0), (0.02, 0.01), (0.06, 0.04)])
def test_paired_bootstrap_covers_right_or_wrong(n: int, lost: float, gained: float) -> None:
    assert coverage(lambda rng: right_or_wrong(rng, n, lost, gained)) >= LEAST_COVERAGE


@pytest.mark.parametrize(("n", "skewed"), [(10, False), (20, False), (100, False), (300, True)])
def test_paired_bootstrap_covers_errors(n: int, skewed: bool) -> None:
    assert coverage(lambda rng: errors(rng, n, skewed)) >= LEAST_COVERAGE


def narrowed(interval: Interval) -> Interval:
    return Interval(
        interval.mid - (interval.mid - interval.low) / 2,
        interval.mid,
        interval.mid + (interval.high - interval.mid) / 2,
    )


def test_sabotage_intervals_of_half_the_width_are_caught() -> None:
    def median(rng: np.random.Generator) -> tuple[Interval, float]:
        return narrowed(median_interval(rng.lognormal(0, 0.5, 20))), 1.0

    def tail(rng: np.random.Generator) -> tuple[Interval, float]:
        return narrowed(quantile_interval(rng.exponential(size=300), 0.95)), -math.log(0.05)

    def paired(rng: np.random.Generator) -> tuple[Interval, float]:
        interval, truth = errors(rng, 100, False)
        return narrowed(interval), truth

    for broken in (median, tail, paired):
        assert coverage(broken) < LEAST_COVERAGE - 0.05


def test_sabotage_a_plain_bootstrap_of_no_difference_would_have_no_width() -> None:
    same = np.ones((50, 1))
    assert paired_bootstrap(same, same, difference).high > 0  # unseen losses are possible
    nearly = same * 0.999  # not right-or-wrong: nothing is added, and nothing differs
    assert paired_bootstrap(nearly, nearly, difference).width == 0


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=60), st.sampled_from([0.1, 0.5, 0.95, 0.99]))
def test_quantile_interval_is_in_order_and_among_the_values(values: list[float], quantile: float) -> None:
    interval = quantile_interval(np.array(values), quantile)
    assert min(values) <= interval.low <= interval.mid <= interval.high <= max(values)
    assert (interval.confidence == 0.95) == all(sides_known(len(values), quantile)) or interval.confidence <= 0.95


@given(st.lists(st.floats(-100, 100), min_size=6, max_size=60))
def test_median_interval_is_symmetric(values: list[float]) -> None:
    up, down = median_interval(np.array(values)), median_interval(-np.array(values))
    assert (up.low, up.high) == (-down.high, -down.low)


@pytest.mark.parametrize(("quantile", "count"), [(0.5, 6), (0.95, 72), (0.99, 368)])
def test_least_count_is_where_both_sides_become_known(quantile: float, count: int) -> None:
    assert least_count(quantile) == count
    assert all(sides_known(count, quantile))
    assert not all(sides_known(count - 1, quantile))
    ordered = np.arange(count, dtype=np.float64)
    assert quantile_interval(ordered, quantile).confidence == 0.95
    assert quantile_interval(ordered[: count // 2], quantile).confidence < 0.95


def test_too_few_values_say_what_was_reached() -> None:
    assert quantile_interval(np.ones(1), 0.5).confidence == 0
    assert quantile_interval(np.arange(100.0), 0.99).confidence == pytest.approx(1 - 0.99**100, abs=0.03)


def test_bootstrap_is_repeatable_and_paired() -> None:
    rng = np.random.default_rng(3)
    theirs = rng.normal(size=(200, 1)) * 100
    ours = theirs - 1 + 0.01 * rng.normal(size=(200, 1))
    interval = paired_bootstrap(ours, theirs, difference)
    assert interval == paired_bootstrap(ours, theirs, difference)
    assert interval.high - interval.low < 0.01  # the samples' own spread of 100 cancels


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        median_interval(np.array([]))
    with pytest.raises(ValueError, match="0 < quantile < 1"):
        quantile_interval(np.ones(3), 1.0)
    with pytest.raises(ValueError, match="low <= mid <= high"):
        Interval(2, 1, 3)
    with pytest.raises(ValueError, match="low <= mid <= high"):
        median_interval(np.array([math.nan] * 8))
    with pytest.raises(ValueError, match="share a shape"):
        paired_bootstrap(np.ones((3, 1)), np.ones((4, 1)), difference)


def test_interval_maps_and_travels() -> None:
    interval = Interval(1, 2, 4)
    assert interval.map(lambda v: 1 / v) == Interval(0.25, 0.5, 1)
    assert Interval.from_json(interval.to_json()) == interval
    assert Interval.exactly(7).width == 0
    assert Interval(-1, 0, 1).width == math.inf
