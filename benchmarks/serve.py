"""The governor on a real ladder: bursts, overload, changed goals, memory, and a rung that goes bad.

One process; requests are sent at the times of a trace, whatever became of those before (an open loop), and are late
from the time at which they should have been sent, so a server that stalls can't hide it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.errors import ServingError
from accelerando.serve.estimates import ArrivalRate
from accelerando.serve.governed import GovernedModel, govern
from accelerando.serve.governor import PRESETS, Decides, Decision, RungState, Signal
from accelerando.serve.policies import Fixed, RateController, SlackFit
from accelerando.serve.tickets import Ticket
from accelerando.serve.traces import Trace, gamma, poisson
from benchmarks.cases import CASES
from benchmarks.ladders import vit_ladder
from benchmarks.results import record, table

SLO = 0.3  # seconds
SECONDS = 20.0  # of a trace
OVERLOAD_SECONDS = 60.0
CYCLES = 200
CROWD = 16  # rows of a request in the overload


@dataclass(frozen=True)
class Replay:
    """What became of a trace: shares of requests; quality is the share of right answers."""

    policy: str
    met: float
    quality: float
    effective: float
    switches: float
    p99: float


def run(name: str) -> None:
    path, rows = vit_ladder(), CASES["vit-heal"]().data
    parts: list[str] = []
    for part in (
        lambda: goals(path, rows),
        lambda: overloaded(path, rows),
        lambda: cycles(path),
        lambda: bad_rung(path, rows),
        lambda: bursts(path, rows, cv2=4.0),
        lambda: bursts(path, rows, cv2=23.0),
    ):
        parts.append(part())
        record(name, "The governor on a ladder of the ViT", "\n\n".join(parts))  # what was measured is kept


def opened(path: Path, policy: Decides | str = "balanced", audit: float = 0.0, goal: str = "") -> GovernedModel:
    """The bundle with all its portable rungs loaded."""
    original = CASES["vit-heal"]().model  # the first rung runs its own code
    model = govern(path, goal=goal or f"p99 <= {SLO * 1e3:g}ms", governor=policy, audit=audit, model=original)
    until = time.monotonic() + 60
    while any(r.state in ("out", "loading") for r in model.status().rungs) and time.monotonic() < until:
        time.sleep(0.05)
    return model


# --- bursts -----------------------------------------------------------------------------------------------------


def bursts(path: Path, rows: Any, cv2: float) -> str:
    """Every policy on the same trace, at twice what the best rung carries."""
    with opened(path) as model:
        states = [s for s in model._conductor.company.residents.states if s.ready]
    best = max(states, key=lambda s: s.quality)
    carried = max(n / best.seconds(n) for n in (1, best.most_rows)) / CROWD  # requests/s, joined where that pays
    trace = gamma(rate=2.0 * carried, cv2=cv2, seconds=SECONDS, seed=7)
    policies: dict[str, Callable[[], Decides]] = {
        **{f"rung {s.number} always ({s.seconds(1) * 1e3:.2f} ms)": _fixed(s.number) for s in states},
        "slack only (SlackFit)": SlackFit,
        "rate every 10 s": Slow,
        **{f"governor, {name}": _preset(governor) for name, governor in PRESETS.items()},
    }
    found = [replayed(path, rows, trace, name, make()) for name, make in policies.items()]
    lines = [
        [
            r.policy,
            f"{r.met:.2%}",
            f"{r.quality:.2%}",
            f"{r.effective:.2%}",
            f"{r.switches:.1f}",
            f"{r.p99 * 1e3:.0f} ms",
        ]
        for r in found
    ]
    head = ["policy", "answered in time", "right, of those", "right, of all", "switches/s", "p99"]
    return f"Bursts: {trace}, each of {CROWD} rows; {SLO * 1e3:.0f} ms for each.\n\n{table(head, lines)}"


def _fixed(number: int) -> Callable[[], Decides]:
    return lambda: Fixed(number)


def _preset(governor: Decides) -> Callable[[], Decides]:
    return lambda: governor


class Slow:
    """The 10 s controller, told of the rate as it averages it."""

    def __init__(self) -> None:
        self.rate, self.inner = ArrivalRate(tau=10.0), RateController()

    def decide(self, last: Decision | None, signal: Signal, rungs: tuple[RungState, ...]) -> Decision:
        return self.inner.decide(last, replace(signal, rate=self.rate.at(signal.now)), rungs)


def replayed(path: Path, rows: Any, trace: Trace, name: str, policy: Decides) -> Replay:
    """A trace against a policy, in earnest."""
    x, y = rows
    with opened(path, policy) as model:
        sent = send(model, x, trace, policy.rate if isinstance(policy, Slow) else None, CROWD)
        switches = model.status().switches
    good = [s for s in sent if s.in_time]
    right = sum(s.answer == int(y[i % (len(y) - CROWD)]) for i, s in enumerate(sent) if s.in_time)
    times = [s.came - s.at for s in sent if s.came < float("inf")]
    return Replay(
        name, len(good) / len(sent), right / max(len(good), 1), right / len(sent), switches / trace.seconds,
        float(np.quantile(times, 0.99)) if times else float("nan"),
    )  # fmt: skip


@dataclass
class Sent:
    """One request of a trace: when it should have been sent, when its answer came, and what it said."""

    at: float
    came: float = float("inf")
    answer: int = -1

    @property
    def in_time(self) -> bool:
        return self.came - self.at <= SLO


def send(model: GovernedModel, x: Any, trace: Trace, told: ArrivalRate | None = None, rows: int = 1) -> list[Sent]:
    """Each request at its time; returns once all are answered or given up."""
    sent: list[Sent] = []
    start = time.monotonic() + 0.1
    for i, arrival in enumerate(trace.arrivals):
        one = Sent(start + arrival)
        sent.append(one)
        if (wait := one.at - time.monotonic()) > 0:
            time.sleep(wait)
        if told:
            told.observe(time.monotonic())
        leaf = x[i % (len(x) - rows) :][:rows]
        with contextlib.suppress(ServingError):
            ticket = model.submit([leaf], seconds=max(one.at + SLO - time.monotonic(), 1e-6))
            ticket.future.add_done_callback(lambda future, one=one: note(one, future))
    time.sleep(2 * SLO)
    return sent


def note(one: Sent, future: Any) -> None:
    if future.exception() is None:
        one.came, one.answer = time.monotonic(), int(future.result().leaves[0][0].argmax())


def said(good: bool) -> str:
    return "reached" if good else "not reached"


# --- change, overload, memory, bad rungs ----------------------------------------------------------------------------


def goals(path: Path, rows: Any) -> str:
    """Goals that take turns: whether the very next batch obeys, and what a switch costs."""
    x, obeyed, setting, switched, stayed = rows[0][:1], 0, [], [], []
    with opened(path, "responsive") as model:
        top, bottom = model.bundle.ladder[1].speedup.low * 0.9, model.bundle.ladder.fastest.speedup.low * 0.9
        for i in range(400):
            start = time.perf_counter()
            model.goal = f"speedup >= {bottom:.3f}" if i % 2 else f"speedup >= {top:.3f}"
            setting.append(time.perf_counter() - start)
            for times in (switched, stayed):
                start = time.perf_counter()
                _, why = model.explain(x)
                times.append(time.perf_counter() - start - why.computed)
            obeyed += (why.rung == len(model.bundle.ladder) - 1) == bool(i % 2)
    extra = float(np.quantile(switched, 0.99)) - float(np.median(stayed))
    return (
        f"A changed goal was in force at the next batch in {obeyed} of 400 changes; setting it took "
        f"{np.quantile(setting, 0.99) * 1e3:.2f} ms (p99). The first call on another rung took {extra * 1e3:.2f} ms "
        "more besides computing (p99, over the median of calls that stay); asked for: 1 ms, "
        f"{said(extra <= 1e-3)}."
    )


def overloaded(path: Path, rows: Any) -> str:
    """Three times what the fastest rung carries, then half the best's; requests of many rows, so that it computes."""
    x = np.concatenate([rows[0], rows[0][:CROWD]])
    with opened(path) as model:
        states = [s for s in model._conductor.company.residents.states if s.ready]
        alone = closed_loop(model, x)
        before = model.status().memory_bytes
        sent = send(model, x, poisson(rate=3 * alone, seconds=OVERLOAD_SECONDS, seed=3), rows=CROWD)
        grown = model.status().memory_bytes - before
        calm = send(model, x, poisson(rate=0.5 / max(s.seconds(CROWD) for s in states), seconds=3, seed=4), rows=CROWD)
    goodput = sum(s.in_time for s in sent) / OVERLOAD_SECONDS
    missed = [s.at for s in calm if not s.in_time]
    back = max(missed) - calm[0].at if missed else 0.0
    return (
        f"Overload: {3 * alone:,.0f} requests/s of {CROWD} rows for {OVERLOAD_SECONDS:.0f} s, {len(sent):,} in all, "
        f"sent by a thread of the same interpreter. Answered in time: {goodput:,.0f}/s, **{goodput / alone:.0%}** of "
        f"the {alone:,.0f}/s that the fastest rung answers in a closed loop; asked for: 90 %, "
        f"{said(goodput >= 0.9 * alone)}. "
        f"Memory grew by {grown / 1e6:.1f} MB, the record of what was sent included. Afterwards the last miss came "
        f"{back:.2f} s after the load had fallen; asked for: within {2 * SLO:.1f} s, {said(back <= 2 * SLO)}."
    )


