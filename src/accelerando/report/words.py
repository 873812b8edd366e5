"""Figures and recipes in a reader's words; plain ASCII but for what the caller named."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from accelerando.goal import Bound
from accelerando.interval import Interval
from accelerando.plugins import StoredBackend, StoredTechnique
from accelerando.recipe import Backend, Knob, Plugin, Recipe, Technique
from accelerando.report.fronts import front_of, heals, members_of

# Metrics that are shares of 1: shown in percent, and their differences in points.
SHARES = frozenset({"accuracy", "top-5", "f1", "mean-iou", "agreement"})

# How plugins are called in prose; any other reads as its name with spaces.  A form change needs no words: the
# backend that follows implies it.
NAMES = {
    "eager": "PyTorch eager",
    "inductor": "AOTInductor",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "export_onnx": "",
    "export_torch": "",
    "convert_openvino": "",
    "fold": "folded",
    "half": "16-bit floats",
    "quantize_static": "int8 static",
    "quantize_nncf": "int8 by NNCF",
    "quantize_dynamic": "int8 dynamic",
    "quantize_weights": "int8 weights",
    "quantize_weights_nncf": "int8 weights by NNCF",
    "drop_layers": "fewer layers",
    "prune_channels": "fewer channels",
    "low_rank": "low rank",
    "merge_tokens": "merged tokens",
    "separate_convolutions": "separable convolutions",
    "sparsify": "sparse",
    "fft_convolution": "convolutions by FFT",
    "grow": "grown",
    "distil": "healed",
}
# Knobs whose value says enough without the knob's name.
SELF_EVIDENT = frozenset({"method", "calibration", "dtype", "precision", "hint", "layout", "format", "mode"})
TELLING = frozenset({"share", "seconds"})  # knobs that are told at their defaults too
SWITCHED_OFF = {"per_channel": "per tensor"}  # knobs of which there is a word for what is done instead
WIDE = 0.5  # an interval this wide, relative to its middle
CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]"
)


def clean(text: str) -> str:
    """Somebody else's words without control codes: compilers colour their errors, and a terminal would obey."""
    return CONTROL.sub("", text.replace("\r\n", "\n").replace("\t", "    "))


def shorten(text: str, most: int) -> str:
    """One line of at most so many characters."""
    line = " ".join(clean(text).split())
    return line if len(line) <= most else line[: most - 3].rstrip() + "..."


# --- recipes ----------------------------------------------------------------------------------------------------


def plugin(part: Plugin) -> str:
    """A technique or backend with the knobs that are not at their defaults; empty for a bare change of form."""
    name = NAMES.get(part.name, part.name.replace("_", " "))
    knobs = changed_knobs(part)
    if knobs and not name:
        name = part.name.replace("_", " ")
    return f"{name} ({', '.join(knobs)})" if knobs else name


def changed_knobs(part: Plugin) -> list[str]:
    """The knobs that are not at their defaults, each in words; how much is cut and how long is taught always."""
    if isinstance(part, (StoredTechnique, StoredBackend)):  # its defaults are not known here; how it prints is
        changed = [k for k in part.knobs if re.search(rf"[(,] ?{re.escape(k)}=", part.text)]
    else:
        defaults = {f.name: f.default for f in dataclasses.fields(part)}  # type: ignore[arg-type]
        changed = [k for k, v in part.knobs.items() if v != defaults[k]]
    return [knob(k, v) for k, v in part.knobs.items() if k in changed or k in TELLING]


def knob(name: str, value: Knob) -> str:
    """One setting: `1 thread`, `no arena`, `entropy`, `opset 20`."""
    words = name.replace("_", " ")
    if name == "keep" and isinstance(value, float):
        return f"{100 * value:.3g} % kept in float"
    if name == "share" and isinstance(value, float):
        return f"{100 * value:.3g} %" if value > 0.95 else f"{100 * value:.0f} %"
    if name == "seconds" and isinstance(value, (int, float)):
        return duration(value)
    if value is None or value is False:
        return SWITCHED_OFF.get(name, f"no {words}")
    if value is True:
        return words
    if isinstance(value, str):
        text = shorten(value, 40).replace("_", " ")
        return text if name in SELF_EVIDENT else f"{words} {text}"
    if words.endswith("s") and isinstance(value, int):
        return f"{value} {words[:-1] if value == 1 else words}"
    return f"{words} {value:.4g}" if isinstance(value, float) else f"{words} {value}"


