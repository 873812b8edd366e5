"""One page of text about a profile, from its plain data (`Profile.to_json()`, a bundle's `profile.json`)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from accelerando.report import words
from accelerando.report.plain_text import LINES, WIDTH, plain

ROWS = 12  # layers shown; the rest is summed up in one line
HELPS = 5
NAME = 30  # characters for a layer
CEILINGS = {
    "float32": ("float32 products, Gop/s", 1e9),
    "int8": ("int8 products, Gop/s", 1e9),
    "memory": ("memory, GB/s", 1e9),
    "cache": ("cache, GB/s", 1e9),
    "call": ("torch module starts, k/s", 1e3),
    "node": ("ONNX node starts, k/s", 1e3),
}
BOUNDS = {
    "compute": "its products run at a good share of this machine's peak",
    "memory": "it waits for its weights or activations",
    "overhead": "starting it, or timing it, takes longer than its work",
    "kernel": "its kernel is far from what this machine can do",
}

Data = Mapping[str, Any]


def render(profile: Data, width: int = WIDTH) -> str:
    """The page as plain text, no line longer than `width`: no colours, no control codes."""
    return plain(page(profile), width)


def show(profile: Data, console: Console | None = None) -> None:
    """Print the page; on a terminal with colours, at its width."""
    (console or Console()).print(page(profile))


def page(profile: Data) -> Group:
    """The page as one renderable."""
    derived = profile["derived"]
    return Group(
        _head(profile),
        *_section("In short", _bullets(derived["answers"])),
        *_section("Where the time goes", _layers(derived["rows"], profile["covered"]["mid"])),
        *(_section("What could help", _helps(derived["helps"])) if derived["helps"] else ()),
        *(_section("Growth with the batch", _growth(profile["growth"])) if profile["growth"] else ()),
        *_section("What this machine can do, measured", _ceilings(profile["ceilings"])),
        *(_section("Doubts", _bullets(derived["doubts"])) if derived["doubts"] else ()),
    )


def _section(title: str, body: RenderableType) -> tuple[RenderableType, ...]:
    return Text(), Text(title, style="bold"), Padding(body, (0, 0, 0, 2))


def _bullets(items: Sequence[str]) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    for item in items:
        table.add_row("-", Text(words.clean(str(item))))
    return table


def _head(profile: Data) -> RenderableType:
    derived, machine = profile["derived"], profile["machine"]
    whole = profile["whole"]
    rows = Table.grid(padding=(0, 2))
    rows.add_row("time", _span(whole))
    rows.add_row("least", f"{words.seconds(derived['least_seconds'])} by the roofs; "
                          f"{words.seconds(derived['least_seconds_int8'])} in int8")  # fmt: skip
    rows.add_row("work", f"{_count(derived['flops'])} FLOPs")
    weights, activations = words.size(profile["weight_bytes"]), words.size(profile["peak_bytes"])
    rows.add_row("memory", f"{weights} of weights, and at most {activations} of activations at once")
    rows.add_row("machine", Text(words.clean(f"{machine['cpu']}, {machine['cores']} cores")))
    title = Text.assemble(
        (words.clean(str(profile["name"])), "bold"),
        f", {profile['form']}, batch {profile['batch']}, {_plural(profile['threads'], 'thread')}",
    )
    return Group(title, Padding(rows, (0, 0, 0, 2)))


def _layers(rows: Sequence[Data], covered: float) -> RenderableType:
    shown = list(rows) if len(rows) <= ROWS else _alike(rows)
    table = Table(box=LINES, padding=0, pad_edge=False, show_edge=False)  # the box leaves one column between
    table.add_column("layer", no_wrap=True)
    for name in ("time", "share", "FLOPs", "peak", "least"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    for row in shown[:ROWS]:
        figures = (words.seconds(_taken(row)), f"{row['share'] * covered:.0%}", _count(row["flops"]))
        memory, least = words.size(row["peak_bytes"]), _least(row["least_seconds"])
        table.add_row(Text(_layer_name(row)), *figures, memory, least, row["bound"])
    if rest := shown[ROWS:]:
        share = f"{sum(r['share'] for r in rest) * covered:.0%}"
        flops, least = _count(sum(r["flops"] for r in rest)), _least(sum(r["least_seconds"] for r in rest))
        table.add_row(f"{len(rest)} more", words.seconds(sum(map(_taken, rest))), share, flops, "", least, "")
    table.add_row("outside the layers", "", f"{1 - covered:.0%}", "", "", "", "")
    notes = ["outside the layers: Python and glue between them"]
    if any(row["container"] for row in shown[:ROWS]):
        notes.append("~ what a module with layers inside does between them")
    if any("*" in row["name"] for row in shown[:ROWS]):
        notes.append("* layers alike, taken together; their peak is the highest of them")
    notes += [f"{b}: {BOUNDS[b]}" for b in BOUNDS if any(row["bound"] == b for row in shown[:ROWS])]
    return Group(table, Text(), *(Text(note, style="dim") for note in notes))


def _alike(rows: Sequence[Data]) -> list[Data]:
    """Rows whose names differ in numbers only become one, the dearest first: twelve blocks read like one."""
    groups: dict[tuple[str, str], list[Data]] = {}
    for row in rows:
        groups.setdefault((re.sub(r"\d+", "*", row["name"]), row["kind"]), []).append(row)
    return sorted((_together(name, group) for (name, _), group in groups.items()), key=_taken, reverse=True)


def _together(name: str, group: list[Data]) -> Data:
    if len(group) == 1:
        return group[0]
    sums = {key: sum(row[key] for row in group) for key in ("share", "flops", "least_seconds")}
    bounds: dict[str, float] = defaultdict(float)
    for row in group:
        bounds[row["bound"]] += _taken(row)
    return {
        **group[0],
        **sums,
        "name": name,
        "kind": f"{words.shorten(group[0]['kind'], 17)} x{len(group)}",
        "seconds": {"mid": sum(map(_taken, group))},
        "peak_bytes": max(row["peak_bytes"] for row in group),
        "bound": max(bounds, key=lambda bound: bounds[bound]),
    }


def _layer_name(row: Data) -> str:
    """The kind, and as much of the path as there is room for: its end says more than its beginning."""
    kind, name = words.shorten(f"{'~' if row['container'] else ''}{row['kind']}", 22), words.shorten(row["name"], 500)
    room = NAME - len(kind) - 1
    return f"{name if len(name) <= room else '..' + name[2 - room :]} {kind}"


def _taken(row: Data) -> float:
    return float(row["seconds"]["mid"])


def _helps(rows: Sequence[Data]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for row in rows[:HELPS]:
        most = f", at most {row['at_most']:.2g}x" if row["at_most"] else ""
        reach = f"{row['share']:.0%} of the time, {_plural(row['layers'], 'layer')}{most}"
        table.add_row(Text(row["technique"], style="bold"), Text(f"{words.clean(row['why'])} ({reach})"))
    return table


def _growth(growth: Data) -> RenderableType:
    table = Table(box=LINES, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    for name in ("batch", "time", "per row", "rows/s", "activations"):
        table.add_column(name, justify="right", no_wrap=True)
    for batch, median, peak in zip(growth["batches"], growth["medians"], growth["peak_bytes"], strict=True):
        seconds = median["mid"]
        table.add_row(
            str(batch),
            _span(median),
            words.seconds(seconds / batch),
            _count(batch / seconds if seconds else 0),
            words.size(peak),
        )
    return Group(table, Text(f"stopped there: {words.clean(growth['stopped'])}", style="dim"))


def _ceilings(rows: Sequence[Data]) -> RenderableType:
    table = Table(box=LINES, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in ("", "threads", "best", "median (95 %)", "by"):
        table.add_column(name, justify="left" if name in ("", "by") else "right", no_wrap=True)
    known = [row for row in rows if row["what"] in CEILINGS]
    for row in sorted(known, key=lambda r: (list(CEILINGS).index(r["what"]), r["threads"])):
        name, scale = CEILINGS[row["what"]]
        low, mid, high = (words.figure(row["rate"][k] / scale) for k in ("low", "mid", "high"))
        by = words.shorten(row["by"], 14)
        table.add_row(name, str(row["threads"]), words.figure(row["best"] / scale), f"{mid} ({low} to {high})", by)
    return table


def _count(value: float) -> str:
    """A number with its thousands by letter: `4.19 M`."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{words.figure(value / scale)} {unit}"
    return f"{value:.0f}" if value >= 10 or value == int(value) else words.figure(value)


def _least(value: float) -> str:
    return "< 0.1 us" if 0 < value < 1e-7 else words.seconds(value)


def _span(interval: Data) -> str:
    """A time with its interval."""
    low, mid, high = (words.seconds(interval[k]) for k in ("low", "mid", "high"))
    return f"{mid} ({low} to {high})"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
