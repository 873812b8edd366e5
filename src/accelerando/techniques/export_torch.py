"""Torch to torch.export's program, with every axis dynamic that the signature says may change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.techniques._parity import answer_torch, ensure_same, example, first_lines, probes
from accelerando.techniques._quiet import quiet
from accelerando.workload import Form, Model, Samples, flat_module

MOST_ROWS = 1 << 20  # an upper bound that no batch reaches; compilers want one


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
        import torch

        flat = flat_module(model)
        leaves = example(model.signature, data)
        expected = [(x, answer_torch(flat, x)) for x in probes(model.signature, data)]
        program = self._capture(model, tuple(torch.from_numpy(x) for x in leaves))
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

    def _capture(self, model: Model, tensors: tuple[Any, ...]) -> Any:
        """The program with named dimensions; with torch's own guesses where its solver wants other bounds.

        Raises:
            RefusalError: torch.export fails in both ways.
        """
        try:
            return self._export(model, tensors, named=True)
        except RefusalError as first:
            try:
                return self._export(model, tensors, named=False)
            except RefusalError:
                raise first from None

    def _export(self, model: Model, tensors: tuple[Any, ...], named: bool) -> Any:
        import copy

        import torch
        from torch.export import Dim, export

        flat = flat_module(model)
        if any(isinstance(m, torch.nn.RNNBase) for m in flat.modules()):
            flat = copy.deepcopy(flat)  # tracing assigns to the weight lists of recurrent layers
        axes = {a for p in model.signature.inputs for a in p.shape if isinstance(a, str)}
        dims = {a: Dim(a, min=1, max=MOST_ROWS) if named else Dim.DYNAMIC for a in axes}
        shapes = tuple({i: dims[a] for i, a in enumerate(p.shape) if isinstance(a, str)} for p in model.signature.inputs)
        try:
            with quiet(), torch.no_grad(), _sizes_of_one():
                return export(flat, tensors, dynamic_shapes=(shapes,), strict=self.strict)
        except Exception as error:
            raise RefusalError(Reason.EXPORT_FAILED, first_lines(error)) from error


def _sizes_of_one() -> contextlib.AbstractContextManager[Any]:
    """Let a program traced with two rows take one: without it torch assumes that no dynamic axis has length 1."""
    import torch

    return torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