def front(steps: Sequence[Technique]) -> list[str]:
    """Steps that shape and heal, those of a kind joined: `fewer layers (49 %, then 36 %)`, `healed 8 min`.

    A cut that no lesson followed stands after the lessons.
    """
    taught = max((i + 1 for i, step in enumerate(steps) if heals(step)), default=0)
    lessons = [step for step in steps[:taught] if heals(step)]
    bare = _cuts(steps[taught:])
    if lessons and bare:
        bare[0] = f"then {bare[0]}"
    return [*_cuts([s for s in steps[:taught] if not heals(s)]), *_lessons(lessons), *bare]


def _cuts(steps: Sequence[Technique]) -> list[str]:
    said = []
    for name in dict.fromkeys(step.name for step in steps):
        settings = [", ".join(changed_knobs(step)) for step in steps if step.name == name]
        shown = ", then ".join(filter(None, settings))
        said.append(f"{called(name)} ({shown})" if shown else called(name))
    return said


def _lessons(steps: Sequence[Technique]) -> list[str]:
    said = []
    for name in dict.fromkeys(step.name for step in steps):
        mine = [step for step in steps if step.name == name]
        whole = sum(float(step.knobs.get("seconds") or 0) for step in mine)
        times = {knob("seconds", step.knobs.get("seconds")) for step in mine}
        others = dict.fromkeys(k for step in mine for k in changed_knobs(step) if k not in times)
        text = f"{called(name)} {duration(round(whole))}" if whole else called(name)
        said.append(f"{text} ({', '.join(others)})" if others else text)
    return said


def called(name: str) -> str:
    """How a technique or a backend is called; never empty."""
    return NAMES.get(name) or name.replace("_", " ")


def recipe(made: Recipe) -> str:
    """A recipe as a person would say it: `ONNX Runtime, int8 static (entropy), 1 thread`."""
    backend: Backend = made.backend
    if joined := exit_of(backend):
        return f"{recipe(joined[0])}, {joined[1]}"
    if len(members := members_of(backend)) == 2:
        return f"cascade: {recipe(members[0])}, when sure{_surety(backend)}; else {recipe(members[1])}"
    shaped = front_of(made)
    parts = [called(backend.name), *front(shaped), *(plugin(s) for s in made.steps[len(shaped) :])]
    return clean(", ".join([*filter(None, parts), *changed_knobs(backend)]))


def exit_of(backend: Backend) -> tuple[Recipe, str] | None:
    """The recipe that a cascade leaves early where it is sure, and the exit in words; None where it asks two models.

    Its members are then the front and the rest of one: the same steps, of which the last is the exit.
    """
    if not getattr(backend, "hands_over", False):
        return None
    front, rest = members_of(backend)
    if front.backend != rest.backend:
        return None
    share = front.steps[-1].knobs.get("share")
    place = f" before the last {knob('share', share)}" if isinstance(share, float) else ""
    whole = Recipe(rest.steps[:-1], rest.backend)
    return whole, f"{called(front.steps[-1].name)}{place} when sure{_surety(backend)}"


def _surety(backend: Backend) -> str:
    """Of what a cascade is sure enough: ` (margin 0.83)`."""
    by, least = backend.knobs.get("confidence"), backend.knobs.get("threshold")
    return clean(f" ({by} {figure(least, 2)})") if isinstance(least, (int, float)) else ""


# --- figures ----------------------------------------------------------------------------------------------------


