"""A wider or deeper model that is, to begin with, the same function."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.techniques._deeper import deepen
from accelerando.techniques._parity import answer_torch, ensure_same, probes
from accelerando.techniques._wider import widen
from accelerando.workload import Form, Model, Samples, flat_module


@dataclass(frozen=True)
class Grow(Technique):
    """More to learn with, for a model whose quality is short while its speed is spare.

    Where it is to be taught it needs labels: from the original alone it could learn no more than that knows.
    Training goes on from what is known: wider by doubling hidden units and sharing out their outgoing weights, deeper
    by copies of residual blocks that add nothing yet, or by identity layers where there are no blocks.

    Args:
        width: times as many hidden units; those that no sum, norm or attention ties to others.
        depth: times as many blocks.

    Source: Chen, Goodfellow, Shlens, "Net2Net: Accelerating Learning via Knowledge Transfer", ICLR 2016; a last layer
    of zeros as in Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 5.1.
    """

    width: float = 1.0
    depth: float = 1.25

    takes: ClassVar[Form] = Form.TORCH
    gives: ClassVar[Form] = Form.TORCH
    stage: ClassVar[Stage] = Stage.SHAPE
    needs: ClassVar[tuple[str, ...]] = ("torch", "torch_pruning")

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 1 or self.width == self.depth == 1:
            raise ValueError(
                f"width and depth must be at least 1, and one of them above, but are {self.width} and {self.depth}"
            )

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Grow]:
        return [cls(), cls(depth=1.5), cls(width=1.5, depth=1.0), cls(width=1.25, depth=1.25)]

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        if model.form is Form.TORCH and not any(p.ndim > 1 for p in model.content.parameters()):
            return RefusalError(Reason.NOTHING_TO_DO, "it has no weights")
        lessons = model.lessons
        if lessons is not None and (lessons.train.targets is None or lessons.metric.of_original):
            return RefusalError(
                Reason.NOTHING_TO_DO,
                "a larger model can learn more than the original knows from labels alone: give train= with targets, "
                "and a metric that compares with targets",
            )
        return None

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        module, said = copy.deepcopy(model.content), []
        if self.width > 1:
            said.append(widen(module, model.signature, data, self.width))
        if self.depth > 1:
            said.append(deepen(module, model.signature, data, self.depth))
        before, after = flat_module(model), flat_module(replace(model, content=module))
        worst = 0.0
        for leaves in probes(model.signature, data):
            worst = max(worst, ensure_same(model.signature, answer_torch(before, leaves), answer_torch(after, leaves)))
        return model.changed(Form.TORCH, module, f"grow: {'; '.join(said)}; within {worst:.1e} of the original")
