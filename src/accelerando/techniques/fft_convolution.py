"""Convolutions with large kernels, computed by Fourier transforms where that is measured faster."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.signature import Array
from accelerando.techniques import _fft_plan
from accelerando.techniques._fft_layer import exact_convolution, fft_layer
from accelerando.techniques._fft_plan import Plan
from accelerando.techniques._fft_speed import fastest
from accelerando.techniques._parity import answer_torch, ensure_same, first_lines, probes
from accelerando.workload import Form, Model, Samples, flat_module

# Smaller kernels are not even timed.  With AVX-512, times faster than the best direct form: lines of 16,384 by
# kernels of 64 on one channel 0.7, on 8 channels each by its own 9.6; images of 56 x 56 by 15 x 15 on 16 channels each
# by its own 0.3, by 31 x 31 0.9; of 64 x 64 by 21 x 21 from 8 channels to 8 1.2, by 41 x 41 31.
LEAST_LINE, LEAST_IMAGE = 32, 15 * 15
MOST_SPAN = max(_fft_plan.COLUMNS) * _fft_plan.MOST_ROWS // 2


@dataclass(frozen=True)
class FftConvolution(Technique):
    """Rewrite nn.Conv1d and nn.Conv2d with large kernels as products of spectra: the same function in other steps.

    The transforms are matrix products (`_fft_plan`), so every exporter and backend takes them.  Each layer that could
    gain is timed alone on a row of the data, in both forms, in ONNX Runtime and OpenVINO; the best of one form is
    held against the best of the other.

    Args:
        gain: how many times faster than the best direct form a layer must be to be rewritten; 0 rewrites, without
            timing, every layer that can be.
    """

    gain: float = 1.2

    takes: ClassVar[Form] = Form.TORCH
    gives: ClassVar[Form] = Form.TORCH
    stage: ClassVar[Stage] = Stage.LOWER
    exact: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("torch",)
    typical_seconds: ClassVar[float] = 15.0

    def __post_init__(self) -> None:
        if not 0 <= self.gain < float("inf"):
            raise ValueError(f"gain must be a number of 0 or more, but is {self.gain!r}")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[FftConvolution]:
        return [cls()]

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        if model.form is not Form.TORCH or _candidates(model.content):
            return None
        return RefusalError(
            Reason.NOTHING_TO_DO,
            f"no nn.Conv1d or nn.Conv2d has a kernel of {LEAST_LINE} numbers in a line, or {LEAST_IMAGE} in an area, "
            "or more; smaller ones are not tried",
        )

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        if refusal := self.refuse(model, Machine.look()):
            raise refusal
        changed = copy.deepcopy(model.content)
        sites = {name: _Site(conv) for name, conv in _candidates(changed).items()}
        answered = list(_answers(model.changed(Form.TORCH, changed), list(sites.values()), data))
        layers, said, timed = dict[Any, Any](), list[str](), dict[Any, Any]()
        for name, site in sites.items():
            layer, words = self._rewritten(site, timed)
            if layer is not None:
                layers[site.conv] = layer
            said.append(f"{name or 'the model'} ({site}) {words}")
        if not layers:
            raise RefusalError(Reason.NOTHING_TO_DO, "; ".join(said))
        made = model.changed(Form.TORCH, _replaced(changed, layers), *(f"fft_convolution: {words}" for words in said))
        worst = _ensure_same(made, answered)
        return made.changed(Form.TORCH, made.content, f"fft_convolution: within {worst:.1e} of the original")

    def _rewritten(self, site: _Site, timed: dict[Any, Any]) -> tuple[Any, str]:
        """The layer that takes a convolution's place, or None where it is left alone; and why.

        Args:
            timed: what has been timed so far; layers that are alike are timed once.
        """
        plan, why = site.plan()
        if plan is None:
            return None, f"is left alone: {why}"
        layer = fft_layer(site.conv, plan)
        if not self.gain:
            return layer, f"goes by FFT of {plan}, untimed"
        key = str(site)
        try:
            timed[key] = timed.get(key) or fastest({"direct": site.conv, "fft": layer}, site.example)
        except RefusalError as refusal:
            return None, f"is left alone: {refusal.detail}"
        (direct, direct_tool), (fft, fft_tool) = timed[key]["direct"], timed[key]["fft"]
        figures = f"{fft * 1e3:.3g} ms by FFT of {plan} ({fft_tool}), {direct * 1e3:.3g} ms direct ({direct_tool})"
        if direct < self.gain * fft:
            return None, f"is left alone: {figures}"
        return layer, f"goes by FFT: {figures}"


@dataclass
class _Site:
    """A convolution, and what goes into it.

    Args:
        shapes: of its inputs, without the batch.
        example: the longest input, one row.
    """

    conv: Any
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    example: Any = None

    def see(self, x: Any) -> None:
        self.shapes.add(tuple(x.shape[1:]))
        if self.example is None or self.example[0].numel() < x[0].numel():
            self.example = x[:1].detach().clone().contiguous()

    def plan(self) -> tuple[Plan | None, str]:
        """How to cut it, or why it can't be."""
        conv = self.conv
        if self.example is None:
            return None, "no input came to it"
        if str(conv.weight.dtype) != "torch.float32" or str(self.example.dtype) != "torch.float32":
            return None, f"only float32 is handled, but it is {conv.weight.dtype}"
        if self.example.ndim != conv.weight.ndim:
            return None, f"its input must have a batch axis, but has {self.example.ndim} axes"
        edges = conv._reversed_padding_repeated_twice
        span = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if conv.weight.ndim == 3:
            found = _fft_plan.line(
                self.example.shape[-1] + sum(edges), span[0], conv.in_channels, conv.out_channels, conv.groups,
                dynamic=len(self.shapes) > 1,
            )  # fmt: skip
            return found, f"its kernel spans {span[0]}; at most about {MOST_SPAN} can be cut into blocks"
        if len(self.shapes) > 1:
            return None, "images of several sizes go into it"
        width, height = self.example.shape[3] + sum(edges[:2]), self.example.shape[2] + sum(edges[2:])
        found = _fft_plan.image(height, width, (span[0], span[1]))
        return found, f"its images are {height} x {width} with their padding; at most {_fft_plan.MOST_ROWS} a side"

    def __str__(self) -> str:
        """What its time depends on."""
        seen = " or ".join(" x ".join(map(str, shape)) for shape in sorted(self.shapes))
        return f"{self.conv}, input {seen or 'unknown'}"


