"""Statuses of a model that has been busy."""

from __future__ import annotations

import dataclasses
from typing import Any

from shelf import fake_status

from accelerando.interval import Interval
from accelerando.serve.status import BUCKETS, Histogram, Status

MOST = len(BUCKETS) + 1


def busy(name: str = "digits", times: int = 1, **changed: Any) -> Status:
    """A status after `times` as many requests as after one."""
    base = fake_status(name)
    rungs = tuple(
        dataclasses.replace(rung, answered=100 * times, agreement=Interval(0.97, 0.98, 0.99) if rung.number else None)
        for rung in base.rungs
    )
    given: dict[str, Any] = {
        "rungs": rungs, "rows": 200 * times, "all_rows": 226 * times, "answered": 200 * times, "late": 3 * times,
        "refused": 20 * times, "expired": 5 * times, "failed": 1 * times, "cancelled": 4 * times, "switches": 2 * times,
        "queue_rows": 7, "rate": 12.5,
        "queued": Histogram((0, 150 * times, *[0] * (MOST - 3), 50 * times), 9.0 * times),
        "computed": Histogram((*[0] * 3, 200 * times, *[0] * (MOST - 4)), 0.8 * times), "memory_cap": 10_000_000,
        "effective_quality": 0.9, "drift": ("x: drifted",), **changed,
    }  # fmt: skip
    return dataclasses.replace(base, **given)
