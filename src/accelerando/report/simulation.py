"""What a simulation found: a table for the terminal, and a page with two plots."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from accelerando.report import plots, words
from accelerando.report.elements import Child, el, fine, table
from accelerando.report.page import document
from accelerando.report.plain_text import LINES, WIDTH, plain
from accelerando.report.sections import plot as figure
from accelerando.report.sections import section

if TYPE_CHECKING:
    from accelerando.serve.simulation import Outcome, Simulation

HEAD = ["policy", "on time", "quality", "effective", "missed", "sw/s", "p50", "p99"]
OURS = "governor"


def render(found: Simulation, width: int = WIDTH) -> str:
    """The table as plain text: no colours, no control codes."""
    return plain(report(found), width)


def report(found: Simulation) -> RenderableType:
    """The table with what it is about."""
    grid = Table(box=LINES, padding=0, show_edge=False, header_style="dim", pad_edge=False)
    for number, name in enumerate(HEAD):
        grid.add_column(name, justify="right" if number else "left", no_wrap=True)
    for outcome in found.outcomes:
        ours = outcome.policy.startswith(OURS)
        grid.add_row(*map(Text, _row(found, outcome)), style="bold" if ours else "")
    about, legend = (map(words.clean, lines) for lines in (_about(found), _legend(found)))
    return Group(*map(Text, about), Text(), grid, Text(), *(Text(line, style="dim") for line in legend))


def write(found: Simulation, path: str | Path) -> Path:
    """Write the page, which needs nothing else, to a file; returns its path.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    path = Path(path)
    path.write_bytes(page(found).encode("utf-8"))
    return path


