"""What a user of torch-pruning gets: half of every layer's channels cut as its README does, then one epoch."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.training import Course, Rows, learned

COURSE = Course(epochs=1, batch=64)


class ProjectedBlock(nn.Module):
    """A ResNet block whose shortcut is a convolution, made from one (`stride`, `extra`) that pads with zeros instead.

    It answers the same.  Channels that padding makes come from no layer, and torch-pruning can't cut them.
    """

    def __init__(self, block: Any):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = block.conv1, block.bn1, block.conv2, block.bn2
        inside, outside = block.conv1.in_channels, block.conv2.out_channels
        self.project = nn.Conv2d(inside, outside, 1, block.stride, bias=False)
        with torch.no_grad():
            self.project.weight.zero_()
            for channel in range(inside):
                self.project.weight[channel + block.extra // 2, channel] = 1

    def forward(self, x: Any) -> Any:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.project(x))


def projected(model: Any) -> Any:
    """A copy of a ResNet with zero-padded shortcuts, with convolutions in their place."""
    model = copy.deepcopy(model)
    for name, block in list(model.named_modules()):
        if getattr(block, "extra", 0):
            parent, _, place = name.rpartition(".")
            setattr(model.get_submodule(parent), place, ProjectedBlock(block))
    return model


def halved(model: Any, example: Any) -> Any:
    """The model without half of the channels of every layer but the last, by the magnitude of coupled weights."""
    import torch_pruning as tp

    model = projected(model).requires_grad_(True)
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    settings = {"pruning_ratio": 0.5, "ignored_layers": [last], "round_to": 8}
    tp.pruner.MagnitudePruner(model, example, importance=importance, **settings).step()
    return model


def pruned(model: Any, train: Rows) -> Any:
    """The halved model after one epoch on the training labels, in eval mode."""
    smaller = halved(model, torch.from_numpy(train[0][:1]))
    return learned("resnet-pruned", smaller, train, COURSE, F.cross_entropy).requires_grad_(False)
