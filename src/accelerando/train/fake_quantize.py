"""Quantization-aware finetuning: int8 is simulated while training, and taken off again (Jacob et al. 2018).

Weights of Linear and Conv layers are rounded per output channel, symmetric; their inputs per tensor, with the range
that was seen.  Rounding is passed over by the gradient (straight through, Bengio et al. 2013).  Batch norm needs no
folding here: it scales whole output channels, and so do the steps of the rounding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from accelerando.errors import Reason, RefusalError

MOMENTUM = 0.02  # of the activations' range
TINY = 1e-8


class FakeInt8:
    """Simulated int8 on a module's layers, from `on` to `off`; while off, the module is an ordinary one.

    Args:
        module: its layers' `forward` is replaced while it is on; its weights stay plain parameters.
    """

    def __init__(self, module: Any) -> None:
        from torch import nn

        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        self.layers = [m for m in module.modules() if isinstance(m, kinds)]
        if not self.layers:
            raise RefusalError(Reason.NOTHING_TO_DO, "it has no Linear or Conv layer that could be quantized")
        self.forget()

    def on(self) -> None:
        for i, layer in enumerate(self.layers):
            layer.__dict__["forward"] = partial(self._forward, i, layer)  # before the one of its class

    def forget(self) -> None:
        """The ranges are taken anew from the next batch."""
        self._ranges: list[tuple[float, float]] = [(0.0, 0.0)] * len(self.layers)

    def off(self) -> None:
        for layer in self.layers:
            layer.__dict__.pop("forward", None)

    def _forward(self, number: int, layer: Any, x: Any) -> Any:
        from torch.nn import functional

        if layer.training or self._ranges[number] == (0.0, 0.0):
            self._see(number, x)
        x, weight = self._rounded(number, x), _rounded_weight(layer.weight)
        if hasattr(layer, "_conv_forward"):
            return layer._conv_forward(x, weight, layer.bias)
        return functional.linear(x, weight, layer.bias)

    def _see(self, number: int, x: Any) -> None:
        """Widen the range to 0 and what a batch holds: at once the first time, then slowly."""
        low, high = (float(v) for v in x.detach().aminmax())
        low, high, (before, after) = min(low, 0.0), max(high, 0.0), self._ranges[number]
        if (before, after) != (0.0, 0.0):
            low, high = before + MOMENTUM * (low - before), after + MOMENTUM * (high - after)
        self._ranges[number] = low, high

    def _rounded(self, number: int, x: Any) -> Any:
        import torch

        low, high = self._ranges[number]
        step = max((high - low) / 255, TINY)
        zero = min(255, max(0, round(-low / step)))
        return torch.fake_quantize_per_tensor_affine(x, step, zero, 0, 255)


def _rounded_weight(weight: Any) -> Any:
    import torch

    flat = weight.detach().reshape(len(weight), -1)
    step = (flat.abs().amax(1) / 127).clamp(min=TINY)
    return torch.fake_quantize_per_channel_affine(weight, step, torch.zeros_like(step, dtype=torch.int32), 0, -127, 127)
