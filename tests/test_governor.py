from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from accelerando.errors import UsageError
from accelerando.serve.estimates import ArrivalRate, Slowdown
from accelerando.serve.governor import (
    BALANCED,
    GLANCE,
    PRESETS,
    RESPONSIVE,
    UNHURRIED,
    Decision,
    Governor,
    RungState,
    Signal,
    soonest,
)

SECONDS = (0.120, 0.080, 0.053, 0.035, 0.024, 0.016, 0.010)
QUALITY = (0.92, 0.915, 0.905, 0.89, 0.87, 0.84, 0.80)
RUNGS = tuple(RungState(i, q, 0.0, s, 1.1) for i, (s, q) in enumerate(zip(SECONDS, QUALITY, strict=True)))
ANY = -math.inf


def waiting(count: int, slack: float = 0.3, floor: float = ANY, rows: int = 1, **more: object) -> Signal:
    """So many requests with the same time left, or an even spread of it."""
    queue = tuple((slack, rows, floor) for _ in range(min(count, GLANCE)))
    given: dict[str, object] = {"now": 100.0, "rows": count * rows, "queue": queue, "patience": 0.3, **more}
    return Signal(**given)  # type: ignore[arg-type]


def on(number: int, since: float = 0.0, pressed: float = 0.0) -> Decision:
    return Decision(number, 1, since, "test", pressed)


# --- what it does -----------------------------------------------------------------------------------------------


def test_with_time_it_stands_on_the_best_rung() -> None:
    made = BALANCED.decide(None, waiting(1), RUNGS)
    assert (made.rung, made.rows) == (0, 1)
    assert "best rung" in made.why


def test_the_drain_law_by_hand() -> None:
    """B = 0.9 * 0.3 / (4 + 20 * 0.15) = 38.6 ms a row: the rung of 35 ms, for the one of 53 ms is too dear."""
    made = BALANCED.decide(None, waiting(4, rate=20.0), RUNGS)
    assert made.rung == 3
    assert "rung 2 takes 53 ms a row" in made.why
    assert "38.6 ms" in made.why
    assert BALANCED.decide(None, waiting(4, rate=20.0, slowdown=1.5), RUNGS).rung == 4  # 36 ms; 35 ms became 53 ms


def test_a_short_deadline_is_kept_by_the_tail_not_by_the_median() -> None:
    assert BALANCED.decide(None, waiting(1, slack=0.054), RUNGS).rung == 3  # 53 ms fits, its p95 of 58 ms does not
    assert BALANCED.decide(None, waiting(1, slack=0.059), RUNGS).rung == 2


def test_those_behind_stay_feasible_on_the_fastest_rung() -> None:
    queue = ((0.3, 1, ANY), (0.05, 1, ANY), (0.3, 1, ANY))
    made = BALANCED.decide(None, Signal(0.0, 3, queue, patience=0.3), RUNGS)
    assert made.rung == 3  # 50 ms until the second's deadline less 10 ms for it: 38.5 ms fit, 58 ms do not
    assert "behind can spare 40 ms" in made.why


def test_a_floor_behind_counts_its_own_fastest_rung() -> None:
    behind = ((0.3, 1, ANY), (0.11, 1, 0.9))  # must be answered by rung 2 at least: 53 ms
    assert BALANCED.decide(None, Signal(0.0, 2, behind, patience=0.3), RUNGS).rung == 3  # 57 ms are left: 38.5 ms


