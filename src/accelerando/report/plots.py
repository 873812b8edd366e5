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

from accelerando.goal import Bound
from accelerando.interval import Interval
from accelerando.report import words
from accelerando.report.elements import fine
from accelerando.report.story import Seen, Story
from accelerando.trial import Evidence, thin

Figure = dict[str, Any]
POINTS = 300  # of a distribution's curve
MOST_CURVES = 6


def said(text: str, width: int = 46) -> str:
    """Text for plotly: escaped, folded."""
    return "<br>".join(html.escape(line) for line in textwrap.wrap(words.clean(text), width)) or " "


def change(evidence: Evidence) -> tuple[Interval, float]:
    """The drop as a change of quality, up is better, and what it is multiplied by: points for shares of 1."""
    scale = 100.0 if evidence.metric in words.SHARES else 1.0
    return evidence.drop.map(lambda drop: -drop * scale), scale


def log_axis(low: float, high: float, say: Callable[[float], str], **more: Any) -> dict[str, Any]:
    """A logarithmic axis with its few ticks at 1, 2, 5 (and 3, 4, 6, 8 over a short range)."""
    low, high = max(low, 1e-12), max(high, 1.01 * low)
    short = high / low < 30
    steps = (1, 2, 3, 4, 5, 6, 8) if high / low < 8 else (1, 2, 3, 5) if short else (1, 2, 5) if high / low < 500 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
    return {
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickvals": ticks,
        "ticktext": [fine(say(t)) for t in ticks],
        **more,
    }


def _tick_times(value: float) -> str:
    return f"{value:.3g}x"


def _tick_seconds(value: float) -> str:
    for unit, scale in (("us", 1e6), ("ms", 1e3), ("s", 1.0)):
        if value * scale < 999.5 or unit == "s":
            return f"{value * scale:.3g} {unit}"
    return ""


def _bars(intervals: Sequence[Interval], colour: str, thickness: float) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [i.high - i.mid for i in intervals],
        "arrayminus": [i.mid - i.low for i in intervals],
        "color": colour,
        "thickness": thickness,
        "width": 0,
    }


# --- the quality-speed plane ------------------------------------------------------------------------------------


def plane(story: Story) -> Figure:
    """Every measured recipe by its speed and its quality, with intervals; the goal's region; the ladder as a staircase."""
    rungs = [s for s in story.seen if s.rung is not None]
    others = [s for s in story.seen if s.rung is None and s.refused is None]
    refused = [s for s in story.seen if s.refused is not None]
    x, y, floor = _window(story)
    staircase = sorted(rungs, key=lambda s: s.rung or 0)
    data = [
        *_region(story, x, y),
        {
            "type": "scatter", "mode": "lines", "name": "the ladder", "hoverinfo": "skip",
            "x": [s.evidence.speedup.mid for s in staircase], "y": [change(s.evidence)[0].mid for s in staircase],
            "line": {"shape": "vh", "color": "var(--accent)", "width": 1.5, "dash": "dot"},
        },
        _cloud(story, refused, "turned away", "var(--faint)", floor, {"symbol": "x", "size": 7}, 1),
        _cloud(story, others, "verified", "var(--middle)", floor, {"symbol": "circle-open", "size": 8}, 1),
        _cloud(story, [s for s in rungs if s.rung != story.bundle.best], "rungs", "var(--accent)", floor, {"size": 10}, 2),
        _cloud(story, [s for s in rungs if s.rung == story.bundle.best], "the best", "var(--good)", floor,
               {"symbol": "diamond", "size": 14}, 2.5),
    ]  # fmt: skip
    unit = "points" if story.metric in words.SHARES else "its own unit"
    layout = {
        "xaxis": log_axis(*x, _tick_times, title={"text": "times as fast as the original"}),
        "yaxis": {"title": {"text": f"{said(story.metric, 24)} against the original, {unit}"}, "range": list(y), "zeroline": True},
        "hovermode": "closest",
    }  # fmt: skip
    return {"data": [trace for trace in data if trace.get("x")], "layout": layout, "height": 460}


