"""Where a goal is not proven: the nearest misses, what they would cost, and what would help."""

from __future__ import annotations

import math
from dataclasses import replace

from accelerando.errors import Reason
from accelerando.goal import Check, Outcome
from accelerando.interval import Interval
from accelerando.report import words
from accelerando.report.story import Story
from accelerando.report.way import Seen
from accelerando.trial import Refused
from accelerando.workload import Form

MISSES = 3
JUDGED_ON_SAMPLES = ("drop", "quality")
EXACT = ("memory", "size")


def nearest(story: Story) -> tuple[str, ...]:
    """The nearest misses, one for each set of missed bounds: what it reaches, and the bounds that it would meet."""
    if story.bundle.verdict.outcome is Outcome.MET:
        return ()
    found: dict[frozenset[str], tuple[float, Seen, list[Check]]] = {}
    for seen in story.seen:
        if seen.rung == 0:
            continue  # the original: it would meet any bound that asks for nothing
        missed = [c for c in story.bundle.goal.judge(seen.evidence).checks if c.outcome is not Outcome.MET]
        if not missed or (seen.refused is not None and seen.refused.reason in (Reason.NOT_FINITE, Reason.WRONG_OUTPUT)):
            continue
        gap = sum(c.shortfall for c in missed)
        key = frozenset(c.bound.quantity for c in missed)
        if key not in found or gap < found[key][0]:
            found[key] = gap, seen, missed
    ranked = sorted(found.values(), key=lambda f: f[0])[:MISSES]
    return tuple(_miss(story, seen, missed) for _, seen, missed in ranked)


def _miss(story: Story, seen: Seen, missed: list[Check]) -> str:
    metric = story.metric
    speed = "" if any(c.bound.quantity == "speedup" for c in missed) else f" ({words.times(seen.evidence.speedup.mid)})"
    reached = "; ".join(
        f"{c.bound.quantity} {words.between(c.interval, lambda v, b=c.bound: words.quantity(b, v, metric))}, "
        f"so it would meet {replace(c.bound, value=_outward(c))}"
        for c in missed
    )
    return f"{story.name(seen.recipe)}{speed}: {reached}"


def _outward(check: Check) -> float:
    """The interval's far edge, rounded to two digits away from it, so that the bound named would be met."""
    edge = check.interval.low if check.bound.least else check.interval.high
    if edge == 0 or not math.isfinite(edge):
        return edge
    places = 1 - math.floor(math.log10(abs(edge)))
    step = 10.0**-places
    return round((math.floor(edge / step) if check.bound.least else math.ceil(edge / step)) * step, max(places, 0))


def helps(story: Story) -> tuple[str, ...]:
    """What would help; empty where the goal is met."""
    bundle = story.bundle
    if bundle.verdict.outcome is Outcome.MET:
        return ()
    said = [line for c in bundle.verdict.checks if c.outcome is Outcome.UNSURE and (line := _sharper(story, c))]
    if bundle.run.get("finished") is False:
        why, budget = bundle.run.get("why_stopped"), bundle.run.get("budget_seconds")
        of = f", {words.duration(float(budget))}" if budget else ""
        said.append(
            f"a larger budget{of} so far: the search was not through{f' ({why})' if why else ''}; it can be resumed"
        )
    missing = [g for g in story.groups if g.reason in (Reason.MISSING_PACKAGE, Reason.MISSING_TOOL)]
    for group in missing:
        details = dict.fromkeys(words.shorten(t.outcome.detail, 120) for t in group.trials)  # type: ignore[union-attr]
        said.append(f"{group.reason.remedy}: {'; '.join(list(details)[:3])}")
    if taught := _teaching(story):
        said.append(taught)
    if any(c.outcome is Outcome.NOT_MET for c in bundle.verdict.checks):
        said.append("a wider bound: the nearest misses name those that would be met")
    return tuple(said)


def _teaching(story: Story) -> str:
    """What `train=` would make possible, where a torch module was given and only the training data is missing."""
    refused = (t.outcome for t in story.trials if isinstance(t.outcome, Refused))
    untaught = any(o.reason is Reason.NO_TRAINING_DATA for o in refused)
    missed = [c for c in story.bundle.verdict.checks if c.outcome is not Outcome.MET]
    if not untaught or not missed or story.bundle.workload.get("form") != Form.TORCH.value:
        return ""
    out = "; ".join(_out_of_reach(story, check) for check in missed)
    return (
        f"train=: {out}; with train= the model could be cut and healed: rows like those of data=, with labels or "
        "without, some thousands are good"
    )


def _out_of_reach(story: Story, check: Check) -> str:
    """A bound, and the nearest to it that keeps the quality without training."""
    bound, quality = check.bound, story.bundle.goal.quality_bounds
    kept = []
    for seen in story.seen:
        checks = {c.bound: c for c in story.bundle.goal.judge(seen.evidence).checks}
        if seen.refused is None and all(checks[q].outcome is Outcome.MET for q in quality) and bound in checks:
            kept.append(checks[bound].interval.mid)
    said = f"{bound} is {'out of reach' if check.outcome is Outcome.NOT_MET else 'not proven'} without training"
    if bound in quality or not kept:
        return said
    nearest = words.quantity(bound, max(kept) if bound.least else min(kept), story.metric)
    return f"{said} ({nearest} is the {'most' if bound.least else 'least'} that keeps the quality)"


def _sharper(story: Story, check: Check) -> str:
    """How to turn a `cannot tell` into an answer."""
    evidence, metric, bound = story.best.evidence, story.metric, check.bound
    if check.note:
        return f"{bound}: {check.note}"
    if bound.quantity in EXACT:
        return ""
    factor = more_needed(check.interval, bound.value, bound.least)
    samples = bound.quantity in JUDGED_ON_SAMPLES
    count = len(evidence.scores) if samples else len(evidence.rounds)
    unit = "test samples" if samples else "rounds of measuring (a larger budget)"
    half = (check.interval.high - check.interval.low) / 2
    of = f"{count} {'samples' if samples else 'rounds'}"
    known = f"the {bound.quantity} is known to +-{_half(story, check, half)} with {of}"
    if math.isinf(factor):
        return f"{known}, and its middle is at or past the bound: {unit} would settle it, more likely against it"
    middle = words.quantity(bound, check.interval.mid, metric)
    return f"more {unit}: {known}; about {_round_up(count * factor)} would settle it if its middle stays at {middle}"


def _half(story: Story, check: Check, half: float) -> str:
    if check.bound.quantity == "quality" and story.metric in words.SHARES:
        return f"{words.points(half)} points"
    return words.quantity(check.bound, half, story.metric)


def more_needed(interval: Interval, bound: float, least: bool) -> float:
    """By what factor the observations must grow for the interval's edge to reach the bound.

    The width of an interval shrinks with the root of the observations: factor = (half width / margin)^2.
    Infinite where the middle itself does not meet the bound.
    """
    margin = interval.mid - bound if least else bound - interval.mid
    half = interval.mid - interval.low if least else interval.high - interval.mid
    return (half / margin) ** 2 if margin > 0 else math.inf


def _round_up(value: float) -> int:
    """Two digits, upwards: a rough number should look like one."""
    step = 10 ** max(0, math.floor(math.log10(max(value, 1))) - 1)
    return math.ceil(value / step) * step
