"""Three small layers for a convolution: 1 x 1 to few channels, the kernel from few to few, 1 x 1 to all.

A Tucker-2 decomposition: the kernel is projected on the main directions of both its channel modes (higher-order SVD;
Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications", ICLR 2016).
Those of the answers are found on the data (`_factors`).  Those of the inputs are the kernel's own, unfolded, with each
channel's weight given by the data: with C = L L^T the second moment of the input's channels, W L ~ W L Q Q^T for the
main eigenvectors Q of L^T W^T W L, so that W ~ (W L Q) (L^-T Q)^T.
"""

from __future__ import annotations

import math
from typing import Any

from accelerando.techniques._factors import LANES, RIDGE, Factors, Parts


def triple(factors: Factors, budget: int) -> Parts | None:
    """The three layers that keep most of the energies of both modes, for at most `budget` multiply-adds a row.

    None where the layer has no extent, or where none are so cheap.
    """
    if factors.rows is None:
        return None
    values, fold, lines = _inputs(factors)
    kept_in, kept_out = (x.cumsum(0) / max(float(x.sum()), 1e-30) for x in (values, factors.energies))
    found: list[tuple[float, int, int]] = []
    channels = factors.layer.in_channels
    for first in (*range(1, min(LANES, channels)), *range(LANES, channels, LANES)):
        left = budget - cost(factors, first, 0)
        if (second := left // (cost(factors, first, 1) - cost(factors, first, 0))) < 1:
            break
        second = factors.rounded(second)
        found.append((float(kept_in[first - 1] * kept_out[second - 1]), first, second))
    if not found:
        return None
    _, first, second = max(found)
    return _build(factors, first, second, fold, lines)


def three(factors: Factors, first: int, second: int) -> Parts:
    """The three layers of these ranks, of the inputs and of the answers."""
    _, fold, lines = _inputs(factors)
    return _build(factors, first, second, fold, lines)


def cost(factors: Factors, first: int, second: int) -> int:
    """Multiply-adds of the three layers for one row; the first runs wherever there is an input."""
    out, channels, *extent = factors.layer.weight.shape
    entries = math.prod(factors.shape) // channels
    return entries * channels * first + factors.positions * second * (math.prod(extent) * first + out)


def _inputs(factors: Factors) -> tuple[Any, Any, Any]:
    """The energy that each main direction of the inputs keeps, (in,), and L Q and L^-T Q, (in, in)."""
    import torch

    weight = factors.layer.weight.detach().double().movedim(1, -1).flatten(0, -2)
    eye = torch.eye(len(factors.spread), dtype=torch.float64)
    root = torch.linalg.cholesky(factors.spread + eye * (RIDGE * float(factors.spread.trace().clamp_min(1e-12))))
    values, vectors = torch.linalg.eigh(root.T @ (weight.T @ weight) @ root)
    vectors = vectors.flip(1)
    lines = torch.linalg.solve_triangular(root.T, vectors, upper=True)
    return values.flip(0).clamp_min(0).numpy(), root @ vectors, lines


def _build(factors: Factors, first: int, second: int, fold: Any, lines: Any) -> Parts:
    import torch
    from torch import nn

    layer, kind = factors.layer, type(factors.layer)
    weight, u = layer.weight.detach().double(), factors.directions[:, :second]
    rows, mix = torch.linalg.qr(lines[:, :first])  # orthonormal, so that float32 will do
    core = torch.einsum("os,oi...,if->sf...", u, weight, fold[:, :first] @ mix.T)
    blank: Any = nn.utils.skip_init  # draws no random weights
    extent = {k: getattr(layer, k) for k in ("stride", "padding", "dilation", "padding_mode")}
    made = nn.Sequential(
        blank(kind, layer.in_channels, first, 1, bias=False),
        blank(kind, first, second, layer.kernel_size, bias=False, **extent),
        blank(kind, second, layer.out_channels, 1),
    )
    flat = (1,) * (weight.ndim - 2)
    values = (rows.T.reshape(first, -1, *flat), core, u.reshape(-1, second, *flat))
    for part, value in zip(made, values, strict=True):
        part.weight = nn.Parameter(value.to(layer.weight.dtype).contiguous(), layer.weight.requires_grad)
    made[2].bias = nn.Parameter(layer.weight.new_zeros(layer.out_channels), layer.weight.requires_grad)
    with torch.no_grad():  # what is right in the mean needs no rank
        off = layer(factors.rows) - made(factors.rows)
        made[2].bias.copy_(off.movedim(1, -1).flatten(0, -2).mean(0))
    return Parts((first, second), cost(factors, first, second), made.train(layer.training))
