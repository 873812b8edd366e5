"""The last minute, and whether the goal was met in it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recently import MOST, busy
from shelf import fake_status

from accelerando.interval import Interval
from accelerando.serve.status import BUCKETS, Histogram, RungStatus
from accelerando.serve.tally import Tally
from accelerando.server import goal_watch, recent


def test_the_difference_of_two_statuses_tells_of_the_time_between() -> None:
    found = recent.compare(busy(times=2), busy(times=3), 10.0)
    assert (found.requests, found.in_time, found.late, found.refused, found.expired, found.failed) == (
        226,
        197,
        3,
        20,
        5,
        1,
    )
    assert found.share == pytest.approx(197 / 226)
    assert found.rows == pytest.approx(20.0)  # two rungs answered 100 rows each
    assert found.quality == pytest.approx(0.9)
    assert found.answers is not None
    assert found.answers.mid == pytest.approx((0.96 + 0.93) / 2)
    assert found.computed.counts[3] == 200
    assert found.computed.total == pytest.approx(0.8)


def test_effective_quality_of_the_last_minute_is_not_that_since_the_start() -> None:
    before, after = busy(times=1, effective_quality=0.9), busy(times=2, effective_quality=0.6)
    assert recent.compare(before, after, 1.0).quality == pytest.approx(0.3)


def test_what_was_missed_counts_0_and_no_less() -> None:
    """A tally's own figures: 50 rows answered and 100 refused, then 10 and 40, by a rung of 0.9."""
    tally, told = Tally(), []
    for answered, refused in ((50, 100), (10, 40)):
        tally.answered(0.9, answered, 0.0, 0.001, late=False)
        tally.turned_away("refused", refused)
        told.append(fake_status(rows=tally.rows, all_rows=tally.all_rows, effective_quality=tally.effective_quality))
    assert recent.compare(*told, 1.0).quality == pytest.approx(0.9 * 10 / 50)
    tally.turned_away("refused", 5)
    none = fake_status(rows=tally.rows, all_rows=tally.all_rows, effective_quality=tally.effective_quality)
    assert recent.compare(told[-1], none, 1.0).quality == pytest.approx(0.0)


def test_where_less_is_better_missed_answers_have_no_quality() -> None:
    before, after = (busy(times=n, effective_quality=float("nan")) for n in (1, 2))
    assert recent.compare(before, after, 1.0).quality is None


def test_nothing_between_means_no_figures() -> None:
    found = recent.compare(busy(), busy(), 5.0)
    assert (found.requests, found.share, found.quality, found.answers, found.rows) == (0, None, None, None, 0.0)
    assert recent.quantile(found.queued, 0.99) is None


@given(st.lists(st.integers(0, 1000), min_size=MOST, max_size=MOST), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_a_quantile_lies_in_its_bucket_and_rises(counts: list[int], one: float, other: float) -> None:
    histogram = Histogram(tuple(counts), 1.0)
    low, high = sorted((one, other))
    found = recent.quantile(histogram, low), recent.quantile(histogram, high)
    if not sum(counts):
        assert found == (None, None)
        return
    assert found[0] is not None
    assert found[1] is not None
    assert found[0] <= found[1] <= BUCKETS[-1]
    number = next(i for i in range(MOST) if sum(counts[: i + 1]) >= low * sum(counts) and counts[i])
    ends = (0.0, *BUCKETS, BUCKETS[-1])
    assert ends[number] <= found[0] <= ends[number + 1]


def test_a_history_is_bounded_and_tells_of_its_window() -> None:
    history = recent.History()
    for step in range(1000):
        history.note(2.0 * step, 1e9 + 2.0 * step, busy(times=step))
    assert len(history.points) == 300
    assert history.points[-1].at - history.points[0].at == 598.0
    assert history.points[-1].share == pytest.approx(197 / 226)
    assert history.recent(1998.0, busy(times=999)).seconds == pytest.approx(60.0)


def test_a_model_that_was_loaded_anew_begins_anew() -> None:
    history = recent.History()
    for step in range(20):
        history.note(2.0 * step, 2.0 * step, busy(times=step + 50))
    assert history.recent(40.0, busy(times=1)).requests == 0
    history.note(40.0, 40.0, busy(times=1))
    assert history.points[-1].share is None
    assert history.recent(44.0, busy(times=2)).requests == 226


# --- the goal, just now -------------------------------------------------------------------------------------------


def seen(goal: str, *, in_time: int = 1000, late: int = 0, rung: RungStatus | None = None, **changed: Any) -> str:
    status = busy(goal=goal, **changed)
    if rung:
        status = dataclasses.replace(status, rungs=(status.rungs[0], rung))
    fields: dict[str, Any] = {
        **{f.name: 0 for f in dataclasses.fields(recent.Recent)}, "seconds": 60.0, "requests": in_time + late,
        "in_time": in_time, "late": late, "rows": (in_time + late) / 60, "quality": None, "answers": None, "drop": None,
        "queued": status.queued, "computed": status.computed,
    }  # fmt: skip
    return goal_watch.judge(goal_watch.read(goal), status, recent.Recent(**fields)).outcome


def rung(drop: Interval) -> RungStatus:
    return dataclasses.replace(fake_status().rungs[1], drop=drop)


@pytest.mark.parametrize(
    ("goal", "late", "outcome"),
    [
        ("p99 <= 20ms", 0, "met"), ("p99 <= 20ms", 11, "not met"), ("p95 <= 20ms", 11, "met"),
        ("latency <= 20ms", 900, "met"), ("latency <= 20ms", 1100, "not met"),
        ("throughput >= 10/s", 0, "met"), ("throughput >= 1000/s", 0, "met"), ("throughput >= 1000/s", 400, "not met"),
        ("memory <= 4MB", 0, "not met"), ("memory <= 6MB", 0, "met"), ("size <= 6MB", 0, "cannot tell"),
        ("speedup >= 4", 0, "met"), ("speedup >= 6", 0, "not met"),
        ("quality >= 0.9", 0, "met"), ("quality >= 0.99", 0, "not met"), ("quality >= 0.94", 0, "cannot tell"),
    ],
)  # fmt: skip
def test_a_bound_is_held_against_the_last_minute(goal: str, late: int, outcome: str) -> None:
    assert seen(goal, late=late) == outcome


def test_a_bound_on_quality_is_met_by_the_end_of_the_interval_that_counts() -> None:
    assert seen("drop <= 1%", rung=rung(Interval(0.001, 0.005, 0.0095))) == "met"  # of 0.96
    assert seen("drop <= 1%", rung=rung(Interval(0.001, 0.005, 0.0097))) == "cannot tell"
    assert seen("drop <= 1%", rung=rung(Interval(0.0097, 0.01, 0.02))) == "not met"


def test_without_requests_or_a_goal_it_says_so() -> None:
    assert seen("p99 <= 20ms", in_time=0) == "quiet"
    assert seen("drop <= 50%", in_time=0) == "quiet"
    assert seen("") == "met"
    assert seen("", late=500) == "not met"
    assert seen("this is no goal") == "met"  # a governor may have words of its own


def test_a_share_is_cut_not_rounded() -> None:
    assert [goal_watch.percent(x) for x in (1.0, 0.99999, 0.999, 0.5, 0.0)] == [
        "100 %",
        "99.99 %",
        "99.9 %",
        "50 %",
        "0 %",
    ]
