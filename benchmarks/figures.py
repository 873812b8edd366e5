"""What a part of a benchmark has to say: its figures, each held against what was asked for, and some words.

ACCELERANDO_BENCH_SCALE shortens everything that is measured, to see whether it runs; what it then prints is no result.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from benchmarks.results import table

SCALE = float(os.environ.get("ACCELERANDO_BENCH_SCALE", "1"))


@dataclass(frozen=True)
class Figure:
    """One measured figure, what was asked for, and whether that was reached."""

    what: str
    found: str
    asked: str
    reached: bool


@dataclass(frozen=True)
class Found:
    """What a part found: its figures, and how they came about."""

    figures: tuple[Figure, ...]
    text: str


def shortened(seconds: float, least: float = 1.0) -> float:
    """A duration, at the scale that was asked for."""
    return max(seconds * SCALE, min(seconds, least))


def fewer(count: int, least: int = 20) -> int:
    """A number of repetitions, at the scale that was asked for."""
    return max(int(count * SCALE), min(count, least))


def held_against(figures: list[Figure]) -> str:
    """All figures as a table."""
    rows = [[f.what, f.found, f.asked, "reached" if f.reached else "**not reached**"] for f in figures]
    return table(["what", "found", "asked for", ""], rows)
