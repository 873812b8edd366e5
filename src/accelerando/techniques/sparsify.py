"""Zeros for the smallest weights of large linear layers: faster where a backend multiplies by what is left only."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.workload import Form, Model, Samples

LEAST = 1 << 18  # numbers in a weight; a product with a smaller one takes microseconds, whatever it holds

NO_KERNEL = (
    "no backend here multiplies by N of every M numbers faster: on a processor without such an instruction only the "
    "number of zeros counts, and for 2:4, half of a 2048 x 2048 weight at one row, on a 2-core AVX-512 machine a "
    "compressed product took 1,814 us in SciPy and 1,996 us in ONNX Runtime where a dense one took 715 us; "
    "use `unstructured`, which pays from about 90 % zeros on"
)


@dataclass(frozen=True)
class Sparsify(Technique):
    """Set the smallest weights of every large linear layer to zero, the same share in each (magnitude pruning).

    The shapes stay, so only a backend that offers sparse products is faster for it.  A trainer that comes after must
    leave exact zeros as they are.

    Args:
        share: of each layer's weights that are zeros afterwards, to the nearest whole weight; those that are zeros
            already count.
        pattern: `unstructured`, or N of every M as `2:4`, which is refused: no kernel here gains from it.
    """

    share: float = 0.95
    pattern: str = "unstructured"

    takes: ClassVar[Form] = Form.TORCH
    gives: ClassVar[Form] = Form.TORCH
    stage: ClassVar[Stage] = Stage.SHAPE
    wants: ClassVar[str] = "sparse products"
    needs: ClassVar[tuple[str, ...]] = ("torch",)

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1, but is {self.share!r}")
        if self.pattern != "unstructured" and not re.fullmatch(r"[1-9]\d*:[1-9]\d*", self.pattern):
            raise ValueError(f"pattern must be `unstructured` or N:M as in `2:4`, but is {self.pattern!r}")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Sparsify]:
        return [cls(), cls(share=0.9), cls(share=0.98)]

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        if self.pattern != "unstructured":
            return RefusalError(Reason.NOT_NATIVE, NO_KERNEL)
        if model.form is Form.TORCH and not _large(model.content):
            return RefusalError(
                Reason.NOTHING_TO_DO,
                f"no linear layer of its own weight has {LEAST:,} numbers or more, as 512 x 512 has: "
                "smaller products don't gain from zeros",
            )
        return None

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        if refusal := self.refuse(model, Machine.look()):
            raise refusal
        changed = copy.deepcopy(model.content)
        layers = _large(changed)
        new = sum(_zero(layer.weight, self.share) for layer in layers.values())
        if not new:
            raise RefusalError(
                Reason.NOTHING_TO_DO, f"{self.share:.2%} of the weights of {', '.join(layers)} are zeros already"
            )
        shapes = Counter(" x ".join(map(str, layer.weight.shape)) for layer in layers.values())
        which = ", ".join(f"{count} of {shape}" for shape, count in shapes.items())
        said = f"sparsify: {self.share:.2%} zeros in each of {len(layers)} linear layers ({which})"
        return model.changed(Form.TORCH, changed, said)


def _large(module: Any) -> dict[str, Any]:
    """Large linear layers by name, each once, whose weight nobody else holds, as a tied embedding does."""
    from torch import nn

    owners = Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and isinstance(layer._parameters.get("weight"), nn.Parameter)  # a parametrized weight is made anew each time
        and layer.weight.numel() >= LEAST
        and owners[id(layer.weight)] == 1
    }


def _zero(weight: Any, share: float) -> int:
    """Set the smallest numbers of a weight to zero, the earlier of equals first; how many were not zero before."""
    import torch

    before = int(torch.count_nonzero(weight))
    smallest = torch.sort(weight.detach().abs().flatten(), stable=True).indices[: round(share * weight.numel())]
    with torch.no_grad():
        weight.view(-1)[smallest] = 0.0
    return before - int(torch.count_nonzero(weight))