def _candidates(module: Any) -> dict[str, Any]:
    """Convolutions by name whose kernels are large; of torch's own classes, and without hooks or parametrizations."""
    from torch import nn

    least = {nn.Conv1d: LEAST_LINE, nn.Conv2d: LEAST_IMAGE}
    return {
        name: conv
        for name, conv in module.named_modules()
        if type(conv) in least
        and math.prod(conv.kernel_size) >= least[type(conv)]
        and not (conv._forward_hooks or conv._forward_pre_hooks)
    }


def _answers(model: Model, sites: list[_Site], data: Samples) -> Iterator[tuple[list[Array], list[Array]]]:
    """Probes and the original's answers to them; each site sees what goes into it.

    Its large convolutions are computed by torch's own FFT in float64: exact, and never slow, while a direct form of
    torch can take a minute for a row.

    Raises:
        RefusalError: the model fails.
    """
    for site in sites:

        def forward(x: Any, site: _Site = site) -> Any:
            site.see(x)
            return exact_convolution(site.conv, x)

        site.conv.forward = forward
    try:
        flat = flat_module(model)
        for leaves in probes(model.signature, data):
            yield leaves, answer_torch(flat, leaves)
    finally:
        for site in sites:
            del site.conv.forward


def _replaced(module: Any, layers: dict[Any, Any]) -> Any:
    """The module with some of its modules replaced, wherever they are used."""
    if module in layers:
        return layers[module]
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if child in layers:
                setattr(parent, name, layers[child])
    return module


def _ensure_same(made: Model, answered: list[tuple[list[Array], list[Array]]]) -> float:
    """How far the rewritten model's answers are from the original's.

    Raises:
        RefusalError: too far, or it fails.
    """
    flat, worst = flat_module(made), 0.0
    for leaves, expected in answered:
        try:
            got = answer_torch(flat, leaves)
        except Exception as error:
            raise RefusalError(Reason.UNSUPPORTED, f"the rewritten model fails: {first_lines(error)}") from error
        worst = max(worst, ensure_same(made.signature, expected, got))
    return worst
