"""Rows to learn from: drawn at random in batches of one shape, and shifted a little where they are images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from accelerando.signature import Array
from accelerando.workload import Samples

SHIFT = 0.1  # of an image's height and width, at most
MOST_CHANNELS = 4  # of what looks like an image


@dataclass(frozen=True)
class Batch:
    """Rows of one chunk: which ones, their flat inputs as tensors, and their targets, if any, as a tensor."""

    chunk: int
    rows: Array
    inputs: tuple[Any, ...]
    targets: Any

    def __len__(self) -> int:
        return len(self.rows)


class Rows:
    """An endless stream of batches: every row once, then every row once again, in another order.

    `batch` may be changed on the way.
    """

    def __init__(self, samples: Samples, batch: int, seed: int) -> None:
        self.samples, self.batch = samples, batch
        self._rng = np.random.default_rng(seed)
        self._drawn: Iterator[tuple[int, Array]] = iter(())

    def draw(self) -> Batch:
        """The next batch, as copies."""
        drawn = next(self._drawn, None)
        if drawn is None or len(drawn[1]) > self.batch:
            self._drawn = iter(self._order())
            drawn = next(self._drawn)
        return self.pick(*drawn)

    def pick(self, number: int, rows: Array) -> Batch:
        """These rows of a chunk."""
        import torch

        chunk = self.samples.chunks[number]
        inputs = tuple(torch.from_numpy(np.array(x[rows])) for x in chunk.inputs)
        targets = None if chunk.targets is None else torch.from_numpy(np.array(chunk.targets[rows]))
        return Batch(number, rows, inputs, targets)

    def _order(self) -> list[tuple[int, Array]]:
        """An epoch: (chunk, rows), each of at most `batch` rows and nearly as long as the others of its chunk."""
        batches: list[tuple[int, Array]] = []
        for number, chunk in enumerate(self.samples.chunks):
            order = self._rng.permutation(len(chunk))
            if len(order) == 1:
                order = np.repeat(order, 2)  # batch norm can't learn from a single row
            parts = np.array_split(order, math.ceil(len(order) / self.batch))
            batches += [(number, np.sort(part)) for part in parts]
        return [batches[i] for i in self._rng.permutation(len(batches))]


def shifted(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Flat inputs of which the images are shifted, each row by another few pixels; edges are repeated.

    Never flipped, nor turned: digits and letters would become others.
    """
    return tuple(_shifted(x) if looks_like_image(x) else x for x in inputs)


def looks_like_image(x: Any) -> bool:
    """Whether a tensor may be (n, channels, height, width) of images."""
    return x.dim() == 4 and x.shape[1] <= MOST_CHANNELS and min(x.shape[2:]) * SHIFT >= 1


def _shifted(x: Any) -> Any:
    import torch

    n, height, width = x.shape[0], x.shape[2], x.shape[3]
    places = []
    for size in (height, width):
        most = int(size * SHIFT)
        by = torch.randint(-most, most + 1, (n, 1))
        places.append((torch.arange(size) + by).clamp(0, size - 1))
    row = torch.arange(n)[:, None, None]
    return x.permute(0, 2, 3, 1)[row, places[0][:, :, None], places[1][:, None, :]].permute(0, 3, 1, 2)
