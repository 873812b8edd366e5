"""The pictures of the governor's page: what policies do to each request of a trace, and how they fare over many.

What a picture shows may be simulated, or have happened in earnest (`bursts`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol
from xml.etree.ElementTree import Element

import numpy as np

from accelerando.serve.governor import BALANCED, Decides, Decision, RungState, Signal
from accelerando.serve.policies import Entrant, RateController, SlackFit
from accelerando.serve.simulation import Outcome, Terms, simulate
from accelerando.serve.traces import Trace
from benchmarks.drawing import WIDTH, Axis, Panel, save, words

PLACES = 4  # of a second: arrivals are rounded, so that a request is known again by when it came
LEFT, RIGHT = 62.0, WIDTH - 14.0
SHOWN = (
    ("ours", Entrant("governor, balanced", BALANCED)),
    ("first", Entrant("slack only", SlackFit())),
    ("second", Entrant("rate every 10 s", RateController(), tau=10.0, every_arrival=True)),
)
# A policy's colour in the plane, and where its name stands: pixels to the right and down, and which part of it there.
OURS, FIXED = ("ours", 0, -11, "middle"), ("middle", 6, 14, None)
LABELS = {
    "slack only": ("first", 0, 19, "middle"),
    "rate every 10 s": ("second", -9, -4, "end"),
    "governor, steady": ("ours", -4, 19, None),
    "rung 0 always": ("middle", -9, -2, "end"),
}


class Recorded:
    """A policy that keeps what it decided: when, for a head that came when, and which rung (none: refused)."""

    def __init__(self, policy: Decides, patience: float) -> None:
        self.policy, self.patience = policy, patience
        self.kept: list[tuple[float, float, int | None]] = []

    def decide(self, last: Decision | None, signal: Signal, rungs: tuple[RungState, ...]) -> Decision:
        decision = self.policy.decide(last, signal, rungs)
        came = round(signal.now + signal.queue[0][0] - self.patience, PLACES)
        self.kept.append((signal.now, came, decision.rung))
        return decision


class Fared(Protocol):
    """How a policy fared: the share of requests in time, and the quality of those."""

    @property
    def attainment(self) -> float: ...

    @property
    def quality(self) -> float: ...


@dataclass(frozen=True)
class Course:
    """What became of each request: seconds are those of the trace, and nothing in it is rounded but arrivals.

    Args:
        stood: (when, rung) of each batch.
        answered: (arrival, seconds until the answer).
        missed: arrivals of those that were refused, or expired while they waited.
    """

    stood: tuple[tuple[float, int], ...]
    answered: tuple[tuple[float, float], ...]
    missed: tuple[float, ...]
    outcome: Fared


def follow(rungs: Sequence[RungState], trace: Trace, patience: float, entrant: Entrant) -> Course:
    """One policy on one trace of requests of one row, on rungs whose calls take what they usually take.

    A batch is one request here, so that each decision is about its head alone: rungs on which joining pays won't do.
    """
    trace = Trace.of(np.round(trace.arrivals, PLACES), trace.rows, trace.name)
    recorded = Recorded(entrant.policy, patience)
    (outcome,) = simulate(rungs, trace, Terms(patience), [replace(entrant, policy=recorded)]).outcomes
    seconds = {r.number: r.seconds(1) for r in rungs}
    runs = [(now, came, rung) for now, came, rung in recorded.kept if rung is not None]
    everybody = Counter(round(at, PLACES) for at in trace.arrivals.tolist())
    return Course(
        tuple((now, rung) for now, _, rung in runs),
        tuple((came, now + seconds[rung] - came) for now, came, rung in runs),
        tuple(sorted((everybody - Counter(at for _, at, _ in runs)).elements())),
        outcome,
    )


def draw_course(path: Path, rungs: Sequence[RungState], trace: Trace, patience: float) -> None:
    """A trace in the course of time, simulated for three policies."""
    courses = [(colour, entrant.name, follow(rungs, trace, patience, entrant)) for colour, entrant in SHOWN]
    draw_courses(path, trace, patience, [r.seconds(1) for r in rungs], courses)


def draw_courses(
    path: Path, trace: Trace, patience: float, seconds: Sequence[float], courses: Sequence[tuple[str, str, Course]]
) -> None:
    """A trace in the course of time: what came, on which rung each policy stood, and how long each request took.

    Args:
        seconds: that a request takes each rung.
        courses: of three policies: (colour, name, course).
    """
    across = Axis(0.0, float(np.ceil(trace.seconds)), LEFT, RIGHT)
    parts, top = _arrivals(across, trace, 1 / seconds[0]), 110.0
    for number, (colour, name, course) in enumerate(courses, 1):
        parts += _stands(across, top, seconds, course, name, colour)
        parts += _takes(across, top, patience, course, colour, last=number == len(courses))
        top += 224
    title = f"{trace.name}: arrivals per second, the rung stood on, and the time of each request, for three policies"
    save(path, top + 26, title, *parts)


def _arrivals(across: Axis, trace: Trace, carries: float) -> list[Element]:
    """How many requests came in each second, and how many the best rung carries."""
    counts = np.bincount(trace.arrivals.astype(int))
    most = float(counts.max())
    panel = Panel(across, Axis(0.0, most, 110.0, 30.0))
    level = {0.0: "0", carries: f"{carries:.3g}", 2 * carries: f"{2 * carries:.3g}", most: f"{most:.0f}"}
    return [
        panel.frame(f"requests that came, per second; the best rung carries {carries:.3g}", _seconds(across), level),
        panel.steps([(float(second), float(n)) for second, n in enumerate(counts)], "middle"),
        panel.line([(0.0, carries), (across.high, carries)], "bad", "limit"),
    ]


def _stands(
    across: Axis, top: float, seconds: Sequence[float], course: Course, name: str, colour: str
) -> list[Element]:
    panel = Panel(across, Axis(len(seconds) - 0.5, -0.5, top + 117, top + 35))
    met, good = course.outcome.attainment * 100, course.outcome.quality * 100
    last = len(seconds) - 1
    names = {float(n): f"{seconds[n] * 1e3:.3g} ms" for n in (*range(0, last, 2), last)}
    return [
        panel.frame(f"{name}: {met:.1f} % in time, {good:.1f} % right of these", _seconds(across), names, colour),
        panel.steps(_turns(course.stood), colour),
        words(RIGHT, top + 27, "the rung stood on", "end"),
    ]


def _takes(across: Axis, top: float, patience: float, course: Course, colour: str, last: bool) -> list[Element]:
    panel = Panel(across, Axis(0.0, 1.5 * patience, top + 224, top + 126))
    late = sum(seconds > patience for _, seconds in course.answered)
    missed = f"{len(course.missed)} refused or expired, {late} late"
    return [
        panel.frame("", _seconds(across, said=last), {0.0: "0", patience: f"{patience * 1e3:g} ms"}),
        panel.line([(0.0, patience), (across.high, patience)], "bad", "limit"),
        panel.dots(course.answered, colour),
        panel.ticks(course.missed, "bad"),
        words(LEFT, panel.y.end - 3, "how long each request took"),
        words(RIGHT, panel.y.end - 3, missed, "end", "bad"),
    ]


def _seconds(across: Axis, said: bool = False) -> dict[float, str]:
    step = 10 if across.high > 20 else 2
    return {float(s): f"{s} s" if said else "" for s in range(0, int(across.high) + 1, step)}


def _turns(stood: Sequence[tuple[float, int]]) -> list[tuple[float, float]]:
    """Where the rung changes."""
    return [(now, float(rung)) for i, (now, rung) in enumerate(stood) if i == 0 or rung != stood[i - 1][1]]


def draw_plane(path: Path, rungs: Sequence[RungState], found: Mapping[str, Mapping[str, Outcome]]) -> None:
    """For each case, the quality of what was on time against the deadlines that were missed: up and left is better."""
    parts, top = [], 0.0
    for case, outcomes in found.items():
        least = 0.5 / max(o.requests for o in outcomes.values())  # stands for none, on an axis by powers of ten
        low, high = min(o.quality for o in outcomes.values()), max(o.quality for o in outcomes.values())
        up = Axis(low - 0.02, high + 0.01, top + 262, top + 36)
        panel = Panel(Axis(least, 1.0, LEFT, RIGHT - 20, log=True), up)
        ticks = {least: "none missed", **{t: f"{t * 100:g} %" for t in (1e-4, 1e-3, 1e-2, 0.1, 1.0)}}
        levels = np.arange(np.ceil((low - 0.02) * 20) / 20, high + 0.01, 0.05)
        title = f"{case}: quality of what was in time, against deadlines missed"
        parts.append(panel.frame(title, ticks, {float(q): f"{q * 100:.0f} %" for q in levels}))
        places = {o.policy: (max(1 - o.attainment, least), o.quality) for o in outcomes.values()}
        fixed = {f"rung {r.number} always": f"{r.seconds(1) * 1e3:g} ms" for r in rungs}
        parts.append(panel.line((places[policy] for policy in fixed if policy in places), "middle"))
        for policy, place in places.items():
            colour, right, down, anchor = LABELS.get(policy, OURS if policy.startswith("governor") else FIXED)
            name = fixed.get(policy, policy.removeprefix("governor, "))
            parts.append(panel.dots([place], colour, "big"))
            parts.append(words(panel.x.at(place[0]) + right, up.at(place[1]) + down, name, anchor, colour))
        top += 290
    save(path, top + 4, "Quality of what was on time against deadlines missed, for every policy", *parts)
