"""Small torch models on which the contracts are checked, with weights and data by a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from accelerando.signature import Array

Given = tuple[Any, Any]  # a torch module, and data as `accelerate` takes it


def floats(*shape: int, seed: int = 0) -> Array:
    """Normal deviates, repeatable."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def image() -> Given:
    """Convolutions with batch norm; one input, one output."""
    from torch import nn, random

    with random.fork_rng(devices=()):
        random.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
        )  # fmt: skip
    return model.eval(), floats(40, 1, 8, 8)


def two_inputs() -> Given:
    """Two inputs by name, a dict of two outputs, and weights that are shared."""
    import torch
    from torch import nn

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 6)
            self.again = self.right

        def forward(self, a: Any, b: Any) -> dict[str, Any]:
            mixed = torch.relu(self.left(a)) + self.right(b)
            return {"mixed": self.again(mixed), "norm": mixed.square().sum(1)}

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Pair().eval(), {"a": floats(40, 4), "b": floats(40, 6, seed=1)}


def recurrent() -> Given:
    """An LSTM; a tuple of two outputs."""
    import torch
    from torch import nn

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: Any) -> tuple[Any, Any]:
            states, _ = self.lstm(x)
            return self.head(states[:, -1]), states

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Reader().eval(), floats(40, 7, 3)


def tokens() -> Given:
    """Whole numbers of several lengths with a mask; an answer with named fields."""
    import torch
    from torch import nn

    @dataclass
    class Answer:
        logits: Any
        state: Any

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.q, self.v = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 3)

        def forward(self, input_ids: Any, attention_mask: Any) -> Answer:
            x = self.embed(input_ids)
            weights = self.q(x) @ x.transpose(1, 2) / 4 + (1.0 - attention_mask[:, None].to(x.dtype)) * -1e4
            state = torch.softmax(weights, -1) @ self.v(x)
            return Answer(self.head(state.mean(1)), state)

    def batch(length: int) -> dict[str, Array]:
        rng = np.random.default_rng(length)
        mask = np.arange(length)[None] < rng.integers(2, length + 1, (20, 1))
        return {"input_ids": rng.integers(0, 50, (20, length)), "attention_mask": mask.astype(np.int64)}

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Attends().eval(), [batch(n) for n in (6, 9, 12)]


def writer() -> Given:
    """A model that writes into its input."""
    import torch
    from torch import nn

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Any) -> Any:
            x.mul_(0.5)
            return self.layer(x)

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Writes().eval(), floats(40, 4)


def zeros() -> Given:
    """Large linear layers whose weights are mostly zeros, on vectors and on sequences: for sparse products."""
    import torch
    from torch import nn

    class Zeros(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each, self.all = nn.Linear(512, 520), nn.Linear(520, 512)
            with torch.no_grad():
                for layer in (self.each, self.all):
                    layer.weight[torch.rand_like(layer.weight) < 0.95] = 0.0

        def forward(self, x: Any) -> Any:
            return self.all(torch.relu(self.each(x)).mean(1))

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Zeros().eval(), floats(40, 3, 512)


def network() -> Any:
    """(n, 1, 8, 8) -> (n, 5): convolutions with batch norm, and two linear layers with only dropout between them."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(144, 64), nn.Dropout(0.5), nn.Linear(64, 5),
        )  # fmt: skip
        for buffer in model[1].buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)  # else the norm would do nothing
    return model.eval()


def stubborn() -> tuple[Any, Any]:
    """A model that chooses its way by its input's values, with data for it: no exporter can follow."""
    import torch
    from torch import nn

    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            return self.one(x) if float(x.sum()) > 0 else self.other(x)

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Stubborn().eval(), floats(64, 4)


CASES: dict[str, Callable[[], Given]] = {  # which a backend must take, or refuse
    case.__name__: case for case in (image, two_inputs, recurrent, tokens, writer, zeros)
}
