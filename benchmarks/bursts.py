"""Bursts: every policy on the same traces, in earnest, at twice what the best rung carries.

On the second trace the policies come in the opposite order: the machine's speed drifts, and none shall have the better
half of it.

In this process, with the sender in a thread of its own that sleeps nearly always: it sends some hundred requests a
second of many rows, and the policies that are compared can't be given to a server by its command line.  A request is
late from the time at which it should have been sent, so a stall can't hide itself.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from accelerando.errors import ServingError
from accelerando.serve.estimates import ArrivalRate
from accelerando.serve.governed import GovernedModel
from accelerando.serve.governor import PRESETS, Decides, Decision, RungState, Signal
from accelerando.serve.policies import Fixed, RateController, SlackFit
from accelerando.serve.traces import Trace, gamma
from accelerando.server.command import SWITCH_SECONDS
from benchmarks.courses import Course, draw_courses
from benchmarks.figures import SCALE, Figure, Found, shortened
from benchmarks.governor import PAGE
from benchmarks.ladders import Ground
from benchmarks.results import table

SLO = 0.3  # seconds
SECONDS, SEEDS = 8.0, (7, 8)  # of each trace
CROWD = 16  # rows of a request
OVER = 2.0  # times what the best rung carries
ASKED = {4.0: 0.999, 23.0: 0.995}  # of deadlines met, by CV2
SHOWN = (("ours", "governor, balanced"), ("first", "slack only (SlackFit)"), ("second", "rate every 10 s"))  # pictured
JUDGED = "balanced"  # the preset whose figures count: nobody who does not choose has another


@dataclass(frozen=True)
class Replay:
    """What became of a trace under a policy: `met` of the requests; right answers of those in time, and of all."""

    policy: str
    met: float
    quality: float
    effective: float
    switches: float
    p99: float

    @property
    def attainment(self) -> float:
        return self.met

    def line(self) -> list[str]:
        shares = (f"{x:.2%}" for x in (self.met, self.quality, self.effective))
        return [self.policy, *shares, f"{self.switches:.1f}", f"{self.p99 * 1e3:.0f} ms"]


def usual(ground: Ground) -> Found:
    return replayed(ground, 4.0)


def violent(ground: Ground) -> Found:
    return replayed(ground, 23.0)


def replayed(ground: Ground, cv2: float) -> Found:
    """Every policy on the same traces."""
    with ground.opened(f"p99 <= {SLO * 1e3:g}ms") as model:
        states = [s for s in model._conductor.company.residents.states if s.ready]
    best = max(states, key=lambda s: s.quality)
    carried = max(n / best.seconds(n) for n in (1, best.most_rows)) / CROWD  # requests/s, joined where that pays
    traces = [gamma(rate=OVER * carried, cv2=cv2, seconds=shortened(SECONDS), seed=seed) for seed in SEEDS]
    fixed: dict[str, Callable[[], Decides]] = {
        f"rung {s.number} always ({s.seconds(CROWD) * 1e3:.2f} ms)": _always(s.number) for s in states
    }
    others: dict[str, Callable[[], Decides]] = {"slack only (SlackFit)": SlackFit, "rate every 10 s": Slow}
    ours = {f"governor, {name}": _preset(governor) for name, governor in PRESETS.items()}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)  # as the server does
    try:
        policies = {**fixed, **others, **ours}
        order = [(trace, name) for i, trace in enumerate(traces) for name in list(policies)[:: -1 if i % 2 else 1]]
        runs = [(name, replay(ground, trace, policies[name]())) for trace, name in order]
    finally:
        sys.setswitchinterval(interval)
    found = {name: told(name, [run for of, run in runs if of == name]) for name in policies}
    if SCALE == 1:
        shown = [(c, n, course(n, next(run for of, run in runs if of == n))) for c, n in SHOWN]
        draw_courses(PAGE / f"governor-earnest-{cv2:g}.svg", traces[0], SLO, [s.seconds(CROWD) for s in states], shown)
    judged = found[f"governor, {JUDGED}"]
    head = ["policy", "answered in time", "right, of those", "right, of all", "switches/s", "p99"]
    return Found(
        figures(judged, [found[n] for n in fixed], [found[n] for n in others], cv2),
        f"Bursts: {'; '.join(map(str, traces))}; each request of {CROWD} rows, {SLO * 1e3:.0f} ms for each; sent by a "
        f"thread of the process that computes; the second trace with the policies in the opposite order.\n\n"
        + table(head, [r.line() for r in found.values()]),
    )


def figures(judged: Replay, fixed: list[Replay], others: list[Replay], cv2: float) -> tuple[Figure, ...]:
    """The governor's, against what was asked for and the other policies."""
    rivals = [r for r in fixed if r.met >= judged.met]
    best = max([*rivals, *others], key=lambda r: r.effective)
    return (
        Figure(
            f"deadlines met, bursts of CV2 {cv2:g}", f"{judged.met:.2%}", f"{ASKED[cv2]:.1%}", judged.met >= ASKED[cv2]
        ),
        Figure(
            f"right answers in time, of all, CV2 {cv2:g}", f"{judged.effective:.2%}",
            f"above {best.effective:.2%} ({best.policy})", judged.effective > best.effective,
        ),
    )  # fmt: skip


