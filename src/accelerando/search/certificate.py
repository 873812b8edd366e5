"""Certify: the figures that are printed, measured once, on samples and in rounds that nothing was selected on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from accelerando.errors import Reason, RefusalError
from accelerando.goal import Goal, Outcome
from accelerando.ladder import Ladder, Rung
from accelerando.measure.arm import LOAD_SECONDS, Arm
from accelerando.measure.bench import examine, rematch
from accelerando.measure.rounds import CERTIFY, Effort
from accelerando.recipe import Recipe
from accelerando.search.budget import Budget
from accelerando.search.grounds import Grounds, standing
from accelerando.signature import Array
from accelerando.trial import FEW_ROUNDS, Refused, Trial

MOST_RUNGS = 6
FALLBACKS = 3  # how many runners-up may take the place of a best that does not certify
PROCESSES = 3  # pairs of new processes in which the best is timed
LEAST_SECONDS = 4.0  # of duel, for those rungs that are certified whatever the budget says


@dataclass
class Certificate:
    """What certifying found: rungs by recipe key, their answers to the probe, and who failed."""

    rungs: dict[str, Rung] = field(default_factory=dict)
    answers: dict[str, list[Array]] = field(default_factory=dict)
    failed: list[Trial] = field(default_factory=list)


def certify(
    history: Sequence[Trial],
    original: Recipe,
    grounds: Grounds,
    probe: tuple[Array, ...],
    budget: Budget,
    doing: Callable[[Recipe, str], None] = lambda recipe, what: None,
) -> tuple[Ladder, Rung, Certificate]:
    """The certified ladder, and its best rung.

    The order is fixed before anything is measured: the best by the select split, the original, and then the other
    rungs as long as time lasts; while no best has met the goal, its runners-up come first.  The best is the first of
    that order that meets the goal, so that it is not picked for its luck on the certify split.  The best and the
    original are certified whatever the budget says, for without them there is nothing to show.

    Returns:
        The ladder, the best rung, and the certificate.

    Raises:
        RefusalError: the original itself can't be measured any more.
    """
    goal, done, best = grounds.goal, Certificate(), None
    grounds.bench.patience = LOAD_SECONDS
    verified = standing(history)
    ranked = sorted(verified.values(), key=lambda t: goal.merit(t.evidence), reverse=True)  # type: ignore[arg-type]
    ladder = Ladder.climb(list(verified.values()), original, keep=ranked[0].recipe)
    others = [verified[r.recipe.key] for r in reversed(ladder.rungs)]
    must = {ranked[0].recipe.key, original.key}
    queue = _unique([ranked[0], verified[original.key], *others])[:MOST_RUNGS]
    runners_up = [t for t in ranked[1 : 1 + FALLBACKS] if t.recipe.key != original.key]
    took = 0.0
    while queue:
        trial = queue.pop(0)
        if trial.recipe.key not in must and budget.to_certify < took:
            break
        doing(trial.recipe, "certifying")
        before = budget.used
        share = 0.5 if trial is ranked[0] else 1 / (len(queue) + 1) if trial.recipe != original else 0.0
        pairs = PROCESSES if trial is ranked[0] and trial.recipe != original else 1
        rung = _certify(trial, grounds, probe, done, budget.to_certify * share, pairs)
        took = budget.used - before
        if rung is not None and best is None and goal.judge(rung.evidence).outcome is Outcome.MET:
            best = rung
        elif best is None and trial.recipe != original and runners_up:
            queue = _unique([*queue[:1], runners_up.pop(0), *queue[1:]])
    rungs = list(done.rungs.values())
    if original.key not in done.rungs:
        raise RefusalError(Reason.CRASHED, getattr(done.failed[-1].outcome, "detail", ""))
    best = best or max(rungs, key=lambda r: goal.merit(r.evidence))
    climbed = Ladder.of(rungs, original, keep=best.recipe)
    return climbed, _on(climbed, best, goal), done


def uncertified(history: Sequence[Trial], original: Recipe, goal: Goal) -> tuple[Ladder, Rung]:
    """The ladder and the best as the search has them so far: what an interrupt leaves."""
    verified = standing(history)
    best = max(verified.values(), key=lambda t: goal.merit(t.evidence))  # type: ignore[arg-type]
    ladder = Ladder.climb(list(verified.values()), original, keep=best.recipe)
    return ladder, ladder.rungs[ladder.best(goal.merit)]


def _on(ladder: Ladder, best: Rung, goal: Goal) -> Rung:
    """The best, if it has a rung: what is not clearly faster than the original has none, and the best that has one
    takes its place."""
    there = {r.recipe.key for r in ladder.rungs}
    return best if best.recipe.key in there else ladder.rungs[ladder.best(goal.merit)]


def _certify(
    trial: Trial, grounds: Grounds, probe: tuple[Array, ...], done: Certificate, seconds: float, processes: int = 1
) -> Rung | None:
    assert trial.verified is not None
    subject = grounds.subject(trial.recipe, trial.verified.artifact)
    answers: list[Array] = []

    def ask(arm: Arm) -> None:
        answers.extend(arm.answers(probe, LOAD_SECONDS))

    effort, bench = _effort(grounds.goal, seconds, processes), grounds.bench
    try:
        evidence = examine(subject, bench, "certify", effort, visit=ask, seed=1)
        for seed in range(2, processes + 1):
            evidence = evidence.with_rounds(**vars(rematch(subject, bench, "certify", effort, seed)))
    except RefusalError as error:
        done.failed.append(replace(trial, outcome=Refused(error.reason, f"while certifying: {error.detail}")))
        return None
    rung = Rung(trial.recipe, trial.verified.artifact, evidence, certified=True)
    done.rungs[trial.recipe.key] = rung
    done.answers[trial.recipe.key] = answers
    return rung


def _effort(goal: Goal, seconds: float, processes: int) -> Effort:
    """As many rounds in each pair of processes as fit, between the least and the most that certifying asks for."""
    seconds = max(seconds * 0.7, LEAST_SECONDS) / processes
    rounds = int(seconds / (2 * CERTIFY.block_seconds))
    least = max(FEW_ROUNDS, CERTIFY.least // processes)
    most = min(CERTIFY.most // processes, max(least, rounds))
    return replace(CERTIFY, least=least, most=most, calls=-(-goal.samples_needed // processes), seconds=seconds)


def _unique(trials: Sequence[Trial]) -> list[Trial]:
    return list({t.recipe.key: t for t in trials}.values())
