"""The search as rows: plain data, a line for each trial, for JSON and for data frames."""

from __future__ import annotations

import math
from typing import Any

from accelerando.bundle import Bundle
from accelerando.errors import MissingExtraError
from accelerando.interval import Interval
from accelerando.report import words
from accelerando.report.fronts import front_of, tail_of
from accelerando.report.healing import lessons_of, only_measured
from accelerando.report.story import Story
from accelerando.trial import Evidence, Refused, Trial

FIGURES = ("speedup", "drop", "relative_drop", "quality", "throughput")


def rows(bundle: Bundle) -> list[dict[str, Any]]:
    """One flat row for each trial, in the order in which they were tried; every row has the same keys.

    Times are in seconds, sizes in bytes, drops in the metric's own unit.  A rung's figures are those of its
    certified evidence.  What was not measured is None.  `front` holds the steps that shape and heal, `tail` the rest;
    `lesson_seconds` is the training behind a recipe, `lesson_seconds_spent` what of it this very trial took, and
    `before_healing` marks shapes that were only measured.
    """
    story = Story(bundle)
    rungs = {rung.recipe.key: number for number, rung in enumerate(bundle.ladder.rungs)}
    last = {trial.recipe.key: number for number, trial in enumerate(story.history)}
    return [
        _row(story, number, trial, rungs.get(trial.recipe.key) if last[trial.recipe.key] == number else None)
        for number, trial in enumerate(story.history)
    ]


def to_frame(bundle: Bundle) -> Any:
    """The rows as a pandas.DataFrame.

    Raises:
        MissingExtraError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingExtraError("to_frame() needs pandas: pip install 'accelerando[optimize]'") from error
    return pandas.DataFrame(rows(bundle))


def _row(story: Story, number: int, trial: Trial, rung: int | None) -> dict[str, Any]:
    refused = trial.outcome if isinstance(trial.outcome, Refused) else None
    lessons = [lesson for _, lesson in lessons_of(trial)]
    evidence = story.bundle.ladder.rungs[rung].evidence if rung is not None else trial.evidence
    return {
        "trial": number,
        "key": trial.recipe.key,
        "recipe": words.recipe(trial.recipe),
        "backend": trial.recipe.backend.name,
        "techniques": " > ".join(step.name for step in trial.recipe.steps),
        "front": " > ".join(map(str, front_of(trial.recipe))),
        "tail": str(tail_of(trial.recipe)),
        "lessons": len(lessons),
        "lesson_seconds": round(sum(lesson.seconds for lesson in lessons), 1),
        "lesson_seconds_spent": round(story.taught[number], 1),
        "before_healing": only_measured(trial),
        "outcome": "refused" if refused else "verified",
        "reason": refused.reason.name if refused else None,
        "detail": words.clean(refused.detail) if refused else None,
        "rung": rung,
        "best": rung == story.bundle.best and rung is not None,
        "certified": rung is not None and story.bundle.ladder.rungs[rung].certified,
        "attempt_seconds": trial.seconds,
        **_figures(evidence, refused.speedup if refused else None),
    }


def _figures(evidence: Evidence | None, timed: Interval | None) -> dict[str, Any]:
    intervals: dict[str, Interval | None] = {
        name: None if evidence is None else getattr(evidence, name) for name in FIGURES
    }
    intervals["speedup"] = intervals["speedup"] or timed
    for label, quantile in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        intervals[label] = None if evidence is None else evidence.latency(quantile)
    found: dict[str, Any] = {}
    for name, interval in intervals.items():
        for suffix, bound in (("", "mid"), ("_low", "low"), ("_high", "high")):
            value = None if interval is None else getattr(interval, bound)
            found[name + suffix] = value if value is not None and math.isfinite(value) else None  # JSON has no infinity
    for name in ("metric", "split", "batch", "load_seconds", "peak_bytes", "disk_bytes", "machine"):
        found[name] = None if evidence is None else getattr(evidence, name)
    found["doubts"] = None if evidence is None else "; ".join(evidence.doubts())
    return found