def test_it_falls_at_once_and_climbs_a_rung_for_each_dwell() -> None:
    assert BALANCED.decide(on(0, pressed=100.0), waiting(16), RUNGS).rung == 5
    calm = waiting(1)
    assert BALANCED.decide(on(6, 99.95, 99.95), calm, RUNGS).rung == 6
    climbed = BALANCED.decide(on(6, 99.9, 99.9), calm, RUNGS)  # a quarter of 300 ms have passed
    assert climbed.rung == 5
    assert "climbs one rung for every 75 ms" in climbed.why
    assert climbed.pressed == pytest.approx(99.975)
    assert climbed.since == 100.0
    assert BALANCED.decide(climbed, calm._replace(now=100.04), RUNGS).rung == 5
    assert BALANCED.decide(climbed, calm._replace(now=100.06), RUNGS).rung == 4
    assert BALANCED.decide(on(6, 0.0, 0.0), calm, RUNGS).rung == 0  # nobody came for 100 s
    unhurried = calm._replace(patience=math.inf, queue=((math.inf, 1, ANY),))
    assert BALANCED.decide(on(6, 99.7, 99.7), unhurried, RUNGS).rung == 5  # then of a second
    assert RESPONSIVE.decide(on(6, 99.9, 99.9), calm, RUNGS).rung == 0
    assert BALANCED.decide(on(6, 99.9, 99.9), waiting(1, floor=0.9), RUNGS).rung == 2  # a floor does not wait


def test_a_rung_that_has_gone_is_no_place_to_stand() -> None:
    rungs = tuple(replace(r, ready=r.number != 3) for r in RUNGS)
    for last in (on(3, 100.0, 100.0), on(17)):
        made = BALANCED.decide(last, waiting(1), rungs)
        assert made.rung is not None
        assert rungs[made.rung].ready


@pytest.mark.parametrize(
    ("signal", "rungs", "said"),
    [
        (waiting(1), tuple(replace(r, ready=False) for r in RUNGS), "no rung is ready"),
        (waiting(1, slack=0.005), RUNGS, "deadline is in 5 ms, but the fastest rung that may answer, 6, takes 10 ms"),
        (waiting(1, slack=-1.0), RUNGS, "deadline has passed"),
        (waiting(1, slack=0.02, slowdown=2.5), RUNGS, "takes 25 ms"),
        (
            waiting(1, floor=0.95),
            RUNGS,
            "quality of 0.95, but no rung that is ready promises more than 0.92",
        ),
        (waiting(1, slack=0.05, floor=0.9), RUNGS, "rung that may answer, 2, takes 53 ms"),
        (waiting(1, rows=100), RUNGS, "has 100 rows, but no rung takes more than 64"),
        (waiting(1, bank=-1.0, asked=0.93), RUNGS, "the -1 that better answers have earned do not bear it"),
    ],
)
def test_a_head_that_cannot_be_answered_is_refused_in_words(
    signal: Signal, rungs: tuple[RungState, ...], said: str
) -> None:
    made = BALANCED.decide(None, signal, rungs)
    assert made.rung is None
    assert said in made.why


def test_the_fastest_takes_what_is_too_much_for_the_law() -> None:
    made = BALANCED.decide(on(0), waiting(400), RUNGS)
    assert made.rung == 6
    assert "the fastest that is left" in made.why


def test_a_head_that_fits_by_its_median_only_is_tried() -> None:
    assert BALANCED.decide(None, waiting(1, slack=0.0105), RUNGS).rung == 6


def test_the_bank_lets_a_lesser_rung_be_taken_only_while_it_bears_it() -> None:
    hurried = waiting(16, asked=0.9)
    assert BALANCED.decide(None, hurried._replace(bank=0.07), RUNGS).rung == 5  # 0.84 - 0.9 = -0.06 a row
    assert BALANCED.decide(None, hurried._replace(bank=0.05), RUNGS).rung == 4
    assert BALANCED.decide(None, hurried._replace(bank=0.0), RUNGS).rung == 2
    assert replace(BALANCED, allowance=0.07).decide(None, hurried._replace(bank=0.0), RUNGS).rung == 5
    in_need = waiting(1, slack=0.03, asked=0.9, bank=0.0)  # only lesser rungs are in time
    assert BALANCED.decide(None, in_need, RUNGS).rung is None


