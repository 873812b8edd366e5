"""A race in which an arm dies: the one that died is refused, and nobody else."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from accelerando.errors import Reason, RefusalError
from accelerando.goal import Goal
from accelerando.search.grounds import Grounds, race
from accelerando.search.proposal import Proposal
from accelerando.testing.fakes import fake_trial


class Arm:
    """An arm that answers blocks, or dies at its first, or can't be loaded."""

    pid = os.getpid()

    def __init__(self, fate: str) -> None:
        if fate == "unloadable":
            raise RefusalError(Reason.CRASHED, "no such file")
        self.fate, self.alive = fate, True

    def __enter__(self) -> Arm:
        return self

    def __exit__(self, *why: object) -> None:
        pass

    def block(self, seconds: float, timeout: float, core: int = 0) -> np.ndarray:
        if self.fate == "dies":
            self.alive = False
            raise RefusalError(Reason.CRASHED, "died of SIGSEGV")
        return np.full(5, 1e-3)

    def typical(self, block: np.ndarray) -> float:
        return float(np.median(block))


def run(*fates: str) -> list[bool]:
    """Race recipes with these fates; for each trial that comes back, in order of level, whether it is verified."""
    trials = [fake_trial(speedup=3.0, level=i + 1) for i in range(len(fates))]
    fate = {t.recipe.key: f for t, f in zip(trials, fates, strict=True)}
    original = SimpleNamespace(recipe=fake_trial().recipe, skeleton=None)
    bench: Any = SimpleNamespace(
        arm=lambda subject, split: Arm(fate[subject.recipe.key]), original_arm=Arm("well"), original=original,
        machine=SimpleNamespace(cores=2), patience=1.0,
    )  # fmt: skip
    grounds = Grounds(None, bench, Goal.parse("drop <= 1%"), Path())
    first, *rest = (t.recipe for t in trials)
    after = race(Proposal(first, "", True, tuple(rest)), grounds, tuple(trials), 5)
    found = {t.recipe.key: t.verified is not None for t in after}
    return [found[t.recipe.key] for t in trials if t.recipe.key in found]


def test_all_that_run_are_timed() -> None:
    assert run("well", "well", "well") == [True, True, True]


def test_the_one_that_died_is_refused_and_no_other() -> None:
    assert run("dies", "well", "well") == [False]


def test_one_that_does_not_load_is_refused_and_the_others_race() -> None:
    assert run("well", "unloadable", "well") == [True, False, True]


def test_where_none_loads_nobody_races() -> None:
    assert run("unloadable", "unloadable") == [False, False]
