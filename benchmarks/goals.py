"""A goal that changes: whether the very next batch obeys, and what a switch between rungs in memory costs."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.figures import Figure, Found, fewer
from benchmarks.ladders import Ground

SWITCH = 1e-3  # seconds
CHANGES = 400


def changed(ground: Ground) -> Found:
    """Goals that take turns between the fastest rung and one that is slower."""
    x, changes = ground.x[:1], fewer(CHANGES)
    obeyed = 0
    setting: list[float] = []
    switched: list[float] = []
    stayed: list[float] = []
    with ground.opened("p99 <= 10s", "responsive") as model:
        top, bottom = model.bundle.ladder[1].speedup.low * 0.9, model.bundle.ladder.fastest.speedup.low * 0.9
        for i in range(changes):
            start = time.perf_counter()
            model.goal = f"speedup >= {bottom:.3f}" if i % 2 else f"speedup >= {top:.3f}"
            setting.append(time.perf_counter() - start)
            for times in (switched, stayed):
                start = time.perf_counter()
                _, why = model.explain(x)
                times.append(time.perf_counter() - start - why.computed)
            obeyed += (why.rung == len(model.bundle.ladder) - 1) == bool(i % 2)
    extra = float(np.quantile(switched, 0.99)) - float(np.median(stayed))
    return Found(
        (
            Figure(
                "a changed goal is in force", f"at the next batch in {obeyed} of {changes}", "all", obeyed == changes
            ),
            Figure("a switch between rungs in memory, p99", f"{extra * 1e3:.2f} ms", "1 ms", extra <= SWITCH),
        ),
        f"Setting a goal took {np.quantile(setting, 0.99) * 1e3:.2f} ms (p99). A switch is what the first call on "
        "another rung takes besides computing, over the median of calls that stay.",
    )
