"""The loop: a student is taught by the original for a given time, and the best that was seen of it is kept.

begin     the first look; the fastest pace; the learning rate
learn     steps, until it is time to look; a checkpoint for every epoch
judge     look at the student and at its average; keep the best; leave a checkpoint
finish    the best weights, and what there is to say
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.signature import Signature
from accelerando.train import schedule
from accelerando.train.checkpoint import Checkpoint, Progress
from accelerando.train.course import Course
from accelerando.train.fake_quantize import FakeInt8
from accelerando.train.pace import find_pace, threads_kept
from accelerando.train.practice import Practice
from accelerando.train.room import shortage_refused
from accelerando.train.teacher import Teacher
from accelerando.train.watch import Best, Watch
from accelerando.train.weights import Average, Weights, fit, live_weights, put, weights_of
from accelerando.workload import Lessons

SEED = 0
LOOKS = 8  # over the budget, where looking is cheap
LOOKING = 0.1  # of the time at most
PATIENCE, LAST_PHASE = 4, 0.8  # looks without a gain, and from when on they end the lesson
SAY_SECONDS = 1.5
SAVE_SECONDS, SAVING = 2.0, 0.05  # between checkpoints at least; of the time at most
BLOWN = 10.0  # times the loss at the beginning: it diverged
FALLS = 2  # returns to the best weights before it is given up
RANGE_TEST = 0.06  # of the time at most
MOST_REMEMBERED, REMEMBERED = 1000, 0.05  # steps in the average of weights; as a share of all


@dataclass(frozen=True)
class Taught:
    """A module in eval mode without gradients, and what there is to say about how it was taught."""

    module: Any
    log: tuple[str, ...]


def teach(
    module: Any,
    signature: Signature,
    lessons: Lessons,
    course: Course,
    clock: Callable[[], float] = time.monotonic,
) -> Taught:
    """Teach a copy of a module.

    A lesson that was begun in `lessons.folder` goes on with the time that was left; one that was finished is not
    learned again.

    Args:
        clock: seconds since whenever.

    Raises:
        RefusalError: DIVERGED, OUT_OF_MEMORY, NO_ROOM, or UNSUPPORTED: it can't be trained, or not with such data.
    """
    import torch

    with torch.random.fork_rng(devices=()), torch.enable_grad(), threads_kept(), shortage_refused():
        torch.manual_seed(SEED)
        student = _copied(module)
        teacher = Teacher(lessons.teacher, signature, lessons.train, lessons.folder.parent / "teacher")
        checkpoint = Checkpoint(lessons.folder, _key(student, course, teacher.key, lessons))
        saved = checkpoint.read()
        if saved is not None and not all(fit(student, weights) for weights in saved[1].values()):
            saved = None
        if saved is not None and saved[0].done:
            return _taught(student, saved[1]["best"], saved[0])
        lesson = _Lesson(student, signature, lessons, course, teacher, checkpoint, clock)
        best, progress = lesson.resume(*saved) if saved is not None else lesson.begin()
        return _taught(student, best, progress)


class _Astray(Exception):  # noqa: N818  not an error: the lesson goes back and on
    """The loss, or an answer, is not finite, or grows without bound."""


class _Lesson:
    def __init__(
        self,
        student: Any,
        signature: Signature,
        lessons: Lessons,
        course: Course,
        teacher: Teacher,
        checkpoint: Checkpoint,
        clock: Callable[[], float],
    ) -> None:
        self._clock, self._start, self._said = clock, clock(), -math.inf
        self._student, self._lessons, self._course = student, lessons, course
        self._teacher, self._checkpoint, self._progress = teacher, checkpoint, Progress()
        self._practice = Practice(student, signature, lessons, teacher, course, clock)
        look_seconds = LOOKING / LOOKS / 2 * course.seconds
        self._watch = Watch(lessons.watch, lessons.metric, signature, lessons.teacher, look_seconds, clock)
        self._fake = FakeInt8(student) if course.quantized else None

    # --- the story --------------------------------------------------------------------------------------------------

    def begin(self) -> tuple[Weights, Progress]:
        """From the student's own weights, which neither the first look nor the trials move."""
        first = weights_of(self._student)
        self._get_ready()
        value = self._look()
        if math.isfinite(value):
            self._progress.curve = [(0.0, value)]
        self._best = Best(self._watch, value, first)
        self._find_pace(first)
        progress = self._progress
        progress.rate, progress.chosen = self._course.learning_rate, "as given"
        if not progress.rate:
            progress.rate, progress.chosen = self._range_test()
            self._restart(first)
        return self._learned(looked=self._elapsed())

    def resume(self, progress: Progress, kept: dict[str, Weights]) -> tuple[Weights, Progress]:
        """From a checkpoint, with the time that was left."""
        self._start -= progress.seconds
        self._progress = progress
        put(self._student, kept["latest"])
        self._get_ready()
        self._best = Best(self._watch, progress.value, kept["best"])
        self._find_pace(kept["latest"])
        return self._learned(looked=progress.curve[-1][0] if progress.curve else 0.0)

    def _learned(self, looked: float) -> tuple[Weights, Progress]:
        """Steps and looks until the time is up, or nothing is gained any more.

        Args:
            looked: when the last look was, or would have been: the next is due as long after it, resumed or not.
        """
        spacing = self._course.seconds / LOOKS
        self._saved, self._save_took = (self._elapsed(), self._progress.rows), 0.0
        while self._left() > 0:
            due = looked + max(spacing, 2 * self._watch.took * (1 / LOOKING - 1))
            try:
                while self._elapsed() < due and self._left() > 0:
                    self._advance()
                    self._tell()
                    self._save_if_due()
                self._judge()
            except _Astray as astray:
                self._go_back(str(astray))
            looked = self._elapsed()
            if self._best.idle >= PATIENCE and self._elapsed() > LAST_PHASE * self._course.seconds:
                break
        if math.isnan(self._best.value):
            raise RefusalError(Reason.NOT_FINITE, "its answers were never finite, neither before training nor after")
        self._report()
        return self._best.weights, self._progress

    def _report(self) -> None:
        """Leave what was learned, and what there is to say about it."""
        progress, watch = self._progress, self._watch
        progress.seconds, progress.value, progress.done = self._elapsed(), self._best.value, True
        untrained = progress.curve and progress.curve[0][0] == 0
        started = f"{progress.curve[0][1]:.4g}" if untrained else "not finite"
        curve = " ".join(f"{f'{seconds:.1f}' if seconds else '0'}:{value:.4f}" for seconds, value in progress.curve)
        progress.log = [
            f"distil: {progress.rows / len(self._lessons.train):.1f} epochs in {progress.seconds:.0f} s, {watch.name} "
            f"on {watch.rows} watch rows {started} -> {progress.value:.4g}, learning rate {progress.rate:.2g} "
            f"{progress.chosen}, batch {self._practice.rows.batch}, {self._practice.aim.hard_name}",
            f"distil: curve {curve}",
        ]
        self._checkpoint.write(progress, best=self._best.weights)
        self._teacher.keep()
        if self._fake:
            self._fake.off()

    # --- getting ready ----------------------------------------------------------------------------------------------

    def _get_ready(self) -> None:
        """Simulated int8, with the ranges of some rows; as many watch rows as there is time for."""
        self._student.eval()
        if self._fake:
            self._fake.on()
            self._practice.show()
        self._watch.fit_into_time(self._student)

    def _find_pace(self, weights: Weights) -> None:
        """Keep the fastest pace; the trials leave no trace."""
        bf16, rows = Machine.look().bf16 and not self._course.quantized, len(self._lessons.train)
        pace = find_pace(self._practice.seconds_of, rows, self._left(), bf16)
        self._practice.keep(pace)
        self._restart(weights)

    def _range_test(self) -> tuple[float, str]:
        start, optimizer = self._clock(), self._course.optimizer
        self._practice.advance(0.0)
        each = self._clock() - start
        trials = min(schedule.MOST_TRIALS, int(RANGE_TEST * self._course.seconds / max(each, 1e-9)))
        if trials < schedule.LEAST_TRIALS:
            return schedule.usual(optimizer), "as usual"
        return schedule.range_test(lambda rate: self._practice.advance(rate)[0], optimizer, trials), "by range test"

    def _restart(self, weights: Weights) -> None:
        """From these weights, with an optimizer, an average and a loss that have no past."""
        put(self._student, weights)
        self._practice.restart()
        self._average: Average | None = None
        self._first: float | None = None
        if self._fake:
            self._fake.forget()

    # --- learning ---------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """A step, whose loss is watched, and whose weights are averaged with those before."""
        progress = self._progress
        height = schedule.height(self._elapsed() / self._course.seconds, self._practice.steps)
        loss, rows = self._practice.advance(progress.rate * height)
        progress.steps, progress.rows = progress.steps + 1, progress.rows + rows
        if not math.isfinite(loss):
            raise _Astray(f"the loss, or its gradient, was not finite after {self._elapsed():.0f} s")
        if self._first is None:
            self._first = self._smooth = loss
        self._smooth = 0.9 * self._smooth + 0.1 * loss
        if self._smooth > BLOWN * max(abs(self._first), 1.0):
            raise _Astray(f"the loss grew from {self._first:.3g} to {self._smooth:.3g} in {self._elapsed():.0f} s")
        if self._average is None:
            to_come = progress.steps * self._left() / self._elapsed()
            self._average = Average(self._student, int(min(MOST_REMEMBERED, max(10, REMEMBERED * to_come))))
        self._average.update()

    def _judge(self) -> None:
        """Look at the student and at its average, keep the better if it is the best, and leave a checkpoint."""
        value, latest = self._look(), weights_of(self._student)
        if math.isnan(value):
            raise _Astray(f"its answers were not finite after {self._elapsed():.0f} s")
        weights = latest
        if self._average is not None:
            put(self._student, self._average.weights)
            averaged = self._look()
            if not self._watch.better(value, averaged):
                value, weights = averaged, weights_of(self._student)
            put(self._student, latest)
        self._best.offer(value, weights)
        self._progress.curve.append((self._elapsed(), value))
        self._save(latest)

    def _save_if_due(self) -> None:
        """Leave a checkpoint where an epoch was learned since the last one, so that no more than that can be lost."""
        seconds, rows = self._saved
        if self._progress.rows - rows < len(self._lessons.train) or math.isnan(self._best.value):
            return
        if self._elapsed() - seconds >= max(SAVE_SECONDS, self._save_took / SAVING):
            self._save(weights_of(self._student))

    def _save(self, latest: Weights) -> None:
        progress, start = self._progress, self._elapsed()
        progress.seconds, progress.value = start, self._best.value
        self._checkpoint.write(progress, best=self._best.weights, latest=latest)
        self._saved = self._elapsed(), progress.rows
        self._save_took = self._saved[0] - start

    def _look(self) -> float:
        return self._watch.look(self._student.eval())

    def _go_back(self, why: str) -> None:
        """To the best weights, with a tenth of the learning rate.

        Raises:
            RefusalError: DIVERGED: it went astray too often.
        """
        progress = self._progress
        progress.falls += 1
        if progress.falls > FALLS:
            raise RefusalError(
                Reason.DIVERGED,
                f"{why}, at a learning rate of {progress.rate:.2g}; lowering it {FALLS} times was no help",
            )
        progress.rate, progress.chosen = progress.rate / 10, f"lowered, for {why}"
        self._restart(self._best.weights)

    # --- time -------------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        now = self._clock()
        if now - self._said >= SAY_SECONDS:
            self._said = now
            of = f"{self._elapsed():.0f} of {self._course.seconds:.0f} s"
            self._lessons.say(f"healing {of}, {self._watch.name} {self._best.value:.3f}")

    def _elapsed(self) -> float:
        return self._clock() - self._start

    def _left(self) -> float:
        """Seconds for steps: the last look must still fit in."""
        return self._course.seconds - self._elapsed() - 2 * self._watch.took


def _copied(module: Any) -> Any:
    student = copy.deepcopy(module)
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return student.eval()


def _taught(student: Any, weights: Weights, progress: Progress) -> Taught:
    """The student with these weights, ordinary again."""
    import torch

    put(student, weights)
    student.eval().requires_grad_(False).zero_grad()
    if any(type(m).__name__ == "Conv2d" for m in student.modules()):
        student.to(memory_format=torch.contiguous_format)
    return Taught(student, tuple(progress.log))


def _key(student: Any, course: Course, teacher: str, lessons: Lessons) -> str:
    """A hash of what a lesson depends on, but for the weights that it begins with: the same cut gives the like."""
    shapes = [(name, str(t.dtype), tuple(t.shape)) for name, t in live_weights(student).items()]
    plain = [asdict(course), shapes, teacher, lessons.metric.name, len(lessons.watch)]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]
