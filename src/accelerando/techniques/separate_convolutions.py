"""Separable convolutions for full ones: one filter per channel, then a mix of the channels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.techniques._parity import batch
from accelerando.techniques._separable import Separation, candidates, separated, separations
from accelerando.techniques._shapes import ensure_shaped
from accelerando.workload import Form, Model, Samples

CALIBRATION_ROWS = 64
SHARES = (0.5, 0.3, 0.7)


@dataclass(frozen=True)
class SeparateConvolutions(Technique):
    """Full k x k convolutions become a depthwise and a pointwise one, fitted to the calibration data.

    Those go first whose answer suffers least per multiply-add saved, until the share is reached or none is left.
    The norm that follows stays as it is.

    Args:
        share: of the multiply-adds of all convolutions, how many are taken away.
        filters: depthwise filters per input channel; more are nearer to the original, and save less.

    Source: Guo et al., "Network Decoupling: From Regular to Depthwise Separable Convolutions", BMVC 2018.
    """

    share: float = 0.5
    filters: int = 1

    takes: ClassVar[Form] = Form.TORCH
    gives: ClassVar[Form] = Form.TORCH
    stage: ClassVar[Stage] = Stage.SHAPE
    needs: ClassVar[tuple[str, ...]] = ("torch",)

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1, both excluded, but is {self.share}")
        if self.filters < 1:
            raise ValueError(f"filters must be at least 1, but is {self.filters}")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[SeparateConvolutions]:
        return [*(cls(share) for share in SHARES), cls(filters=2)]

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        if model.form is Form.TORCH and not candidates(model.content, self.filters):
            return self._nothing()
        return None

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        if not candidates(model.content, self.filters):
            raise self._nothing()
        rows = batch(model.signature, data.take(CALIBRATION_ROWS).chunks[0].inputs, min(CALIBRATION_ROWS, len(data)))
        found, total = separations(model, rows, self.filters)
        if not found:
            raise RefusalError(Reason.UNSUPPORTED, "its convolutions did not run on the calibration data")
        chosen = cheapest(found, self.share * total)
        module = separated(model.content, chosen)
        ensure_shaped(model, module, data)
        return model.changed(
            Form.TORCH,
            module,
            f"separate_convolutions: {len(chosen)} of {len(found)} full convolutions are separable now, "
            f"{sum(s.saved for s in chosen) / total:.0%} of the convolutions' multiply-adds less; the most costly is "
            f"{max(chosen, key=lambda s: s.error).name}, off by {max(s.error for s in chosen):.0%} of its energy",
        )

    def _nothing(self) -> RefusalError:
        return RefusalError(
            Reason.NOTHING_TO_DO,
            f"no full convolution would save multiply-adds with {self.filters} filters per channel",
        )


def cheapest(found: list[Separation], wanted: float) -> list[Separation]:
    """The separations to make for at least `wanted` multiply-adds saved; more wanted always adds, never swaps."""
    chosen, saved = [], 0.0
    for separation in sorted(found, key=lambda s: (s.error / s.saved, s.name)):
        chosen.append(separation)
        saved += separation.saved
        if saved >= wanted:
            break
    return chosen