def page(found: Simulation) -> str:
    """The page with the table and the plots.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    rows: list[list[Child]] = [[fine(cell) for cell in _row(found, outcome)] for outcome in found.outcomes]
    lead, *facts = _about(found)
    parts = [
        section("policies", "What each policy would do", f"{lead} {' '.join(facts)}",
                figure("plane", plane(found), "Quality against missed deadlines; the table holds the same figures"),
                table(HEAD, rows, "Policies", frozenset(range(1, len(HEAD)))),
                *(el("p", line, class_="note") for line in _legend(found))),
        section("course", "In the course of time", "Requests as they came, and how good their answers were.",
                figure("rate", rate(found), "Rows per second over the trace"),
                figure("quality", course(found), "How good the answers were over the trace")),
    ]  # fmt: skip
    return document("accelerando: simulation", el("main", *parts))


# --- plots ------------------------------------------------------------------------------------------------------


def plane(found: Simulation) -> plots.Figure:
    """Missed deadlines against the quality of what was on time: up and left is better, also where less is."""
    least = 0.5 / max(o.requests for o in found.outcomes)  # where none was missed, on an axis by powers of ten
    groups = [
        ("governor", "var(--good)", "star", [o for o in found.outcomes if o.policy.startswith(OURS)]),
        ("others", "var(--middle)", "circle", [o for o in found.outcomes if not o.policy.startswith(OURS)]),
    ]
    data: list[dict[str, Any]] = []
    for name, colour, symbol, outcomes in groups:
        shown = [o for o in outcomes if math.isfinite(o.quality)]
        data.append({
            "type": "scatter", "mode": "markers+text", "name": name,
            "x": [max(1 - o.attainment, least) for o in shown], "y": [o.quality for o in shown],
            "text": [plots.said(o.policy.removeprefix("governor, "), 30) for o in shown],
            "textposition": ["middle left" if o.attainment < 0.9 else "middle right" for o in shown],
            "marker": {"color": colour, "symbol": symbol, "size": 11},
            "hovertext": [plots.said(f"{o.policy}: {o.attainment:.3%} on time, {_quality(found, o.quality)}")
                          for o in shown],
            "hovertemplate": "%{hovertext}<extra></extra>", "showlegend": False,
        })  # fmt: skip
    ticks = [t for t in (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0) if t >= least]
    axis = {
        "type": "log", "title": {"text": "deadlines missed"},
        "range": [math.log10(least) - 0.15, 0.15],
        "tickvals": [least, *ticks], "ticktext": ["none", *(f"{100 * t:g} %" for t in ticks)],
    }  # fmt: skip
    up: dict[str, Any] = {"title": {"text": f"{found.metric}, on time"}}
    if not found.higher_is_better:
        up["autorange"] = "reversed"
    layout = {"xaxis": axis, "yaxis": up, "hovermode": "closest"}
    return {"data": data, "layout": layout, "height": 420}


def rate(found: Simulation) -> plots.Figure:
    """Rows that came a second."""
    course = found.outcomes[0].course
    line = {
        "type": "scatter", "mode": "lines", "line": {"shape": "hv", "color": "var(--middle)", "width": 1.5},
        "x": [round(m.at, 6) for m in course], "y": [round(m.rate, 6) for m in course],
        "fill": "tozeroy", "showlegend": False, "hovertemplate": "%{y:.3g} rows/s<extra></extra>",
    }  # fmt: skip
    layout = {"xaxis": {"title": {"text": "seconds"}}, "yaxis": {"title": {"text": "rows/s"}, "rangemode": "tozero"}}
    return {"data": [line], "layout": layout, "height": 220}


def course(found: Simulation) -> plots.Figure:
    """Effective quality of what came in each stretch of time: our best, and the two best others.

    Where less of the metric is better, what of it was on time.
    """
    more = found.higher_is_better
    ranked = sorted(found.outcomes, key=lambda o: -o.effective_quality if more else -o.attainment)
    ours = [o for o in ranked if o.policy.startswith(OURS)][:1]
    shown = ours + [o for o in ranked if not o.policy.startswith(OURS)][:2]
    data = [
        {
            "type": "scatter", "mode": "lines", "name": plots.said(o.policy),
            "line": {"shape": "hv", "width": 1.5, "color": ("var(--good)", "var(--rung4)", "var(--middle)")[i % 3]},
            "x": [round(m.at, 6) for m in o.course],
            "y": [round(y, 6) if math.isfinite(y) else None
                  for y in (m.quality if more else m.on_time for m in o.course)],
        }
        for i, o in enumerate(shown)
    ]  # fmt: skip
    title = f"effective {found.metric}" if more else "share on time"
    layout = {"xaxis": {"title": {"text": "seconds"}}, "yaxis": {"title": {"text": title}}}
    return {"data": data, "layout": layout, "height": 360}


# --- words ------------------------------------------------------------------------------------------------------


def _row(found: Simulation, outcome: Outcome) -> list[str]:
    return [
        outcome.policy,
        f"{100 * outcome.attainment:.2f} %",
        _quality(found, outcome.quality),
        _quality(found, outcome.effective_quality),
        f"{outcome.misses:,}",
        f"{outcome.switches_per_second:.2f}",
        words.seconds(outcome.p50) if math.isfinite(outcome.p50) else "-",
        words.seconds(outcome.p99) if math.isfinite(outcome.p99) else "-",
    ]


def _quality(found: Simulation, value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{100 * value:.2f} %" if found.metric in words.SHARES else words.figure(value, 4)


def _about(found: Simulation) -> list[str]:
    ready = [r for r in found.rungs if r.ready]
    slow, fast = (1 / r.seconds(1) for r in (ready[0], ready[-1]))
    load = found.trace.rate * ready[0].seconds(1)
    return [
        f"{found.trace}.",
        f"An answer may take {words.seconds(found.terms.patience)}. {words.count(len(ready), 'rung')}, from "
        f"{words.figure(slow)} to {words.figure(fast)} rows/s; the mean load is {words.figure(load)} times what the "
        "slowest carries.",
        *_left_out(found),
    ]


def _left_out(found: Simulation) -> list[str]:
    if not found.left_out:
        return []
    several = len(found.left_out) > 1
    rungs = f"rung{'s' * several} {', '.join(map(str, found.left_out))}"
    run = "they run" if several else "it runs"
    return [f"Left out: {rungs}, for {run} the original's own code, which a server has not."]


def _legend(found: Simulation) -> list[str]:
    effective = (
        "of everything, 0 for what was not. Who knew all arrivals in advance could not have had more than "
        f"{_quality(found, found.most_quality)}."
        if found.higher_is_better
        else f"none, for less {found.metric} is better: an answer that never came has no error that it could count as."
    )
    return [
        f"quality: {found.metric} as certified (its worse end), of what was on time; effective: {effective}",
        "sw/s: changes of rung a second. Simulated from recorded times: no model ran.",
    ]