def test_a_mean_quality_is_kept_whatever_comes() -> None:
    rng = np.random.default_rng(0)
    bank, last, refused = 0.0, None, 0
    for step in range(3000):
        signal = waiting(int(rng.integers(1, 40)), asked=0.88, bank=bank, now=step * 0.05)
        made = BALANCED.decide(last, signal, RUNGS)
        if made.rung is None:
            refused += 1
            continue
        last = made
        bank += RUNGS[made.rung].quality - 0.88
        assert bank >= 0
    assert refused == 0  # a slower rung is always in time here


def test_without_a_latency_asked_for_a_rung_must_carry_what_comes() -> None:
    quiet = waiting(1, slack=math.inf, patience=math.inf)
    assert BALANCED.decide(None, quiet, RUNGS).rung == 0
    for rate in (10.0, 20.0, 50.0):
        steady = quiet._replace(rate=rate, rows=int(rate * UNHURRIED))
        made = BALANCED.decide(None, steady, RUNGS)
        assert made.rung is not None
        assert RUNGS[made.rung].per_row < 1 / rate
    assert BALANCED.decide(None, quiet._replace(rows=10_000), RUNGS).rung == 6


# --- batches ----------------------------------------------------------------------------------------------------

JOINING = (RungState(0, 0.9, 0.010, 0.001, 1.0), RungState(1, 0.8, 0.002, 0.0002, 1.0))


def test_requests_join_only_where_it_pays() -> None:
    assert BALANCED.decide(None, waiting(8), RUNGS).rows == 1
    assert BALANCED.decide(None, waiting(8), JOINING).rows == 8
    nearly = (RungState(0, 0.9, 0.0015, 0.010, 1.0),)
    assert BALANCED.decide(None, waiting(8), nearly).rows == 1  # a full batch would be 1.15 times cheaper
    assert replace(BALANCED, gain=1.1).decide(None, waiting(8), nearly).rows > 1


def test_a_batch_keeps_requests_whole_and_within_the_limits() -> None:
    of_three = waiting(5, rows=3)
    assert BALANCED.decide(None, of_three, JOINING).rows == 15
    small = tuple(replace(r, most_rows=7) for r in JOINING)
    assert BALANCED.decide(None, of_three, small).rows == 6
    assert BALANCED.decide(None, waiting(50), JOINING).rows == 50  # also those beyond the glance
    assert BALANCED.decide(None, waiting(1000), JOINING).rows == 64
    slow = tuple(replace(r, per_row=0.01) for r in JOINING[:1])
    assert BALANCED.decide(None, waiting(16, patience=0.302), slow).rows == 14  # 150 ms: half of the patience


def test_a_batch_takes_requests_from_the_head_on_while_the_rung_keeps_their_floors() -> None:
    queue = ((0.3, 1, ANY), (0.3, 1, 0.5), (0.3, 1, 0.85), (0.3, 1, ANY))
    only_fast = (replace(JOINING[0], ready=False), JOINING[1])
    assert BALANCED.decide(None, Signal(0.0, 4, queue, patience=0.3), only_fast).rows == 2
    earned = waiting(8, asked=0.85, bank=0.16)
    assert BALANCED.decide(None, earned, only_fast).rows == 3  # each costs the bank 0.05


# --- what holds for every signal --------------------------------------------------------------------------------

requests = st.lists(
    st.tuples(st.floats(-0.05, 0.4), st.integers(1, 4), st.sampled_from([ANY, 0.8, 0.86, 0.9])),
    min_size=1,
    max_size=GLANCE,
).map(lambda found: tuple(sorted(found, key=lambda r: r[0])))


@st.composite
def ladders(draw: st.DrawFn) -> tuple[RungState, ...]:
    """Slower is better, as on a ladder."""
    count = draw(st.integers(1, 8))
    steps = draw(st.lists(st.floats(1.2, 2.0), min_size=count, max_size=count))
    fixed, tail = draw(st.sampled_from([0.0, 0.1, 0.8])), draw(st.floats(1.0, 1.5))
    ready = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    rungs, seconds = [], 0.2
    for i in range(count):
        seconds /= steps[i]
        rungs.append(RungState(i, 0.92 - 0.02 * i, fixed * seconds, (1 - fixed) * seconds, tail, 64, ready[i]))
    return tuple(rungs)


