"""The quality-speed plane: what was measured, what is asked for, and the ladder, in one plot."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from accelerando.goal import Bound
from accelerando.interval import Interval
from accelerando.report import words
from accelerando.report.elements import fine
from accelerando.report.plots import Figure, bars, log_axis, said, tick_times
from accelerando.report.story import Story
from accelerando.report.way import Seen
from accelerando.trial import Evidence


def picture(story: Story) -> Figure:
    """Every measured recipe with its intervals, the goal's region, and the ladder as a staircase."""
    rungs, best = [s for s in story.seen if s.rung is not None], story.bundle.best
    others = [s for s in story.seen if s.rung is None and s.refused is None]
    refused = [s for s in story.seen if s.refused is not None and not s.bare]
    bare = [s for s in story.seen if s.bare]
    x, y, floor = _window(story)
    staircase = sorted(rungs, key=lambda s: s.rung or 0)
    data = [
        *_region(story, x, y),
        _rug(story, y[0]),
        {
            "type": "scatter", "mode": "lines", "name": "the ladder", "hoverinfo": "skip",
            "x": [s.evidence.speedup.mid for s in staircase], "y": [change(s.evidence)[0].mid for s in staircase],
            "line": {"shape": "vh", "color": "var(--accent)", "width": 1.5, "dash": "dot"},
        },
        _cloud(story, refused, "turned away", "var(--faint)", floor, {"symbol": "x", "size": 7}, 1),
        _cloud(story, bare, "shapes, before healing", "var(--unsure)", floor, {"symbol": "diamond-open", "size": 7}, 1),
        _cloud(story, others, "verified", "var(--middle)", floor, {"symbol": "circle-open", "size": 8}, 1),
        _cloud(story, [s for s in rungs if s.rung != best], "rungs", "var(--accent)", floor, {"size": 10}, 2),
        _cloud(story, [s for s in rungs if s.rung == best], "the best", "var(--good)", floor,
               {"symbol": "diamond", "size": 14}, 2.5),
    ]  # fmt: skip
    unit = "points" if story.metric in words.SHARES else "its own unit"
    layout = {
        "xaxis": log_axis(*x, tick_times, title={"text": "times as fast as the original"}),
        "yaxis": {"title": {"text": f"{said(story.metric, 24)} against the original, {unit}"}, "range": list(y),
                  "zeroline": True},
        "hovermode": "closest",
    }  # fmt: skip
    return {"data": [trace for trace in data if trace.get("x")], "layout": layout, "height": 430}


def _window(story: Story) -> tuple[tuple[float, float], tuple[float, float], float]:
    """The ranges of both axes; a candidate that lost far too much is shown at the lower edge, not at its true place."""
    kept = [s for s in story.seen if s.refused is None]
    speeds = [v for s in story.seen for v in (s.evidence.speedup.low, s.evidence.speedup.high)]
    speeds += [speedup.mid for _, _, speedup in story.timed]
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
        "error_x": bars([s.evidence.speedup for s in seen], colour, thickness),
        "error_y": bars(shown, colour, thickness),
        "marker": {**marker, "color": colour, "symbol": ["triangle-down" if out else symbol for out in below]},
        "text": [str(s.rung) if s.rung is not None else "" for s in seen],
        "textposition": "top right",
        "hovertext": [_tip(story, s) for s in seen],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }


def _rug(story: Story, edge: float) -> dict[str, Any]:
    """Ticks at the lower edge: turned away on speed alone, before quality was looked at."""
    return {
        "type": "scatter",
        "name": "turned away unscored",
        "mode": "markers",
        "x": [speedup.mid for _, _, speedup in story.timed],
        "y": [edge] * len(story.timed),
        "marker": {
            "symbol": "line-ns",
            "size": 14,
            "line": {"width": 2, "color": "var(--faint)"},
            "color": "var(--faint)",
        },
        "hovertext": [
            f"<b>{said(words.recipe(r))}</b><br>{fine(words.between(speedup, words.times))}<br>"
            f"{said(words.shorten(f'turned away: {o.reason.happened}: {o.detail}', 200))}"
            for r, o, speedup in story.timed
        ],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "cliponaxis": False,
    }


def _tip(story: Story, seen: Seen) -> str:
    evidence = seen.evidence
    lines = [
        f"<b>{said(story.name(seen.recipe))}</b>",
        fine(f"{words.between(evidence.speedup, words.times)}, p50 {words.seconds(evidence.latency().mid)}"),
        fine(f"{html.escape(story.metric)} {words.quality(story.metric, evidence.quality.mid)}, "
             f"drop {words.drop(story.metric, evidence.drop)}"),
    ]  # fmt: skip
    if seen.bare:
        lines.append("a shape, before it was healed")
    elif seen.refused is not None:
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


def change(evidence: Evidence) -> tuple[Interval, float]:
    """The drop as a change of quality, up is better, and what it is multiplied by: points for shares of 1."""
    scale = 100.0 if evidence.metric in words.SHARES else 1.0
    return evidence.drop.map(lambda drop: -drop * scale), scale
