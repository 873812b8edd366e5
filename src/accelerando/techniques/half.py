"""Half precision: the module computes in bfloat16 or float16, and still takes and gives what it did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.techniques._parity import answer_torch, first_lines, probes
from accelerando.techniques._quiet import quiet
from accelerando.workload import Form, Model, Samples, flat_module

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Half(Technique):
    """Weights and activations of 16 bits; inputs are cast on the way in, outputs back on the way out.

    Args:
        dtype: `bf16` (range of float32, 8 bits of precision) or `fp16` (range up to 65504, 11 bits).
    """

    dtype: str = "bf16"

    takes: ClassVar[Form] = Form.TORCH
    gives: ClassVar[Form] = Form.TORCH
    # Before the export: a recipe's stages never go back, and no exporter's program is rewritten afterwards.
    stage: ClassVar[Stage] = Stage.LOWER
    needs: ClassVar[tuple[str, ...]] = ("torch",)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, but is {self.dtype!r}")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Half]:
        return [cls(), cls(dtype="fp16")] if machine.fp16 else [cls()]

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        if model.form is not Form.TORCH:
            return None
        if not (machine.bf16 if self.dtype == "bf16" else machine.fp16):
            return RefusalError(Reason.NOT_NATIVE, f"{machine.cpu} has no {self.dtype} products: it would be slower")
        floats = {str(t.dtype) for t in model.content.state_dict().values() if t.dtype.is_floating_point}
        if floats and floats <= {f"torch.{DTYPES[self.dtype]}"}:
            return RefusalError(Reason.NOTHING_TO_DO, f"every weight is {self.dtype} already")
        return None

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        halved = model.changed(Form.TORCH, _halved(model, DTYPES[self.dtype]), f"half: computes in {self.dtype}")
        flat = flat_module(halved)
        for leaves in probes(model.signature, data):
            try:
                with quiet():
                    answers = answer_torch(flat, leaves)
            except Exception as error:
                raise RefusalError(Reason.UNSUPPORTED, f"it does not run in {self.dtype}: {first_lines(error)}") from error
            _check(model, answers)
        return halved


def _check(model: Model, answers: list[Any]) -> None:
    import numpy as np

    for port, answer in zip(model.signature.outputs, answers, strict=True):
        if str(answer.dtype) != port.dtype:
            raise RefusalError(Reason.WRONG_OUTPUT, f"{port.name} is {answer.dtype}, but must be {port.dtype}")
        if answer.dtype.kind == "f" and not np.isfinite(answer).all():
            raise RefusalError(Reason.NOT_FINITE, f"{port.name} overflows")


def _halved(model: Model, name: str) -> Any:
    """A copy of the module in 16 bits that takes and gives the signature's types."""
    import copy

    import torch
    from torch.utils._pytree import tree_map

    dtype = getattr(torch, name)
    outputs = tuple(getattr(torch, p.dtype, None) for p in model.signature.outputs)

    class Halved(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(model.content).to(dtype)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree_map(_narrow, (args, kwargs))
            return _Widen(outputs)(self.inner(*args, **kwargs))

    def _narrow(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return Halved().eval().requires_grad_(False)
