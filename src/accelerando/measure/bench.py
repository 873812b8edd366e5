"""One function examines everything, the original included: reloaded from disk, in a fresh process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from accelerando.errors import DataError, Reason, RefusalError
from accelerando.interval import Floats, Interval
from accelerando.machine import Machine
from accelerando.measure.arm import LOAD_SECONDS, Arm, Subject
from accelerando.measure.rounds import SCREEN, Effort, Rounds, duel
from accelerando.metric import Metric
from accelerando.signature import Signature
from accelerando.trial import Evidence, thin

ORIGINAL_SECONDS = 1800.0  # the original is given all the time that it takes to score a split

ScreenGate = Callable[[Rounds], "RefusalError | None"]
ScoreGate = Callable[[Evidence], "RefusalError | None"]


@dataclass
class Bench:
    """The place where recipes are examined: the original, loaded and kept, and all that evidence depends on.

    Args:
        original: what every candidate is held against.
        signature: how the model is called.
        metric: how its answers are judged.
        data: folder with the splits.
        machine: this one.
        batch: rows per timed call.
        memory_limit: bytes that an arm may hold.
        patience: seconds that a candidate may take to load and to give its first answer.
    """

    original: Subject
    signature: Signature
    metric: Metric
    data: Path
    machine: Machine
    batch: int
    memory_limit: int | None = None
    patience: float = LOAD_SECONDS
    _arm: Arm | None = field(default=None, repr=False)
    _scoring_seconds: float = field(default=0.0, repr=False)
    _peak: int = field(default=0, repr=False)
    _scores: dict[str, Floats] = field(default_factory=dict, repr=False)

    @property
    def original_arm(self) -> Arm:
        """The original, loaded; it stays for all the duels to come."""
        if self._arm is not None and not self._arm.alive:
            self.close()  # killed from outside, for memory perhaps: the next duel gets a fresh one
        if self._arm is None:
            self._arm = self.arm(self.original, "select", LOAD_SECONDS)
            self._arm.block(0.1, LOAD_SECONDS)
            self._peak = self._arm.peak_bytes()  # now, before larger batches are scored
        return self._arm

    @property
    def original_peak_bytes(self) -> int:
        return self._peak

    def arm(self, subject: Subject, split: str, patience: float | None = None) -> Arm:
        limit = self.patience if patience is None else patience
        return Arm(subject, self.signature, self.data, split, self.batch, self.memory_limit, limit)

    def original_scores(self, split: str) -> Floats:
        """The original's per-sample statistics; asked once for each split."""
        if split not in self._scores:
            start = time.monotonic()
            self._scores[split] = self.original_arm.scores(self.data / split, self.metric, ORIGINAL_SECONDS)
            self._scoring_seconds = max(self._scoring_seconds, time.monotonic() - start)
        return self._scores[split]

    @property
    def scoring_limit(self) -> float:
        """Seconds that a candidate may take to score a split: what takes thrice the original's is of no use."""
        return LOAD_SECONDS / 4 + 3 * self._scoring_seconds

    def close(self) -> None:
        if self._arm is not None:
            self._arm.close()
            self._arm = None


def examine(
    subject: Subject,
    bench: Bench,
    split: str,
    effort: Effort,
    *,
    after_screen: ScreenGate = lambda rounds: None,
    after_scores: ScoreGate = lambda evidence: None,
    answered: Callable[[Interval], bool] = lambda speedup: False,
    visit: Callable[[Arm], None] = lambda arm: None,
    seed: int = 0,
    screen: Effort = SCREEN,
) -> Evidence:
    """Load a recipe's files in a fresh process, and measure speed, quality and memory against the original.

    Cheap before dear: a short duel, then the scores, then the long duel; the two gates may end it in between.

    Args:
        subject: what to examine; the original itself is one.
        split: `select` or `certify`.
        effort: of the long duel; `screen` of the short one before it.
        after_screen, after_scores: give the reason to stop, or None.
        answered: whether a speedup answers the question, so that the duel may end early.
        visit: called with the loaded arm when all is measured.

    Raises:
        RefusalError: it failed, or a gate turned it away; where it had been scored by then, the error's
            `evidence` says so.
    """
    original = bench.original_arm
    with bench.arm(subject, split) as arm:
        cores = bench.machine.cores
        rounds = duel(arm, original, screen, cores=cores, seed=seed)
        peak = arm.peak_bytes()
        if refusal := after_screen(rounds):
            refusal.speedup = rounds.speedup
            raise refusal
        scores = bench.original_scores(split)
        if subject.recipe.key != bench.original.recipe.key:  # its answers are those it is compared with
            scores = _scores(arm, bench, split)
        evidence = _evidence(subject, bench, split, rounds, scores, arm.load_seconds, peak)
        if refusal := after_scores(evidence):
            refusal.evidence, refusal.speedup = evidence, evidence.speedup
            raise refusal
        if effort.most > screen.most:
            rounds += duel(arm, original, effort.after(screen.most), cores=cores, seed=seed + 1, answered=answered)
            evidence = _evidence(subject, bench, split, rounds, scores, arm.load_seconds, peak)
        visit(arm)
    return evidence


def rematch(subject: Subject, bench: Bench, split: str, effort: Effort, seed: int = 0) -> Rounds:
    """One more duel, in which candidate and original both have a process that is new.

    Two processes of the same files differ by a few percent, for memory and threads fall otherwise in each; within
    one pair of processes no number of rounds shows that.

    Raises:
        RefusalError: the candidate failed.
    """
    bench.close()
    original = bench.original_arm
    with bench.arm(subject, split) as arm:
        return duel(arm, original, effort, cores=bench.machine.cores, seed=seed)


def _scores(arm: Arm, bench: Bench, split: str) -> Floats:
    """A candidate's scores; the metric has judged the original by now, so where it fails, the answers are at fault."""
    try:
        return arm.scores(bench.data / split, bench.metric, bench.scoring_limit)
    except DataError as error:
        raise RefusalError(Reason.WRONG_OUTPUT, str(error)) from error


def _evidence(
    subject: Subject, bench: Bench, split: str, rounds: Rounds, scores: Floats, load_seconds: float, peak: int
) -> Evidence:
    return Evidence(
        split=split,
        batch=bench.batch,
        rounds=rounds.rounds,
        stolen=rounds.stolen,
        seconds=thin(rounds.seconds),
        original_seconds=thin(rounds.original_seconds),
        scores=scores,
        original_scores=bench.original_scores(split),
        metric=bench.metric.name,
        higher_is_better=bench.metric.higher_is_better,
        load_seconds=load_seconds,
        peak_bytes=peak,
        original_peak_bytes=bench.original_peak_bytes,
        disk_bytes=subject.artifact.bytes,
        original_disk_bytes=bench.original.artifact.bytes,
        machine=bench.machine.key,
    )
