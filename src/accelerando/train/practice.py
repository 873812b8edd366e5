"""Training steps: a batch, the teacher's word on it, a loss, a gradient, and an optimizer that follows it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from accelerando.errors import Reason, RefusalError, UsageError
from accelerando.schooling import varied_by
from accelerando.signature import Signature, flatten
from accelerando.train.course import Course
from accelerando.train.hints import Hints
from accelerando.train.loss import aim_of
from accelerando.train.pace import Pace
from accelerando.train.room import fitted, in_lesson
from accelerando.train.rows import Batch, Rows, looks_like_image, shifted
from accelerando.train.teacher import Teacher
from accelerando.train.weights import Zeros
from accelerando.workload import Lessons

CLIP = 4.0  # times the usual norm of the gradient
LEAST_FOR_NORM = 4  # rows of which a batch norm can take statistics
DECAY = {"adamw": 0.01, "sgd": 5e-4}  # the usual one, of weights, not of biases and norms


class Practice:
    """A student, and what its steps need.

    Args:
        student: our own copy of the module, whose parameters may be changed.
        clock: seconds.
    """

    def __init__(
        self,
        student: Any,
        signature: Signature,
        lessons: Lessons,
        teacher: Teacher,
        course: Course,
        clock: Callable[[], float],
    ) -> None:
        import torch

        self._student, self._signature, self._teacher = student, signature, teacher
        self._course, self._clock = course, clock
        self._images = any(type(m).__name__ == "Conv2d" for m in student.modules())
        if self._images:
            student.to(memory_format=torch.channels_last)
        self._augment, self._zeros = lessons.augment, Zeros(student)
        normed = any("BatchNorm" in type(m).__name__ for m in student.modules())
        self._least, self._most = LEAST_FOR_NORM if normed else 1, sys.maxsize  # rows that learn together, that fit
        self.rows = Rows(lessons.train, Pace().batch, seed=0)
        self._bf16 = False
        self._last: tuple[Batch, list[Any]] | None = None
        self.restart()
        fitted(lambda: self._get_to_know(lessons), self._halve_batch)

    def _get_to_know(self, lessons: Lessons) -> None:
        """What is to be learned, seen by some rows."""
        batch = self.rows.draw()
        taught, course = self._teacher.answers(batch), self._course
        floats = self._teacher.floats
        self.aim = aim_of(self._signature, floats, lessons.metric, lessons.loss, course, taught, batch.targets)
        still = self.aim.meaning != "numbers" and all(x.dim() <= 2 for x in taught)  # else places in it would move
        self._shifts = still and sum(map(looks_like_image, batch.inputs)) == 1
        self._hints = Hints(self._student, lessons.teacher, self._called, batch.inputs) if course.features else None

    def restart(self) -> None:
        """Go on from the student's weights as they are, with an optimizer that has no past."""
        self._optimizer = _optimizer(self._student, self._course)
        self._optimizer.zero_grad()
        self._norm = 0.0
        self.steps = 0  # since then

    def advance(self, rate: float, again: bool = False) -> tuple[float, int]:
        """Draw a batch and make a step: the loss before it, NaN where it could not be made, and the rows.

        Where the step does not fit into memory, the batch is halved from then on.

        Args:
            again: take the batch of the step before, if it is not too large; the teacher need not be asked.

        Raises:
            RefusalError: OUT_OF_MEMORY, or UNSUPPORTED: the module can't be trained.
        """

        def step() -> tuple[float, int]:
            if not again or self._last is None or len(self._last[0]) > self.rows.batch:
                batch = self.rows.draw()
                self._last = batch, self._taught(batch)
            (batch, taught), start = self._last, self._clock()
            loss = self._step(batch, taught, rate)
            self._each = (self._clock() - start) / len(batch)
            return loss, len(batch)

        try:
            found = fitted(step, self._halve_batch)
        except RefusalError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {str(error)[:300]}"
            raise RefusalError(Reason.UNSUPPORTED, f"it can't be trained: {what}") from error
        self.steps += 1
        return found

    def seconds_of(self, pace: Pace) -> float:
        """What a step takes at a pace, without the teacher's time; it moves no weight but statistics of the data.

        Raises:
            RefusalError: as `advance`.
        """
        self.keep(pace)
        self.advance(0.0, again=True)
        return self._each * pace.batch

    def keep(self, pace: Pace) -> None:
        """Make steps at this pace."""
        import torch

        torch.set_num_threads(pace.threads)
        self._bf16 = self._teacher.bf16 = pace.bf16
        self.rows.batch = min(pace.batch, self._most)

    def show(self) -> None:
        """Let the student answer some rows, from which it does not learn."""
        import torch

        with torch.no_grad():
            fitted(lambda: self.call(self.rows.draw().inputs), self._halve_batch)

    def call(self, inputs: tuple[Any, ...]) -> Any:
        """The student's answer to flat inputs."""
        return self._called(self._student, inputs)

    def _called(self, module: Any, inputs: Sequence[Any]) -> Any:
        """A module's answer to flat inputs."""
        import torch

        if self._images:
            inputs = tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)
        args, kwargs = self._signature.call(inputs)
        return module(*args, **kwargs)

    def _taught(self, batch: Batch) -> list[Any]:
        """What the teacher says of the rows as they are, before they are varied."""
        return self._teacher.answers(batch) if self.aim.asks else []

    def _step(self, batch: Batch, taught: list[Any], rate: float) -> float:
        import torch

        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._student.train()
        self._optimizer.zero_grad()
        inputs = self._varied(batch.inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            answer, apart = self._answered(inputs)
        leaves, _ = flatten(answer)
        loss = self.aim(answer, [leaves[i] for i in self._teacher.floats], taught, batch.targets) + apart
        found = float(loss.detach())
        if not math.isfinite(found):
            return math.nan
        loss.backward()
        if not self._clip():
            return math.nan
        self._optimizer.step()
        with torch.no_grad():
            self._zeros.restore()
        return found

    def _answered(self, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
        """The student's answer, and how far its hidden states are from the teacher's, by their weight."""
        if self._hints is None:
            return self.call(inputs), 0.0
        with self._hints.listening() as heard:
            answer = self.call(inputs)
        return answer, self._course.features * self._hints.distance(heard, inputs)

    def _varied(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inputs, augmented in the owner's way or in ours.

        Raises:
            RefusalError: UNSUPPORTED: the owner's way raised, or gives something else.
        """
        if self._augment is None:
            return shifted(inputs) if self._shifts else inputs
        try:
            return varied_by(self._augment, inputs)
        except UsageError as error:
            raise in_lesson(error) from error

    def _clip(self) -> bool:
        """Cut a gradient that is far longer than usual; whether it is finite.

        The usual length is a running average: no constant would suit every loss (Brock et al. 2021 have the like).
        """
        import torch

        gradients = [p.grad for p in self._student.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            return False
        if self._norm and norm > CLIP * self._norm:
            for gradient in gradients:
                gradient.mul_(CLIP * self._norm / norm)
            norm = CLIP * self._norm
        self._norm = 0.9 * self._norm + 0.1 * norm if self._norm else norm
        return True

    def _halve_batch(self) -> None:
        """Half the rows from now on, and an optimizer anew: the memory of the one at hand may be half made."""
        self._last = None
        self.restart()
        if self.rows.batch <= self._least:
            rows = f"{self.rows.batch} row{'s' if self.rows.batch > 1 else ''}"
            raise RefusalError(Reason.OUT_OF_MEMORY, f"a training step of {rows} does not fit into the rest")
        self.rows.batch = self._most = max(self.rows.batch // 2, self._least)


def _optimizer(student: Any, course: Course) -> Any:
    import torch

    parameters = [p for p in student.parameters() if p.requires_grad]
    if not parameters:
        raise RefusalError(Reason.NOTHING_TO_DO, "it has no parameters that could learn")
    decay = DECAY[course.optimizer] if course.weight_decay is None else course.weight_decay
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    fused = all(p.dtype in (torch.float32, torch.float64) for p in parameters)
    if course.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, fused=fused)
    return torch.optim.AdamW(groups, lr=0.0, fused=fused)