def _window(story: Story) -> tuple[tuple[float, float], tuple[float, float], float]:
    """The ranges of both axes; a candidate that lost far too much is shown at the lower edge, not at its true place."""
    kept = [s for s in story.seen if s.refused is None]
    speeds = [v for s in story.seen for v in (s.evidence.speedup.low, s.evidence.speedup.high)]
    changes = [v for s in kept for v in (change(s.evidence)[0].low, change(s.evidence)[0].high)]
    speeds += [b for b, _ in _speed_bounds(story)]
    changes += _change_bounds(story)
    low, high = min(0.0, *changes), max(0.0, *changes)
    span = (high - low) or abs(change(story.best.evidence)[1]) * 0.01
    floor = low - 0.12 * span
    return (min(speeds) / 1.08, max(speeds) * 1.12), (floor - 0.05 * span, high + 0.12 * span), floor


def _cloud(
    story: Story, seen: Sequence[Seen], name: str, colour: str, floor: float, marker: dict[str, Any], thickness: float
) -> dict[str, Any]:
    changes = [change(s.evidence)[0] for s in seen]
    below = [c.mid < floor for c in changes]
    shown = [Interval(floor, floor, floor) if out else c for c, out in zip(changes, below, strict=True)]
    symbol = marker.get("symbol", "circle")
    return {
        "type": "scatter",
        "name": name,
        "mode": "markers+text" if name in ("rungs", "the best") else "markers",
        "x": [s.evidence.speedup.mid for s in seen],
        "y": [c.mid for c in shown],
        "error_x": _bars([s.evidence.speedup for s in seen], colour, thickness),
        "error_y": _bars(shown, colour, thickness),
        "marker": {**marker, "color": colour, "symbol": ["triangle-down" if out else symbol for out in below]},
        "text": [str(s.rung) if s.rung is not None else "" for s in seen],
        "textposition": "top right",
        "hovertext": [_tip(story, s) for s in seen],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }


def _tip(story: Story, seen: Seen) -> str:
    evidence = seen.evidence
    lines = [
        f"<b>{said(story.name(seen.recipe))}</b>",
        fine(f"{words.between(evidence.speedup, words.times)}, p50 {words.seconds(evidence.latency().mid)}"),
        fine(f"{html.escape(story.metric)} {words.quality(story.metric, evidence.quality.mid)}, "
             f"drop {words.drop(story.metric, evidence.drop)}"),
    ]  # fmt: skip
    if seen.refused is not None:
        lines += [said(f"turned away: {seen.refused.reason.happened}"), said(words.shorten(seen.refused.detail, 140))]
    lines += [said(doubt) for doubt in evidence.doubts()]
    return "<br>".join(lines)


def _speed_bounds(story: Story) -> list[tuple[float, bool]]:
    """Bounds that are about speed as (least speedup, exact?): latency and throughput through the original's own."""
    evidence = story.best.evidence
    found = []
    for bound in story.bundle.goal.bounds:
        if bound.quantity == "speedup" and bound.least:
            found.append((bound.value, True))
        elif bound.quantity in ("latency", "p95", "p99") and not bound.least and bound.value > 0:
            quantile = {"latency": 0.5, "p95": 0.95, "p99": 0.99}[bound.quantity]
            found.append((evidence.original_latency(quantile).mid / bound.value, False))
        elif bound.quantity == "throughput" and bound.least:
            before = evidence.batch / float(np.median(evidence.rounds[:, 1]))
            found.append((bound.value / before, False))
    return found


def _change_bounds(story: Story) -> list[float]:
    """Bounds that are about quality, as the least change of it in the plot's unit."""
    return [v for bound in story.bundle.goal.bounds if (v := _least_change(story, bound)) is not None]


def _least_change(story: Story, bound: Bound) -> float | None:
    evidence = story.best.evidence
    scale, before = change(evidence)[1], evidence.original_quality.mid
    if bound.quantity == "drop" and not bound.least:
        return -scale * bound.value * (abs(before) if bound.relative else 1.0)
    if bound.quantity == "quality" and bound.least == evidence.higher_is_better:
        return scale * (bound.value - before) * (1 if evidence.higher_is_better else -1)
    return None


