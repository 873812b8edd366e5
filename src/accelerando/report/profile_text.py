"""One page of text about a profile, from its plain data (`Profile.to_json()`, a bundle's `profile.json`)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from accelerando.report.words import clean, shorten

WIDTH = 80
ROWS = 12  # layers shown; the rest is summed up in one line
HELPS = 5
DIGITS = 3
LINES = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)  # one line under the header
CEILINGS = {
    "float32": ("float32 products", "G operations/s", 1e9),
    "int8": ("int8 products", "G operations/s", 1e9),
    "memory": ("memory", "GB/s", 1e9),
    "cache": ("cache", "GB/s", 1e9),
    "call": ("torch module starts", "million/s", 1e6),
    "node": ("ONNX node starts", "million/s", 1e6),
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
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    show(profile, console)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


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
        table.add_row("-", Text(clean(str(item))))
    return table


def _head(profile: Data) -> RenderableType:
    derived, machine = profile["derived"], profile["machine"]
    whole = profile["whole"]
    rows = Table.grid(padding=(0, 2))
    rows.add_row("time", _span(whole))
    rows.add_row("least", f"{_seconds(derived['least_seconds'])} by the roofs; "
                          f"{_seconds(derived['least_seconds_int8'])} in int8")  # fmt: skip
    rows.add_row("work", f"{_count(derived['flops'])} FLOPs")
    rows.add_row(
        "memory",
        f"{_bytes(profile['weight_bytes'])} of weights, {_bytes(profile['peak_bytes'])} of activations alive at most",
    )
    rows.add_row("machine", Text(clean(f"{machine['cpu']}, {machine['cores']} cores")))
    title = Text.assemble(
        (clean(str(profile["name"])), "bold"),
        f", {profile['form']}, batch {profile['batch']}, {_plural(profile['threads'], 'thread')}",
    )
    return Group(title, Padding(rows, (0, 0, 0, 2)))


def _layers(rows: Sequence[Data], covered: float) -> RenderableType:
    table = Table(box=LINES, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("layer", no_wrap=True, overflow="ellipsis", min_width=14, max_width=30)
    for name in ("time", "share", "FLOPs", "moved", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("least", justify="right", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    for row in rows[:ROWS]:
        name = Text(_layer_name(row))
        figures = (_seconds(row["seconds"]["mid"]), f"{row['share'] * covered:.0%}", _count(row["flops"]))
        moved = (_bytes(row["moved_bytes"]), _bytes(row["peak_bytes"]), _seconds(row["least_seconds"]))
        table.add_row(name, *figures, *moved, row["bound"])
    if rest := rows[ROWS:]:
        seconds, least = (sum(f(r) for r in rest) for f in (_taken, lambda r: r["least_seconds"]))
        table.add_row(
            f"{len(rest)} more", _seconds(seconds), f"{sum(r['share'] for r in rest) * covered:.0%}",
            _count(sum(r["flops"] for r in rest)), _bytes(sum(r["moved_bytes"] for r in rest)), "", _seconds(least), "",
        )  # fmt: skip
    table.add_row(Text("outside the layers"), "", f"{1 - covered:.0%}", "", "", "", "", "")
    bounds = [b for b in BOUNDS if any(row["bound"] == b for row in rows[:ROWS])]
    parts = [table, Text(), Text("outside: Python and glue; ~ what a container does between its layers", style="dim")]
    return Group(*parts, *(Text(f"{b}: {BOUNDS[b]}", style="dim") for b in bounds))


def _layer_name(row: Data) -> str:
    """The end of a long path says more than its beginning."""
    name = f"{clean(row['name'])} {'~' if row['container'] else ''}{clean(row['kind'])}"
    return name if len(name) <= 30 else "..." + name[-27:]


def _taken(row: Data) -> float:
    return float(row["seconds"]["mid"])


def _helps(rows: Sequence[Data]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for row in rows[:HELPS]:
        most = f", at most {row['at_most']:.2g}x" if row["at_most"] else ""
        reach = f"{row['share']:.0%} of the time, {_plural(row['layers'], 'layer')}{most}"
        table.add_row(Text(row["technique"], style="bold"), Text(f"{clean(row['why'])} ({reach})"))
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
            _seconds(seconds / batch),
            _count(batch / seconds if seconds else 0),
            _bytes(peak),
        )
    return Group(table, Text(f"stopped there: {clean(growth['stopped'])}", style="dim"))


def _ceilings(rows: Sequence[Data]) -> RenderableType:
    table = Table(box=LINES, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    for name in ("", "threads", "best", "median (95 %)", "unit", "by"):
        table.add_column(name, justify="left" if name in ("", "unit", "by") else "right", no_wrap=True)
    for row in sorted(rows, key=lambda r: (list(CEILINGS).index(r["what"]), r["threads"])):
        name, unit, scale = CEILINGS[row["what"]]
        low, mid, high = (_figure(row["rate"][k] / scale) for k in ("low", "mid", "high"))
        span = f"{mid} ({low} to {high})"
        table.add_row(name, str(row["threads"]), _figure(row["best"] / scale), span, unit, shorten(row["by"], 14))
    return table


# --- figures ----------------------------------------------------------------------------------------------------


def _figure(value: float) -> str:
    """Three digits that count, and never an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{DIGITS}g}"


def _scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    """In the largest unit that leaves at least 1; the last one for what is smaller still."""
    unit, scale = next(((u, s) for u, s in units if abs(value) >= 0.9995 * s), units[-1])
    return f"{_figure(value / scale)} {unit}".rstrip()


def _seconds(value: float) -> str:
    return _scaled(value, (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))) if value else "0"


def _bytes(value: float) -> str:
    return _scaled(value, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))) if value else "0"


def _count(value: float) -> str:
    return _scaled(value, (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))) if value else "0"


def _span(interval: Data) -> str:
    """A time with its interval, in one unit where it is narrow."""
    low, mid, high = (_seconds(interval[k]) for k in ("low", "mid", "high"))
    return f"{mid} ({low} to {high})"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
