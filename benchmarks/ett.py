"""ETTh1: the temperature of an electricity transformer and six loads, hourly, and a small forecaster of our own.

Four days in, one day ahead, all seven columns; in units of the training months' deviation.  The usual split by time:
12 months to learn from, 4 for validation (unused: nothing is chosen here), 4 to test.  Windows begin at every hour and
overlap, so the 2,857 tests are not as independent as an interval over samples takes them to be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.training import Course, Rows, learned
from benchmarks.transformer import Block

PAST, AHEAD, COLUMNS = 96, 24, 7
MONTH = 30 * 24
COURSE = Course(epochs=2, rate=1e-3)


class Forecaster(nn.Module):
    """(n, 96 hours, 7) float32 -> (n, 24 hours, 7): how far each column moves from where it is now."""

    def __init__(self, width: int = 128, depth: int = 3, heads: int = 4, hidden: int = 256):
        super().__init__()
        self.embed = nn.Linear(COLUMNS, width)
        self.places = nn.Parameter(0.02 * torch.randn(1, PAST, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden, dropout=0.2) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, AHEAD * COLUMNS)

    def forward(self, x: Any) -> Any:
        now = x[:, -1:]
        h = self.embed(x - now) + self.places
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h[:, -1])).unflatten(1, (AHEAD, COLUMNS)) + now


def windows(table: np.ndarray) -> Rows:
    """Every window of a table (hours, 7): (n, 96, 7) and the (n, 24, 7) that follow."""
    every = np.lib.stride_tricks.sliding_window_view(table, PAST + AHEAD, axis=0).transpose(0, 2, 1)
    return np.ascontiguousarray(every[:, :PAST]), np.ascontiguousarray(every[:, PAST:])


def rows(data: Path) -> tuple[Rows, Rows]:
    """Windows to learn from, and those that are judged."""
    table = np.loadtxt(data / "ETTh1.csv", delimiter=",", skiprows=1, usecols=range(1, 1 + COLUMNS))
    seen, test = table[: 12 * MONTH], table[16 * MONTH - PAST : 20 * MONTH]
    mean, deviation = seen.mean(axis=0), seen.std(axis=0)
    ready = [((part - mean) / deviation).astype(np.float32) for part in (seen, test)]
    return windows(ready[0]), windows(ready[1])


def trained(train: Rows, course: Course = COURSE) -> nn.Module:
    """The forecaster, taught on these rows."""
    torch.manual_seed(0)
    return learned("ett", Forecaster(), train, course, F.l1_loss)


METRIC, TEACHING = "mae", {"loss": F.l1_loss}
