from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from accelerando.backends.eager import Eager
from accelerando.bundle import Bundle
from accelerando.errors import UsageError
from accelerando.ladder import Ladder
from accelerando.recipe import Recipe
from accelerando.report import simulation as shown
from accelerando.serve import traces
from accelerando.serve.governor import PRESETS, Decides, Decision, Governor, RungState, Signal
from accelerando.serve.policies import Entrant, Fixed, RateController, SlackFit, clairvoyant, usual
from accelerando.serve.simulation import (
    Outcome,
    Simulation,
    Terms,
    recorded_times,
    rung_states,
    simulate,
    simulate_bundle,
)
from accelerando.serve.traces import Trace
from accelerando.testing.bundles import write_bundle
from accelerando.testing.fakes import fake_rung, fakes_known
from benchmarks.governor import BEST_CARRIES, QUALITY, RUNGS, SECONDS, WIDE, fare, noise


def one(seconds: float = 0.01) -> tuple[RungState, ...]:
    return (RungState(0, 0.9, 0.0, seconds),)


def alone(
    rungs: tuple[RungState, ...], trace: Trace, patience: float, policy: Decides | None = None, **more: object
) -> Outcome:
    terms = Terms(patience)
    return simulate(rungs, trace, terms, [Entrant("it", policy or Fixed(0))], **more).outcomes[0]  # type: ignore[arg-type]


# --- the simulator against what is known ------------------------------------------------------------------------


def test_a_clock_below_capacity_never_waits() -> None:
    found = alone(one(), Trace.of(np.arange(100) * 0.02), 0.1)
    assert (found.on_time, found.p50, found.p99) == (100, pytest.approx(0.01), pytest.approx(0.01))
    assert found.quality == found.effective_quality == pytest.approx(0.9)
    assert found.utilisation == pytest.approx(0.5, rel=0.02)


def test_a_clock_above_capacity_is_cut_to_capacity_and_nothing_dead_is_run() -> None:
    """One in 5 ms, 10 ms each, 30 ms of patience: half are answered, all in time, the others refused at once."""
    found = alone(one(), Trace.of(np.arange(1000) * 0.005), 0.0301)
    assert found.late == found.expired == 0
    assert found.on_time == pytest.approx(500, abs=5)
    assert found.refused == 1000 - found.on_time
    assert found.p99 <= 0.0301
    assert found.effective_quality == pytest.approx(0.9 * found.attainment)


def test_a_clump_by_hand() -> None:
    """Five at once, 10 ms each, 35 ms of patience: three are answered, after 10, 20 and 30 ms."""
    found = alone(one(), Trace.of(np.zeros(5)), 0.035)
    assert (found.on_time, found.refused) == (3, 2)
    assert found.p50 == pytest.approx(0.02)


def test_rows_are_counted_and_requests_kept_whole() -> None:
    found = alone(one(), Trace.of(np.zeros(3), np.array([2, 3, 1])), 1.0)
    assert found.p99 == pytest.approx(0.06, rel=0.01)
    joining = (RungState(0, 0.9, 0.010, 0.001),)
    joined = alone(joining, Trace.of(np.zeros(8), np.full(8, 3)), 1.0, Governor())
    assert (joined.p50, joined.p99) == (pytest.approx(0.034), pytest.approx(0.034))  # one batch of 24 rows


def test_a_stall_lets_what_waits_expire_unanswered() -> None:
    stall = np.array([100.0])
    found = alone(one(), Trace.of(np.array([0.0, 0.001, 0.002])), 0.05, times=[stall])
    assert (found.late, found.expired, found.on_time) == (1, 2, 0)
    assert math.isnan(found.quality)
    assert found.effective_quality == 0.0


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_poisson_arrivals_wait_as_pollaczek_and_khinchine_say(load: float) -> None:
    """M/D/1: the mean wait is load * service / (2 (1 - load)); the answer's time is that and the service."""
    trace = traces.poisson(load / 0.01, 15_000 * 0.01 / load, seed=4)
    found = simulate(one(), trace, Terms(1e6), [Entrant("it", Every())]).outcomes[0]
    assert found.utilisation == pytest.approx(load, rel=0.03)
    assert mean_time(trace) - 0.01 == pytest.approx(load * 0.01 / (2 * (1 - load)), rel=0.12)
    assert found.p50 == pytest.approx(float(np.quantile(times_of(trace), 0.5)), rel=1e-9)
    assert found.p99 == pytest.approx(float(np.quantile(times_of(trace), 0.99)), rel=1e-9)