def closed_loop(model: GovernedModel, x: Any, seconds: float = 4.0) -> float:
    """Requests a second on the fastest rung, with always 32 under way."""
    old, model.goal = model.goal, f"speedup >= {model.bundle.ladder.fastest.speedup.low * 0.9:.3f}"
    waiting: list[Ticket] = [model.submit([x[i : i + CROWD]], seconds=30.0) for i in range(32)]
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        waiting.pop(0).future.result(30)
        count += 1
        i = count % (len(x) - CROWD)
        waiting.append(model.submit([x[i : i + CROWD]], seconds=30.0))
    for ticket in waiting:
        ticket.future.result(30)
    model.goal = old
    return count / seconds


def cycles(path: Path) -> str:
    """Load and unload a rung many times, and all of them beside each other."""
    with opened(path) as model:
        residents = model._conductor.company.residents
        together = residents.memory
        largest = max(residents.bytes_of(r.number) for r in residents if r.state == "ready")
        for _ in range(10):
            residents.evict(1)
            residents.load(1)
        from accelerando.serve.residents import held_bytes

        before = held_bytes(residents._pid())
        for _ in range(CYCLES):
            residents.evict(1)
            residents.load(1)
        after = held_bytes(residents._pid())
        count = sum(r.state == "ready" for r in residents)
    growth = after / before - 1
    return (
        f"{CYCLES} cycles of unloading and loading a rung: resident memory grew by **{growth:.1%}**; asked for: at "
        f"most 2 %, {said(growth <= 0.02)}. All {count} rungs loaded hold {together / 1e6:.0f} MB; the largest alone "
        f"is certified at {largest / 1e6:.0f} MB beyond its library."
    )


