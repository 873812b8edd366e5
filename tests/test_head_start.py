"""The head start of a refresh: students that were taught for the old weights are had again for the new ones."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from accelerando import manifest
from accelerando.adoption import adopt
from accelerando.backends.cascade import Cascade
from accelerando.backends.eager import Eager
from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.bundle import Bundle
from accelerando.errors import BundleError, Reason, RefusalError
from accelerando.ladder import Ladder, Rung
from accelerando.machine import Machine
from accelerando.measure.arm import save_samples
from accelerando.recipe import Artifact, Recipe
from accelerando.renewal import _plans
from accelerando.search.budget import Budget
from accelerando.search.head_start import ORIGINAL, HeadStart, front_key, lesson_keys, students_of
from accelerando.search.workshop import Workshop
from accelerando.techniques.distil import Distil
from accelerando.techniques.drop_layers import DropLayers
from accelerando.techniques.export_onnx import ExportOnnx
from accelerando.techniques.prune_channels import PruneChannels
from accelerando.testing.bundles import write_bundle
from accelerando.testing.fakes import fake_evidence, fakes_known
from accelerando.train.checkpoint import Checkpoint, Progress
from accelerando.train.weights import weights_of
from accelerando.workload import Form, Model, Samples, Workload

CUT, CUT_MORE = DropLayers(0.5), PruneChannels(0.5, importance="magnitude", everywhere=False)
FIRST, SECOND, THIRD = Distil(seconds=5), Distil(seconds=6), Distil(seconds=7)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class Chain(nn.Module):
    """(n, 8) -> (n, 3), by way of four residual blocks."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
            self.blocks = nn.Sequential(*(Block() for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)))


def rows(count: int) -> tuple[Any, Any]:
    x = np.random.default_rng(0).standard_normal((count, 8)).astype(np.float32)
    return x, (x.sum(1) > 0).astype(np.int64)


@pytest.fixture(scope="module")
def load() -> Workload:
    return adopt(Chain(1).eval(), rows(200), train=rows(300), metric="accuracy")


def cut(load: Workload, model: Model, *steps: Any) -> Model:
    for step in steps:
        model = step.apply(model, load.calibrate, Path())
    return model


def old_model(load: Workload) -> Model:
    return replace(load.model, content=Chain(0).eval().requires_grad_(False))


@pytest.fixture
def taught(load: Workload, tmp_path: Path) -> tuple[HeadStart, Any]:
    """A head start of a chain that was cut and taught twice, and the student after that."""
    old = old_model(load)
    Eager().compile(old, tmp_path)
    first = moved(cut(load, old, CUT).content)
    second = moved(cut(load, replace(old, content=first), CUT_MORE).content)
    students = {
        front_key((CUT, FIRST)): written(first, tmp_path / "a"),
        front_key((CUT, FIRST, CUT_MORE, SECOND)): written(second, tmp_path / "b"),
    }
    return HeadStart(tmp_path / "weights.safetensors", students), second