def times_of(trace: Trace) -> np.ndarray:
    """Lindley's recursion, 10 ms each: reckoned apart from the simulator."""
    done, found = 0.0, []
    for at in trace.arrivals:
        done = max(done, at) + 0.01
        found.append(done - at)
    return np.array(found)


def mean_time(trace: Trace) -> float:
    return float(times_of(trace).mean())


@dataclass(frozen=True)
class Every:
    """One request at a time on the first rung."""

    def decide(self, last: Decision | None, signal: Signal, rungs: tuple[RungState, ...]) -> Decision:
        return Decision(rungs[0].number, signal.queue[0][1], 0.0, "always")


def test_every_request_has_one_fate() -> None:
    found = simulate(RUNGS, traces.gamma(40, 10, 30, seed=3), Terms(0.3), times=[noise(i) for i in range(7)])
    for o in found.outcomes:
        assert o.requests == o.on_time + o.late + o.refused + o.expired == len(found.trace)
        assert o.effective_quality == pytest.approx(o.quality * o.attainment)
        assert sum(share for _, share in o.shares) == pytest.approx(1.0)
        assert o.effective_quality <= found.most_quality
        assert 0 < o.utilisation <= 1


def test_the_same_seed_gives_the_same_figures() -> None:
    def run(seed: int) -> tuple[Outcome, ...]:
        return simulate(RUNGS, traces.gamma(20, 4, 5, seed=1), Terms(0.3), times=[noise(0)] * 7, seed=seed).outcomes

    assert repr(run(1)) == repr(run(1))
    assert repr(run(1)) != repr(run(2))


def test_a_mean_quality_that_is_asked_for_is_kept() -> None:
    trace = traces.gamma(2 * BEST_CARRIES, 4, 60, seed=5)
    asked = simulate(RUNGS, trace, Terms(0.3, asked=0.89), [Entrant("it", Governor())]).outcomes[0]
    free = simulate(RUNGS, trace, Terms(0.3), [Entrant("it", Governor())]).outcomes[0]
    assert free.quality < 0.89
    assert asked.quality > 0.8899
    floored = simulate(RUNGS, trace, Terms(0.3, floor=0.88), [Entrant("it", Governor())]).outcomes[0]
    assert sum(share for number, share in floored.shares if number > 3) == 0


# --- the governor against others --------------------------------------------------------------------------------


def beats_the_others(found: dict[str, Outcome], name: str) -> None:
    ours = found[name]
    for policy, other in found.items():
        if policy.startswith("governor"):
            continue
        assert ours.effective_quality > other.effective_quality, policy
        if other.attainment >= ours.attainment:
            assert ours.quality > other.quality, policy


@pytest.mark.slow
def test_bursts_of_cv2_4_at_twice_the_best_rungs_capacity() -> None:
    """Seeds on which nothing was tuned."""
    found, _ = fare(RUNGS, 4, 0.3, range(500, 504), 300)
    for name in ("steady", "balanced"):
        assert found[f"governor, {name}"].attainment >= 0.999
        beats_the_others(found, f"governor, {name}")
    assert found["governor, responsive"].attainment >= 0.998
    beats_the_others(found, "governor, responsive")
    assert found["slack only"].attainment < 0.9
    assert found["rate every 10 s"].attainment < 0.9
    assert found["governor, balanced"].switches_per_second < 2 / 0.3  # twice in what a request may take


@pytest.mark.slow
def test_bursts_of_cv2_23() -> None:
    """On a ladder whose fastest rung can answer such bursts; where it can't, nobody could."""
    found, _ = fare(WIDE, 23, 0.3, range(500, 504), 300)
    assert found["rung 8 always"].attainment > 0.9995
    for name in ("steady", "balanced"):
        assert found[f"governor, {name}"].attainment >= 0.995
        beats_the_others(found, f"governor, {name}")


