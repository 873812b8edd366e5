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
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, but is {self.optimizer!r}")
