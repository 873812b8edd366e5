"""A small good bundle, written as the search writes them: to test what reads bundles, and to be damaged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.bundle import Bundle
from accelerando.goal import Goal
from accelerando.ladder import Ladder, Rung
from accelerando.machine import Machine
from accelerando.parity import Parity
from accelerando.recipe import Artifact, Backend, Recipe
from accelerando.signature import Port, Signature
from accelerando.testing.fakes import fake_evidence, fake_recipe
from accelerando.trial import Trial, Verified
from accelerando.workload import Form, Model

GOAL = "speedup >= 2, drop <= 5%"
SIGNATURE = Signature(
    inputs=(Port("x", "float32", ("batch", 4)),),
    outputs=(Port("logits", "float32", ("batch", 3)),),
    parameters=("x",),
    positional=1,
    arguments={"x": {"leaf": 0}},
    result={"leaf": 0},
)
WORKLOAD: dict[str, Any] = {
    "form": "torch", "metric": "accuracy", "higher_is_better": True, "digest": "0123456789abcdef", "select": 500,
    "certify": 500, "calibrate": 100, "notes": ["a fake"], "origin": None,
}  # fmt: skip
RUN: dict[str, Any] = {
    "started": "2026-01-01T00:00:00+00:00", "seconds": 12.5, "budget_seconds": 60.0, "trials": 3, "finished": True,
    "accelerando": "0.1.0", "command": None,
}  # fmt: skip


def write_bundle(
    path: Path,
    *,
    recipes: Sequence[Recipe] | None = None,
    content: Any = None,
    signature: Signature = SIGNATURE,
    inputs: Sequence[Any] | None = None,
    best: int = -1,
    journal: bool = True,
    skeleton: Any = None,
    **changed: Any,
) -> Bundle:
    """A bundle whose rungs are really compiled and answered by their backends; its evidence is made up.

    Args:
        path: an empty folder, or one to come.
        recipes: from the original to the fastest; rung i is said to be 1 + 2 i times faster.  Fakes, without it.
        content: what the backends compile, in the first form that they take.
        inputs: the rows for parity; without it, drawn for the first input of the signature.
        best: number of the best rung.
        journal: write `trials.jsonl` too.
        skeleton: the original module, for backends that are not portable.
        changed: further arguments of `Bundle.write`, in place of made-up ones.
    """
    recipes = recipes or [fake_recipe(0), fake_recipe(1), fake_recipe(2, strengths=(3,))]
    rows = list(inputs) if inputs is not None else [np.random.default_rng(0).standard_normal((4, 4), np.float32)]
    rungs, answers = [], {}
    for i, recipe in enumerate(recipes):
        folder = path / "rungs" / recipe.key
        folder.mkdir(parents=True)
        artifact = _compile(recipe.backend, content, signature, folder)
        evidence = fake_evidence(1.0 + 2 * i, 0.0, n=500, seed=i, split="certify", disk_bytes=artifact.bytes)
        rungs.append(Rung(recipe, artifact, evidence, certified=True))
        runner = recipe.backend.load(artifact, folder, signature, skeleton)
        answers[recipe.key] = tuple(runner(rows))
        runner.close()
    if journal:
        trials = [Trial(r.recipe, Verified(r.artifact, r.evidence), 1.0, ("a fake",)) for r in rungs]
        lines = [json.dumps(t.to_json(), allow_nan=False) + "\n" for t in trials]
        (path / "trials.jsonl").write_text("".join(lines))
    goal = Goal.parse(GOAL)
    number = range(len(rungs))[best]
    given: dict[str, Any] = {
        "goal": goal,
        "verdict": goal.judge(rungs[number].evidence),
        "best": number,
        "ladder": Ladder(tuple(rungs)),
        "signature": signature,
        "machine": Machine.look(),
        "workload": WORKLOAD,
        "run": RUN,
        "profile": {"layers": [{"name": "conv", "seconds": 0.001}]},
        "parity": Parity(tuple(rows), answers[recipes[0].key], answers),
    }
    return Bundle.write(path, **{**given, **changed})


def _compile(backend: Backend, content: Any, signature: Signature, folder: Path) -> Artifact:
    for i, member in enumerate(backend.members):
        (folder / str(i)).mkdir()
        _compile(member.backend, content, signature, folder / str(i))
    form = Form.ONNX if backend.members else _form(backend)
    return backend.compile(Model(form, content, signature), folder)


def _form(backend: Backend) -> Form:
    return Form.TORCH if Form.TORCH in backend.takes else sorted(backend.takes, key=lambda f: f.value)[0]
