"""The technique `distil`: what it says to the search, and that what it heals can be shipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from taught import Case, Clock, case_of, trained
from torch import nn

from accelerando.adoption import adopt
from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.measure.arm import save_samples
from accelerando.recipe import Recipe, Stage, plugin_from_json
from accelerando.search.workshop import Workshop
from accelerando.techniques._parity import ensure_same
from accelerando.techniques.distil import Distil
from accelerando.techniques.export_onnx import ExportOnnx
from accelerando.testing.technique_contract import answers
from accelerando.train import trainer
from accelerando.train.course import Course
from accelerando.train.fake_quantize import FakeInt8
from accelerando.train.trainer import teach
from accelerando.workload import Form, Samples

BRIEF = Distil(seconds=6, learning_rate=0.01)


class Small(nn.Module):
    """(n, 1, 8, 8) -> (n, 10), with batch norm and dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Flatten(), nn.Dropout(0.1), nn.Linear(32 * width, 10),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Case:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32).reshape(-1, 1, 8, 8), y.astype(np.int64)
    torch.manual_seed(0)
    net = trained(Small(16), x[:1200], y[:1200], nn.functional.cross_entropy)
    return case_of(net, (x[1200:], y[1200:]), (x[:1200], y[:1200]), tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lessons have the same steps however busy the machine is."""
    monkeypatch.setattr(trainer, "teach", lambda *given: teach(*given, Clock()))


def healed(case: Case, student: nn.Module, technique: Distil, folder: Path) -> Any:
    model = replace(case.model, content=student, lessons=replace(case.lessons, folder=folder / "lessons" / "x"))
    return technique.apply(model, Samples(()), folder)


@pytest.mark.slow
def test_a_healed_net_can_be_exported(images: Case, tmp_path: Path) -> None:
    torch.manual_seed(1)
    student = Small(4).eval().requires_grad_(False)
    made = healed(images, student, BRIEF, tmp_path)
    assert made.form is Form.TORCH
    assert images.value(made.content) > max(0.8, images.value(student))
    assert made.log[-1].startswith("distil: curve 0:")
    weight = made.content.body[0].weight
    assert weight.is_contiguous()
    exported = ExportOnnx().apply(made, images.lessons.watch, _folder(tmp_path))
    rows = [images.lessons.watch.chunks[0].inputs[0][:5]]
    ensure_same(made.signature, answers(made, rows), answers(exported, rows))


@pytest.mark.slow
def test_after_quantized_training_int8_loses_no_more_and_the_net_is_ordinary(images: Case, tmp_path: Path) -> None:
    torch.manual_seed(1)
    student = Small(2).eval().requires_grad_(False)
    plain = healed(images, student, BRIEF, tmp_path / "plain").content
    ready = healed(images, student, replace(BRIEF, quantized=True), tmp_path / "ready").content
    assert all("forward" not in vars(module) for module in ready.modules())
    assert ready.state_dict().keys() == plain.state_dict().keys()
    assert images.value(ready) > 0.6
    lost = [images.value(net) - _in_int8(images, net) for net in (plain, ready)]
    assert lost[1] <= lost[0] + 0.01


def _in_int8(case: Case, net: nn.Module) -> float:
    fake = FakeInt8(net)
    fake.on()
    value = case.value(net)
    fake.off()
    return value


def test_it_is_kept_within_its_time(images: Case, tmp_path: Path) -> None:
    """By a clock that only it reads: 6 s are 1,200 readings."""
    clock = Clock()
    lessons = replace(images.lessons, folder=tmp_path / "lessons" / "x")
    teach(Small(4).eval(), images.model.signature, lessons, Course(seconds=6), clock)
    assert 4.8 < clock.now < 6.3  # it may stop when four fifths are spent


def _folder(path: Path) -> Path:
    (path / "onnx").mkdir()
    return path / "onnx"


def test_without_training_data_it_refuses_by_name(images: Case, tmp_path: Path) -> None:
    machine = Machine.look()
    refusal = Distil().refuse(images.model, machine)
    assert refusal is not None
    assert refusal.reason is Reason.NO_TRAINING_DATA
    assert "train=" in refusal.detail
    with pytest.raises(RefusalError, match="train="):
        Distil().apply(images.model, Samples(()), tmp_path)
    assert Distil().refuse(replace(images.model, lessons=images.lessons), machine) is None
    assert Distil().refuse(replace(images.model, form=Form.ONNX), machine) is None


def test_it_says_how_long_it_takes() -> None:
    assert 60 < Distil().expected_seconds < 70
    assert Distil(seconds=600).expected_seconds > 600
    assert Distil.stage is Stage.HEAL


def test_knobs_that_came_later_leave_older_recipes_as_they_were() -> None:
    old = {
        "name": "distil", "seconds": 60, "labels": 0.5, "temperature": 2.0, "learning_rate": 0.0, "optimizer": "adamw",
        "quantized": False, "features": 0.0,
    }  # fmt: skip
    assert Distil().to_json() == old
    assert plugin_from_json(Distil, old) == Distil()
    turned = Distil(weight_decay=0.0, smoothing=0.1)
    assert turned.to_json() == {**old, "weight_decay": 0.0, "smoothing": 0.1}
    assert plugin_from_json(Distil, turned.to_json()) == turned
    assert str(turned) == "distil(weight_decay=0.0, smoothing=0.1)"


def test_knobs_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="seconds"):
        Distil(seconds=0)
    with pytest.raises(ValueError, match="optimizer"):
        Distil(optimizer="lion")


class Wide(nn.Module):
    """(n, 1, 64, 64) -> (n, 5); each row takes some 10 MB to learn from."""

    def __init__(self) -> None:
        super().__init__()
        layers = [layer for i in range(4) for layer in (nn.Conv2d(64 if i else 1, 64, 1), nn.Tanh())]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


@pytest.mark.slow
def test_in_a_workshop_with_little_memory_it_learns_from_fewer_rows_or_refuses(tmp_path: Path) -> None:
    """In a real child: of 64 rows, with which its trials begin, a step takes more than the limit."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((150, 1, 64, 64)).astype(np.float32), rng.integers(0, 5, 150)
    load = adopt(Wide(), (x[:50], y[:50]), train=(x[50:], y[50:]), metric="accuracy")
    for name in ("calibrate", "select", "train"):
        save_samples(getattr(load, name), tmp_path / "data" / name)

    def built(megabytes: int) -> str:
        folder = tmp_path / str(megabytes)
        shop = Workshop(load, Machine.look(), folder / "steps", tmp_path / "data", megabytes * 2**20)
        recipe = Recipe((Distil(seconds=6, learning_rate=1e-3), ExportOnnx()), Onnxruntime())
        try:
            return shop.build(recipe, folder / "built", timeout=120).log[0]
        finally:
            shop.close()

    batch = int(built(620).partition(", batch ")[2].partition(",")[0])
    assert 1 <= batch <= 16
    with pytest.raises(RefusalError, match=r"1 row does not fit|what a lesson keeps does not fit") as refused:
        built(256)
    assert (refused.value.reason, refused.value.step) == (Reason.OUT_OF_MEMORY, 0)