def test_sabotage_a_governor_that_does_not_look_at_the_queue_is_seen() -> None:
    """Each of these breaks one part of the law; the figures say so."""

    @dataclass(frozen=True)
    class Blind:
        """Sees the head only, and no arrivals."""

        def decide(self, last: Decision | None, signal: Signal, rungs: tuple[RungState, ...]) -> Decision:
            blind = signal._replace(rows=signal.queue[0][1], queue=signal.queue[:1], rate=0.0)
            return PRESETS["balanced"].decide(last, blind, rungs)

    @dataclass(frozen=True)
    class Timid:
        """Never leaves the fastest rung."""

        def decide(self, last: Decision | None, signal: Signal, rungs: tuple[RungState, ...]) -> Decision:
            return Decision(rungs[-1].number, signal.queue[0][1], 0.0, "timid")

    entrants = [Entrant("ours", Governor()), Entrant("blind", Blind()), Entrant("timid", Timid())]
    trace = traces.gamma(2 * BEST_CARRIES, 4, 120, seed=900)
    ours, blind, timid = simulate(RUNGS, trace, Terms(0.3), entrants, times=[noise(i) for i in range(7)]).outcomes
    assert ours.attainment > 0.998
    assert blind.attainment < 0.98
    assert blind.misses > 10 * ours.misses
    assert timid.attainment > 0.998
    assert timid.quality < ours.quality - 0.05


def test_after_an_overload_it_is_back_at_once() -> None:
    """Three times what the fastest carries: it goes on answering at nearly that capacity, and recovers by itself."""
    trace = traces.overload(10.0, 3 / SECONDS[-1], 30.0, seed=6)
    found = alone(RUNGS, trace, 0.3, PRESETS["balanced"])
    times = np.array([m.at for m in found.course])
    quality = np.array([m.quality for m in found.course])
    rate = np.array([m.rate for m in found.course])
    crowded = (times > 10.5) & (times < 19.5)
    goodput = float((quality * rate)[crowded].mean()) / QUALITY[-1]
    assert goodput > 0.9 / SECONDS[-1]
    assert np.nanmean(quality[times > 21]) > 0.85


# --- the policies -----------------------------------------------------------------------------------------------


def head(slack: float, rows: int = 1, **more: object) -> Signal:
    return Signal(100.0, rows, ((slack, 1, -math.inf),), patience=0.3, **more)  # type: ignore[arg-type]


def test_slack_only_takes_the_slowest_that_fits() -> None:
    assert SlackFit().decide(None, head(0.3), RUNGS).rung == 0
    assert SlackFit().decide(None, head(0.3, rows=1000), RUNGS).rung == 0  # it is blind to the queue
    assert SlackFit().decide(None, head(0.1), RUNGS).rung == 1
    assert SlackFit().decide(None, head(0.0105), RUNGS).rung == 6
    assert SlackFit().decide(None, head(0.005), RUNGS).rung is None
    gpu = tuple(replace(r, fixed=r.per_row, per_row=r.per_row / 50) for r in RUNGS)
    assert SlackFit().decide(None, head(0.3, rows=16), gpu).rows > 1


def test_the_controller_keeps_its_rung_for_ten_seconds() -> None:
    policy = RateController()
    first = policy.decide(None, head(0.3, rate=15.0), RUNGS)
    assert first.rung == 2  # 18.9 rows/s carry 15.75
    later = head(0.3, rate=80.0)._replace(now=105.0)
    assert policy.decide(first, later, RUNGS).rung == 2
    assert policy.decide(first, later._replace(now=110.5), RUNGS).rung == 6
    assert policy.decide(None, head(0.3, rate=1000.0), RUNGS).rung == 6


def test_the_clairvoyant_bound_by_hand() -> None:
    rungs = (RungState(0, 0.9, 0.0, 0.1), RungState(1, 0.5, 0.0, 0.05))
    apart = Trace.of(np.array([0.0, 10.0]))
    assert clairvoyant(rungs, apart, 0.2) == pytest.approx(0.9)
    pair = Trace.of(np.zeros(2))
    assert clairvoyant(rungs, pair, 0.2) == pytest.approx(0.9)
    assert clairvoyant(rungs, pair, 0.15) == pytest.approx(0.7)  # 75 ms each, or one on each rung
    assert clairvoyant(rungs, Trace.of(np.zeros(4)), 0.1) == pytest.approx(0.25)  # two of them on the fast rung
    late = Trace.of(np.array([0.0, 0.0, 0.1]))  # the first two have 150 ms, the third has 100 ms of its own after it
    assert clairvoyant(rungs, late, 0.15) == pytest.approx((0.7 + 0.7 + 0.9) / 3)
    assert clairvoyant(rungs, pair, math.inf) == pytest.approx(0.9)


