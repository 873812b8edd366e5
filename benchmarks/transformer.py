"""A pre-norm transformer block, of which the benchmarks' own text and forecasting models are made."""

from __future__ import annotations

from typing import Any

from torch import nn


class Block(nn.Module):
    """(n, length, width) -> the same; `mask` (n, length) is added to the scores of each position, or None."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Any, mask: Any = None) -> Any:
        h = self.norm_1(x)
        x = x + self.drop(self.attention(h, h, h, key_padding_mask=mask, need_weights=False)[0])
        return x + self.drop(self.mlp(self.norm_2(x)))