def _region(story: Story, x: tuple[float, float], y: tuple[float, float]) -> list[dict[str, Any]]:
    """Where the goal's bounds on speed and quality hold."""
    speeds, changes = _speed_bounds(story), _change_bounds(story)
    if not speeds and not changes:
        return []
    left, low = max([x[0] / 2, *(v for v, _ in speeds)]), max([y[0] - abs(y[0]), *changes])
    right, high = x[1] * 2, y[1] + abs(y[1]) + 1
    about = "" if all(exact for _, exact in speeds) else " (about)"
    return [{
        "type": "scatter", "mode": "lines", "fill": "toself", "name": f"the goal{about}", "hoverinfo": "skip",
        "x": [left, right, right, left, left], "y": [low, low, high, high, low],
        "fillcolor": "var(--region)", "line": {"color": "var(--good)", "width": 1},
    }]  # fmt: skip


# --- the way, the distributions, the time -----------------------------------------------------------------------


def way(story: Story) -> Figure:
    """What each step brought on the way from the original to the best: from one speedup to the next."""
    legs = story.way
    ends = [leg.seen.evidence.speedup for leg in legs]
    names = [f"the original<br>{said(words.recipe(story.original.recipe), 24)}", *(said(leg.added, 24) for leg in legs)]
    labels = [f"{n}{' ' * i}" for i, n in enumerate(names)]  # plotly joins rows of one name
    colours = ["var(--middle)", *("var(--good)" if e.mid >= leg.before else "var(--bad)" for e, leg in zip(ends, legs, strict=True))]
    values = [1.0, *(v for e in ends for v in (e.low, e.high))]
    left = 0.8 * min(values)
    bases = [left, *(leg.before for leg in legs)]
    texts = [" 1x", *(f" {words.between(e, words.times)}" for e in ends)]
    gains = ["", *(f"{words.times(e.mid / leg.before)} by this step" for e, leg in zip(ends, legs, strict=True))]
    stops = [1.0, *(e.mid for e in ends)]
    bars = {
        "type": "bar", "orientation": "h", "y": labels, "base": bases,
        "x": [stop - base for stop, base in zip(stops, bases, strict=True)],
        "marker": {"color": colours}, "hovertext": [fine(f"{said(n)}<br>{g}") for n, g in zip(names, gains, strict=True)],
        "hovertemplate": "%{hovertext}<extra></extra>", "showlegend": False,
    }  # fmt: skip
    marks = {
        "type": "scatter", "mode": "markers+text", "y": labels[1:], "x": [e.mid for e in ends],
        "error_x": _bars(ends, "var(--text)", 1.5), "marker": {"color": "var(--text)", "size": 4},
        "hoverinfo": "skip", "showlegend": False,
    }  # fmt: skip
    notes = [
        {"x": math.log10(max(s, b, *( [ends[i - 1].high] if i else []))), "y": label, "text": fine(t), "showarrow": False,
         "xanchor": "left", "xshift": 6, "font": {"color": "var(--text)"}}
        for i, (s, b, label, t) in enumerate(zip(stops, bases, labels, texts, strict=True))
    ]  # fmt: skip
    layout = {
        "xaxis": log_axis(left, 1.9 * max(values), _tick_times, title={"text": "times as fast as the original"}),
        "yaxis": {"autorange": "reversed", "automargin": True},
        "annotations": notes,
        "bargap": 0.35,
    }
    return {"data": [bars, marks], "layout": layout, "height": 130 + 58 * len(labels)}