def test_simulations_that_make_no_sense_are_refused() -> None:
    trace = Trace.of(np.zeros(2))
    with pytest.raises(UsageError, match="patience"):
        Terms(0.0)
    with pytest.raises(UsageError, match="at least one rung"):
        simulate((), trace, Terms(1.0))
    with pytest.raises(UsageError, match="each of the 7 rungs"):
        simulate(RUNGS, trace, Terms(1.0), times=[noise(0)])


# --- traces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "0.5\n0.75\n\n2\n"),
        ("a.csv", "seconds,rows\n0.5,1\n0.75,1\n2,1\n"),
        ("a.csv", "user, MS\nx,500\ny,750\nz,2000\n"),
        ("a.csv", "\ufeff0.5,1\n0.75,1\n2.0,1"),
        ("a.jsonl", '0.5\n{"seconds": 0.75}\n{"ms": 2000, "rows": 1, "path": "/"}\n'),
        ("a.ndjson", '{"ms": 500}\n{"ms": 750}\n{"ms": 2000}\n'),
    ],
)
def test_traces_are_read_as_they_come(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = traces.find(tmp_path / name)
    assert found.arrivals.tolist() == pytest.approx([0.0, 0.25, 1.5])
    assert found.rows.tolist() == [1, 1, 1]
    assert found.name == name


def test_rows_of_a_trace(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("0,3\n1,5\n")
    found = traces.read(tmp_path / "a.csv")
    assert found.rows.tolist() == [3, 5]
    assert (found.rate, found.peak) == (8.0, 5.0)
    assert "2 requests in 1 s, 8 rows/s" in str(found)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "0\n1\nx\n", "line 3: seconds must be a number, but is 'x'"),
        ("a.csv", "0\n2\n1\n", "line 3: 1 s comes after 2 s; sort"),
        ("a.csv", "0\nnan\n", "line 2: the time must be a finite number"),
        ("a.csv", "0,0\n", "line 1: rows must be a whole number"),
        ("a.csv", "0,1.5\n", "line 1: rows must be a whole number"),
        ("a.csv", "when,rows\n0,1\n", "line 1: one column must be seconds or ms"),
        ("a.csv", "seconds,rows\n0\n", "line 2: 2 fields are expected, but there are 1"),
        ("a.jsonl", "0\n{\n", "line 2: "),
        ("a.jsonl", '{"rows": 1}\n', "line 1: a request has one time"),
        ("a.jsonl", '{"seconds": 1, "ms": 1}\n', "line 1: a request has one time"),
        ("a.jsonl", '{"seconds": "1"}\n', "line 1: seconds must be a number, but is '1'"),
        ("a.jsonl", '{"seconds": true}\n', "line 1: seconds must be a number"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1: "),
        ("a.jsonl", "1e999\n", "line 1: the time must be a finite number"),
        ("a.csv", "\n", "holds no request"),
        ("a.csv", "seconds\n", "holds no request"),
        ("a.txt", "0\n", "ends in .csv or .jsonl"),
    ],
)
def test_a_bad_trace_gets_one_clear_error_with_its_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as caught:
        traces.find(tmp_path / name)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 500


