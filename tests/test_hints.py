"""Hidden states as a lesson: which blocks correspond, and that a student comes nearer to its teacher in them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from taught import BRIEF, Case, case_of, trained
from torch import nn

from accelerando.errors import Reason, RefusalError
from accelerando.train.hints import Hints


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class Chain(nn.Module):
    """(n, 8) -> (n, 2), by way of residual blocks in a list."""

    def __init__(self, blocks: int = 4, width: int = 16) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def call(module: Any, inputs: Any) -> Any:
    return module(*inputs)


def hints(student: nn.Module, teacher: nn.Module) -> Hints:
    return Hints(student.eval(), teacher.eval(), call, [torch.randn(5, 8)])


@pytest.mark.parametrize(
    ("count", "pairs"),
    [(4, {"0": "0", "1": "1", "2": "2", "3": "3"}), (2, {"0": "1", "1": "3"}), (3, {"0": "0", "1": "1", "2": "3"}),
     (1, {"0": "3"})],
)  # fmt: skip
def test_the_last_block_corresponds_to_the_last(count: int, pairs: dict[str, str]) -> None:
    found = hints(Chain(count), Chain(4))._pairs
    assert found == {f"blocks.{mine}": f"blocks.{other}" for mine, other in pairs.items()}


def test_a_block_that_was_stood_in_for_corresponds_to_none() -> None:
    student = Chain(4)
    student.blocks[1] = nn.Identity()
    assert list(hints(student, Chain(4))._pairs.values()) == ["blocks.0", "blocks.2", "blocks.3"]


@pytest.mark.parametrize("student", [Chain(4, width=8), nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))])
def test_where_every_width_was_cut_there_is_nothing_to_compare(student: nn.Module) -> None:
    with pytest.raises(RefusalError) as refused:
        hints(student, Chain(4))
    assert refused.value.reason is Reason.NOTHING_TO_DO
    assert "features=0" in refused.value.detail


def test_the_same_model_is_no_distance_away_and_scale_does_not_count() -> None:
    teacher = Chain(2)
    compared, inputs = hints(copy.deepcopy(teacher), teacher), [torch.randn(5, 8)]
    with torch.no_grad(), compared.listening() as heard:
        call(compared._student, inputs)
    assert float(compared.distance(heard, inputs)) == pytest.approx(0)
    larger = {name: 3 * state for name, state in heard.items()}
    assert float(compared.distance(larger, inputs)) == pytest.approx(0, abs=1e-4)
    other = {name: torch.randn_like(state) for name, state in heard.items()}
    assert float(compared.distance(other, inputs)) > 0.1
    assert not any(m._forward_hooks for m in (*teacher.modules(), *compared._student.modules()))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    x = np.random.default_rng(0).standard_normal((900, 8)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(np.int64)
    torch.manual_seed(0)
    net = trained(Chain(4), x[:600], y[:600], nn.functional.cross_entropy)
    return case_of(net, (x[600:], y[600:]), (x[:600], y[:600]), tmp_path_factory.mktemp("chain"))


def shortened(teacher: nn.Module) -> nn.Module:
    student = copy.deepcopy(teacher)
    student.blocks = nn.ModuleList([student.blocks[0], student.blocks[3]])
    return student


def apart(student: nn.Module, teacher: nn.Module, case: Case) -> float:
    inputs = [torch.from_numpy(np.array(x)) for x in case.lessons.watch.chunks[0].inputs]
    compared = Hints(student, teacher, call, inputs)
    with torch.no_grad(), compared.listening() as heard:
        call(student, inputs)
        return float(compared.distance(heard, inputs))


def test_a_student_that_is_taught_them_is_nearer_in_them(case: Case, tmp_path: Path) -> None:
    teacher = case.model.content
    plain, hinted = (
        case.taught(shortened(teacher), replace(BRIEF, features=weight), folder=tmp_path / str(weight) / "x").module
        for weight in (0.0, 1.0)
    )
    assert apart(hinted, teacher, case) < 0.8 * apart(plain, teacher, case)
    assert case.value(hinted) >= case.value(shortened(teacher))
    assert not any(m._forward_hooks for m in hinted.modules())


def test_a_weight_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="features"):
        replace(BRIEF, features=-1.0)
