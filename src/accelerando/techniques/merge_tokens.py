"""Fewer tokens from block to block of a transformer: those that are alike become one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.techniques._blocks import repeated
from accelerando.techniques._parity import batch
from accelerando.techniques._shapes import ensure_shaped
from accelerando.techniques._tokens import find_chain, merged, schedule
from accelerando.workload import Form, Model, Samples

CALIBRATION_ROWS = 32
BY = ("place", "content")


@dataclass(frozen=True)
class MergeTokens(Technique):
    """Between its blocks a transformer's tokens become fewer, by the same factor each time; the first block sees all.

    Tokens that are read by their place, such as a class token, stay.

    Args:
        share: of the tokens that all blocks together work on, how many are taken away.
        by: how tokens are chosen.  `place`: the same places for every input, those most alike on the calibration data
            (Ward's clusters), so that merging is one product with a constant matrix; `content`: per input, by ToMe's
            bipartite soft matching on the hidden states, which follows the input and costs more at run time.

    Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023; Ward, "Hierarchical Grouping to Optimize an
    Objective Function", JASA 1963.
    """

    share: float = 0.5
    by: str = "place"

    takes: ClassVar[Form] = Form.TORCH
    gives: ClassVar[Form] = Form.TORCH
    stage: ClassVar[Stage] = Stage.SHAPE
    needs: ClassVar[tuple[str, ...]] = ("torch", "scipy")

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1, both excluded, but is {self.share}")
        if self.by not in BY:
            raise ValueError(f"by must be one of {', '.join(BY)}, but is {self.by!r}")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[MergeTokens]:
        return [cls(), cls(share=0.3), cls(by="content")]

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        if model.form is not Form.TORCH:
            return None
        if len(repeated(model.content)) < 2:
            return RefusalError(Reason.NOTHING_TO_DO, "it has no chain of blocks to merge tokens between")
        for port in model.signature.inputs:
            if changing := [axis for axis in port.shape[1:] if isinstance(axis, str)]:
                return RefusalError(
                    Reason.UNSUPPORTED, f"axis {changing[0]!r} of {port.name} changes, but tokens must be equally many"
                )
        return None

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        if refusal := self.refuse(model, Machine.look()):
            raise refusal
        inputs = data.take(CALIBRATION_ROWS).chunks[0].inputs
        leaves = batch(model.signature, inputs, min(CALIBRATION_ROWS, len(inputs[0])))
        chain = find_chain(model, leaves)
        counts = schedule(chain, self.share)
        module = merged(model, leaves, chain, counts, self.by)
        ensure_shaped(model, module, data)
        taken = 1 - sum(counts) / (len(counts) * chain.tokens)
        return model.changed(
            Form.TORCH,
            module,
            f"merge_tokens: its {len(counts)} blocks work on {', '.join(map(str, counts))} tokens by {self.by}, "
            f"{taken:.0%} less in all; {chain.kept} stay as they are",
        )
