"""The bundle: the folder that leaves the search and enters the runtime.  JSON and hashed files, never a pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerando.goal import Goal, Verdict
from accelerando.ladder import Ladder
from accelerando.machine import Machine
from accelerando.signature import Signature
from accelerando.trial import Trial

SCHEMA = 1


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Args:
        path: the folder.
        goal: what was asked for.
        verdict: what the best rung's evidence says of the goal.
        best: number of the best rung of the ladder.
        ladder: rungs from the original to the fastest; rung i's files lie in `rungs/<recipe key>/`.
        signature: how the model is called.
        machine: where the evidence was gathered.
        workload: plain data about the workload: form, metric, higher_is_better, digest, select (count), certify
            (count), calibrate (count), notes (list), origin (how to get the original again, or null).
        run: plain data about the run: started (ISO time), seconds, budget_seconds, trials (count), finished (bool),
            accelerando (version), command (how to reproduce it).
    """

    path: Path
    goal: Goal
    verdict: Verdict
    best: int
    ladder: Ladder
    signature: Signature
    machine: Machine
    workload: Mapping[str, Any]
    run: Mapping[str, Any]

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Every trial of the search, from `trials.jsonl`."""
        raise NotImplementedError

    @property
    def profile(self) -> Mapping[str, Any] | None:
        """The profile of the original (`profile.json`), where one was made."""
        raise NotImplementedError
