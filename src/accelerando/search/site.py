"""The site of a search: the bundle's folder while it is being filled.

    bundle/manifest.json, rungs/, trials.jsonl      what stays
    bundle/work/data/                               the splits, for the arms to map
    bundle/work/steps/                              the workshop's intermediate files
    bundle/work/rungs/<key>/                        the files of every recipe that was verified
    bundle/work/lock                                held by the one search that may work here

The work folder goes when the search is finished; until then a killed search can be resumed from what is here.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerando.bundle import Bundle
from accelerando.errors import Reason, RefusalError, UsageError
from accelerando.goal import Goal, Outcome
from accelerando.ladder import Ladder, Rung
from accelerando.machine import Machine, installed_version
from accelerando.measure.arm import PROBE_ROWS, Subject, save_samples
from accelerando.measure.bench import Bench
from accelerando.parity import Parity
from accelerando.recipe import Artifact, Recipe
from accelerando.search.budget import Budget
from accelerando.search.certificate import certify, uncertified
from accelerando.search.grounds import Grounds, check_files
from accelerando.search.head_start import HeadStart, students_of
from accelerando.search.log import Journal
from accelerando.search.stored import rows_to_ask
from accelerando.search.structure import structure_of
from accelerando.search.workshop import Workshop
from accelerando.trial import Refused, Trial
from accelerando.workload import Form, Workload

MEMORY_SHARE = 0.8
# Reasons that more room, time, packages or a repaired disk take away between one call and the next.
MAY_PASS = frozenset({
    Reason.MISSING_PACKAGE, Reason.MISSING_TOOL, Reason.NO_ROOM, Reason.OUT_OF_MEMORY, Reason.TIMED_OUT, Reason.DAMAGED,
})  # fmt: skip
ROOM_FACTOR = 12  # how many times the model's own size the candidates may need on disk


class Site:
    """Where one search works; a context that cleans up after itself.

    Args:
        origin: how to get the original again.
        again: the command or call that does the same again, for the reports.

    Raises:
        UsageError: the folder is in use, holds something else, or the disk has no room.
        BundleError: it holds a bundle of another model, or a damaged one.
    """

    def __init__(
        self,
        into: str | Path,
        workload: Workload,
        machine: Machine,
        goal: Goal,
        budget: Budget,
        original: Recipe,
        memory_limit: int | None = None,
        origin: str | None = None,
        again: str | None = None,
        head_start: HeadStart | None = None,
    ) -> None:
        self.into = Path(into)
        self.workload, self.machine, self.goal, self.budget = workload, machine, goal, budget
        self.original, self.origin, self.again, self.head_start = original, origin, again, head_start
        self._structure = structure_of(workload)
        self._before = _bundle_in(self.into, workload)
        self._check_room()
        self.work = self.into / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.work / "lock")
        try:
            self.journal = Journal(self.into / "trials.jsonl")
            for name in ("calibrate", "select", "certify", "train"):
                if (rows := getattr(workload, name)) is not None:
                    save_samples(rows, self.work / "data" / name)
            limit = memory_limit or int(machine.memory_bytes * MEMORY_SHARE)
            skeleton = workload.model.content if workload.model.form is Form.TORCH else None
            subject = Subject(original, Artifact(()), self.work / "rungs" / original.key, skeleton)
            data = self.work / "data"
            bench = Bench(subject, workload.model.signature, workload.metric, data, machine, goal.batch, limit)
            workshop = Workshop(workload, machine, self.work / "steps", data, limit, head_start)
            self.grounds = Grounds(workshop, bench, goal, self.work)
        except BaseException:
            os.close(self._lock)
            raise
        self._done = self.finished is not None
        self._news = False  # whether this call has added anything to what was there

    @property
    def finished(self) -> Bundle | None:
        """The bundle of an earlier search here that had nothing left to try for this very goal."""
        before = self._before
        same = before is not None and before.goal == self.goal and before.machine.key == self.machine.key
        if before is None or not same or not before.run["finished"]:
            return None
        return before if before.run["budget_seconds"] >= self.budget.seconds else None

    def history(self) -> tuple[Trial, ...]:
        """The trials of earlier searches here that still count.

        They are this machine's, of this goal's batch, with their files in place; what was refused for a reason that
        may have passed since, or under a goal that was stricter, is tried anew.
        """
        trials = []
        for trial in self.journal.read(self.machine.key):
            if not self._still_counts(trial):
                continue
            if trial.verified is not None:
                folder, published = self.grounds.folder(trial.recipe), self.into / "rungs" / trial.recipe.key
                if not folder.exists() and published.exists():
                    shutil.copytree(published, folder, copy_function=_link)
                try:
                    check_files(trial.verified.artifact, folder)
                except RefusalError:
                    continue  # it will be tried anew
                if trial.recipe == self.original:
                    self.grounds.adopt_original(trial.verified.artifact)
            trials.append(trial)
        return tuple(trials)

    def _still_counts(self, trial: Trial) -> bool:
        evidence, outcome = trial.evidence, trial.outcome
        if evidence is not None and evidence.batch != self.goal.batch:
            return False
        if not isinstance(outcome, Refused):
            return True
        if outcome.reason is Reason.BELOW_QUALITY:
            checks = self.goal.judge(evidence).checks if evidence else ()
            return any(c.outcome is Outcome.NOT_MET and c.bound in self.goal.quality_bounds for c in checks)
        return outcome.reason not in MAY_PASS

    def note(self, history: tuple[Trial, ...], trial: Trial) -> tuple[Trial, ...]:
        """The history with one trial more; it is on the disk, and the bundle holds the best so far.

        Raises:
            UsageError: the disk is full; everything before this trial is kept.
        """
        try:
            self.journal.append(trial)
            history = (*history, trial)
            self._news = self._news or trial.verified is not None
            if trial.verified and any(t.verified and t.recipe == self.original for t in history):
                self.save(history, "running")
        except OSError as error:
            raise UsageError(
                f"no room to go on at {self.into}: {error}; "
                "free some space and call again, nothing that was measured is lost"
            ) from error
        return history

    def save(self, history: tuple[Trial, ...], why: str) -> Bundle:
        """Write the bundle with the best so far, not certified."""
        if not any(t.verified and t.recipe == self.original for t in history):
            raise UsageError("stopped before the original was measured: there is nothing to keep yet")
        if why == "interrupted" and self._before is not None and not self._news and self._before.goal == self.goal:
            return self._before  # nothing was added to what an earlier search left: its certificates stay
        ladder, best = uncertified(history, self.original, self.goal)
        return self._write(ladder, best, history, why, None, None)

    def finish(self, history: tuple[Trial, ...], doing: Callable[[Recipe, str], None]) -> Bundle:
        """Certify, profile, and write the bundle for good; the work folder goes."""
        probe = rows_to_ask(self.workload)
        explored = self.budget.to_explore > 0
        ladder, best, certificate = certify(history, self.original, self.grounds, probe, self.budget, doing)
        for trial in certificate.failed:
            self.journal.append(trial)
        answers = {rung.recipe.key: certificate.answers[rung.recipe.key] for rung in ladder.rungs}
        parity = Parity.of(probe, self.original.key, answers, self.workload.fixed_batch or PROBE_ROWS)
        why = "nothing left worth its time" if explored else "the budget was used"
        bundle = self._write(ladder, best, history, why, parity, None)
        self._done = True
        profile = self._profile()  # an interrupt from here on costs the profile alone
        return self._write(ladder, best, history, why, parity, profile) if profile else bundle

    def close(self) -> None:
        self.grounds.workshop.close()
        self.grounds.bench.close()
        os.close(self._lock)
        if self._done:
            shutil.rmtree(self.work, ignore_errors=True)

    def __enter__(self) -> Site:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _profile(self) -> dict[str, Any] | None:
        """The original's profile, if time is left for one; it never costs the bundle."""
        seconds = min(20.0, self.budget.left)
        if seconds < 3:
            return None
        try:
            return self.grounds.workshop.profile(seconds)
        except RefusalError:
            return None

    def _write(
        self, ladder: Ladder, best: Rung, history: tuple[Trial, ...], why: str, parity: Parity | None, profile: Any
    ) -> Bundle:
        for rung in ladder.rungs:
            self._publish(rung)
        kept = {rung.recipe.key for rung in ladder.rungs}
        if parity is not None and not kept <= parity.rungs.keys():
            parity = None
        return Bundle.write(
            self.into,
            goal=self.goal,
            verdict=self.goal.judge(best.evidence),
            best=[r.recipe.key for r in ladder.rungs].index(best.recipe.key),
            ladder=ladder,
            signature=self.workload.model.signature,
            machine=self.machine,
            workload=self._workload_facts(),
            run={
                "started": datetime.fromtimestamp(time.time() - self.budget.used, timezone.utc).isoformat(
                    timespec="seconds"
                ),
                "seconds": round(self.budget.used, 1),
                "budget_seconds": self.budget.seconds,
                "trials": len({t.recipe.key for t in history}),
                "finished": why == "nothing left worth its time",
                "why_stopped": why,
                "accelerando": installed_version("accelerando") or "unknown",
                "command": self.again,
            },
            profile=profile,
            parity=parity,
            students=students_of(ladder, self.work / "lessons", self._before, self.head_start),
        )

    def _publish(self, rung: Rung) -> None:
        """A rung's files into the bundle, by link where the file system can."""
        source, target = self.grounds.folder(rung.recipe), self.into / "rungs" / rung.recipe.key
        if not source.exists() or _is_whole(rung.artifact, target):
            return
        part = target.with_name(target.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part, copy_function=_link)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)

    def _workload_facts(self) -> dict[str, Any]:
        load = self.workload
        return {
            "form": load.model.form.value,
            "metric": load.metric.name,
            "higher_is_better": load.metric.higher_is_better,
            "digest": load.digest,
            "calibrate": len(load.calibrate),
            "select": len(load.select),
            "certify": len(load.certify),
            "notes": list(load.notes),
            "origin": self.origin,
            "structure": self._structure,
        }

    def _check_room(self) -> None:
        parent = next(p for p in (self.into, *self.into.resolve().parents) if p.exists())
        rows = (self.workload.calibrate, self.workload.select, self.workload.certify, self.workload.train)
        needed = sum(x.nbytes for s in rows if s is not None for c in s.chunks for x in c.inputs)
        needed += ROOM_FACTOR * self._model_bytes()
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise UsageError(
                f"the disk at {parent} has {free / 2**20:,.0f} MB free, and this may need {needed / 2**20:,.0f} MB; "
                "free some space, or give into= a folder on another disk"
            )

    def _model_bytes(self) -> int:
        content = self.workload.model.content
        if self.workload.model.form is Form.TORCH:
            return sum(t.numel() * t.element_size() for t in content.state_dict().values())
        return Path(content).stat().st_size


