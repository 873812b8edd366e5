"""The goal language is read, spelt and judged; every complaint points at what is wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accelerando.errors import GoalError
from accelerando.goal import Bound, Check, Goal, Outcome, Verdict
from accelerando.interval import Interval
from accelerando.metric import METRICS
from accelerando.testing.fakes import fake_evidence
from accelerando.trial import LUCK

GOOD = {
    "speedup >= 4, drop <= 1%": (Bound("speedup", True, 4), Bound("drop", False, 0.01, True)),
    "p99 <= 5ms, drop <= 0.005": (Bound("p99", False, 0.005), Bound("drop", False, 0.005)),
    "memory<=200MB;size <= 1.5 GiB": (Bound("memory", False, 2e8), Bound("size", False, 1.5 * 2**30)),
    "latency <= 3 ms": (Bound("latency", False, 0.003),),
    "P50 < 250us and p95 ≤ 1s": (Bound("latency", False, 0.00025), Bound("p95", False, 1)),
    "Speedup => 4x": (Bound("speedup", True, 4),),
    "speedup > 1.5\n, quality ≥ 97%": (Bound("speedup", True, 1.5), Bound("quality", True, 0.97)),
    "quality <= 0.3": (Bound("quality", False, 0.3),),
    "quality >= -2.5, drop <= -0.1%": (Bound("quality", True, -2.5), Bound("drop", False, -0.001, True)),
    "latency <= 300 \u00b5s, size =< 10kb": (Bound("latency", False, 0.0003), Bound("size", False, 1e4)),
    "drop <= 1%, drop <= 0.02": (Bound("drop", False, 0.01, True), Bound("drop", False, 0.02)),
}


@pytest.mark.parametrize("text", GOOD)
def test_goals_are_read(text: str) -> None:
    assert Goal.parse(text).bounds == GOOD[text]
    assert Goal.parse(text).batch == 1


def test_batch_and_preference() -> None:
    goal = Goal.parse("throughput >= 2000/s @ batch 32, memory <= 200MB, prefer speed")
    assert (goal.batch, goal.prefer) == (32, "speed")
    assert goal == Goal.parse("@ batch 32, throughput>=2e3/s , memory <= 0.2GB @batch 32", prefer="speed")
    assert goal.text != str(goal) == "throughput >= 2000/s, memory <= 200MB @ batch 32, prefer speed"
    with pytest.raises(GoalError, match="prefer must be 'quality' or 'speed', but got 'cost'"):
        Goal.parse("drop <= 1%", prefer="cost")
    with pytest.raises(GoalError, match=r"prefers speed, but prefer='quality' was given"):
        Goal.parse("drop <= 1%, prefer speed", prefer="quality")


# What is wrong, the word under which the carets are, and what the message says.
BAD = {
    "dorp <= 1%": ("dorp", "did you mean 'drop'"),
    "speedup >= 4, dorp <= 1%": ("dorp", "did you mean 'drop'"),
    "speadup >= 4": ("speadup", "did you mean 'speedup'"),
    "accuracy >= 0.9": ("accuracy", "did you mean 'quality'"),
    "fps >= 30/s": ("fps", "did you mean 'throughput'"),
    "p90 <= 5ms": ("p90", "did you mean 'p95'"),
    "zzz >= 1": ("zzz", "There are speedup, latency"),
    "4 >= speedup": ("4", "begins with what is bounded"),
    "speedup >= 4, speedup <= 2": ("speedup <= 2", "contradicts 'speedup >= 4'"),
    "quality >= 0.9, quality <= 0.95": ("quality <= 0.95", "contradicts 'quality >= 0.9'"),
    "drop <= 1%, drop <= 2%": ("drop <= 2%", "keep the stricter one"),
    "latency <= 5ms, p50 <= 4ms": ("p50 <= 4ms", "keep the stricter one"),
    "speedup <= 2": ("speedup <= 2", "a speedup takes lower bounds only"),
    "throughput <= 5/s": ("throughput <= 5/s", "a throughput takes lower bounds only"),
    "latency >= 5ms": ("latency >= 5ms", "a latency takes upper bounds only"),
    "drop >= 1%": ("drop >= 1%", "a drop takes upper bounds only"),
    "memory >= 1MB": ("memory >= 1MB", "a memory takes upper bounds only"),
    "p99 <= 5": ("5", "a p99 needs a unit (us, ms, s), such as 'p99 <= 5ms'"),
    "size <= 10": ("10", "needs a unit (B, KB"),
    "throughput >= 100": ("100", "such as 'throughput >= 2000/s'"),
    "p99 <= 5mss": ("mss", "did you mean 'ms'"),
    "memory <= 5ms": ("ms", "is no unit of memory"),
    "quality >= 3dB": ("dB", "is no unit of quality"),
    "memory <= 20%": ("%", "only a drop and a quality are given in %"),
    "speedup >= 400%": ("%", "only a drop and a quality are given in %"),
    "speedup == 4": ("==", "never exactly so; write >= or <="),
    "speedup = 4": ("=", "write >= or <="),
    "speedup >= 4 drop <= 1%": ("drop", "put a comma between"),
    "quality >= 0.9 p99 <= 5ms": ("p99", "put a comma between"),
    "drop <= 1% 5": ("5", "put a comma between"),
    "speedup >= 4,": (",", "a bound is missing after the comma"),
    ", drop <= 1%": (",", "begins with what is bounded"),
    "speedup >= fast": ("fast", "there must be a number"),
    "speedup 4": ("4", "there must be >= or <="),
    "speedup >= 0": ("0", "always above 0"),
    "latency <= -5ms": ("-5", "always above 0"),
    "drop <= 1e999": ("1e999", "too large"),
    "p99 <= 1ms @ batch 3, p95 <= 1ms @ batch 4": ("4", "asks for batch 3 already"),
    "p99 <= 1ms @ batch 0": ("0", "whole number from 1"),
    "p99 <= 1ms @ batch 1.5": ("1.5", "whole number from 1"),
    "p99 <= 1ms @ rows 3": ("rows", "there must be 'batch' and a number"),
    "p99 <= 1ms @": ("@", "there must be 'batch' and a number"),
    "@ batch 3": ("@", "no bound in this goal"),
    "batch 3": ("batch", "written '@ batch 32'"),
    "drop <= 1%, prefer spede": ("spede", "'quality' or 'speed'"),
    "drop <= 1%, prefer speed, prefer quality": ("quality", "prefers speed already"),
    "drop # 1%": ("#", "there must be >= or <="),
}


@pytest.mark.parametrize("text", BAD)
def test_carets_are_under_what_is_wrong(text: str) -> None:
    word, says = BAD[text]
    with pytest.raises(GoalError, match=re.escape(says)) as caught:
        Goal.parse(text)
    shown, carets = str(caught.value).splitlines()[2:4]
    assert shown[4:] == text
    assert "".join(c for c, mark in zip(shown, carets, strict=False) if mark == "^") == word


def test_at_the_end_the_caret_is_behind_the_goal() -> None:
    for text in ("speedup", "speedup >=", "p99 <= 1ms @ batch", "drop <= 1%, prefer"):
        with pytest.raises(GoalError) as caught:
            Goal.parse(text)
        assert str(caught.value).splitlines()[3] == " " * (4 + len(text)) + "^"


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_an_empty_goal_is_refused(text: str) -> None:
    with pytest.raises(GoalError, match=r"the goal is empty; ask for something, such as 'speedup >= 4, drop <= 1%'"):
        Goal.parse(text)


def test_a_goal_is_a_text() -> None:
    with pytest.raises(GoalError, match=r"a goal is a text such as .* but got 4"):
        Goal.parse(4)


positive = st.floats(1e-9, 1e15, allow_nan=False)


@st.composite
def goals(draw: st.DrawFn) -> Goal:
    bounds = []
    for name in draw(st.lists(st.sampled_from(sorted(EVERY)), min_size=1, max_size=9, unique=True)):
        least, relative, values = EVERY[name]
        least = draw(st.booleans()) if least is None else least
        bounds.append(Bound(name.rstrip("%"), least, draw(values), relative))
    return Goal("", tuple(bounds), draw(st.integers(1, 9999)), draw(st.sampled_from(["quality", "speed"])))


signed = st.floats(-1e6, 1e6)
EVERY: dict[str, tuple[bool | None, bool, st.SearchStrategy[float]]] = {
    "speedup": (True, False, positive),
    "latency": (False, False, positive),
    "p95": (False, False, positive),
    "p99": (False, False, positive),
    "throughput": (True, False, positive),
    "memory": (False, False, st.integers(1, 10**15).map(float)),
    "size": (False, False, positive),
    "quality": (None, False, signed),
    "drop": (False, False, signed),
    "drop%": (False, True, signed),
}


@settings(max_examples=300, deadline=None)
@given(goals())
def test_what_is_spelt_is_read_back_the_same(goal: Goal) -> None:
    again = Goal.parse(str(goal))
    assert again == goal
    assert str(again) == str(goal)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="speduplatncyro p95<>=@,%.0123456789msxMBbatch/-+e&;\t\u00d7\u00b5", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        goal = Goal.parse(text)
    except GoalError:
        return
    assert Goal.parse(str(goal)) == goal


# --- judging ----------------------------------------------------------------------------------------------------


def outcomes(text: str, **evidence: float | str) -> list[str]:
    return [c.outcome.value for c in Goal.parse(text).judge(fake_evidence(**evidence)).checks]


def test_a_bound_is_met_only_by_the_end_of_the_interval() -> None:
    assert outcomes("speedup >= 4", speedup=4.3, noise=0.01) == ["met"]
    assert outcomes("speedup >= 4", speedup=4.05, noise=0.1) == ["cannot tell"]
    assert outcomes("speedup >= 4", speedup=3.95, noise=0.1) == ["cannot tell"]
    assert outcomes("speedup >= 4", speedup=3.7, noise=0.01) == ["not met"]
    assert outcomes("drop <= 1%", drop=0.0, n=2000) == ["met"]
    assert outcomes("drop <= 1%", drop=0.0, n=40) == ["cannot tell"]
    assert outcomes("drop <= 1%", drop=0.2, n=200) == ["not met"]


def test_every_quantity_is_judged_by_its_own_figure() -> None:
    text = (
        "speedup >= 3, latency <= 3ms, p95 <= 3ms, p99 <= 3ms, throughput >= 300/s, memory <= 50MB, size <= 1MB, "
        "quality >= 80%, drop <= 5%, drop <= 0.05"
    )
    assert set(outcomes(text, speedup=4, calls=1000)) == {"met"}
    text = (
        "speedup >= 5, latency <= 2ms, p95 <= 2ms, p99 <= 2ms, throughput >= 500/s, memory <= 49MB, size <= 999KB, "
        "quality >= 99%, drop <= -5%, drop <= -0.05"
    )
    assert set(outcomes(text, speedup=4, calls=1000)) == {"not met"}


def test_relative_and_absolute_drop_differ() -> None:
    # 0.04 of 0.5 is 8 %
    assert outcomes("drop <= 0.06, drop <= 6%", drop=0.04, quality=0.5, n=5000) == ["met", "not met"]
    lower_is_better = {"metric": "mae", "quality": 2.0, "drop": 0.1}
    assert outcomes("drop <= 0.15, drop <= 3%, quality <= 2.3", **lower_is_better) == ["met", "not met", "met"]


def test_too_few_calls_can_refute_a_tail_but_never_prove_it() -> None:
    verdict = Goal.parse("p99 <= 5ms").judge(fake_evidence(4, calls=100))
    assert verdict.outcome is Outcome.UNSURE
    assert verdict.explain()[0].endswith("cannot tell: 100 timed calls are too few for an interval, 368 are needed")
    assert outcomes("p99 <= 5ms", speedup=4, calls=400) == ["met"]
    assert outcomes("p99 <= 1ms", speedup=4, calls=100) == ["not met"]


def test_too_few_rounds_tell_nothing() -> None:
    assert outcomes("speedup >= 4, throughput >= 1/s", speedup=9, rounds=5) == ["cannot tell", "cannot tell"]
    assert outcomes("speedup >= 4", speedup=2, rounds=5) == ["cannot tell"]
    assert outcomes("speedup >= 4, throughput >= 1/s", speedup=9, rounds=6) == ["met", "met"]


def test_speed_at_another_batch_tells_nothing() -> None:
    goal = Goal.parse("speedup >= 4, size <= 10MB @ batch 32")
    assert goal.judge(fake_evidence(9, batch=32)).outcome is Outcome.MET
    verdict = goal.judge(fake_evidence(9, batch=1))
    assert [c.outcome for c in verdict.checks] == [Outcome.UNSURE, Outcome.MET]
    assert "measured at batch 1, but batch 32 is asked for" in verdict.explain()[0]


def test_the_worst_check_is_the_verdict() -> None:
    text = "speedup >= 4, drop <= 1%"
    assert Goal.parse(text).judge(fake_evidence(5, n=2000)).outcome is Outcome.MET
    assert Goal.parse(text).judge(fake_evidence(5, n=50)).outcome is Outcome.UNSURE
    assert Goal.parse(text).judge(fake_evidence(2, n=50)).outcome is Outcome.NOT_MET


def test_verdicts_explain_themselves_in_the_units_of_the_goal() -> None:
    goal = Goal.parse("speedup >= 4, p99 <= 5ms, throughput >= 100/s, memory <= 200MB, quality >= 0.8, drop <= 1%")
    lines = goal.judge(fake_evidence(5, drop=0.1, noise=0.02)).explain()
    figure = r"-?[\d.]+"
    assert re.fullmatch(rf"speedup >= 4: {figure} \({figure} to {figure}\) met", lines[0])
    assert re.fullmatch(rf"p99 <= 5ms: {figure}ms \({figure}ms to {figure}ms\) met", lines[1])
    assert re.fullmatch(rf"throughput >= 100/s: {figure}/s \({figure}/s to {figure}/s\) met", lines[2])
    assert lines[3] == "memory <= 200MB: 50MB met"
    assert re.fullmatch(rf"drop <= 1%: {figure}% \({figure}% to {figure}%\) not met", lines[5])


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.5, 8), st.sampled_from([0.001, 0.02, 0.3]), st.sampled_from([-0.1, 0.0, 0.02, 0.2]), st.integers(3, 20)
)
def test_shortfall_is_positive_exactly_where_a_bound_is_not_proven(
    speedup: float, noise: float, drop: float, rounds: int
) -> None:
    goal = Goal.parse("speedup >= 4, p99 <= 5ms, drop <= 1%, drop <= 0.01, quality >= 0.9, memory <= 40MB")
    for check in goal.judge(fake_evidence(speedup, drop, noise, rounds=rounds)).checks:
        assert math.isfinite(check.shortfall)
        assert check.shortfall >= 0
        if check.outcome is Outcome.MET:
            assert check.shortfall == 0
        elif not check.note:
            assert check.shortfall > 0


def test_shortfalls_are_of_one_scale() -> None:
    far = Goal.parse("speedup >= 4, memory <= 25MB, drop <= 1%").judge(fake_evidence(2, 0.0, 0.0, n=10**4))
    speed, memory, drop = (c.shortfall for c in far.checks)
    assert speed == pytest.approx(math.log(2 * (1 + LUCK)))
    assert memory == pytest.approx(math.log(2))
    assert drop == 0
    assert far.shortfall == pytest.approx(speed + memory)


def test_direction_of_quality_depends_on_the_metric() -> None:
    Goal.parse("quality >= 0.97").check("accuracy", METRICS["accuracy"].higher_is_better)
    Goal.parse("quality <= 0.3, drop <= 5").check("mae", METRICS["mae"].higher_is_better)
    with pytest.raises(GoalError, match=r"'quality <= 0.3' points the wrong way: higher is better for accuracy"):
        Goal.parse("quality <= 0.3").check("accuracy", METRICS["accuracy"].higher_is_better)
    with pytest.raises(GoalError, match=r"lower is better for mae.*did you mean 'quality <= 0.3'"):
        Goal.parse("quality >= 0.3").check("mae", METRICS["mae"].higher_is_better)


def test_percentages_written_as_numbers_are_noticed() -> None:
    with pytest.raises(GoalError, match=r"accuracy lies between 0 and 1.*did you mean 'quality >= 0.97'"):
        Goal.parse("quality >= 97").check("accuracy", METRICS["accuracy"].higher_is_better)
    with pytest.raises(GoalError, match=r"did you mean 'drop <= 2%'"):
        Goal.parse("drop <= 2").check("f1", METRICS["f1"].higher_is_better)
    Goal.parse("drop <= 2, quality >= 30").check("psnr", METRICS["psnr"].higher_is_better)


# --- what the search and the measurer ask ---------------------------------------------------------------------------


def test_what_a_goal_wants() -> None:
    assert Goal.parse("drop <= 1%").wants_speed
    assert Goal.parse("drop <= 1%, memory <= 9MB").wants_speed
    assert not Goal.parse("speedup >= 4, drop <= 1%").wants_speed
    assert not Goal.parse("p99 <= 5ms").wants_speed
    assert Goal.parse("speedup >= 4, drop <= 1%", prefer="speed").wants_speed
    goal = Goal.parse("throughput >= 5/s, size <= 9MB, quality >= 0.5, drop <= 1%, p95 <= 2s")
    assert [b.quantity for b in goal.speed_bounds] == ["throughput", "p95"]
    assert [b.quantity for b in goal.quality_bounds] == ["quality", "drop"]


def test_samples_needed() -> None:
    assert Goal.parse("speedup >= 4, drop <= 1%").samples_needed == 0
    assert Goal.parse("latency <= 4ms").samples_needed == 6
    assert Goal.parse("p95 <= 4ms").samples_needed == 72
    needed = Goal.parse("p95 <= 4ms, p99 <= 5ms").samples_needed
    assert needed == 368
    assert outcomes("p99 <= 5ms", speedup=4, calls=needed) == ["met"]
    assert outcomes("p99 <= 5ms", speedup=4, calls=needed - 1) == ["cannot tell"]


def best(text: str, *found: dict[str, float], prefer: str | None = None) -> int:
    goal = Goal.parse(text, prefer)
    keys = [goal.merit(fake_evidence(**{"n": 2000, "seed": i, **e})) for i, e in enumerate(found)]
    assert len({len(k) for k in keys}) == 1
    return keys.index(max(keys))


def test_merit_puts_the_outcome_first() -> None:
    met, unsure, missed = {"speedup": 4.2}, {"speedup": 4.0, "noise": 0.05}, {"speedup": 3.5}
    assert best("speedup >= 4", missed, unsure, met) == 2
    assert best("speedup >= 4", missed, unsure) == 1


def test_merit_prefers_quality_beyond_noise_then_speed() -> None:
    fast, faithful = {"speedup": 9.0, "drop": 0.009}, {"speedup": 5.0, "drop": 0.0}
    text = "speedup >= 4, drop <= 2%"
    assert best(text, fast, faithful) == 1
    assert best(text, fast, faithful, prefer="speed") == 0
    assert best("drop <= 2%", fast, faithful) == 0
    by_a_hair = {"speedup": 5.0, "drop": -0.0005}  # one sample of 2000
    assert best(text, {"speedup": 9.0, "drop": 0.0}, by_a_hair) == 0


def test_merit_takes_the_more_faithful_of_two_equally_fast() -> None:
    assert best("drop <= 2%", {"speedup": 5.0, "drop": 0.01}, {"speedup": 4.99, "drop": 0.0}) == 1
    assert best("drop <= 2%", {"speedup": 5.0, "drop": 0.01}, {"speedup": 4.0, "drop": 0.0}) == 0


def test_merit_puts_the_nearest_miss_first() -> None:
    near, slow, lossy = {"speedup": 3.5}, {"speedup": 2.0}, {"speedup": 9.0, "drop": 0.5}
    assert best("speedup >= 4, drop <= 1%", slow, near, lossy) == 1
    assert best("speedup >= 4, drop <= 1%", slow, lossy) == 0


# --- sabotage ---------------------------------------------------------------------------------------------------


def audit(judge: Callable[[Goal, float, float], Outcome]) -> list[str]:
    """What a judge got wrong on planted evidence: far above, far below and astride the bound."""
    planted = {
        (8.0, 0.01): Outcome.MET,
        (4.5, 0.02): Outcome.MET,
        (4.0, 0.1): Outcome.UNSURE,
        (3.6, 0.02): Outcome.NOT_MET,
        (1.0, 0.01): Outcome.NOT_MET,
    }
    goal = Goal.parse("speedup >= 4")
    found = {at: judge(goal, *at) for at in planted}
    return [f"{at}: {found[at].value}, not {right.value}" for at, right in planted.items() if found[at] is not right]


def own(goal: Goal, speedup: float, noise: float) -> Outcome:
    return goal.judge(fake_evidence(speedup, noise=noise)).outcome


def by_the_middle(goal: Goal, speedup: float, noise: float) -> Outcome:
    return Outcome.MET if fake_evidence(speedup, noise=noise).speedup.mid >= 4 else Outcome.NOT_MET


def backwards(goal: Goal, speedup: float, noise: float) -> Outcome:
    flipped = tuple(replace(b, least=not b.least) for b in goal.bounds)
    return replace(goal, bounds=flipped).judge(fake_evidence(speedup, noise=noise)).outcome


def test_the_goal_passes_its_audit() -> None:
    assert audit(own) == []


def test_sabotage_a_goal_that_never_says_no_is_caught() -> None:
    assert len(audit(lambda goal, speedup, noise: Outcome.MET)) == 3


def test_sabotage_other_judges_are_caught() -> None:
    assert audit(by_the_middle)
    assert audit(backwards)
    assert audit(lambda goal, speedup, noise: Outcome.UNSURE)


def test_false_met_is_rare_on_the_bound_itself() -> None:
    """Candidates whose true speedup lies just below the bound are called met in at most 2.5 % of duels."""
    rng = np.random.default_rng(0)
    goal = Goal.parse("speedup >= 4")
    seeds = rng.integers(10**6, size=400)
    met = sum(
        goal.judge(fake_evidence(3.999, noise=0.05, seed=int(s), n=8, calls=8)).outcome is Outcome.MET for s in seeds
    )
    assert met <= 400 * 0.05  # 2.5 % and three standard deviations


def test_bounds_checks_and_verdicts_read_well() -> None:
    bound = Bound("size", False, 1234567.0)
    assert str(bound) == "size <= 1.234567MB"
    check = Check(bound, Interval.exactly(2e6), Outcome.NOT_MET, 0.5)
    assert str(check) == "size <= 1.234567MB: 2MB not met"
    assert Verdict(Outcome.NOT_MET, (check, check)).shortfall == 1.0
