"""A small original, and what it can be cut to and taught with: what tests of the trainer share."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accelerando.adoption import adopt
from accelerando.train.course import Course
from accelerando.train.trainer import Taught, teach
from accelerando.train.watch import Watch
from accelerando.workload import Lessons, Model

BRIEF = Course(seconds=6, learning_rate=0.01)


class Clock:
    """A clock that goes on by as much whenever it is read: however busy the machine, a lesson has the same steps."""

    def __init__(self, tick: float = 0.005) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


@dataclass(frozen=True)
class Case:
    """An original, and what it can be cut to and taught with."""

    model: Model
    lessons: Lessons

    def cut(self, keep: int = 24) -> nn.Module:
        """A copy with the first units of its hidden layer alone: poor, but not random."""
        module = copy.deepcopy(self.model.content)
        first, last = module[0], module[-1]
        small = nn.Linear(first.in_features, keep), nn.Linear(keep, last.out_features)
        with torch.no_grad():
            small[0].weight.copy_(first.weight[:keep])
            small[0].bias.copy_(first.bias[:keep])
            small[1].weight.copy_(last.weight[:, :keep])
            small[1].bias.copy_(last.bias)
        return nn.Sequential(small[0], nn.ReLU(), small[1]).eval().requires_grad_(False)

    def taught(self, module: nn.Module, course: Course = BRIEF, **other: Any) -> Taught:
        return teach(module, self.model.signature, replace(self.lessons, **other), course, Clock())

    def value(self, module: nn.Module) -> float:
        """The metric on all watch rows."""
        return Watch(self.lessons.watch, self.lessons.metric, self.model.signature, None, 1).look(module)


def trained(module: nn.Module, x: Any, y: Any, loss: Any) -> nn.Module:
    torch.manual_seed(0)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    optimizer = torch.optim.Adam(module.parameters(), 0.003)
    for _ in range(10):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            loss(module(x[rows]), y[rows]).backward()
            optimizer.step()
    return module.eval()


def case_of(net: nn.Module, data: Any, train: Any, folder: Path, **settings: Any) -> Case:
    load = adopt(net, data, train=train, **settings)
    assert load.train is not None
    lessons = Lessons(
        load.model.content, load.train, load.select, load.metric, load.loss, load.augment, folder / "lessons" / "a",
        lambda text: None,
    )  # fmt: skip
    return Case(load.model, lessons)