def _bundle_in(into: Path, workload: Workload) -> Bundle | None:
    """The bundle that is there, of the same workload; None where the folder is new or holds a search just begun.

    Raises:
        UsageError: it is a file, or a folder of something else.
        BundleError: it is a bundle of another workload, or a damaged one.
    """
    if not into.exists():
        return None
    if not into.is_dir():
        raise UsageError(f"into={str(into)!r} is a file; give a folder that is new, or that holds a bundle")
    if (into / "manifest.json").exists():
        before = Bundle.open(into, hashes=False)
        before.check_workload(workload.digest)
        return before
    if any(p.name not in ("work", "rungs", "trials.jsonl") for p in into.iterdir()):
        raise UsageError(f"into={str(into)!r} holds something that is not a bundle; give a new or an empty folder")
    (into / "trials.jsonl").unlink(missing_ok=True)  # trials of nobody knows which model
    return None


def _is_whole(artifact: Artifact, folder: Path) -> bool:
    """Whether a folder holds just these files; not so where a recipe was built anew, with other bytes."""
    try:
        check_files(artifact, folder)
    except RefusalError:
        return False
    return True


def _lock(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise UsageError(
            f"another search is at work in {path.parent.parent}; wait for it, or give another folder"
        ) from error
    return handle


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
