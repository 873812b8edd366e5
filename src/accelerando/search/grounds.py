"""`attempt`: the one place where an exception becomes data."""

from __future__ import annotations

import contextlib
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from accelerando.errors import BrokenPluginError, Reason, RefusalError, UsageError
from accelerando.goal import Goal, Outcome
from accelerando.interval import Interval
from accelerando.measure.arm import LOAD_SECONDS, Subject
from accelerando.measure.bench import Bench, examine
from accelerando.measure.rounds import RACE, SCREEN, SELECT, Effort, Rounds, contest
from accelerando.recipe import Artifact, File, Recipe, Stage
from accelerando.search.directions import grows
from accelerando.search.history import LOSSLESS_DROP, Proposal, front_of
from accelerando.search.workshop import Built, Workshop
from accelerando.trial import Evidence, Refused, Trial, Verified, thin

BUILD_SECONDS = 300.0  # a build that takes longer has hung, whatever the budget
SHAPE_SCREEN = Effort(least=12, most=12, block_seconds=0.1)
HOPE = 0.9  # a candidate that is under this share of the original's speed after the screen is turned away


@dataclass(frozen=True)
class Grounds:
    """Where attempts are made: the workshop that builds, the bench that examines, and the bundle's folder."""

    workshop: Workshop
    bench: Bench
    goal: Goal
    into: Path

    def folder(self, recipe: Recipe) -> Path:
        return self.into / "rungs" / recipe.key

    def adopt_original(self, artifact: Artifact) -> None:
        """From now on the original is these files."""
        self.bench.original = replace(self.bench.original, artifact=artifact)

    def subject(self, recipe: Recipe, artifact: Artifact) -> Subject:
        """A recipe's files; the user's own module goes along only where the backend needs it."""
        skeleton = None if recipe.backend.portable else self.bench.original.skeleton
        return Subject(recipe, artifact, self.folder(recipe), skeleton)


def attempt(
    proposal: Proposal,
    grounds: Grounds,
    history: tuple[Trial, ...],
    seconds_left: float,
    doing: Callable[[str], None] = lambda what: None,
) -> Trial:
    """Build, load from disk and measure one recipe.  Gives a trial, whatever happens.

    Args:
        proposal: what to try; if `again`, the files are there and more rounds are added to its evidence.
        history: trials so far, from which the gates take the best.
        seconds_left: of the budget.
        doing: told of each step.

    Raises:
        UsageError: the caller's own mistake came to light only now, such as a metric that fails.
    """
    recipe, start = proposal.recipe, time.monotonic()
    before = next((t for t in reversed(history) if t.recipe.key == recipe.key), None)
    log: tuple[str, ...] = ()
    is_original = recipe.key == grounds.bench.original.recipe.key
    grounds.bench.patience = LOAD_SECONDS if is_original else min(LOAD_SECONDS, max(10.0, 0.2 * seconds_left))
    try:
        if proposal.again and before and before.verified:
            doing("measuring again")
            artifact, log = before.verified.artifact, before.log
            more = examine(grounds.subject(recipe, artifact), grounds.bench, "select", SELECT, seed=len(history))
            outcome: Verified | Refused = Verified(artifact, merged(before.verified.evidence, more))
        else:
            doing("building")
            built = _build(recipe, grounds, _patience(recipe, seconds_left), doing)
            log = built.log
            doing("measuring")
            outcome = Verified(built.artifact, _examine(recipe, built.artifact, grounds, history))
    except RefusalError as error:
        outcome = Refused(error.reason, error.detail, error.step, error.evidence, error.speedup)
    except (UsageError, BrokenPluginError):
        raise
    except Exception as error:  # noqa: BLE001  this is the place
        lines = "".join(traceback.format_exception(error))[-2000:]
        outcome = Refused(Reason.CRASHED, f"{type(error).__name__}: {error}\n{lines}")
    if isinstance(outcome, Refused) and proposal.again and is_original and before is not None:
        return before  # it ran before: others' load, say, is no reason to lose it
    if isinstance(outcome, Refused):
        shutil.rmtree(grounds.folder(recipe), ignore_errors=True)
    return Trial(recipe, outcome, time.monotonic() - start, log)


def race(proposal: Proposal, grounds: Grounds, history: tuple[Trial, ...], seconds_left: float) -> list[Trial]:
    """The proposal's recipe and its rivals in one contest: a trial for each, whose speed is the contest's alone.

    Their scores were measured and stay.  A rival that fails is refused; the others race without it.
    """
    start, known = time.monotonic(), standing(history)
    runners = [known[r.key] for r in (proposal.recipe, *proposal.rivals)]
    grounds.bench.patience, trials, ready = LOAD_SECONDS, [], []
    with contextlib.ExitStack() as stack:
        for trial in runners:
            assert trial.verified is not None
            try:
                subject = grounds.subject(trial.recipe, trial.verified.artifact)
                ready.append((trial, stack.enter_context(grounds.bench.arm(subject, "select"))))
            except RefusalError as error:
                trials.append(replace(trial, outcome=Refused(error.reason, error.detail)))
        if not ready:
            return trials
        try:
            effort = replace(RACE, seconds=min(RACE.seconds, max(5.0, seconds_left)))
            arms, original = [arm for _, arm in ready], grounds.bench.original_arm
            seen = contest(arms, original, effort, cores=grounds.bench.machine.cores, seed=len(history))
        except RefusalError as error:
            outcome = Refused(error.reason, f"while racing: {error.detail}")
            return [*trials, *(replace(trial, outcome=outcome) for trial, arm in ready if not arm.alive)]
    for (trial, _), rounds in zip(ready, seen, strict=True):
        assert trial.verified is not None
        timed = replace(
            trial.verified.evidence, rounds=rounds.rounds, stolen=rounds.stolen, seconds=thin(rounds.seconds),
            original_seconds=thin(rounds.original_seconds),
        )  # fmt: skip
        took = (time.monotonic() - start) / len(ready)
        trials.append(replace(trial, outcome=replace(trial.verified, evidence=timed), seconds=took))
    return trials


