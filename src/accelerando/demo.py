"""The demo: a small convolutional network on scikit-learn's digits, trained in seconds, then accelerated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerando.pipeline import accelerate
from accelerando.result import Result

GOAL = "speedup >= 4, drop <= 1%"
ORIGIN = "accelerando.demo:trained"
TEST_ROWS = 900
EPOCHS = 12


def digits() -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """(train, test): inputs (n, 1, 8, 8) float32 in 0..1, labels (n,) int64."""
    import numpy as np
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = (images.reshape(-1, 1, 8, 8) / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(x))
    test, train = order[:TEST_ROWS], order[TEST_ROWS:]
    return (x[train], labels[train].astype(np.int64)), (x[test], labels[test].astype(np.int64))


def build() -> Any:
    """The network, untrained: (n, 1, 8, 8) float32 -> (n, 10) logits."""
    from torch import nn

    def block(inside: int, outside: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]

    layers = [*block(1, 32), *block(32, 32), *block(32, 64, 2), *block(64, 64), *block(64, 128, 2), *block(128, 128)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def train(data: tuple[Any, Any], epochs: int = EPOCHS) -> Any:
    """The network, trained for a few epochs; the same weights every time on one machine."""
    import torch

    torch.manual_seed(0)
    model = build()
    x, y = torch.from_numpy(data[0]), torch.from_numpy(data[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    steps = epochs * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(x)), 64):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


def run_demo(into: Path, budget: str, say: Callable[[str], None]) -> Result:
    """Train, then accelerate under `GOAL`."""
    say("training a small convolutional network on scikit-learn's digits ...")
    train_rows, test_rows = digits()
    model = train(train_rows)
    say(f"accelerating it: {GOAL}, within {budget}")
    return accelerate(
        model, test_rows, GOAL, train=train_rows, metric="accuracy", budget=budget, into=into,
        origin=ORIGIN,
    )  # fmt: skip


def trained() -> Any:
    """The demo's original again, as `accelerando bench` asks for it."""
    return train(digits()[0])
