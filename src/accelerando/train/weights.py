"""The weights of a module by name: taken out, put back, averaged; and zeros that stay zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Weights = dict[str, Any]  # name -> tensor

LEAST_ZEROS = 0.3  # of a weight: fewer exact zeros are an accident, not a sparse layer


def live_weights(module: Any) -> Weights:
    """The parameters and buffers themselves; one that has several names is there once."""
    return {name: t.detach() for name, t in (*module.named_parameters(), *module.named_buffers())}


def weights_of(module: Any) -> Weights:
    """Copies of all parameters and buffers."""
    return {name: t.clone() for name, t in live_weights(module).items()}


def put(module: Any, weights: Mapping[str, Any]) -> None:
    """Copy weights into a module, whose own tensors stay where they are."""
    for name, tensor in live_weights(module).items():
        tensor.copy_(weights[name])


def fit(module: Any, weights: Mapping[str, Any]) -> bool:
    """Whether these are the weights of such a module: the same names, shapes and types."""
    own = live_weights(module)
    return own.keys() == weights.keys() and all(
        t.shape == weights[name].shape and t.dtype == weights[name].dtype for name, t in own.items()
    )


class Average:
    """The running average of a module's weights (Polyak & Juditsky 1992): plain at first, then exponential.

    Args:
        horizon: how many of its updates it remembers.
        weights: where it goes on from; None for the module's own.
    """

    def __init__(self, module: Any, horizon: int, weights: Weights | None = None) -> None:
        self.weights = weights_of(module) if weights is None else weights
        self._live, self._horizon, self._count = live_weights(module), horizon, 0

    def update(self) -> None:
        """Take in what the module's weights are now."""
        self._count = min(self._count + 1, self._horizon)
        for name, tensor in self._live.items():
            if tensor.is_floating_point():
                self.weights[name].lerp_(tensor, 1 / self._count)
            else:
                self.weights[name].copy_(tensor)


class Zeros:
    """The zeros of weights that were made sparse; those of weights that are nothing but zeros are left to grow."""

    def __init__(self, module: Any) -> None:
        self._kept = []
        for parameter in module.parameters():
            if parameter.dim() >= 2 and parameter.is_floating_point():
                there = parameter.detach() != 0
                if LEAST_ZEROS <= 1 - float(there.float().mean()) < 1:
                    self._kept.append((parameter.detach(), there))

    def restore(self) -> None:
        """Make zeros again what was zero at the beginning."""
        for tensor, there in self._kept:
            tensor.mul_(there)