@st.composite
def signals(draw: st.DrawFn) -> Signal:
    queue = draw(requests)
    hidden = draw(st.integers(0, 50)) if len(queue) == GLANCE else 0
    return Signal(
        now=draw(st.floats(0, 1e6)),
        rows=sum(r for _, r, _ in queue) + hidden,
        queue=queue,
        rate=draw(st.floats(0, 200)),
        slowdown=draw(st.floats(0.5, 4)),
        patience=draw(st.sampled_from([0.05, 0.3, math.inf])),
        bank=draw(st.sampled_from([math.inf, 0.0, 1.0, -0.1])),
        asked=draw(st.sampled_from([-math.inf, 0.84, 0.9])),
    )


governors = st.sampled_from([*PRESETS.values(), Governor(allowance=0.5), Governor(gain=1.0)])
lasts = st.one_of(
    st.none(), st.builds(Decision, st.integers(0, 9), st.just(1), st.just(0.0), st.just("x"), st.floats(-10, 1e6))
)


@given(governors, lasts, signals(), ladders())
@settings(max_examples=200, deadline=None)
def test_always_a_ready_rung_that_keeps_floors_and_bank_and_is_in_time(
    governor: Governor, last: Decision | None, signal: Signal, rungs: tuple[RungState, ...]
) -> None:
    made = governor.decide(last, signal, rungs)
    slack, rows, floor = signal.queue[0]
    assert made.why
    assert made == governor.decide(last, signal, rungs)  # pure
    if made.rung is None:
        for r in rungs:
            bears = r.quality >= signal.asked or signal.bank + (r.quality - signal.asked) * rows >= -governor.allowance
            in_time = r.seconds(rows) * signal.slowdown <= slack
            assert not (r.ready and r.quality >= floor and bears and in_time)
        return
    rung = rungs[made.rung]
    assert rung.ready
    assert rung.quality >= floor
    assert rung.seconds(rows) * signal.slowdown <= slack
    shown = 0
    ends = [shown := shown + r for _, r, _ in signal.queue]
    assert made.rows in ends or ends[-1] < made.rows <= signal.rows  # no request is split
    for end, (_, _, asked) in zip(ends, signal.queue, strict=True):
        if end <= made.rows:
            assert rung.quality >= asked
    if rung.quality < signal.asked:
        assert signal.bank + (rung.quality - signal.asked) * made.rows >= -governor.allowance


@given(governors, lasts, signals(), ladders())
@settings(max_examples=200, deadline=None)
def test_never_over_the_budget_while_a_rung_within_it_is_ready(
    governor: Governor, last: Decision | None, signal: Signal, rungs: tuple[RungState, ...]
) -> None:
    """Reckoned here anew, for ladders where joining never pays, so that a row costs what the head's rows cost."""
    rungs = tuple(replace(r, fixed=0.0, per_row=r.fixed + r.per_row) for r in rungs)
    made = governor.decide(last, signal, rungs)
    if made.rung is None:
        return
    slack, rows, floor = signal.queue[0]
    unit = signal.patience if signal.patience < math.inf else 1.0
    budget = (governor.wait + governor.horizon) * unit / (signal.rows + signal.rate * governor.horizon * unit)
    spare, done = math.inf, 0.0
    for later, more, asked in signal.queue[1:]:
        each = min((r.per_row for r in rungs if r.ready and r.quality >= asked), default=0.0) * signal.slowdown
        done += each * more
        spare = min(spare, later - done)

    def within(rung: RungState) -> bool:
        cost = rung.per_row * signal.slowdown
        return cost <= budget and cost * rows * rung.tail <= min(spare, slack)

    def keeps(r: RungState) -> bool:
        bears = r.quality >= signal.asked or signal.bank + (r.quality - signal.asked) * rows >= -governor.allowance
        return r.ready and r.quality >= floor and bears

    near = 1 + 1e-9
    if any(keeps(r) and within(replace(r, per_row=r.per_row * near)) for r in rungs):
        chosen = rungs[made.rung]
        assert within(replace(chosen, per_row=chosen.per_row / near))


