"""Certify: the figures that are printed, measured once, on samples and in rounds that nothing was selected on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from accelerando.errors import Reason, RefusalError
from accelerando.goal import Goal, Outcome
from accelerando.ladder import Ladder, Rung
from accelerando.measure.arm import LOAD_SECONDS, Arm
from accelerando.measure.bench import examine, rematch
from accelerando.measure.rounds import CERTIFY, Effort
from accelerando.recipe import Recipe, Stage
from accelerando.search.budget import Budget
from accelerando.search.grounds import Grounds, standing
from accelerando.search.history import merit
from accelerando.signature import Array
from accelerando.trial import FEW_ROUNDS, Refused, Trial

MOST_RUNGS = 6
FALLBACKS = 4  # how many runners-up may take the place of a best that does not certify
SAFER = 0.75  # times the width of the drop of what failed for its quality: a runner-up as unsure would fail likewise
PROCESSES = 3  # pairs of new processes in which the best is timed
LEAST_SECONDS = 4.0  # of duel, for those rungs that are certified whatever the budget says


@dataclass
class Certificate:
    """What certifying found: rungs by recipe key, their answers to the probe, and who failed."""

    rungs: dict[str, Rung] = field(default_factory=dict)
    answers: dict[str, list[Array]] = field(default_factory=dict)
    failed: list[Trial] = field(default_factory=list)


@dataclass
class Order:
    """Who is certified next, and who is the best: the first in this order that meets the goal.

    The best by the select split comes first, then the original, then the other rungs from the fastest down.  While no
    best has met the goal, runners-up come before those, each of which must promise more of what the last one fell
    short of.  The order never looks at how good a certificate is, only whether it meets the goal: so the best is not
    picked for its luck on the certify split.  The original is the last resort.
    """

    goal: Goal
    original: Recipe
    waiting: list[Trial]
    runners_up: list[Trial]
    fallbacks: int = FALLBACKS
    best: Rung | None = None

    @classmethod
    def of(cls, verified: Mapping[str, Trial], original: Recipe, goal: Goal) -> Order:
        """The order of verified trials, by recipe key, the original among them."""
        ranked = sorted(verified.values(), key=partial(merit, goal=goal), reverse=True)
        ladder = Ladder.climb(ranked, original, keep=ranked[0].recipe)
        others = [verified[r.recipe.key] for r in reversed(ladder.rungs)]
        waiting = _unique([ranked[0], verified[original.key], *others])[:MOST_RUNGS]
        return cls(goal, original, waiting, [t for t in ranked[1:] if t.recipe != original])

    def heard(self, trial: Trial, rung: Rung | None) -> None:
        """Take note of what certifying made of the trial that was first in `waiting`; None where it failed."""
        self.waiting.remove(trial)
        if trial.recipe == self.original or self.best is not None:
            return
        if rung is not None and self.goal.judge(rung.evidence).outcome is Outcome.MET:
            self.best = rung
        elif self.fallbacks:
            self.runners_up = [t for t in self.runners_up if _promises_more(t, trial, rung, self.goal)]
            ahead = [t for t in self.waiting[:1] if t.recipe == self.original]
            self.waiting = _unique([*ahead, *self.runners_up[:1], *self.waiting])
            self.runners_up, self.fallbacks = self.runners_up[1:], self.fallbacks - 1


def certify(
    history: Sequence[Trial],
    original: Recipe,
    grounds: Grounds,
    probe: tuple[Array, ...],
    budget: Budget,
    doing: Callable[[Recipe, str], None] = lambda recipe, what: None,
) -> tuple[Ladder, Rung, Certificate]:
    """The certified ladder, and its best rung, as long as time lasts.

    The best by the select split and the original are certified whatever the budget says, for without them there is
    nothing to show.

    Returns:
        The ladder, the best rung, and the certificate.

    Raises:
        RefusalError: the original itself can't be measured any more.
    """
    goal, done, took = grounds.goal, Certificate(), 0.0
    grounds.bench.patience = LOAD_SECONDS
    order = Order.of(standing(history), original, goal)
    first = order.waiting[0]
    while order.waiting:
        trial = order.waiting[0]
        if trial is not first and trial.recipe != original and budget.to_certify < took:
            break
        doing(trial.recipe, "certifying")
        before = budget.used
        share = 0.5 if trial is first else 1 / len(order.waiting) if trial.recipe != original else 0.0
        pairs = PROCESSES if order.best is None and trial.recipe != original else 1
        rung = _certify(trial, grounds, probe, done, budget.to_certify * share, pairs)
        took = budget.used - before
        order.heard(trial, rung)
    rungs = list(done.rungs.values())
    if original.key not in done.rungs:
        raise RefusalError(Reason.CRASHED, getattr(done.failed[-1].outcome, "detail", ""))
    best = order.best or max(rungs, key=lambda r: goal.merit(r.evidence))
    climbed = Ladder.of(rungs, original, keep=best.recipe)
    return climbed, _on(climbed, best, goal), done


def _promises_more(trial: Trial, failed: Trial, rung: Rung | None, goal: Goal) -> bool:
    """Whether a runner-up may certify where another did not: for quality, it must be a safer one.

    That is, its drop is known clearly better, or it does only some of what may have cost the other its quality.
    """
    missed = goal.judge(rung.evidence).checks if rung else ()
    if not any(c.bound in goal.quality_bounds and c.outcome is not Outcome.MET for c in missed):
        return True
    assert trial.evidence is not None
    assert failed.evidence is not None
    mine, theirs = trial.evidence.drop, failed.evidence.drop
    return mine.high - mine.low <= SAFER * (theirs.high - theirs.low) or _risks(trial) < _risks(failed)


def _risks(trial: Trial) -> frozenset[str]:
    """The techniques that change what is answered, in a cascade those of its members."""
    recipes = trial.recipe.backend.members or (trial.recipe,)
    return frozenset(s.name for r in recipes for s in r.steps if s.stage is not Stage.LOWER)


def uncertified(history: Sequence[Trial], original: Recipe, goal: Goal) -> tuple[Ladder, Rung]:
    """The ladder and the best as the search has them so far: what an interrupt leaves."""
    verified = standing(history)
    best = max(verified.values(), key=partial(merit, goal=goal))
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