def figure(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, without an exponent where that is readable."""
    if not math.isfinite(value):
        return "unknown" if math.isnan(value) else "unlimited" if value > 0 else "-unlimited"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    rounded = float(f"{value:.{digits - 1}e}")  # 9.999 has as many digits before the point as 10
    places = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{value:.{places}f}"


def seconds(value: float) -> str:
    """A latency: `850 us`, `1.23 ms`, `2.10 s`."""
    if value == 0:
        return "0 s"
    for unit, scale in (("ns", 1e9), ("us", 1e6), ("ms", 1e3)):
        if abs(value) * scale < 999.5:
            return f"{figure(value * scale)} {unit}"
    return f"{figure(value)} s"


def count(number: int, thing: str) -> str:
    """`1 recipe`, `7 recipes`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def duration(value: float) -> str:
    """A time that a person waits: `8.3 s`, `52 s`, `2 min 5 s`, `1 h 4 min`."""
    if value < 10 and not isinstance(value, int):
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(value: float) -> str:
    """Bytes in powers of ten, as disks and goals count: `3.50 MB`."""
    for unit, scale in (("B", 1.0), ("kB", 1e3), ("MB", 1e6)):
        if abs(value) < 1000 * scale:
            return f"{value:.0f} B" if unit == "B" else f"{figure(value / scale)} {unit}"
    return f"{figure(value / 1e9)} GB"


def times(value: float) -> str:
    return f"{figure(value)}x"


def _fixed(value: float, places: int) -> str:
    text = f"{value:.{places}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def points(value: float) -> str:
    """A difference of shares, in points of a percent."""
    return _fixed(100 * value, 2 if 5e-5 <= abs(value) < 5e-4 else 1)


def quality(metric: str, value: float) -> str:
    """A metric's value: percent where it is a share."""
    return f"{_fixed(100 * value, 1)} %" if metric in SHARES else figure(value)


def difference(metric: str, value: float) -> str:
    """A bare difference of the metric: points where it is a share, else its own unit."""
    return points(value) if metric in SHARES else figure(value)


def between(interval: Interval, say: object = None) -> str:
    """`mid (low to high)`, or the figure alone where nothing is uncertain."""
    words = say if callable(say) else figure
    low, mid, high = (str(words(v)) for v in (interval.low, interval.mid, interval.high))
    unit = mid.rpartition(" ")[2] if " " in mid else ""
    if unit and all(x.endswith(f" {unit}") for x in (low, high)):  # say a unit once: 3.1 ms (2.9 to 3.4)
        low, high = low.removesuffix(f" {unit}"), high.removesuffix(f" {unit}")
    if all(x.endswith("x") for x in (low, mid, high)):
        low, high = low[:-1], high[:-1]
    return mid if interval.low == interval.high else f"{mid} ({low} to {high})"


def faster(speedup: Interval) -> str:
    """How much faster, in words that do not promise more than the interval holds: `5.12x faster`.

    Where the interval is wide its middle is hardly better than a guess, so its lower end is told: `at least 3x`.
    """
    if speedup.width > WIDE:
        low = times(speedup.low)
        return f"at least {low} faster" if speedup.low >= 1 else f"at least {low} the original's speed"
    return f"{times(speedup.mid)} faster" if speedup.mid >= 1 else f"{times(speedup.mid)} the original's speed"


def drop(metric: str, interval: Interval) -> str:
    """`0.1 points (-0.2 to 0.4)`, or in the metric's own unit."""
    if metric not in SHARES:
        return between(interval)
    if interval.low == interval.high:
        return f"{points(interval.mid)} points"
    return f"{points(interval.mid)} points ({points(interval.low)} to {points(interval.high)})"


# --- goals ------------------------------------------------------------------------------------------------------


def quantity(bound: Bound, value: float, metric: str) -> str:
    """A value in the unit of the quantity that a bound is about."""
    if bound.quantity == "speedup":
        return times(value)
    if bound.quantity in ("latency", "p95", "p99"):
        return seconds(value)
    if bound.quantity == "throughput":
        return f"{figure(value)} /s"
    if bound.quantity in ("memory", "size"):
        return size(value)
    if bound.quantity == "drop" and bound.relative:
        return f"{points(value)} %"
    if bound.quantity == "drop" and metric in SHARES:
        return f"{points(value)} points"
    return quality(metric, value)
