"""How to do the same again: the command or the call that a report shows; `...` stands for what only the user has."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from accelerando.goal import Goal
from accelerando.metric import METRICS
from accelerando.search.budget import Budget
from accelerando.workload import Workload

YOURS = "..."
MB = 2**20


def search_again(
    load: Workload, goal: Goal, budget: Budget, into: Path, origin: str | None, memory_limit: int | None
) -> str:
    """The search: a command where the original came from the command line (`origin`), else a call."""
    if origin is None:
        limit = [f"memory_limit={memory_limit}"] if memory_limit else []
        given = ["model", "data", f"goal={json.dumps(str(goal))}", *_named(load, budget, into), *limit]
        return f"accelerando.accelerate({', '.join(given)})"
    limit = ["--memory-limit", str(memory_limit // MB)] if memory_limit else []
    words = ["optimize", origin, "--goal", str(goal), *_options(load, budget, into), *limit, "--resume"]
    return shlex.join(["accelerando", *words])


def refresh_again(bundle: Path, load: Workload, budget: Budget, into: Path, origin: str | None) -> str:
    """The refresh of a bundle, likewise."""
    if origin is None:
        given = [json.dumps(str(bundle)), "model", "data", *_named(load, budget, into)]
        return f"accelerando.refresh({', '.join(given)})"
    return shlex.join(["accelerando", "refresh", str(bundle), "--model", origin, *_options(load, budget, into)])


def _options(load: Workload, budget: Budget, into: Path) -> list[str]:
    """What both commands take."""
    yours = [word for name in _given(load) for word in (f"--{name}", YOURS)]
    return ["--data", YOURS, *yours, "--metric", _metric(load), "--budget", _seconds(budget), "--into", str(into)]


def _named(load: Workload, budget: Budget, into: Path) -> list[str]:
    """What both calls take."""
    metric = _metric(load)
    named = {"metric": metric if metric == YOURS else json.dumps(metric), **dict.fromkeys(_given(load), YOURS)}
    return [f"{k}={v}" for k, v in {**named, "budget": f'"{_seconds(budget)}"', "into": json.dumps(str(into))}.items()]


def _given(load: Workload) -> list[str]:
    """What is given for retraining."""
    return [name for name in ("train", "loss", "augment") if getattr(load, name) is not None]


def _metric(load: Workload) -> str:
    return load.metric.name if load.metric.name in METRICS else YOURS


def _seconds(budget: Budget) -> str:
    return f"{budget.seconds:.0f}s"
