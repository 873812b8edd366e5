"""Torch to torch.export's program, with every axis dynamic that the signature says may change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.techniques._capture import capture
from accelerando.techniques._parity import answer_torch, ensure_same, example, first_lines, probes
from accelerando.workload import Form, Model, Samples, flat_module


@dataclass(frozen=True)
class ExportTorch(Technique):
    """Capture the flat model as an ExportedProgram, checked against the module at several sizes.

    Args:
        strict: trace Python bytecode instead of running the module on symbols; needed by few models.
    """

    strict: bool = False

    takes: ClassVar[Form] = Form.TORCH
    gives: ClassVar[Form] = Form.EXPORTED
    stage: ClassVar[Stage] = Stage.LOWER
    exact: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("torch",)

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[ExportTorch]:
        return [cls()]

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        flat = flat_module(model)
        leaves = example(model.signature, data)
        expected = [(x, answer_torch(flat, x)) for x in probes(model.signature, data)]
        program = capture(flat, model.signature, leaves, self.strict)
        # Unchecked, as compilers take it: torch guards "not 1" on every axis that was traced at 2 or more, whether
        # or not the graph depends on it.  The probes, one of a single row, are what tells.
        captured = program.module(check_guards=False)
        worst = 0.0
        for inputs, answer in expected:
            try:
                got = answer_torch(captured, inputs)
            except Exception as error:
                shapes = ", ".join(str(x.shape) for x in inputs)
                raise RefusalError(
                    Reason.EXPORT_FAILED, f"the program fails on inputs of {shapes}: {first_lines(error)}"
                ) from error
            worst = max(worst, ensure_same(model.signature, answer, got))
        return model.changed(Form.EXPORTED, program, f"export_torch: within {worst:.1e} of the original")
