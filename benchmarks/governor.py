"""The governor against other policies in the simulator, on seeds on which nothing was tuned; and pictures of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from accelerando.serve.governor import RungState
from accelerando.serve.simulation import Outcome, Simulation, Terms, simulate
from accelerando.serve.traces import gamma
from benchmarks.courses import draw_course, draw_plane
from benchmarks.results import record, table

SECONDS = (0.120, 0.080, 0.053, 0.035, 0.024, 0.016, 0.010)
QUALITY = (0.92, 0.915, 0.905, 0.89, 0.87, 0.84, 0.80)
RUNGS = tuple(RungState(i, q, 0.0, s, 1.15) for i, (s, q) in enumerate(zip(SECONDS, QUALITY, strict=True)))
WIDE = (*RUNGS, RungState(7, 0.77, 0.0, 0.0065, 1.15), RungState(8, 0.73, 0.0, 0.0043, 1.15))
BEST_CARRIES = 1 / SECONDS[0]
SEEDS, LENGTH = range(2000, 2004), 400.0
CASES: dict[str, tuple[tuple[RungState, ...], float, float]] = {
    "CV2 4, 300 ms": (RUNGS, 4.0, 0.3),
    "CV2 23, 300 ms, wide ladder": (WIDE, 23.0, 0.3),
    "CV2 23, 300 ms": (RUNGS, 23.0, 0.3),
    "CV2 23, 500 ms": (RUNGS, 23.0, 0.5),
}
PAGE = Path(__file__).parents[1] / "docs" / "why"  # where the pictures lie
PICTURED = ("CV2 4, 300 ms", "CV2 23, 300 ms, wide ladder")
SHOWN_SECONDS = 60.0  # of the first seed's trace


def run(name: str) -> None:
    found, most = {}, {}
    for case, (rungs, cv2, patience) in CASES.items():
        found[case], most[case] = fare(rungs, cv2, patience, SEEDS, LENGTH)
    policies = list(found["CV2 23, 300 ms, wide ladder"])
    rows = [[policy, *(_cell(found[case].get(policy)) for case in CASES)] for policy in policies]
    rows.append(["no policy can have more than", *(f"- / - / {most[case] * 100:.2f}" for case in CASES)])
    body = (
        "Simulated, not measured: one executor, calls with 8 % of noise and 1 % of stalls of 1.8 times, requests of "
        f"one row, at twice what the best rung carries, seeds {SEEDS[0]} to {SEEDS[-1]}, {LENGTH:.0f} s each. Rung by "
        f"rung {', '.join(f'{s * 1e3:g}' for s in SECONDS)} ms with {', '.join(f'{q * 100:g}' for q in QUALITY)} %; "
        "the wide ladder two more, 6.5 and 4.3 ms with 77 and 73 %. Deadlines met / quality of what was on time / "
        f"effective quality (late and refused count 0), all in percent.\n\n{table(['policy', *CASES], rows)}\n\n"
        "Switches a second in the first case: "
        + ", ".join(f"{p} {found['CV2 4, 300 ms'][p].switches_per_second:.1f}" for p in policies if "rung" not in p)
        + "."
    )
    record(name, "The governor against other policies, simulated", body)
    draw(PAGE, found)


def draw(folder: Path, found: Mapping[str, Mapping[str, Outcome]]) -> None:
    """The pictures of the governor's page: a trace in the course of time, and all policies in the plane."""
    trace = gamma(2 * BEST_CARRIES, 4.0, SHOWN_SECONDS, SEEDS[0])
    draw_course(folder / "governor-course.svg", RUNGS, trace, 0.3)
    draw_plane(folder / "governor-plane.svg", WIDE, {case: found[case] for case in PICTURED})


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return "-"
    return " / ".join(f"{x * 100:.2f}" for x in (outcome.attainment, outcome.quality, outcome.effective_quality))


def fare(
    rungs: tuple[RungState, ...], cv2: float, patience: float, seeds: range, seconds: float
) -> tuple[dict[str, Outcome], float]:
    """The usual policies on gamma traces at twice what the best rung carries, and what nobody could exceed.

    All seeds together.
    """
    runs: list[Simulation] = []
    for seed in seeds:
        trace = gamma(2 * BEST_CARRIES, cv2, seconds, seed)
        times = [noise(100 * seed + i) for i in range(len(rungs))]
        runs.append(simulate(rungs, trace, Terms(patience), times=times, seed=seed))
    joined = {several[0].policy: together(several) for several in zip(*(r.outcomes for r in runs), strict=True)}
    weights = [len(r.trace) for r in runs]
    return joined, float(np.average([r.most_quality for r in runs], weights=weights))


def together(several: tuple[Outcome, ...]) -> Outcome:
    """One policy's outcomes as one."""
    requests, on_time = sum(o.requests for o in several), sum(o.on_time for o in several)
    return replace(
        several[0],
        requests=requests,
        on_time=on_time,
        quality=sum(o.quality * o.on_time for o in several) / on_time,
        effective_quality=sum(o.effective_quality * o.requests for o in several) / requests,
        switches_per_second=sum(o.switches_per_second for o in several) / len(several),
    )


def noise(seed: int, count: int = 4000) -> np.ndarray:
    """Calls as multiples of the usual time: 8 % of noise, and in a hundred one that stalls for 1.8 times as long."""
    rng = np.random.default_rng(seed)
    found = np.exp(0.08 * rng.standard_normal(count))
    found[rng.random(count) < 0.01] *= 1.8
    return found