def standing(history: Sequence[Trial]) -> dict[str, Trial]:
    """The verified trials by recipe key; of a recipe that was tried more than once, the last counts."""
    last = {t.recipe.key: t for t in history}
    return {key: trial for key, trial in last.items() if trial.verified}


def merged(before: Evidence, more: Evidence) -> Evidence:
    """One evidence from two examinations of the same files: all rounds and calls of both."""
    both = before.with_rounds(more.rounds, more.stolen, more.seconds, more.original_seconds)
    return replace(both, peak_bytes=max(before.peak_bytes, more.peak_bytes))


def _patience(recipe: Recipe, seconds_left: float) -> float:
    """Seconds after which a build has hung; lessons, which say how long they are, come on top."""
    members = recipe.backend.members or (recipe,)
    lessons = sum(s.expected_seconds for m in members for s in m.steps if s.stage is Stage.HEAL)
    return 1.5 * lessons + min(BUILD_SECONDS, max(20.0, 0.5 * seconds_left))


def _build(recipe: Recipe, grounds: Grounds, timeout: float, heard: Callable[[str], None]) -> Built:
    folder = grounds.folder(recipe)
    shutil.rmtree(folder, ignore_errors=True)  # a killed run may have left half of it
    built = grounds.workshop.build(recipe, folder, timeout, heard)
    check_files(built.artifact, folder)
    return built


def check_files(artifact: Artifact, folder: Path) -> None:
    """Whether every file is there, whole and unchanged.

    Raises:
        RefusalError: DAMAGED.
    """
    if not artifact.files:
        raise RefusalError(Reason.DAMAGED, "the backend left no file")
    for file in artifact.files:
        path = folder / file.path
        if not path.is_file() or File.of(path, folder) != file:
            raise RefusalError(Reason.DAMAGED, f"{file.path} is not the {file.bytes:,} bytes that were written")


def _examine(recipe: Recipe, artifact: Artifact, grounds: Grounds, history: tuple[Trial, ...]) -> Evidence:
    subject, bench, goal = grounds.subject(recipe, artifact), grounds.bench, grounds.goal
    if recipe.key == bench.original.recipe.key:
        grounds.adopt_original(artifact)
        return examine(subject, bench, "select", SELECT)
    grown = grows(front_of(recipe)) and not goal.wants_speed  # slower on purpose, for quality that no other has
    best = None if grown else _best_lossless(history)

    def too_slow(rounds: Rounds) -> RefusalError | None:
        """Slower than the best by the ratio and by the clock: others' load moves each of them, and seldom both."""
        speedup, seconds = rounds.speedup, float(np.median(rounds.seconds))
        slower = best is not None and best.evidence and seconds > best.evidence.latency().high
        if best is not None and best.evidence and slower and speedup.high < best.evidence.speedup.low:
            figure, other = f"{speedup.mid:.2f}x", best.evidence.speedup
            return RefusalError(
                Reason.TOO_SLOW, f"{figure}, where {best.recipe} gives {other.mid:.2f}x and loses nothing"
            )
        if speedup.high < HOPE:
            return RefusalError(Reason.TOO_SLOW, f"{speedup.mid:.2f}x: slower than the original")
        return None

    def too_bad(evidence: Evidence) -> RefusalError | None:
        missed = [
            c for c in goal.judge(evidence).checks if c.bound in goal.quality_bounds and c.outcome is Outcome.NOT_MET
        ]
        if missed:
            drop = evidence.relative_drop
            return RefusalError(Reason.BELOW_QUALITY, f"drop {drop.mid:.1%} ({drop.low:.1%} to {drop.high:.1%})")
        return None

    def lost(speedup: Interval) -> bool:
        return best is not None and best.evidence is not None and speedup.high < best.evidence.speedup.low

    calls = replace(SELECT, calls=min(goal.samples_needed, 2000))
    front = front_of(recipe)
    only_cut = bool(front) and front[-1].stage is Stage.SHAPE  # the screen is all that it gets, and much hangs on it
    return examine(
        subject, bench, "select", calls, after_screen=too_slow, after_scores=too_bad, answered=lost,
        screen=SHAPE_SCREEN if only_cut else SCREEN,
    )  # fmt: skip


def _best_lossless(history: tuple[Trial, ...]) -> Trial | None:
    """The fastest verified recipe that loses nothing: whatever is clearly slower than it can't win."""
    verified = standing(history).values()
    lossless = [t for t in verified if t.evidence and t.evidence.relative_drop.mid <= LOSSLESS_DROP]
    return max(lossless, key=lambda t: t.evidence.speedup.mid if t.evidence else 0.0, default=None)