def moved(module: nn.Module) -> nn.Module:
    """As if it had been taught."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1
    return module


def written(module: nn.Module, folder: Path) -> Path:
    Checkpoint(folder, "key").write(Progress(steps=3, done=True), best=weights_of(module))
    return next(folder.glob("*.safetensors"))


def applying(load: Workload, steps: tuple[Any, ...]) -> Callable[[int, Model], Model]:
    return lambda number, model: steps[number].apply(model, load.calibrate, Path())


def test_the_old_student_is_had_again_on_the_new_original(load: Workload, taught: Any) -> None:
    start, wanted = taught
    steps = (CUT, FIRST, CUT_MORE, SECOND)
    got = start.student(steps, load.teachable, applying(load, steps))
    assert got.form is Form.TORCH
    theirs, mine = wanted.state_dict(), got.content.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert got.lessons is not None
    assert got.lessons.teacher is load.model.content  # it learns from the new original from now on
    assert [line.partition(":")[0] for line in got.log] == ["drop_layers", "distil", "distil", "prune_channels"] + [
        "distil"
    ] * 2


def test_a_cut_that_comes_out_otherwise_is_refused(load: Workload, taught: Any) -> None:
    start, _ = taught
    steps = (CUT, FIRST, CUT_MORE, SECOND)
    other = (DropLayers(0.25), *steps[1:])  # as if it were measured otherwise: another number of blocks goes
    with pytest.raises(RefusalError) as refused:
        start.student(steps, load.teachable, applying(load, other))
    assert refused.value.reason is Reason.UNSUPPORTED
    assert "not built like the student" in refused.value.detail
    assert start.known((*steps, THIRD)) == 4
    assert start.without(steps).known((*steps, THIRD)) == 0


def test_weights_of_another_original_are_refused(load: Workload, taught: Any, tmp_path: Path) -> None:
    save_file({"stem.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    start = replace(taught[0], original=tmp_path / "other.safetensors")
    with pytest.raises(RefusalError, match="can't be had again"):
        start.student((CUT, FIRST), load.teachable, applying(load, (CUT, FIRST)))


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo pwned",)


def test_a_pickle_in_place_of_a_student_is_never_opened(
    load: Workload, taught: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    start, _ = taught
    start.students[front_key((CUT, FIRST))].write_bytes(pickle.dumps(Payload()))
    with pytest.raises(RefusalError) as refused:
        start.student((CUT, FIRST), load.teachable, applying(load, (CUT, FIRST)))
    assert refused.value.reason is Reason.DAMAGED
    assert "pwned" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("steps", "count"),
    [
        ((CUT, FIRST, SECOND), 2),
        ((CUT, FIRST), 0),  # nothing would be taught on the new original
        ((CUT, FIRST, CUT_MORE), 0),
        ((CUT, SECOND, THIRD), 0),
        ((CUT, FIRST, CUT_MORE, SECOND, THIRD), 4),
        ((CUT, FIRST, CUT_MORE, THIRD, THIRD), 0),
        ((), 0),
    ],
)
def test_it_knows_how_far_a_recipe_was_taught(taught: Any, steps: tuple[Any, ...], count: int) -> None:
    assert taught[0].known(steps) == count


def test_only_the_last_of_several_lessons_leaves_a_student() -> None:
    steps = (CUT, FIRST, SECOND, CUT_MORE, THIRD)
    assert list(lesson_keys(steps)) == [front_key(steps[:3]), front_key(steps)]


# --- in the bundle ----------------------------------------------------------------------------------------------


def ladder_of(*steps: Any) -> Ladder:
    recipes = Recipe((), Eager()), Recipe(steps, Eager(threads=1))
    return Ladder(tuple(Rung(r, Artifact(()), fake_evidence(1.0 + i), certified=True) for i, r in enumerate(recipes)))


def test_students_go_into_the_bundle_and_on_into_the_next(taught: Any, tmp_path: Path) -> None:
    start, _ = taught
    steps = (CUT, FIRST, CUT_MORE, SECOND)
    with fakes_known():
        assert write_bundle(tmp_path / "none").students == {}
        own = students_of(ladder_of(*steps), tmp_path / "nowhere", None, start)
        assert set(own) == set(start.students)
        first = write_bundle(tmp_path / "old", students=own)
        assert {k: p.read_bytes() for k, p in first.students.items()} == {k: p.read_bytes() for k, p in own.items()}
        assert Bundle.open(first.path).students == first.students
        again = HeadStart(start.original, first.students)
        on = students_of(ladder_of(*steps, THIRD), tmp_path / "nowhere", None, again)
        assert on[ORIGINAL] == start.original  # the first cut was made on these
        assert front_key((CUT, FIRST)) in on
        Bundle.write(first.path, **{n: getattr(first, n) for n in FIELDS}, students=on)
        later = Bundle.open(first.path)
        assert later.students.keys() == on.keys()
        assert len(list((first.path / "students").iterdir())) == len(on)  # no other is left
        assert HeadStart.of(later).original == later.students[ORIGINAL]  # type: ignore[union-attr]


FIELDS = ("goal", "verdict", "best", "ladder", "signature", "machine", "workload", "run")


def test_a_damaged_student_is_refused_and_never_written_anew(taught: Any, tmp_path: Path) -> None:
    start, _ = taught
    with fakes_known():
        before = write_bundle(tmp_path / "old", students=start.students)
        victim = before.students[front_key((CUT, FIRST))]
        victim.write_bytes(victim.read_bytes()[:-1] + b"?")
        with pytest.raises(BundleError, match="hash"):
            Bundle.open(before.path)
        kept = students_of(ladder_of(CUT, FIRST, CUT_MORE, SECOND), tmp_path / "nowhere", before, None)
        assert set(kept) == {front_key((CUT, FIRST, CUT_MORE, SECOND))}


def test_a_bundle_from_before_there_were_students_is_read(tmp_path: Path) -> None:
    with fakes_known():
        path = write_bundle(tmp_path / "old").path
        data = json.loads((path / "manifest.json").read_text())
        del data["students"]
        data["seal"] = manifest.seal(data)
        (path / "manifest.json").write_text(json.dumps(data))
        opened = Bundle.open(path)
        assert opened.students == {}
        assert HeadStart.of(opened) is None


# --- in a refresh -----------------------------------------------------------------------------------------------


def test_a_refresh_gives_one_lesson_more_where_it_can_go_on_and_shorter_ones_where_not(taught: Any) -> None:
    start, _ = taught
    healed = Recipe((CUT, FIRST, CUT_MORE, replace(SECOND, quantized=True)), Eager())
    steps = (CUT, FIRST, CUT_MORE, SECOND)
    plans = list(_plans([Recipe(steps, Eager()), healed, Recipe((CUT,), Eager())], start, Budget(40)))
    longer, shorter = plans[0].ways
    assert longer.steps == (*steps, replace(SECOND, seconds=10, learning_rate=3e-4))
    assert shorter.steps == (CUT, replace(FIRST, seconds=5), CUT_MORE, replace(SECOND, seconds=5))
    assert plans[0].given == {front_key(steps[:2]), front_key(steps)}
    assert [len(plan.ways) for plan in plans[1:]] == [1, 1]  # of the one there is no student, the other had no lesson
    (alone,) = next(iter(_plans([Recipe(steps, Eager())], None, Budget(40)))).ways
    assert alone == shorter


def test_the_members_of_a_cascade_are_taught_alike(taught: Any) -> None:
    start, _ = taught
    fast, better = Recipe((CUT, FIRST, ExportOnnx()), Onnxruntime()), Recipe((ExportOnnx(),), Onnxruntime())
    joined = Recipe((), Cascade().with_members((fast, better)))
    (plan,) = _plans([joined], start, Budget(40))
    assert plan.ways[0].backend.members[0].steps == (CUT, FIRST, Distil(seconds=10, learning_rate=3e-4), ExportOnnx())
    assert plan.ways[0].backend.members[1] == better


# --- in the workshop --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_recipe_goes_on_from_the_old_student(load: Workload, taught: Any, tmp_path: Path) -> None:
    start, _ = taught
    for name in ("calibrate", "select", "train"):
        samples = getattr(load, name)
        assert isinstance(samples, Samples)
        save_samples(samples, tmp_path / "work" / "data" / name)
    steps = (CUT, FIRST, CUT_MORE, SECOND, Distil(seconds=1))
    work = tmp_path / "work"
    workshop = Workshop(load, Machine.look(), work / "steps", work / "data", None, start)
    try:
        built = workshop.build(Recipe(steps, Eager()), tmp_path / "rung", 300.0)
        assert sum(line.startswith("distil: as the lesson") for line in built.log) == 2
        assert sum(line.startswith("distil: curve 0:") for line in built.log) == 1  # one lesson was given, no more
        assert [f.name for f in (work / "lessons").iterdir() if f.name != "teacher"] == [front_key(steps)]
        workshop.close()
        start.students[front_key(steps[:2])].write_bytes(b"nothing of the kind")
        with pytest.raises(RefusalError) as refused:
            workshop.build(Recipe(steps, Eager()), tmp_path / "other", 300.0)
        assert refused.value.reason is Reason.DAMAGED
        assert refused.value.step is not None
    finally:
        workshop.close()