def bad_rung(path: Path, rows: Any) -> str:
    """A rung whose weights were disturbed after it was certified: how many audits until it is quarantined."""
    x, rng = rows[0], np.random.default_rng(0)
    with opened(path, audit=1.0, goal="p99 <= 10s") as model:
        residents = model._conductor.company.residents
        number = len(model.bundle.ladder) - 1
        resident = residents[number]
        inner = resident.runner

        class Disturbed:
            def __call__(self, leaves: Any) -> Any:
                answers = inner(leaves)  # type: ignore[misc]
                wrong = rng.random(len(answers[0])) < 0.05
                answers[0][wrong] = np.roll(answers[0][wrong], 1, axis=1)
                return answers

            def close(self) -> None:
                inner.close()  # type: ignore[union-attr]

        resident.runner = Disturbed()  # type: ignore[assignment]
        model.goal = f"speedup >= {model.bundle.ladder.fastest.speedup.low * 0.9:.3f}"
        for i in range(4000):
            model(x[i % len(x)][None])
            if i % 20 == 0:
                time.sleep(0.05)  # audits are done when nothing else is to be done
            if resident.state == "quarantined":
                break
        told, caught = model.status(), resident.state == "quarantined"
    state = f"quarantined after {told.audited} audited requests" if caught else "not found out"
    good = caught and told.audited <= 1000
    return (
        f"A rung of which 5 % of the answers were made wrong after it was certified: {state}; asked for: within 1,000, "
        f"{said(good)}."
    )
