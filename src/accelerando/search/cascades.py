"""Cascades: which two recipes are worth joining, and how sure the fast one must be.

Two that were found apart; or a recipe and an exit half way through it, which is measured alone, as the smaller model
that it is, before it is joined with the rest as the front that hands its state over.

Everything is known from the select split but one thing: of which rows the fast recipe is sure.  With that, each
threshold's cascade is predicted row by row (the scores of the fast one where it is sure, of the better one elsewhere)
and its time from the two recipes' own.  What is predicted to beat the best so far is proposed, and then built and
measured as any other recipe; its certificate comes from samples on which no threshold was chosen.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from accelerando.backends.cascade import CONFIDENCES, Cascade, judged_output, why_no_classes
from accelerando.errors import Reason, RefusalError
from accelerando.goal import Bound, Goal
from accelerando.interval import Floats
from accelerando.measure.arm import LOAD_SECONDS, Subject, open_samples
from accelerando.recipe import Recipe
from accelerando.search.exits import at_exit, exit_of, forms_of, whole_of
from accelerando.search.grounds import Grounds
from accelerando.search.history import (
    BUILD_FAILURES,
    LOSSLESS_DROP,
    History,
    Proposal,
    allowed_drop,
    leader,
    sober,
    speed_of,
)
from accelerando.signature import Array
from accelerando.techniques.early_exit import EarlyExit
from accelerando.trial import Evidence, Refused, Trial
from accelerando.workload import Form

FASTER = 1.5  # times faster than the better one that the fast one must be
GAIN = 1.05  # times faster than measured so far that a cascade must promise to be
CAUTION = 1.25  # half widths of the interval by which the drop must clear its bound: a threshold is chosen for its luck
SHARES = np.geomspace(0.005, 0.8, 24)  # of the rows that are asked again, to choose from
OWN_SECONDS = 25e-6  # of a call, for confidences and for putting rows together
ALONE = 0.1  # of the better one's time that a single row takes of it, however large the batch
ASKED_PER_LOST = 3.0  # rows that are asked again for each that the fast one loses, as a guess
MOST_PAIRS = 4  # that are tuned in one search
LEAST_SECONDS = 20.0  # left, for one to be tuned, built and measured
EXITS = (0.5, 0.7, 0.3)  # shares of the layers that lie behind an exit, to try

Pair = tuple[str, str]  # keys of the fast and of the better recipe


def next_cascade(history: Sequence[Trial], grounds: Grounds, seconds_left: float, tuned: set[Pair]) -> Proposal | None:
    """The next cascade to try, or None when none is worth it.

    Tuning loads the fast recipe, and builds it again where it was turned away for its quality.

    Args:
        tuned: the pairs that were tuned in this search, empty at first; those that are tuned now are added.
    """
    known = History(tuple(history))
    best = leader(known.verified, grounds.goal)
    if best is None or not _fits(grounds):
        return None
    tuned |= {_members(t.recipe) for t in known.last.values() if isinstance(t.recipe.backend, Cascade)}
    return _next_pair(known, grounds, best, seconds_left, tuned) or _next_exit(
        known, grounds, best, seconds_left, tuned
    )


def _next_pair(known: History, grounds: Grounds, best: Trial, seconds_left: float, tuned: set[Pair]) -> Proposal | None:
    """A cascade of recipes that were found apart."""
    goal, better = grounds.goal, _better(known)
    if better is None:
        return None
    for fast in _fast(known, better, best, goal):
        pair = (fast.recipe.key, better.recipe.key)
        if pair in tuned:
            continue
        if len(tuned) >= MOST_PAIRS or seconds_left < LEAST_SECONDS:
            return None
        tuned.add(pair)
        if found := tune(fast, better, grounds, best, seconds_left):
            return found
    return None


def _next_exit(known: History, grounds: Grounds, best: Trial, seconds_left: float, tuned: set[Pair]) -> Proposal | None:
    """An exit to measure, or the cascade of one that was measured."""
    whole = _whole(known, grounds.goal)
    if whole is None or EarlyExit.missing():
        return None
    for share in EXITS:
        recipe = at_exit(whole.recipe, share)
        trial, pair = known.last.get(recipe.key), (recipe.key, whole.recipe.key)
        least = 1 / speed_of(trial.evidence) if trial and trial.evidence else (1 - share) / speed_of(whole.evidence)
        if pair in tuned or seconds_left < LEAST_SECONDS or _hopeless(least, best, grounds.goal):
            continue
        if trial is None:
            return Proposal(recipe, f"an exit with {share:.0%} of the layers behind it, to be joined with the rest")
        if trial.evidence is not None and _may_join(trial):
            tuned.add(pair)
            if found := tune(trial, whole, grounds, best, seconds_left):
                return found
        elif isinstance(trial.outcome, Refused) and trial.outcome.reason in BUILD_FAILURES:
            return None  # what can't be cut here can't be cut there
    return None


def tune(fast: Trial, better: Trial, grounds: Grounds, best: Trial, seconds_left: float = 600.0) -> Proposal | None:
    """The best cascade of two recipes by the select split, or None where none is safe and beats the best so far.

    Where the fast one is an exit of the better one, they are joined as its front and its rest.

    Args:
        fast: verified, or turned away for its quality; with evidence.
        better: verified.
        best: what the cascade must beat, by the goal.
    """
    assert fast.evidence
    assert better.evidence
    assert best.evidence
    try:
        confidences = _confidences(fast, grounds, seconds_left)
    except RefusalError:
        return None
    goal, fixed = grounds.goal, grounds.bench.signature.fixed_batch is not None
    leaves = exit_of(fast.recipe) if whole_of(fast.recipe) == better.recipe else None
    foreseen: list[tuple[tuple[float, ...], _Rule]] = []
    for confidence, sure in zip(CONFIDENCES, confidences.T, strict=True):
        for threshold in _thresholds(sure):
            evidence = predicted(fast.evidence, better.evidence, sure < threshold, fixed, leaves is not None)
            if _safe(goal, evidence):
                foreseen.append((goal.merit(sober(evidence)), _Rule(confidence, threshold, evidence)))
                if goal.wants_speed:
                    break  # a higher threshold is only slower
    if not foreseen:
        return None
    merit, rule = max(foreseen, key=lambda pair: pair[0])
    if merit <= goal.merit(sober(best.evidence)):
        return None
    members, what = (fast.recipe, better.recipe), "a fast recipe where it is sure, a better one elsewhere"
    if leaves is not None:
        members = at_exit(better.recipe, leaves.share, "front"), at_exit(better.recipe, leaves.share, "rest")
        what = "an exit half way where it is sure, and on from there elsewhere"
    cascade = Cascade.of(*members, rule.confidence, rule.threshold)
    return Proposal(Recipe((), cascade), f"{what}: about {GAIN * speed_of(rule.evidence):.1f}x expected")


@dataclass(frozen=True)
class _Rule:
    confidence: str
    threshold: float
    evidence: Evidence  # foreseen


def predicted(
    fast: Evidence, better: Evidence, unsure: NDArray[np.bool_], fixed: bool = False, handed: bool = False
) -> Evidence:
    """The evidence of a cascade as it is foreseen, a little slower than it should be (`GAIN`).

    Args:
        unsure: (n,) the rows that are asked again.
        fixed: whether the model takes one size of batch only, so that a single unsure row costs a whole one.
        handed: whether the better one goes on where the fast one, which is its exit, has stopped.
    """
    rows = np.resize(np.random.default_rng(0).permutation(len(unsure)), (max(len(unsure), 512), fast.batch))
    original, share = better.rounds[:, 1], unsure[rows].mean(axis=1)
    if fixed:
        share = np.ceil(share)
    elif fast.batch > 1:
        share = ALONE * (share > 0) + (1 - ALONE) * share
    again = 1 / speed_of(better)
    if handed:
        again -= min(1 / speed_of(fast), (1 - ALONE) * again)
    calls = 1 / speed_of(fast) + share * again + OWN_SECONDS / np.median(original)
    return replace(
        better,
        scores=np.where(unsure[:, None], better.scores, fast.scores),
        rounds=np.stack([GAIN * calls.mean() * original, original], axis=1),
        seconds=GAIN * calls * np.median(original),
        load_seconds=better.load_seconds + (0 if handed else fast.load_seconds),
        peak_bytes=better.peak_bytes + (0 if handed else fast.peak_bytes),
        disk_bytes=better.disk_bytes + (0 if handed else fast.disk_bytes),
    )


def _fits(grounds: Grounds) -> bool:
    """Whether the answers are classes, and all inputs of one shape.

    Where shapes differ a mean over calls, by which a cascade is timed, can't be held against the original's median.
    """
    if why_no_classes(grounds.bench.signature):
        return False
    return len(open_samples(grounds.bench.data / "select").chunks) == 1


def _better(known: History) -> Trial | None:
    """The fastest that loses nothing."""
    lossless = [
        t for t in known.verified if _may_join(t) and t.evidence and t.evidence.relative_drop.mid <= LOSSLESS_DROP
    ]
    return max(lossless, key=lambda t: speed_of(t.evidence), default=None)


def _whole(known: History, goal: Goal) -> Trial | None:
    """The best that can be left half way: an ONNX file whose quality has something to spare."""
    found = [t for t in known.verified if _may_join(t) and exit_of(t.recipe) is None]
    found = [t for t in found if Form.ONNX in forms_of(t.recipe) and t.evidence and _safe(goal, t.evidence)]
    return leader(found, goal)


def _hopeless(least: float, best: Trial, goal: Goal) -> bool:
    """Whether a cascade that takes at least this share of the original's time can't beat the best."""
    assert best.evidence
    enough = goal.wants_speed and goal.judge(sober(best.evidence)).shortfall == 0
    return enough and GAIN * least * speed_of(best.evidence) > 1


def _fast(known: History, better: Trial, best: Trial, goal: Goal) -> Iterator[Trial]:
    """Recipes that lose something and are much faster than the better one, the most promising first."""
    assert better.evidence
    slow, ranked = 1 / speed_of(better.evidence), []
    for trial in known.last.values():
        evidence = trial.evidence
        if evidence is None or not _may_join(trial) or evidence.scores.shape != better.evidence.scores.shape:
            continue
        if whole_of(trial.recipe) == better.recipe:
            continue  # its state need not be thrown away
        if speed_of(evidence) < FASTER * speed_of(better.evidence):
            continue
        excess = max(0.0, evidence.relative_drop.mid - allowed_drop(goal, evidence))
        least = 1 / speed_of(evidence) + slow * excess  # each row that must not be lost is asked again
        if _hopeless(least, best, goal):
            continue
        ranked.append((least + slow * excess * (ASKED_PER_LOST - 1), trial.recipe.key, trial))
    yield from (trial for _, _, trial in sorted(ranked, key=lambda r: r[:2]))


def _may_join(trial: Trial) -> bool:
    """Whether a recipe can be a member: portable, no cascade itself, and refused for its quality alone if at all."""
    backend, outcome = trial.recipe.backend, trial.outcome
    good = not isinstance(outcome, Refused) or outcome.reason is Reason.BELOW_QUALITY
    return good and backend.portable and not isinstance(backend, Cascade)


def _members(recipe: Recipe) -> Pair:
    """The pair of recipes that was tuned for a cascade."""
    backend = recipe.backend
    assert isinstance(backend, Cascade)
    if backend.hands_over and (whole := whole_of(front := backend.members[0])) and (leaves := exit_of(front)):
        return at_exit(whole, leaves.share).key, whole.key
    fast, better = backend.stored_members
    return fast.key, better.key


def _confidences(trial: Trial, grounds: Grounds, seconds_left: float) -> Floats:
    """How sure a recipe is of each row of the select split, (n, 2): by each of `CONFIDENCES`.

    Raises:
        RefusalError: it can't be built or run.
    """
    bench, folder = grounds.bench, grounds.into / "tuning" / trial.recipe.key
    try:
        if trial.verified is not None:
            subject = grounds.subject(trial.recipe, trial.verified.artifact)
        else:  # its files went when it was turned away; its steps are known in the workshop, or half learned
            shutil.rmtree(folder, ignore_errors=True)
            built = grounds.workshop.build(trial.recipe, folder, max(30.0, seconds_left / 2))
            subject = Subject(trial.recipe, built.artifact, folder)
        with bench.arm(subject, "select", LOAD_SECONDS) as arm:
            look = partial(_look, judged_output(bench.signature))
            return arm.each_row(bench.data / "select", look, max(30.0, bench.scoring_limit))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _look(output: int, answers: list[Array]) -> Floats:
    """In the arm's process: the confidences of one batch."""
    return np.stack([confidence(answers[output]) for confidence in CONFIDENCES.values()], axis=1)


def _thresholds(sure: Floats) -> Iterator[float]:
    """Thresholds under which about `SHARES` of the rows lie, from the lowest up, each between two rows."""
    ordered = np.sort(sure)
    for count in np.unique((SHARES * len(sure)).astype(int)):
        if 0 < count < len(sure) and ordered[count - 1] < ordered[count]:
            yield float((ordered[count - 1] + ordered[count]) / 2)


def _safe(goal: Goal, evidence: Evidence) -> bool:
    """Whether the quality bounds are met with something to spare, for other samples than these."""
    return all(_clears(bound, sober(evidence)) for bound in goal.quality_bounds)


def _clears(bound: Bound, evidence: Evidence) -> bool:
    if bound.quantity == "quality":
        seen = evidence.quality
    else:
        seen = evidence.relative_drop if bound.relative else evidence.drop
    if bound.least:
        return seen.mid - CAUTION * (seen.mid - seen.low) >= bound.value
    return seen.mid + CAUTION * (seen.high - seen.mid) <= bound.value
