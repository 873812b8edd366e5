"""New weights for the ViT: `refresh` of its finished bundle against the search that made the bundle."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from accelerando import Bundle, accelerate, refresh
from benchmarks.cases import BUDGET, CASES, Case, span
from benchmarks.results import record, table

STEPS, BATCH, RATE = 100, 64, 2e-5
ASKED = 0.2  # of the search's time


def run(name: str) -> None:
    case = CASES["vit-heal"]()
    folder = Path(os.environ.get("ACCELERANDO_BENCH_FOLDER", tempfile.mkdtemp()))
    before = bundle_of(case, folder / "vit-heal")
    newer = retrained(case.model, case.train)
    start = time.monotonic()
    result = refresh(before.path, newer, case.data, Path(tempfile.mkdtemp(), "renewed"), train=case.train)
    took = time.monotonic() - start
    was, now = before.ladder.rungs[before.best], result.best
    rows = [
        [what, verdict, span(rung.speedup), f"{rung.evidence.relative_drop.mid:.2%}", f"{seconds:.0f} s"]
        for what, verdict, rung, seconds in (
            ("search, old weights", before.verdict.outcome.value, was, float(before.run["seconds"])),
            ("refresh, new weights", result.verdict, now, took),
        )
    ]
    share = took / float(before.run["seconds"])
    good = share <= ASKED and result.verdict == before.verdict.outcome.value
    body = table(["", "verdict", "speedup", "drop", "time"], rows)
    body += (
        f"\n\nThe goal was {before.goal}. Refreshing took **{share:.0%}** of the search's time; asked for: at most "
        f"{ASKED:.0%}, with the same verdict, {'reached' if good else 'not reached'}. "
        f"The search's bundle held {len(before.students) or 'no'} students to go on from."
    )
    record(name, "Refresh of the ViT's bundle with retrained weights", body)


def bundle_of(case: Case, folder: Path) -> Bundle:
    """The bundle of an earlier `vit-heal`, or one that is searched for now."""
    if (folder / "manifest.json").exists():
        return Bundle.open(folder)
    budget = BUDGET or case.budget
    found = accelerate(
        case.model, case.data, case.goal, train=case.train, metric=case.metric, budget=budget, into=folder
    )
    return found.bundle


def retrained(model: Any, train: tuple[np.ndarray, np.ndarray]) -> Any:
    """The model after a few more steps on its own training data."""
    import copy

    import torch

    model, (x, y) = copy.deepcopy(model).train(), (torch.from_numpy(a) for a in train)
    optimizer, order = torch.optim.AdamW(model.parameters(), RATE), torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (BATCH,), generator=order)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.eval()