def test_traces_that_cannot_be_read_or_are_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="can't be read"):
        traces.read(tmp_path / "none.csv")
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="can't be read"):
        traces.read(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("0\n1\n2\n")
    monkeypatch.setattr(traces, "MOST_REQUESTS", 2)
    with pytest.raises(UsageError, match="line 3: at most 2 requests"):
        traces.read(tmp_path / "b.csv")
    with pytest.raises(UsageError, match="at most 2 requests are made, but about 100"):
        traces.poisson(10, 10)
    monkeypatch.setattr(traces, "MOST_BYTES", 3)
    with pytest.raises(UsageError, match="more than 3 bytes"):
        traces.read(tmp_path / "b.csv")


@pytest.mark.parametrize("cv2", [0.25, 1.0, 4.0, 23.0])
def test_gamma_traces_are_what_they_say(cv2: float) -> None:
    found = traces.gamma(50, cv2, 2000, seed=1)
    assert found.rate == pytest.approx(50, rel=0.1)
    assert found.cv2 == pytest.approx(cv2, rel=0.15)
    assert found.arrivals[0] == 0.0


def test_made_traces_follow_their_rates() -> None:
    ramp = traces.ramp(10, 90, 400, seed=2).arrivals
    assert np.histogram(ramp, 4, (0, 400))[0] / 100 == pytest.approx([20, 40, 60, 80], rel=0.1)
    over = traces.overload(20, 200, 90, seed=2).arrivals
    assert np.histogram(over, 3, (0, 90))[0] / 30 == pytest.approx([20, 200, 20], rel=0.15)
    wild = traces.bursts(10, 200, 2000, calm=4, burst=1, seed=2)
    assert wild.rate == pytest.approx((4 * 10 + 200) / 5, rel=0.2)
    assert wild.cv2 > 2
    assert traces.find(" gamma( rate=200, cv2=4, seconds=6, seed=3 )").arrivals.tolist() == (
        traces.gamma(200, 4, 6, seed=3).arrivals.tolist()
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gama(rate=1)", "there is no trace 'gama'; those that can be made are poisson, gamma, bursts, ramp, overload"),
        ("gamma(rate=1, seconds=1)", "gamma needs cv2 too, as in 'gamma(rate=1, cv2=1, seconds=1)'"),
        ("gamma(rate=1, cv=2, seconds=1)", "gamma takes rate, cv2, seconds, seed, but got 'cv'"),
        ("gamma(200)", "must be a name and a number"),
        ("gamma(rate=-1, cv2=1, seconds=1)", "rate of gamma must be a number above 0"),
        ("gamma(rate=1e12, cv2=1, seconds=1)", "a number above 0 and below 1,000,000,000, but is 1e12"),
        ("ramp(low=-1, high=1, seconds=1)", "low of ramp must be a number from 0 and below 1,000,000,000, but is -1"),
        ("gamma(rate=nan, cv2=1, seconds=1)", "rate of gamma must be a number above 0"),
        ("poisson(rate=1, seconds=1, seed=0.5)", "must be a name and a number"),
    ],
)
def test_a_mistyped_trace_is_answered_in_words(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        traces.find(text)
    assert said in str(caught.value)


def test_a_trace_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="a request at least"):
        Trace.of(np.zeros(0))
    with pytest.raises(UsageError, match="in order"):
        Trace.of(np.array([1.0, 0.0]))


# --- a bundle, and what is shown --------------------------------------------------------------------------------


def test_a_bundle_is_simulated_from_its_evidence(tmp_path: Path) -> None:
    with fakes_known():
        bundle = write_bundle(tmp_path / "bundle")
        states = rung_states(bundle)
        found = simulate_bundle(tmp_path / "bundle", "gamma(rate=150, cv2=4, seconds=5)", "p99 <= 100ms")
        with pytest.raises(UsageError, match="must bound the latency"):
            simulate_bundle(tmp_path / "bundle", "poisson(rate=10, seconds=1)")
    assert [s.per_row for s in states] == pytest.approx([0.01, 0.01 / 3, 0.002], rel=0.05)
    assert all(0.85 < s.quality <= 0.91 and 1.0 <= s.tail < 1.1 for s in states)
    assert [float(np.median(t)) for t in recorded_times(bundle)] == pytest.approx([1.0] * 3)
    assert found.terms.patience == pytest.approx(0.1)
    assert found.metric == "accuracy"
    assert [o.policy for o in found.outcomes] == [e.name for e in usual(states)]
    ours = next(o for o in found.outcomes if o.policy == "governor, balanced")
    assert ours.attainment > 0.99


