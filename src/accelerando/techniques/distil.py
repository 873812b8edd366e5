"""Healing: a model that was cut learns from the original, and from labels, what it knew."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.train.course import Course
from accelerando.workload import Form, Model, Samples

SET_UP_SECONDS = 3.0
LATER = ("weight_decay", "smoothing")  # knobs that recipes did not have at first


@dataclass(frozen=True)
class Distil(Technique):
    """Knowledge distillation (Hinton et al. 2015) within a given time.

    Args:
        seconds: wall-clock time of training on this machine; the learning rate's schedule runs over it.
        labels: weight of the labels against the teacher's answers; ignored where there are no labels.
        temperature: of the softmax through which the teacher's classes are seen.
        learning_rate: its peak; 0 for a range test.
        optimizer: `adamw` or `sgd`.
        quantized: train with simulated int8, so that quantizing afterwards loses less.
        features: weight of the blocks' hidden states against the teacher's (Romero et al. 2015), where blocks have kept
            their width; the teacher is then asked at every step, which about doubles its time.  0 for none.
        weight_decay: how much weights are drawn to zero; None for the optimizer's usual.
        smoothing: share of a label that is spread over all classes; None for the usual, 0.05 or none, by the metric.
    """

    seconds: int = 60
    labels: float = 0.5
    temperature: float = 2.0
    learning_rate: float = 0.0
    optimizer: str = "adamw"
    quantized: bool = False
    features: float = 0.0
    weight_decay: float | None = None
    smoothing: float | None = None

    takes: ClassVar[Form] = Form.TORCH
    gives: ClassVar[Form] = Form.TORCH
    stage: ClassVar[Stage] = Stage.HEAL
    needs: ClassVar[tuple[str, ...]] = ("torch", "safetensors")

    def __post_init__(self) -> None:
        Course(**asdict(self))

    @property
    def expected_seconds(self) -> float:
        return 1.05 * self.seconds + SET_UP_SECONDS

    def to_json(self) -> dict[str, Any]:
        """Without the knobs that came later, unless they are turned: older recipes keep their keys."""
        return {k: v for k, v in super().to_json().items() if k not in LATER or v is not None}

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Distil]:
        return [cls(), cls(seconds=20), cls(seconds=240), cls(labels=0.9), cls(quantized=True)]

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        return _no_lessons() if model.form is Form.TORCH and model.lessons is None else None

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        from accelerando.train.trainer import teach

        if model.lessons is None:
            raise _no_lessons()
        taught = teach(model.content, model.signature, model.lessons, Course(**asdict(self)))
        return model.changed(Form.TORCH, taught.module, *taught.log)


def _no_lessons() -> RefusalError:
    return RefusalError(
        Reason.NO_TRAINING_DATA,
        "train= takes rows like those of data=, with labels or without; some thousands are good",
    )