@given(governors, lasts, signals(), ladders(), st.integers(0, 40), st.floats(0, 100), st.floats(1, 2))
@settings(max_examples=200, deadline=None)
def test_more_load_never_gives_a_better_rung(
    governor: Governor, last: Decision | None, signal: Signal, rungs: tuple[RungState, ...],
    more: int, faster: float, slower: float,
) -> None:  # fmt: skip
    """More rows behind the queue, a higher rate, a slower machine: all else equal."""
    floors = tuple((s, r, ANY) for s, r, _ in signal.queue)  # a rung may be too good for a floor only
    signal = signal._replace(queue=floors)
    made = governor.decide(last, signal, rungs)
    for loaded in (
        signal._replace(rows=signal.rows + more),
        signal._replace(rate=signal.rate + faster),
        signal._replace(queue=(*signal.queue, *((signal.queue[-1][0], 1, ANY),) * min(more, GLANCE - len(floors))),
                rows=signal.rows + min(more, GLANCE - len(floors))),
    ):  # fmt: skip
        under = governor.decide(last, loaded, rungs)
        assert (under.rung is None) == (made.rung is None)
        if made.rung is not None and under.rung is not None:
            assert rungs[under.rung].quality <= rungs[made.rung].quality
    under = governor.decide(last, signal._replace(slowdown=signal.slowdown * slower), rungs)
    if made.rung is not None and under.rung is not None:
        assert rungs[under.rung].quality <= rungs[made.rung].quality


@given(governors, lasts, signals(), ladders(), st.sampled_from([0.125, 0.5, 8.0]))
@settings(max_examples=200, deadline=None)
def test_nothing_has_a_unit_but_the_patience(
    governor: Governor, last: Decision | None, signal: Signal, rungs: tuple[RungState, ...], factor: float
) -> None:
    """A slower ladder with as much longer a patience, and requests as much rarer, is governed alike."""
    assume(signal.patience < math.inf)
    stretched = signal._replace(
        now=signal.now * factor, patience=signal.patience * factor, rate=signal.rate / factor,
        queue=tuple((slack * factor, rows, floor) for slack, rows, floor in signal.queue),
    )  # fmt: skip
    slower = tuple(replace(r, fixed=r.fixed * factor, per_row=r.per_row * factor) for r in rungs)
    long_ago = last and last._replace(since=last.since * factor, pressed=last.pressed * factor)
    made, then = governor.decide(last, signal, rungs), governor.decide(long_ago, stretched, slower)
    assert (then.rung, then.rows) == (made.rung, made.rows)
    assert (then.since, then.pressed) == (made.since * factor, made.pressed * factor)


