"""The page's plots, as plain plotly figures.

Colours are written `var(--name)`: the page's script puts in those of the reader's theme.  Texts that show up in a
plot are escaped here, for plotly reads a little HTML in them.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from accelerando.interval import Interval
from accelerando.report import words
from accelerando.report.elements import fine
from accelerando.report.healing import only_measured, timed
from accelerando.report.story import Story
from accelerando.report.way import Leg
from accelerando.trial import Trial, thin

Figure = dict[str, Any]
POINTS = 300  # of a distribution's curve
MOST_CURVES = 6
NOTHING = "\u200b"  # a space of no width
VERIFIED, AWAY, SHAPE = "verified", "turned away", "shapes, before healing"
KINDS = ((VERIFIED, "var(--good)", "circle"), (AWAY, "var(--faint)", "x"), (SHAPE, "var(--unsure)", "diamond-open"))


def said(text: str, width: int = 46) -> str:
    """Text for plotly: escaped, folded."""
    return "<br>".join(html.escape(line) for line in textwrap.wrap(words.clean(text), width)) or " "


def log_axis(low: float, high: float, say: Callable[[float], str], **more: Any) -> dict[str, Any]:
    """A logarithmic axis with its few ticks at 1, 2, 5 (and 3, 4, 6, 8 over a short range)."""
    low, high = max(low, 1e-12), max(high, 1.01 * low)
    short = high / low < 30
    steps = (
        (1, 2, 3, 4, 5, 6, 8) if high / low < 16 else (1, 2, 3, 5) if short else (1, 2, 5) if high / low < 500 else (1,)
    )
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
    return {
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickvals": ticks,
        "ticktext": [fine(say(t)) for t in ticks],
        **more,
    }


def tick_times(value: float) -> str:
    return f"{round(value, 6):g}x"


def tick_seconds(value: float) -> str:
    for unit, scale in (("us", 1e6), ("ms", 1e3), ("s", 1.0)):
        if value * scale < 999.5 or unit == "s":
            return f"{value * scale:.3g} {unit}"
    return ""


def bars(intervals: Sequence[Interval], colour: str, thickness: float) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [i.high - i.mid for i in intervals],
        "arrayminus": [i.mid - i.low for i in intervals],
        "color": colour,
        "thickness": thickness,
        "width": 0,
    }


def way(story: Story) -> Figure:
    """What each step brought on the way from the original to the best: from one speedup to the next."""
    legs = story.way
    ends = [leg.after for leg in legs]
    names = [
        f"the original<br>{said(words.recipe(story.original.recipe), 24)}",
        *(f"{said(leg.added, 24)}{fine(_quality_step(story, leg))}" for leg in legs),
    ]
    labels = [f"{n}{NOTHING * i}" for i, n in enumerate(names)]  # plotly joins rows of one name
    colours = [
        "var(--middle)",
        *("var(--middle)" if not leg.clear else "var(--good)" if leg.gain > 1 else "var(--bad)" for leg in legs),
    ]
    values = [1.0, *(v for e in ends for v in (e.low, e.high))]
    left = 0.8 * min(values)
    bases = [left, *(leg.before.mid for leg in legs)]
    texts = [" 1x", *(f" {words.between(e, words.times)}" for e in ends)]
    gains = ["", *(f"{words.times(leg.gain)} by this step" for leg in legs)]
    stops = [1.0, *(e.mid for e in ends)]
    floating = {
        "type": "bar", "orientation": "h", "y": labels, "base": bases,
        "x": [stop - base for stop, base in zip(stops, bases, strict=True)],
        "marker": {"color": colours},
        "hovertext": [fine(f"{n}<br>{g}") for n, g in zip(names, gains, strict=True)],
        "hovertemplate": "%{hovertext}<extra></extra>", "showlegend": False,
    }  # fmt: skip
    marks = {
        "type": "scatter", "mode": "markers+text", "y": labels[1:], "x": [e.mid for e in ends],
        "error_x": bars(ends, "var(--text)", 1.5), "marker": {"color": "var(--text)", "size": 4},
        "hoverinfo": "skip", "showlegend": False,
    }  # fmt: skip
    notes = [
        {"x": math.log10(max(s, b, *([ends[i - 1].high] if i else []))), "y": label, "text": fine(t),
         "showarrow": False, "xanchor": "left", "xshift": 6, "font": {"color": "var(--text)"}}
        for i, (s, b, label, t) in enumerate(zip(stops, bases, labels, texts, strict=True))
    ]  # fmt: skip
    layout = {
        "xaxis": log_axis(left, 1.9 * max(values), tick_times, title={"text": "times as fast as the original"}),
        "yaxis": {"autorange": "reversed", "automargin": True},
        "annotations": notes,
        "bargap": 0.35,
    }
    return {"data": [floating, marks], "layout": layout, "height": 130 + 58 * len(labels)}


def _quality_step(story: Story, leg: Leg) -> str:
    """What a leg did to the quality as a line of its name, where that is clear: `-38.1 points`."""
    brought = leg.brought(story.metric)
    return f"<br>{html.escape(brought)}" if brought else ""


def latency(story: Story) -> Figure:
    """The share of calls that were answered within a time: further left is faster, steeper is steadier."""
    ladder, best = story.bundle.ladder.rungs, story.bundle.best
    numbers = [i for i in range(1, len(ladder)) if i != best][-MOST_CURVES:]
    arms = [
        (
            f"the original: {words.recipe(story.original.recipe)}",
            story.best.evidence.original_seconds,
            "var(--text)",
            2.0,
        )
    ]
    arms += [
        (f"{i}: {words.recipe(ladder[i].recipe)}", ladder[i].evidence.seconds, f"var(--rung{1 + k % 6})", 1.5)
        for k, i in enumerate(numbers)
    ]
    if best:
        arms.append(
            (f"{best}, the best: {words.recipe(story.best.recipe)}", story.best.evidence.seconds, "var(--good)", 3.0)
        )
    data, lows, highs = [], [], []
    for name, seconds, colour, width in arms:
        ordered = np.sort(seconds)
        share = (np.arange(len(ordered)) + 1) / len(ordered)
        chosen = thin(np.arange(len(ordered), dtype=np.float64), POINTS).astype(int)
        lows.append(float(ordered[0]))
        highs.append(float(ordered[min(len(ordered) - 1, int(0.995 * len(ordered)))]))
        data.append({
            "type": "scatter", "mode": "lines", "name": said(name, 40),
            "line": {"color": colour, "width": width, "shape": "hv"},
            "x": [float(f"{v:.4g}") for v in ordered[chosen]], "y": [round(float(100 * v), 2) for v in share[chosen]],
            "hovertemplate": f"{said(name)}<br>%{{y:.0f}} % of calls within %{{x:.3s}}s<extra></extra>",
        })  # fmt: skip
    layout = {
        "xaxis": log_axis(min(lows) / 1.1, max(highs) * 1.15, tick_seconds, title={"text": "seconds per call"}),
        "yaxis": {"title": {"text": "calls answered, %"}, "range": [0, 101]},
        "legend": {"orientation": "v", "y": -0.2, "yanchor": "top"},
    }
    return {"data": data, "layout": layout, "height": 380 + 22 * len(arms)}


def learning(story: Story) -> Figure:
    """The time each trial took, and the best speedup that was known after it."""
    ends = [float(v) for v in np.cumsum([t.seconds for t in story.history])]
    best, climbing = 1.0, []
    marks: dict[str, list[tuple[float, Trial, float]]] = {name: [] for name, _, _ in KINDS}
    for end, trial in zip(ends, story.history, strict=True):
        if trial.verified is not None:
            best = max(best, trial.verified.evidence.speedup.mid)
        climbing.append(best)
        speed = timed(trial)
        if speed is not None:
            kind = VERIFIED if trial.verified else SHAPE if only_measured(trial) else AWAY
            marks[kind].append((end, trial, speed.mid))
    data: list[dict[str, Any]] = [{
        "type": "scatter", "mode": "lines", "name": "fastest verified so far", "hoverinfo": "skip",
        "x": [0.0, *ends], "y": [1.0, *climbing], "line": {"shape": "hv", "color": "var(--accent)", "width": 2},
    }]  # fmt: skip
    for name, colour, symbol in KINDS:
        data.append({
            "type": "scatter", "mode": "markers", "name": name,
            "x": [end for end, _, _ in marks[name]], "y": [speed for _, _, speed in marks[name]],
            "marker": {"color": colour, "size": 8, "symbol": symbol},
            "error_x": {"type": "data", "symmetric": False, "array": [0.0] * len(marks[name]), "width": 0,
                        "color": colour, "arrayminus": [t.seconds for _, t, _ in marks[name]], "thickness": 3},
            "hovertext": [
                f"{said(words.recipe(t.recipe))}<br>took {words.duration(t.seconds)}" for _, t, _ in marks[name]
            ],
            "hovertemplate": "%{hovertext}<extra></extra>",
        })  # fmt: skip
    speeds = [1.0, *(speed for each in marks.values() for _, _, speed in each)]
    layout = {
        "xaxis": {"title": {"text": "seconds of trials, one after the other"}, "rangemode": "tozero"},
        "yaxis": log_axis(min(speeds) / 1.15, max(speeds) * 1.2, tick_times, title={"text": "times as fast"}),
        "hovermode": "closest",
    }
    return {"data": [t for t in data if t["x"]], "layout": layout, "height": 360}
