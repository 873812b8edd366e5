"""How a module is to be taught: plain settings."""

from __future__ import annotations

from dataclasses import dataclass

OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True)
class Course:
    """The settings of a training.

    Args:
        seconds: wall-clock time on this machine, all told: looks, trials of speed and the teacher's time count.
        labels: weight of the hard labels, from 0 (the teacher alone) to 1 (labels alone); ignored without labels.
        temperature: of the softmax through which the teacher's classes are seen; above 1, small ones count more.
        learning_rate: the schedule's peak; 0 for a range test.
        optimizer: `adamw`, or `sgd` with Nesterov momentum.
        quantized: int8 weights and activations are simulated while training.
        features: weight of the hidden states that both have, beside the answers; 0 for the answers alone.
        weight_decay: how much weights (not biases, nor norms) are drawn to zero, as a share of the learning rate; None
            for the optimizer's usual: 0.01 of `adamw`, 0.0005 of `sgd`.
        smoothing: share of a label that is spread over all classes (Szegedy et al. 2016); None for 0.05, but 0 where
            the metric judges how sure the answer is.  Of the loss that is guessed for classes: another has none.

    Raises:
        ValueError: a setting is out of its range.
    """

    seconds: float = 60
    labels: float = 0.5
    temperature: float = 2.0
    learning_rate: float = 0.0
    optimizer: str = "adamw"
    quantized: bool = False
    features: float = 0.0
    weight_decay: float | None = None
    smoothing: float | None = None

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"seconds must be more than 0, but is {self.seconds}")
        if not 0 <= self.labels <= 1:
            raise ValueError(f"labels must be from 0 to 1, but is {self.labels}")
        if not 0.1 <= self.temperature <= 100:
            raise ValueError(f"temperature must be from 0.1 to 100, but is {self.temperature}")
        if not 0 <= self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be 0 or more, but is {self.learning_rate}")
        if not 0 <= self.features < float("inf"):
            raise ValueError(f"features must be 0 or more, but is {self.features}")
        if self.weight_decay is not None and not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be 0 or more, or None, but is {self.weight_decay}")
        if self.smoothing is not None and not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be from 0 to less than 1, or None, but is {self.smoothing}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, but is {self.optimizer!r}")
