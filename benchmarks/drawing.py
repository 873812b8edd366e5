"""Plots for the pages, as SVG files that need nothing else: the same figures give the same bytes.

A picture brings its own ground, and its own colours for a light and a dark page, for a page's style does not reach into
an image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from accelerando.report.elements import el, raw

WIDTH = 720  # of every picture, in pixels; about what a page gives it
STYLE = """
svg { --paper: #ffffff; --text: #16191f; --soft: #586070; --line: #dfe3e9;
  --ours: #0b7f5c; --first: #b5482a; --second: #2f5fd0; --middle: #6f798a; --bad: #c2362b; }
@media (prefers-color-scheme: dark) { svg { --paper: #171b21; --text: #e8ebf0; --soft: #9aa4b4; --line: #2f3742;
  --ours: #3fc79a; --first: #f0956f; --second: #82a6ff; --middle: #8b95a7; --bad: #ff7b6e; } }
text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--soft); }
.title { font-weight: 600; font-size: 13px; fill: var(--text); }
.paper { fill: var(--paper); } .grid { stroke: var(--line); }
.ours { --c: var(--ours); } .first { --c: var(--first); } .second { --c: var(--second); }
.middle { --c: var(--middle); } .bad { --c: var(--bad); }
path { fill: none; } .line { stroke: var(--c); stroke-width: 1.4; stroke-linejoin: round; }
.dots { stroke: var(--c); stroke-width: 2.2; stroke-linecap: round; } .big { stroke-width: 10; }
.area { fill: var(--c); fill-opacity: 0.25; stroke: var(--c); stroke-width: 1.2; }
.limit { stroke: var(--c); stroke-dasharray: 5 3; stroke-width: 1.2; }
text.ours, text.first, text.second, text.middle, text.bad { fill: var(--c); }
"""
Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """Where values lie: `low` at pixel `start`, `high` at pixel `end`; by powers of ten where `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


@dataclass(frozen=True)
class Panel:
    """A box with two axes, and what is drawn in it."""

    x: Axis
    y: Axis

    def frame(self, title: str, across: dict[float, str], up: dict[float, str], colour: str = "") -> Element:
        """The grid with its figures: what is written at which value of either axis."""
        left, right, low, high = self.x.start, self.x.end, self.y.start, self.y.end
        grid = [f"M{_n(left)},{_n(self.y.at(v))}H{_n(right)}" for v in up]
        grid += [f"M{_n(self.x.at(v))},{_n(low)}V{_n(high)}" for v in across]
        return el(
            "g",
            el("path", d="".join(grid), class_="grid"),
            *(words(self.x.at(v), low + 15, text, "middle") for v, text in across.items()),
            *(words(left - 6, self.y.at(v) + 4, text, "end") for v, text in up.items()),
            words(left, high - 8, title, class_=f"title {colour}".strip()) if title else None,
        )

    def line(self, points: Iterable[Point], colour: str, kind: str = "line") -> Element:
        """Straight from point to point."""
        return el("path", d="M" + "L".join(self._at(p) for p in points), class_=f"{kind} {colour}")

    def steps(self, points: Sequence[Point], colour: str, kind: str = "line") -> Element:
        """Level from each point to the next, and to the right edge."""
        x, y = self._at(points[0]).split(",")
        parts = [f"M{x},{y}"]
        for point in points[1:]:
            parts.append("H{}V{}".format(*self._at(point).split(",")))
        return el("path", d="".join(parts) + f"H{_n(self.x.end)}", class_=f"{kind} {colour}")

    def dots(self, points: Iterable[Point], colour: str, kind: str = "") -> Element:
        return el("path", d="".join(f"M{self._at(p)}h0" for p in points), class_=f"dots {kind} {colour}".strip())

    def ticks(self, values: Iterable[float], colour: str, length: float = 7.0) -> Element:
        """Short strokes that hang from the upper edge."""
        top = _n(self.y.end)
        return el("path", d="".join(f"M{_n(self.x.at(v))},{top}v{_n(length)}" for v in values), class_=f"line {colour}")

    def _at(self, point: Point) -> str:
        return f"{_n(self.x.at(point[0]))},{_n(self.y.at(point[1]))}"


def words(x: float, y: float, text: str, anchor: str | None = None, class_: str | None = None) -> Element:
    """A line of text; `anchor` is the part of it that lies at x: its start, `middle` or `end`."""
    return el("text", text, x=_n(x), y=_n(y), text_anchor=anchor, class_=class_)


def save(path: Path, height: float, title: str, *parts: Element) -> None:
    """Write a picture; the title is what a screen reader says."""
    root = el(
        "svg",
        el("title", title),
        raw("style", STYLE),
        el("rect", width="100%", height="100%", rx="8", class_="paper"),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {_n(height)}",
        width=str(WIDTH),
        height=_n(height),
        role="img",
    )
    path.write_bytes(ElementTree.tostring(root, encoding="utf-8") + b"\n")


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