def test_where_less_is_better_there_is_no_effective_quality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that never came has no error; counted as 0 it would be the best of all."""
    with fakes_known():
        bundle = write_bundle(tmp_path / "bundle")
    made = [fake_rung(s, d, metric="mae", quality=2.0, level=i) for i, (s, d) in enumerate([(1, 0.0), (3, 0.5)])]
    monkeypatch.setattr(Bundle, "open", lambda path, **_: replace(bundle, ladder=Ladder(tuple(made))))
    found = simulate_bundle("bundle", "gamma(rate=150, cv2=4, seconds=5)", "p99 <= 100ms, drop <= 10%")
    first, second = (r.quality for r in found.rungs)
    assert first == pytest.approx(-2.0, rel=0.02)
    assert second == pytest.approx(-2.5, rel=0.02)
    assert found.terms.asked == pytest.approx(1.1 * first), "the bank counts in the metric's own unit, as it will"
    outcomes = {o.policy: o for o in found.outcomes}
    assert outcomes["rung 0 always"].quality == pytest.approx(-first)
    assert outcomes["rung 1 always"].quality == pytest.approx(-second)
    assert all(math.isnan(o.effective_quality) for o in found.outcomes)
    assert math.isnan(found.most_quality)
    text, curves = shown.render(found), shown.course(found)
    assert "less mae is better" in text
    assert "could not have had more" not in text
    assert curves["layout"]["yaxis"]["title"]["text"] == "share on time"
    assert all(0 <= y <= 1 for line in curves["data"] for y in line["y"] if y is not None)
    assert shown.plane(found)["layout"]["yaxis"]["autorange"] == "reversed"
    assert "nan" not in shown.page(found).partition("<main")[2].partition("<script")[0]


def with_own_code(bundle: Bundle, *numbers: int) -> Bundle:
    """The bundle with these rungs run by the original's own code."""
    made = [replace(r, recipe=Recipe((), Eager())) if i in numbers else r for i, r in enumerate(bundle.ladder)]
    return replace(bundle, ladder=Ladder(tuple(made)))


def test_a_rung_that_no_server_can_run_is_left_out_and_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fakes_known():
        bundle = write_bundle(tmp_path / "bundle")
    monkeypatch.setattr(Bundle, "open", lambda path, **_: with_own_code(bundle, 0))
    asked = ("bundle", "poisson(rate=5, seconds=20)", "p99 <= 300ms")
    found = simulate_bundle(*asked)
    assert [r.number for r in found.rungs] == [1, 2]
    assert all(number != 0 for outcome in found.outcomes for number, _ in outcome.shares)
    assert found.left_out == (0,)
    note = "Left out: rung 0, for it runs the original's own code, which a server has not."
    assert note in " ".join(shown.render(found).split())
    assert note.replace("'", "&#x27;") in shown.page(found) or note in shown.page(found)
    kept = simulate_bundle(*asked, with_original=True)
    assert [r.number for r in kept.rungs] == [0, 1, 2]
    assert "Left out" not in shown.render(kept)
    monkeypatch.setattr(Bundle, "open", lambda path, **_: with_own_code(bundle, 0, 1, 2))
    with pytest.raises(UsageError, match=r"every rung of .* runs the original's own code"):
        simulate_bundle(*asked)


def test_only_the_original_keeps_a_drop_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the server would refuse, the simulation must not promise."""
    with fakes_known():
        bundle = write_bundle(tmp_path / "bundle")
    rungs = [fake_rung(s, d, level=i) for i, (s, d) in enumerate([(1, 0.0), (3, 0.05)])]
    lossy = with_own_code(replace(bundle, ladder=Ladder(tuple(rungs))), 0)
    monkeypatch.setattr(Bundle, "open", lambda path, **_: lossy)
    asked = ("bundle", "poisson(rate=5, seconds=20)", "p99 <= 300ms, drop <= 0%")
    for with_original in (False, True):
        found = simulate_bundle(*asked, with_original=with_original)
        ours = next(o for o in found.outcomes if o.policy == "governor, balanced")
        assert (ours.quality >= found.terms.asked) == with_original


def small() -> Simulation:
    return simulate(RUNGS, traces.gamma(20, 4, 20, seed=1), Terms(0.3), times=[noise(0)] * 7, metric="accuracy")


def test_the_table_fits_a_terminal_and_holds_every_policy() -> None:
    text = shown.render(small())
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert text.isascii()
    for entrant in usual(RUNGS):
        assert sum(line.startswith(entrant.name) for line in lines) == 1
    assert "..." not in text
    assert "100.00 %" in text
    assert "no model ran" in text


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    text = shown.write(small(), tmp_path / "page.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert "governor, balanced" in text
    for name in ("plane", "rate", "quality"):
        assert f'id="{name}-data"' in text


def test_a_trace_on_which_nothing_is_answered_can_be_shown() -> None:
    found = simulate(one(1.0), Trace.of(np.zeros(3)), Terms(0.1))
    assert all(o.attainment == 0 for o in found.outcomes)
    assert " - " in shown.render(found)
    shown.plane(found), shown.course(found), shown.rate(found)