def _always(number: int) -> Callable[[], Decides]:
    return lambda: Fixed(number)


def _preset(governor: Decides) -> Callable[[], Decides]:
    return lambda: governor


class Slow:
    """The 10 s controller, told of the rate as it averages it."""

    def __init__(self) -> None:
        self.rate, self.inner = ArrivalRate(tau=10.0), RateController()

    def decide(self, last: Decision | None, signal: Signal, rungs: tuple[RungState, ...]) -> Decision:
        return self.inner.decide(last, signal._replace(rate=self.rate.at(signal.now)), rungs)


Run = tuple[list["Sent"], int, float]  # what became of each request of a trace; changes of rung; seconds


def replay(ground: Ground, trace: Trace, policy: Decides) -> Run:
    """A trace under a policy."""
    with ground.opened(f"p99 <= {SLO * 1e3:g}ms", policy) as model:
        sent = send(model, ground, trace, policy.rate if isinstance(policy, Slow) else None)
        return sent, model.status().switches, trace.seconds


def told(name: str, runs: list[Run]) -> Replay:
    """What became of all traces together."""
    sent = [one for run, _, _ in runs for one in run]
    met = np.array([s.in_time for s in sent])
    right = np.array([s.right for s in sent])
    times = [s.came - s.at for s in sent if s.came < float("inf")]
    switches = sum(run[1] for run in runs) / sum(run[2] for run in runs)
    return Replay(
        name, float(met.mean()), float(right[met].mean()) if met.any() else 0.0, float((right * met).mean()),
        switches, float(np.quantile(times, 0.99)) if times else float("nan"),
    )  # fmt: skip


@dataclass
class Sent:
    """One request of a trace: when it should have been sent, when its answer came, and which share of it was right.

    `arrival` is its time in the trace; `rung` answered it, and `began` to do so then.
    """

    at: float
    arrival: float
    labels: np.ndarray
    came: float = float("inf")
    right: float = 0.0
    rung: int = -1
    began: float = float("inf")

    @property
    def in_time(self) -> bool:
        return self.came - self.at <= SLO

    def note(self, future: Any) -> None:
        if future.exception() is None:
            self.came = time.monotonic()
            answer = future.result()
            self.right = float((answer.leaves[0].argmax(axis=1) == self.labels).mean())
            self.rung, self.began = answer.why.rung, self.came - answer.why.computed


def course(name: str, run: Run) -> Course:
    """What a picture shows of a policy on one trace."""
    sent, _, seconds = run
    start = sent[0].at - sent[0].arrival
    answered = [one for one in sent if one.came < float("inf")]
    stood = sorted((one.began - start, one.rung) for one in answered if one.began - start <= seconds)
    return Course(
        tuple(stood),
        tuple((one.arrival, one.came - one.at) for one in answered),
        tuple(one.arrival for one in sent if one.came == float("inf")),
        told(name, [run]),
    )


def send(model: GovernedModel, ground: Ground, trace: Trace, told: ArrivalRate | None) -> list[Sent]:
    """Each request at its time; returns once all are answered or given up."""
    sent: list[Sent] = []
    start = time.monotonic() + 0.1
    for i, arrival in enumerate(trace.arrivals):
        first = i * CROWD % (len(ground.x) - CROWD)
        one = Sent(start + arrival, float(arrival), ground.y[first : first + CROWD])
        sent.append(one)
        if (wait := one.at - time.monotonic()) > 0:
            time.sleep(wait)
        if told:
            told.observe(time.monotonic())
        with contextlib.suppress(ServingError):
            left = max(one.at + SLO - time.monotonic(), 1e-6)
            model.submit([ground.x[first : first + CROWD]], seconds=left).future.add_done_callback(one.note)
    time.sleep(2 * SLO)
    return sent
