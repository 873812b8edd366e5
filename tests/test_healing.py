"""From end to end: a model is cut, healed, exported, measured; a lesson survives a kill; new weights need no search."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accelerando import ModelError, UsageError, accelerate, load, refresh
from accelerando.adoption import adopt
from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.bundle import Bundle
from accelerando.demo import digits
from accelerando.errors import Reason, RefusalError
from accelerando.goal import Goal
from accelerando.machine import Machine
from accelerando.recipe import Recipe
from accelerando.search import certificate
from accelerando.search.budget import Budget
from accelerando.search.grounds import attempt
from accelerando.search.history import Proposal
from accelerando.search.site import Site
from accelerando.search.space import original_recipe
from accelerando.techniques.distil import Distil
from accelerando.techniques.drop_layers import DropLayers
from accelerando.techniques.export_onnx import ExportOnnx

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def one_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast the best is says one pair of processes: each imports torch anew, and no speed is judged here."""
    monkeypatch.setattr(certificate, "PROCESSES", 1)


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class Deep(torch.nn.Module):
    """(n, 64) -> (n, 10) logits, by way of eight residual blocks."""

    def __init__(self, width: int = 128, depth: int = 8) -> None:
        super().__init__()
        self.stem, self.head = torch.nn.Linear(64, width), torch.nn.Linear(width, 10)
        self.blocks = torch.nn.Sequential(*(Block(width) for _ in range(depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)))


@dataclass(frozen=True)
class Case:
    model: Any
    train: tuple[Any, Any]
    test: tuple[Any, Any]


@pytest.fixture(scope="module")
def case() -> Case:
    (x, y), (x_test, y_test) = digits()
    x, x_test = x.reshape(-1, 64), x_test.reshape(-1, 64)
    return Case(taught(x, y, seed=0), (x, y), (x_test, y_test))


def taught(x: Any, y: Any, seed: int, model: Any = None, steps: int = 150) -> Any:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = model or Deep()
        optimizer, rows, labels = torch.optim.AdamW(model.parameters(), 1e-3), torch.from_numpy(x), torch.from_numpy(y)
        for _ in range(steps):
            chosen = torch.randint(len(rows), (64,))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(rows[chosen]), labels[chosen]).backward()
            optimizer.step()
    return model.eval()


def site(case: Case, folder: Path, asked: str = "drop <= 5%", seconds: float = 600) -> Site:
    workload = adopt(case.model, case.test, train=case.train, metric="accuracy")
    goal, budget = Goal.parse(asked), Budget(seconds)
    return Site(folder, workload, Machine.look(), goal, budget, original_recipe(workload.model, {"eager": eager()}))


def eager() -> Any:
    from accelerando.backends.eager import Eager

    return Eager


def cut(*lessons: int) -> Recipe:
    return Recipe((DropLayers(0.75), *(Distil(seconds=s) for s in lessons), ExportOnnx()), Onnxruntime())


def test_what_was_cut_is_healed_and_proven(case: Case, tmp_path: Path) -> None:
    with site(case, tmp_path / "bundle") as where:
        trials: tuple[Any, ...] = ()
        for recipe in (where.original, cut(), cut(20)):
            trials += (attempt(Proposal(recipe, ""), where.grounds, trials, 600),)
        wounded, healed = trials[1], trials[2]
        assert healed.verified is not None
        before, after = wounded.outcome.evidence.relative_drop.mid, healed.evidence.relative_drop.mid
        assert after < 0.75 * before  # how much comes back in 20 s is a matter of the machine
        assert any(line.startswith("distil: curve 0:") for line in healed.log)


def test_a_lesson_that_was_killed_goes_on_where_it_was(case: Case, tmp_path: Path) -> None:
    with site(case, tmp_path / "bundle") as where:
        heard: list[str] = []
        with pytest.raises(RefusalError) as stopped:
            where.grounds.workshop.build(cut(20), tmp_path / "first", 14.0, heard.append)  # the child is killed
        assert stopped.value.reason is Reason.TIMED_OUT
        assert any("of 20 s" in text for text in heard)
        built = where.grounds.workshop.build(cut(20), tmp_path / "second", 200.0)
        curve = next(line for line in built.log if line.startswith("distil: curve"))
        assert curve.split()[2].startswith("0:")  # the first look is that of the lesson that was killed
        assert float(curve.split()[-1].split(":")[0]) >= 15


def test_new_weights_need_no_search(case: Case, tmp_path: Path) -> None:
    old = accelerate(
        case.model, case.test, "drop <= 5%", train=case.train, metric="accuracy", budget="40s",
        into=tmp_path / "old", progress=False,
    )  # fmt: skip
    newer = taught(*case.train, seed=1, model=taught(*case.train, seed=0), steps=20)
    new = refresh(tmp_path / "old", newer, case.test, tmp_path / "new", train=case.train, budget="40s", progress=False)
    assert len(new.bundle.trials) <= len(old.bundle.trials)
    assert new.best.certified
    answers = np.asarray(load(tmp_path / "new")(case.test[0][:50])).argmax(1)
    with torch.no_grad():
        theirs = newer(torch.from_numpy(case.test[0][:50])).argmax(1).numpy()
    assert (answers == theirs).mean() >= 0.9
    with pytest.raises(ModelError, match="built otherwise"):
        refresh(tmp_path / "old", Deep(depth=6).eval(), case.test, tmp_path / "third", train=case.train)
    with pytest.raises(UsageError, match="another folder"):
        refresh(tmp_path / "old", newer, case.test, tmp_path / "old", train=case.train)


def test_a_refresh_goes_on_from_what_the_search_has_taught(case: Case, tmp_path: Path) -> None:
    with site(case, tmp_path / "old", "drop <= 90%", 30) as where:
        history: tuple[Any, ...] = ()
        for recipe in (where.original, cut(5, 6)):
            history = where.note(history, attempt(Proposal(recipe, ""), where.grounds, history, 600))
        where.finish(history, lambda recipe, what: None)
    newer = taught(*case.train, seed=1, model=copy.deepcopy(case.model).train(), steps=20)
    given = {"train": case.train, "budget": "30s", "progress": False}
    new = refresh(tmp_path / "old", newer, case.test, tmp_path / "new", **given)
    assert lessons(new.bundle) == [5, 6, 8]
    again = refresh(tmp_path / "new", case.model, case.test, tmp_path / "third", **given)
    assert lessons(again.bundle) == [5, 6, 8, 8]
    for bundle in (new.bundle, again.bundle):
        log = bundle.trials[-1].log
        assert sum(line.startswith("distil: curve 0:") for line in log) == 1  # only the last was given now


def lessons(bundle: Bundle) -> list[int]:
    """Seconds of the lessons of the one recipe beyond the original that was tried."""
    _, trial = bundle.trials
    assert trial.verified is not None
    return [step.knobs["seconds"] for step in trial.recipe.steps if step.name == "distil"]
