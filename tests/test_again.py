"""The line that does the same again: it says all that was given, and the command line and the library take it."""

from __future__ import annotations

import ast
import inspect
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main

import accelerando
from accelerando.adoption import adopt
from accelerando.cli import app
from accelerando.goal import Goal
from accelerando.search.again import refresh_again, search_again
from accelerando.search.budget import Budget
from accelerando.testing.models import image
from accelerando.workload import Workload

GOAL, BUDGET = Goal.parse("speedup >= 4, drop <= 1% @ batch 8, prefer speed"), Budget(90)
INTO, OLD = Path("my bundles/new"), Path("my bundles/old")


def own_score(outputs: Any, targets: Any) -> Any:
    return np.zeros(len(targets))


@pytest.fixture(scope="module")
def plain() -> Workload:
    return adopt(*image(), metric="cosine")


@pytest.fixture(scope="module")
def full(plain: Workload) -> Workload:
    """With all that may be given for retraining, and a metric of one's own."""
    metric = replace(plain.metric, name="own_score")
    return replace(plain, train=plain.calibrate, loss=max, augment=tuple, metric=metric)


def options(line: str) -> dict[str, Any]:
    """What the command line makes of a command."""
    program, name, *words = shlex.split(line)
    assert program == "accelerando"
    return typer.main.get_command(app).commands[name].make_context(name, words).params  # type: ignore[attr-defined]


def named(line: str) -> dict[str, Any]:
    """What the library makes of a call: parameters and the texts of what is given for them."""
    call = ast.parse(line, mode="eval").body
    assert isinstance(call, ast.Call)
    function = getattr(accelerando, ast.unparse(call.func).removeprefix("accelerando."))
    given = {word.arg: ast.unparse(word.value) for word in call.keywords if word.arg}
    return dict(inspect.signature(function).bind(*map(ast.unparse, call.args), **given).arguments)


def test_a_search_from_the_command_line(plain: Workload, full: Workload) -> None:
    said = options(search_again(full, GOAL, BUDGET, INTO, "my models/net.py:build", 900 * 2**20))
    assert (said["model"], said["data"], said["into"], said["resume"]) == ("my models/net.py:build", "...", INTO, True)
    assert [said[name] for name in ("train", "loss", "augment", "metric")] == ["..."] * 4
    assert (Goal.parse(said["goal"]), Budget.parse(said["budget"]).seconds) == (GOAL, 90)
    assert said["memory_limit"] == 900
    said = options(search_again(plain, GOAL, BUDGET, INTO, "net.onnx", None))
    assert [said[name] for name in ("train", "loss", "augment", "metric")] == [None, None, None, "cosine"]


def test_a_refresh_from_the_command_line(plain: Workload, full: Workload) -> None:
    line = refresh_again(OLD, full, BUDGET, INTO, "net.py:build")
    assert line.startswith("accelerando refresh ")
    said = options(line)
    assert (said["bundle"], said["model"], said["data"], said["into"]) == (OLD, "net.py:build", "...", INTO)
    assert [said[name] for name in ("train", "loss", "augment", "metric")] == ["..."] * 4
    assert options(refresh_again(OLD, plain, BUDGET, INTO, "net.py:build"))["train"] is None


def test_calls_of_the_library(plain: Workload, full: Workload) -> None:
    said = named(search_again(full, GOAL, BUDGET, INTO, None, 2**30))
    assert said == {
        "model": "model", "data": "data", "goal": repr(str(GOAL)), "train": "...", "metric": "...", "budget": "'90s'",
        "into": repr(str(INTO)), "memory_limit": str(2**30), "loss": "...", "augment": "...",
    }  # fmt: skip
    assert named(search_again(plain, GOAL, BUDGET, INTO, None, None)).keys() == {
        "model", "data", "goal", "metric", "budget", "into",
    }  # fmt: skip
    said = named(refresh_again(OLD, full, BUDGET, INTO, None))
    assert said == {
        "bundle": repr(str(OLD)), "model": "model", "data": "data", "into": repr(str(INTO)), "train": "...",
        "metric": "...", "budget": "'90s'", "loss": "...", "augment": "...",
    }  # fmt: skip