def latency(story: Story) -> Figure:
    """The share of calls that were answered within a time: further left is faster, steeper is steadier."""
    ladder, best = story.bundle.ladder.rungs, story.bundle.best
    numbers = [i for i in range(1, len(ladder)) if i != best][-MOST_CURVES:]
    arms = [(f"the original: {words.recipe(story.original.recipe)}", story.best.evidence.original_seconds, "var(--text)", 2.0)]
    arms += [
        (f"{i}: {words.recipe(ladder[i].recipe)}", ladder[i].evidence.seconds, f"var(--rung{1 + k % 6})", 1.5)
        for k, i in enumerate(numbers)
    ]
    if best:
        arms.append((f"{best}, the best: {words.recipe(story.best.recipe)}", story.best.evidence.seconds, "var(--good)", 3.0))
    data, lows, highs = [], [], []
    for name, seconds, colour, width in arms:
        ordered = np.sort(seconds)
        share = (np.arange(len(ordered)) + 1) / len(ordered)
        chosen = thin(np.arange(len(ordered), dtype=np.float64), POINTS).astype(int)
        lows.append(float(ordered[0]))
        highs.append(float(ordered[min(len(ordered) - 1, int(0.995 * len(ordered)))]))
        data.append({
            "type": "scatter", "mode": "lines", "name": said(name, 60), "line": {"color": colour, "width": width, "shape": "hv"},
            "x": [float(f"{v:.4g}") for v in ordered[chosen]], "y": [round(float(100 * v), 2) for v in share[chosen]],
            "hovertemplate": f"{said(name)}<br>%{{y:.0f}} % of calls within %{{x:.3s}}s<extra></extra>",
        })  # fmt: skip
    layout = {
        "xaxis": log_axis(min(lows) / 1.1, max(highs) * 1.15, _tick_seconds, title={"text": "seconds per call"}),
        "yaxis": {"title": {"text": "calls answered, %"}, "range": [0, 101]},
        "legend": {"orientation": "v", "y": -0.2, "yanchor": "top"},
    }
    return {"data": data, "layout": layout, "height": 380 + 22 * len(arms)}


def learning(story: Story) -> Figure:
    """The time each trial took, and the best speedup that was known after it."""
    ends = np.cumsum([t.seconds for t in story.trials])
    best, climbing, marks = 1.0, [], {"verified": [], "turned away": []}  # type: tuple[float, list[float], dict[str, list[Any]]]
    for end, trial in zip(ends, story.trials, strict=True):
        if trial.verified is not None:
            best = max(best, trial.verified.evidence.speedup.mid)
        climbing.append(best)
        if trial.evidence is not None:
            marks["verified" if trial.verified else "turned away"].append((float(end), trial))
    line = {
        "type": "scatter", "mode": "lines", "name": "fastest verified so far", "hoverinfo": "skip",
        "x": [0.0, *map(float, ends)], "y": [1.0, *climbing], "line": {"shape": "hv", "color": "var(--accent)", "width": 2},
    }  # fmt: skip
    data = [line]
    for name, colour in (("verified", "var(--good)"), ("turned away", "var(--faint)")):
        data.append({
            "type": "scatter", "mode": "markers", "name": name, "x": [end for end, _ in marks[name]],
            "y": [t.evidence.speedup.mid for _, t in marks[name]],
            "marker": {"color": colour, "size": 8, "symbol": "circle" if name == "verified" else "x"},
            "error_x": {"type": "data", "symmetric": False, "array": [0.0] * len(marks[name]), "width": 0, "color": colour,
                        "arrayminus": [t.seconds for _, t in marks[name]], "thickness": 3},
            "hovertext": [f"{said(words.recipe(t.recipe))}<br>took {words.duration(t.seconds)}" for _, t in marks[name]],
            "hovertemplate": "%{hovertext}<extra></extra>",
        })  # fmt: skip
    speeds = [1.0, *(t.evidence.speedup.mid for t in story.trials if t.evidence is not None)]
    layout = {
        "xaxis": {"title": {"text": "seconds of trials, one after the other"}, "rangemode": "tozero"},
        "yaxis": log_axis(min(speeds) / 1.15, max(speeds) * 1.2, _tick_times, title={"text": "times as fast"}),
        "hovermode": "closest",
    }
    return {"data": [t for t in data if t["x"]], "layout": layout, "height": 360}
