"""What the owner gives for retraining is tried before any work starts, and refused in the owner's words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from accelerando.adoption import adopt
from accelerando.errors import DataError, UsageError
from accelerando.workload import Workload

CLASSES, ROWS = 5, 60


class Named(nn.Module):
    """Answers with a dict, as models of libraries do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.inner(x)}


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, CLASSES)).eval().requires_grad_(False)


def rows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((ROWS, 16)).astype(np.float32), rng.integers(0, CLASSES, ROWS)


def taken_in(net: nn.Module, labels: Any, metric: Any = "accuracy", **other: Any) -> Workload:
    x, y = rows()
    return adopt(net, (x, y), train=(x, labels), metric=metric, **other)


def labels_of(load: Workload) -> np.ndarray:
    assert load.train is not None
    found = load.train.targets
    assert found is not None
    return found


# --- labels -----------------------------------------------------------------------------------------------------


def test_a_label_that_the_model_has_no_class_for_is_named_wherever_it_is(net: nn.Module) -> None:
    for place in range(0, ROWS, 7):
        labels = rows()[1]
        labels[place] = 103
        for metric in ("accuracy", "top-5", "cross-entropy", lambda outputs, targets: outputs.argmax(1) == targets):
            outputs = nn.Sequential(net, nn.Linear(CLASSES, 7)) if metric == "top-5" else net
            with pytest.raises(DataError, match=r"train: .*class 103, but .* (5|7), counted from 0.*loss="):
                taken_in(outputs, labels, metric)


def test_class_numbers_that_are_floats_become_whole(net: nn.Module) -> None:
    labels = rows()[1]
    for kind in (np.float32, np.float64, np.uint16):
        found = labels_of(taken_in(net, labels.astype(kind)))
        assert found.dtype == np.int64
        assert (found == labels).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: np.eye(CLASSES, dtype=np.float32)[y], r"one-hot labels, targets\.argmax\(1\)"),
        (lambda y: y + 0.5, "must be whole numbers"),
        (lambda y: np.stack([y, y], 1), "give class numbers"),
    ],
)
def test_labels_of_another_kind_are_refused(net: nn.Module, change: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(DataError, match=f"train: .*{words}"):
        taken_in(net, change(rows()[1]))


def test_labels_that_lessons_take_are_left_as_they_are(net: nn.Module) -> None:
    x, y = rows()
    y[::3] = -100  # not to be learned
    assert (labels_of(taken_in(net, y)) == y).all()
    assert (labels_of(taken_in(net, y[:, None])) == y[:, None]).all()
    numbers = y.astype(np.float32)
    assert labels_of(taken_in(net, numbers, loss=lambda answer, t: (answer[:, 0] - t).abs().mean())).dtype == np.float32
    assert labels_of(taken_in(net, y + 1000, "agreement")).max() > 1000  # they are not used
    assert taken_in(net, None).train.targets is None  # type: ignore[union-attr]
    wanted = np.tile(x[:, :1], (1, CLASSES))
    assert adopt(net, (x, wanted), train=(x, wanted), metric="mae").train is not None


# --- the loss and the augmentation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"loss": lambda answer, targets: 1 / 0}, r"loss= failed: ZeroDivisionError.*answer float32\(\d, 5\)"),
        ({"loss": lambda answer: answer.sum()}, "loss= failed: TypeError.*must give a scalar"),
        ({"loss": lambda answer, targets: answer}, "must give a scalar tensor"),
        ({"loss": lambda answer, targets: 1.0}, "loss= gave a float, but must give a scalar tensor"),
        ({"loss": lambda answer, targets: answer.sum() * math.nan}, "loss= gave nan.*must be finite"),
        ({"loss": lambda answer, targets: torch.tensor(answer.detach().numpy().sum())}, "does not depend on the model"),
        ({"augment": lambda inputs: (inputs[0][:1],)}, "augment= was given .*, 16.* and gave .*must keep them"),
        ({"augment": lambda inputs: [1.0]}, "augment= failed: .*another"),
        ({"augment": lambda x, y: x}, "augment= failed: TypeError.*must take a tuple"),
    ],
)
def test_what_can_not_teach_is_refused_at_once(net: nn.Module, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        taken_in(net, rows()[1], **given)


def test_what_is_tried_leaves_no_trace(net: nn.Module) -> None:
    """The loss is given the model's own structure, gradients included; random numbers are not missing afterwards."""
    asked: list[Any] = []

    def loss(answer: Any, targets: torch.Tensor) -> torch.Tensor:
        asked.append(answer["logits"].requires_grad)
        return functional.cross_entropy(answer["logits"], targets) + 0 * torch.rand(())

    def spoil(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0].mul_(0).add_(torch.rand_like(inputs[0])),)

    before = torch.random.get_rng_state()
    with torch.no_grad():
        load = taken_in(Named(net), rows()[1], loss=loss, augment=spoil)
    assert asked == [True]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert load.train is not None
    assert (load.train.chunks[0].inputs[0] == rows()[0]).all()
    assert not any(p.requires_grad for p in load.model.content.parameters())


def test_a_loss_needs_labels(net: nn.Module) -> None:
    with pytest.raises(UsageError, match="loss= compares answers with labels, and train= has none"):
        taken_in(net, None, loss=lambda answer, targets: answer.sum())
