"""What training makes small: the distance from the teacher, and from the labels where there are some."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from accelerando.errors import Reason, RefusalError, UsageError
from accelerando.metric import Metric
from accelerando.schooling import loss_of
from accelerando.signature import Signature
from accelerando.train.course import Course
from accelerando.train.room import in_lesson

OF_CLASSES = {"accuracy", "accuracy-at-half", "top-5", "f1", "mean-iou", "cross-entropy", "perplexity", "agreement"}
OF_CHANCES = {"cross-entropy", "perplexity"}  # judged by how sure the answer is, so that smoothing would cost
OF_NUMBERS = {"mae", "mse", "rmse", "r2", "psnr", "cosine"}
SMOOTHING = 0.05  # of hard labels, where the owner does not say
OTHERS = 0.25  # weight of the outputs that the metric does not look at, all together
LEAST_CHANCE = 1e-7


@dataclass(frozen=True)
class Aim:
    """The loss.

    Args:
        meaning: of the primary output: `classes` (logits along an axis), `binary` (one logit) or `numbers`.
        axis: of the classes.
        chances: the output is probabilities, not logits.
        primary: the primary output's place among the float outputs; None where it is not a float.
        scales: how far each float output of the teacher lies from its mean: it makes losses comparable.
        hard: (the model's answer, its primary output, targets) -> loss of the labels; None without.
        hard_name: what it is called in the log.
        labels, temperature: as in `Course`.
        absolute: numbers are judged by absolute differences, not squared ones.
    """

    meaning: str
    axis: int
    chances: bool
    primary: int | None
    scales: tuple[float, ...]
    hard: Callable[[Any, Any, Any], Any] | None
    hard_name: str
    labels: float
    temperature: float
    absolute: bool

    @property
    def asks(self) -> bool:
        """Whether it needs the teacher."""
        return self.hard is None or self.labels < 1

    def __call__(self, answer: Any, leaves: Sequence[Any], taught: Sequence[Any], targets: Any) -> Any:
        """The loss of a batch, a scalar tensor.

        Args:
            answer: the model's, in its own structure.
            leaves: its float outputs.
            taught: the teacher's, alike.
            targets: of the batch, or None.
        """
        leaves = [_wide(x) for x in leaves]
        main = None if self.primary is None else leaves[self.primary]
        share = self.labels if self.hard is not None and targets is not None else 0.0
        hard = self.hard(answer, main, targets) if self.hard is not None and share > 0 else 0.0
        return share * hard + (1 - share) * self._soft(leaves, taught, targets) if share < 1 else hard

    def _soft(self, leaves: Sequence[Any], taught: Sequence[Any], targets: Any) -> Any:
        """The distance from the teacher: the primary output's, and a little of every other's."""
        total, others = 0.0, len(leaves) - (self.primary is not None)
        for i, (leaf, wanted, scale) in enumerate(zip(leaves, taught, self.scales, strict=True)):
            wanted = _wide(wanted)
            if i == self.primary and self.meaning == "classes":
                total = total + self._classes(leaf, wanted, targets)
            elif i == self.primary and self.meaning == "binary":
                total = total + self._binary(leaf, wanted)
            else:
                total = total + self._numbers(leaf, wanted, scale) * (1.0 if i == self.primary else OTHERS / others)
        return total

    def _classes(self, leaf: Any, wanted: Any, targets: Any) -> Any:
        """Kullback-Leibler divergence at a temperature (Hinton et al. 2015), where a position is judged at all."""
        from torch.nn import functional

        heat, axis = self.temperature, self.axis
        mine = functional.log_softmax(self.logits(leaf) / heat, axis)
        theirs = functional.log_softmax(self.logits(wanted) / heat, axis)
        apart = (theirs.exp() * (theirs - mine)).sum(axis)
        if targets is not None and not targets.is_floating_point() and targets.shape == apart.shape:
            judged = (targets >= 0).to(apart.dtype)
            return heat**2 * (apart * judged).sum() / judged.sum().clamp(min=1)
        return heat**2 * apart.mean()

    def _binary(self, leaf: Any, wanted: Any) -> Any:
        from torch.nn import functional

        heat = self.temperature
        theirs = (self.logits(wanted) / heat).sigmoid()
        return heat**2 * functional.binary_cross_entropy_with_logits(self.logits(leaf) / heat, theirs)

    def _numbers(self, leaf: Any, wanted: Any, scale: float) -> Any:
        off = leaf - wanted
        return off.abs().mean() / scale if self.absolute else off.square().mean() / scale**2

    def logits(self, x: Any) -> Any:
        """Logits, where the output may be probabilities."""
        if not self.chances:
            return x
        x = x.clamp(LEAST_CHANCE, 1 - LEAST_CHANCE)
        return x.log() if self.meaning == "classes" else x.log() - (1 - x).log()


def _wide(x: Any) -> Any:
    return x.float() if x.element_size() < 4 else x


def aim_of(
    signature: Signature,
    floats: Sequence[int],
    metric: Metric,
    own_loss: Callable[[Any, Any], Any] | None,
    course: Course,
    taught: Sequence[Any],
    targets: Any,
) -> Aim:
    """The loss for such outputs, targets and metric.

    Args:
        floats: the numbers of the float outputs.
        own_loss: the owner's, (answer, targets) -> scalar tensor.
        taught: the teacher's float outputs for some rows.
        targets: of these rows, or None.

    Raises:
        RefusalError: UNSUPPORTED: no output is a float, so there is nothing that a loss could pull at.
    """
    if not floats:
        raise RefusalError(Reason.UNSUPPORTED, "none of its outputs is a float: there is nothing to learn from")
    number = primary_of(signature)
    primary = list(floats).index(number) if number in floats else None
    meaning, axis = ("numbers", 1) if primary is None else _meaning(metric, taught[primary], targets)
    chances = primary is not None and _are_chances(taught[primary], meaning, axis, metric)
    absolute = metric.name == "mae"
    aim = Aim(
        meaning, axis, chances, primary, tuple(_scale(x, absolute) for x in taught), None, "no labels",
        course.labels, course.temperature, absolute,
    )  # fmt: skip
    if targets is None or course.labels == 0:
        return aim
    usual = 0.0 if metric.name in OF_CHANCES else SMOOTHING
    smoothing = usual if course.smoothing is None else course.smoothing
    return _with_labels(aim, metric, own_loss, smoothing, taught, targets)


def primary_of(signature: Signature) -> int:
    """The number of the output that a named metric looks at (as `metric.primary` has it)."""
    fields = signature.result.get("dict") or signature.result.get("fields") or {}
    return int(fields["logits"].get("leaf", 0)) if "logits" in fields else 0


def _meaning(metric: Metric, outputs: Any, targets: Any) -> tuple[str, int]:
    """What the primary output is, and the axis of its classes."""
    shape = tuple(outputs.shape)
    if metric.name in OF_NUMBERS:
        return "numbers", 1
    if targets is not None and not targets.is_floating_point():
        wanted = tuple(targets.shape)
        wanted = wanted[:1] if wanted[1:] == (1,) else wanted
        if math.prod(shape) == math.prod(wanted):
            return ("binary", 1) if bool(((targets == 0) | (targets == 1)).all()) else ("numbers", 1)
        last, first = shape[:-1] == wanted, len(shape) >= 2 and shape[:1] + shape[2:] == wanted
        if last or first:
            return "classes", len(shape) - 1 if last and not (first and len(wanted) > 2) else 1
    if metric.name in OF_CLASSES and len(shape) >= 2 and shape[1] > 1:
        return "classes", 2 if len(shape) == 3 else 1
    return "numbers", 1


def _are_chances(outputs: Any, meaning: str, axis: int, metric: Metric) -> bool:
    if meaning == "numbers" or float(outputs.min()) < 0 or float(outputs.max()) > 1:
        return False
    return meaning == "binary" or bool(((outputs.sum(axis) - 1).abs() < 1e-3).all())


def _scale(x: Any, absolute: bool) -> float:
    """The mean absolute, or the standard, deviation from the mean; 1 where nothing deviates."""
    off = _wide(x) - _wide(x).mean()
    found = float(off.abs().mean() if absolute else off.square().mean().sqrt())
    return found if math.isfinite(found) and found > 1e-12 else 1.0


def _with_labels(
    aim: Aim,
    metric: Metric,
    own_loss: Callable[[Any, Any], Any] | None,
    smoothing: float,
    taught: Sequence[Any],
    targets: Any,
) -> Aim:
    """The aim with the loss of the labels: the owner's, else the obvious one, else none."""
    from dataclasses import replace

    if own_loss is not None:
        return replace(aim, hard=lambda answer, leaf, wanted: _owners(own_loss, answer, wanted), hard_name="own loss")
    if aim.primary is None or metric.of_original:
        return replace(aim, hard_name="labels not used" if metric.of_original else aim.hard_name)
    outputs, whole = taught[aim.primary], not targets.is_floating_point()
    if whole and aim.meaning == "classes":
        return replace(aim, hard=_cross_entropy(aim, smoothing), hard_name="cross-entropy")
    if whole and aim.meaning == "binary":
        return replace(aim, hard=_binary_cross_entropy(aim), hard_name="binary cross-entropy")
    if aim.meaning == "numbers" and outputs.numel() == targets.numel():
        name = "absolute differences" if aim.absolute else "squared differences"
        return replace(aim, hard=_differences(aim, _scale(targets.float(), aim.absolute)), hard_name=name)
    return replace(aim, hard_name="no loss fits the labels, so they are not used")


def _cross_entropy(aim: Aim, smoothing: float) -> Callable[[Any, Any, Any], Any]:
    def loss(answer: Any, leaf: Any, targets: Any) -> Any:
        from torch.nn import functional

        logits = aim.logits(leaf).movedim(aim.axis, -1)
        logits, wanted = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).long()
        wanted = wanted.masked_fill(wanted < 0, -100)  # not judged
        found = functional.cross_entropy(logits, wanted, label_smoothing=smoothing, reduction="sum")
        return found / (wanted >= 0).sum().clamp(min=1)

    return loss


def _binary_cross_entropy(aim: Aim) -> Callable[[Any, Any, Any], Any]:
    def loss(answer: Any, leaf: Any, targets: Any) -> Any:
        from torch.nn import functional

        wanted = targets.reshape(leaf.shape).to(leaf.dtype)
        return functional.binary_cross_entropy_with_logits(aim.logits(leaf), wanted)

    return loss


def _differences(aim: Aim, scale: float) -> Callable[[Any, Any, Any], Any]:
    def loss(answer: Any, leaf: Any, targets: Any) -> Any:
        off = leaf - targets.reshape(leaf.shape).to(leaf.dtype)
        return off.abs().mean() / scale if aim.absolute else off.square().mean() / scale**2

    return loss


def _owners(own_loss: Callable[[Any, Any], Any], answer: Any, targets: Any) -> Any:
    """The owner's loss.

    Raises:
        RefusalError: UNSUPPORTED: it raised, or what it gave is not a scalar tensor.
    """
    try:
        return loss_of(own_loss, answer, targets)
    except UsageError as error:
        raise in_lesson(error) from error
