"""The page's section on the profile of the original: its layers under the machine's roofs.

It reads the plain data of `profile.json`; a profile of a schema that it does not know is left out, and said to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from accelerando.interval import Interval
from accelerando.report import sections, words
from accelerando.report.elements import Child, el, fine, table
from accelerando.report.plots import Figure, log_axis, said

SCHEMA = 1
TITLE = "Where the original's time goes"
ROWS = 12  # layers in the table
COLOURS = {"compute": "var(--good)", "memory": "var(--accent)", "overhead": "var(--unsure)", "kernel": "var(--bad)"}
DOTS = "A dot is a layer, its area the share of the time; the lines are what this machine reached at best."
MEANING = {
    "compute": "its products run at a good share of the peak",
    "memory": "it waits for its bytes",
    "overhead": "starting it takes longer than its work",
    "kernel": "its kernel is far from the roofs",
}
Row = Mapping[str, Any]


def section(profile: Mapping[str, Any] | None) -> Element | None:
    """Where the original's time goes; None where there is no profile."""
    if profile is None:
        return None
    if profile.get("schema") == SCHEMA:
        try:
            return _section(profile)
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            why = f"it is not as it should be ({type(error).__name__}: {error})"
    else:
        why = f"its schema is {profile.get('schema')!r}, and this version reads {SCHEMA}"
    return sections.section("profile", TITLE, f"There is a profile that can't be shown: {why}. Take it again.")


def _section(profile: Mapping[str, Any]) -> Element:
    derived = profile["derived"]
    rows: Sequence[Row] = derived["rows"]
    whole, covered = Interval.from_json(dict(profile["whole"])), Interval.from_json(dict(profile["covered"]))
    lead = (
        f"{profile['name']}, batch {profile['batch']}, {profile['threads']} threads: "
        f"{words.between(whole, words.seconds)} per call; its layers add up to {covered.mid:.0%} of it."
    )
    worked = [r for r in rows if r["flops"] > 0 and r["moved_bytes"] > 0 and r["seconds"]["mid"] > 0]
    picture = (
        sections.plot(
            "roofline", roofline(profile, worked), "Roofline: operations per second of each layer against the roofs"
        )
        if worked
        else None
    )
    helps = [
        f"{h['technique']}: {h['why']} ({h['layers']} layers, {h['share']:.0%} of the time)"
        for h in derived["helps"][:6]
    ]
    return sections.section(
        "profile", TITLE, fine(lead),
        sections.bullets([str(a) for a in derived["answers"]], "What it says"),
        picture,
        el("p", DOTS, class_="note") if picture is not None else None,
        dearest(rows), sections.bullets(helps, "What could help"),
        sections.bullets([str(d) for d in derived["doubts"]], "Doubts"),
    )  # fmt: skip


def dearest(rows: Sequence[Row]) -> Element:
    """The layers that take the most time."""
    shown: list[list[Child]] = []
    for row in rows[:ROWS]:
        bar = el("span", class_="bar", style=f"width:{100 * min(1.0, row['share']):.1f}%")
        shown.append([
            el("span", words.shorten(row["name"], 60), el("small", words.shorten(row["kind"], 40))),
            el("span", f"{row['share']:.0%}", bar), fine(words.seconds(row["seconds"]["mid"])),
            fine(words.seconds(row["least_seconds"])), f"{row['achieved']:.0%}",
            el("span", row["bound"], el("small", MEANING.get(row["bound"], ""))), words.size(row["moved_bytes"]),
        ])  # fmt: skip
    head = ["layer", "share", "time", "least here", "of its roof", "bound by", "moved"]
    more = f" (the first {ROWS} of {len(rows)})" if len(rows) > ROWS else ""
    return table(head, shown, f"The dearest layers{more}", frozenset({2, 3, 4, 6}))


def roofline(profile: Mapping[str, Any], rows: Sequence[Row]) -> Figure:
    """Operations per second against operations per byte, with the measured roofs (Williams et al. 2009)."""
    threads = profile["threads"]
    found = {c["what"]: c["best"] for c in sorted(profile["ceilings"], key=lambda c: -abs(c["threads"] - threads))}
    intensity = [r["flops"] / r["moved_bytes"] for r in rows]
    speed = [r["flops"] / r["seconds"]["mid"] for r in rows]
    left, right = min([*intensity, 1.0]) / 2, max([*intensity, 50.0]) * 2
    data: list[dict[str, Any]] = []
    roofs = (("float32", "memory", "solid"), ("float32", "cache", "dot"), ("int8", "cache", "dash"))
    for product, bytes_, dash in roofs:
        peak, moved = found.get(product), found.get(bytes_)
        if peak and moved:
            xs = [left, *([peak / moved] if left < peak / moved < right else []), right]
            data.append({
                "type": "scatter", "mode": "lines", "name": f"{product}, bytes from {bytes_}", "hoverinfo": "skip",
                "x": xs, "y": [min(peak, x * moved) for x in xs],
                "line": {"color": "var(--middle)", "width": 1.5, "dash": dash},
            })  # fmt: skip
    for bound, colour in COLOURS.items():
        mine = [i for i, r in enumerate(rows) if r["bound"] == bound]
        data.append({
            "type": "scatter", "mode": "markers", "name": f"bound by {bound}",
            "x": [intensity[i] for i in mine], "y": [speed[i] for i in mine],
            "marker": {"color": colour, "opacity": 0.75, "size": [6 + 34 * rows[i]["share"] ** 0.5 for i in mine]},
            "hovertext": [
                f"<b>{said(rows[i]['name'])}</b><br>{said(rows[i]['kind'])}<br>{rows[i]['share']:.0%} of the time, "
                f"{rows[i]['achieved']:.0%} of its roof" for i in mine
            ],
            "hovertemplate": "%{hovertext}<extra></extra>",
        })  # fmt: skip
    tops = [v for t in data for v in t["y"]]
    layout = {
        "xaxis": log_axis(left, right, lambda v: words.figure(v, 1), title={"text": "operations per byte moved"}),
        "yaxis": log_axis(min(speed) / 2, max(tops) * 2, lambda v: f"{words.figure(v / 1e9, 1)} G",
                          title={"text": "operations per second"}),
        "hovermode": "closest",
    }  # fmt: skip
    return {"data": [t for t in data if t["x"]], "layout": layout, "height": 460}