@given(st.floats(2, 60), st.sampled_from(list(PRESETS.values())), st.sampled_from([1, 3]))
@settings(max_examples=40, deadline=None)
def test_no_oscillation_at_constant_load(rate: float, governor: Governor, clump: int) -> None:
    """A clock's arrivals: once settled, it stays within three neighbours, and moves at most twice per dwell."""
    rate_seen, last, now, done, moves, stood = ArrivalRate(), None, 0.0, 0, [], []
    gap = clump / rate
    while now < 20.0:
        now = max(now, (done // clump) * gap)
        waits = [0.3 - (now - (k // clump) * gap) for k in range(done, int(now / gap + 1e-9) * clump + clump)]
        for _ in waits[:1]:
            rate_seen.observe(now, 1, waits=len(waits) > 1)
        queue = tuple((slack, 1, ANY) for slack in waits[:GLANCE])
        made = governor.decide(last, Signal(now, len(waits), queue, rate_seen.pressing(now), patience=0.3), RUNGS)
        assert made.rung is not None  # it is never driven into a corner
        if now > 5.0:
            stood.append(made.rung)
            if last is not None and made.rung != last.rung:
                moves.append(now)
        last, done = made, done + 1
        now += RUNGS[made.rung].per_row
    assert max(stood) - min(stood) <= 2
    if clump == 1 and rate * SECONDS[0] < 0.6:
        assert set(stood) == {0}
    if governor.dwell:
        assert len(moves) <= 2 * 15.0 / (governor.dwell * 0.3) + 2


# --- the rest ---------------------------------------------------------------------------------------------------


def test_a_governor_with_figures_that_make_no_sense_is_refused() -> None:
    for wrong in ({"dwell": -1.0}, {"wait": 0.0}, {"block": 1.5}, {"horizon": math.nan}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Governor(**wrong)


def test_soonest_is_an_optimist() -> None:
    assert soonest(RUNGS, 1, 0, 0.0, 1.0, ANY) == pytest.approx(0.010)
    assert soonest(RUNGS, 1, 5, 0.02, 2.0, ANY) == pytest.approx(0.02 + 2 * 0.060)
    assert soonest(RUNGS, 1, 0, 0.0, 1.0, 0.9) == pytest.approx(0.053)
    assert soonest(RUNGS, 1, 0, 0.0, 1.0, 0.99) == math.inf
    assert soonest((), 1, 0, 0.0, 1.0, ANY) == math.inf
    assert soonest(JOINING, 1, 20, 0.0, 1.0, ANY) < 0.006  # they may share batches


def test_the_arrival_rate_is_right_in_the_mean_however_irregular_arrivals_are() -> None:
    rng = np.random.default_rng(1)
    for gaps in (np.full(20_000, 0.02), rng.exponential(0.02, 20_000), rng.gamma(0.25, 0.08, 20_000)):
        rate, now, seen = ArrivalRate(), 0.0, []
        for gap in gaps:
            seen.append(rate.at(now + gap * rng.random()))
            now += gap
            rate.observe(now, 2)
        weighted = np.average(seen[100:], weights=gaps[100:])
        assert weighted == pytest.approx(100.0, rel=0.1)
    assert rate.at(now + 10.0) < 1e-5


def test_who_finds_nobody_does_not_press() -> None:
    rate = ArrivalRate()
    for k in range(100):
        rate.observe(k * 0.01, waits=False)
    assert rate.at(1.0) > 50
    assert rate.pressing(1.0) == 0.0


def test_a_caller_that_waits_for_each_answer_gets_the_best_rung_back() -> None:
    """A closed loop arrives as fast as it is answered: that is no load, however fast the rung."""
    rate, last, now = ArrivalRate(), on(6, 0.0, 0.0), 0.0
    for _ in range(200):
        rate.observe(now, waits=False)
        last = BALANCED.decide(last, waiting(1, now=now, rate=rate.pressing(now)), RUNGS)
        assert last.rung is not None
        now += RUNGS[last.rung].per_row
    assert last.rung == 0


def test_the_slowdown_follows_the_machine_and_not_one_stall() -> None:
    slow, rng = Slowdown(), np.random.default_rng(2)
    for _ in range(200):
        slow.observe(0.01, 0.01 * math.exp(0.03 * rng.standard_normal()))
    assert slow.factor() == pytest.approx(1.0, abs=0.05)
    slow.observe(0.01, 0.5)
    assert slow.mean < 1.05
    for _ in range(3):
        slow.observe(0.01, 0.03)
    assert slow.mean == pytest.approx(3.0, rel=0.25)
    for _ in range(10):
        slow.observe(0.01, 0.01)
    assert slow.mean == pytest.approx(1.0, rel=0.1)
    assert slow.factor(2.0) > slow.factor(1.0) > slow.mean
    before = slow.factor()
    for predicted, observed in ((0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (math.nan, 1.0)):
        slow.observe(predicted, observed)
    assert slow.factor() == before


def test_estimates_refuse_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="above 0"):
        ArrivalRate(0.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Slowdown(0.0)
