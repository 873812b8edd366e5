"""SST-2: sentences of film reviews, good or bad, and a small transformer of our own with its own words.

There are no pretrained weights: words that occur at least twice in the 6,920 training sentences are the vocabulary.  As
nothing is chosen by them, the 872 and 1,821 sentences of both other files are judged together.  Certify gets 60 % of
them, 1,616; with this accuracy about 13 more errors are 1 %, so a drop of at most 1 % is certified where fewer than
about 20 answers turn in either direction, or where more turn right than wrong.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.training import Course, Rows, learned
from benchmarks.transformer import Block

LENGTH = 64  # the longest sentence has 53 words
PADDING, UNKNOWN = 0, 1
COURSE = Course(epochs=7, rate=1e-3, decay=0.1)
MASKED = -30.0  # exp(-30) is nothing in float32, and a range that int8 can still hold


class Reader(nn.Module):
    """Word numbers (n, 64) int64, 0 where the sentence has ended -> (n, 2) logits: the mean over words decides."""

    def __init__(self, words: int, width: int = 128, depth: int = 4, heads: int = 4, hidden: int = 256):
        super().__init__()
        self.words = nn.Embedding(words, width, padding_idx=PADDING)
        nn.init.normal_(self.words.weight, std=0.1)  # what rare words learn in a few steps must weigh more than this
        self.places = nn.Parameter(0.02 * torch.randn(1, LENGTH, width))
        self.drop = nn.Dropout(0.3)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, dropout=0.2) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, ids: Any) -> Any:
        real = (ids != PADDING).to(self.places.dtype)
        x = self.drop(self.words(ids) + self.places[:, : ids.shape[1]])
        for block in self.blocks:
            x = block(x, (1 - real) * MASKED)
        total = (self.norm(x) * real[:, :, None]).sum(1)
        return self.head(self.drop(total / real.sum(1, keepdim=True).clamp(min=1)))


def sentences(path: Path) -> tuple[list[list[str]], np.ndarray]:
    """The words of every line, and its label."""
    lines = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    return [text.split() for text, _ in lines], np.array([int(label) for _, label in lines])


def vocabulary(texts: list[list[str]]) -> dict[str, int]:
    """Numbers from 2 on for the words that occur at least twice, the most frequent first."""
    counts = Counter(word for text in texts for word in text)
    kept = sorted((word for word, count in counts.items() if count > 1), key=lambda word: (-counts[word], word))
    return {word: number for number, word in enumerate(kept, UNKNOWN + 1)}


def encoded(texts: list[list[str]], numbers: dict[str, int]) -> np.ndarray:
    """(n, 64) int64: the numbers of each sentence's first 64 words, then zeros."""
    ids = np.full((len(texts), LENGTH), PADDING, np.int64)
    for row, text in zip(ids, texts, strict=True):
        known = [numbers.get(word, UNKNOWN) for word in text[:LENGTH]]
        row[: len(known)] = known
    return ids


def forget(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """One word in ten becomes unknown."""
    (ids,) = given
    lost = (torch.rand(ids.shape) < 0.1) & (ids != PADDING)
    return (ids.masked_fill(lost, UNKNOWN),)


def _forget_and_cut(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same, without the columns in which every sentence has ended: they teach nothing and cost time."""
    (ids,) = forget(given)
    return (ids[:, : int((ids != PADDING).sum(1).max())],)


def rows(data: Path) -> tuple[Rows, Rows]:
    """Word numbers (n, 64) with labels (n,): those to learn from, and those that are judged."""
    splits = {name: sentences(data / "sst2" / f"{name}.tsv") for name in ("train", "dev", "test")}
    numbers = vocabulary(splits["train"][0])
    ready = {name: (encoded(texts, numbers), labels) for name, (texts, labels) in splits.items()}
    ids, labels = (np.concatenate(pair) for pair in zip(ready["dev"], ready["test"], strict=True))
    return ready["train"], (ids, labels)


def trained(train: Rows, course: Course = COURSE) -> nn.Module:
    """The transformer, taught on these rows."""
    torch.manual_seed(0)
    words = int(train[0].max()) + 1  # numbers go by frequency among these rows, so they hold the last one
    return learned("sst2", Reader(words), train, course, smoothed, _forget_and_cut)


def smoothed(answer: Any, targets: Any) -> Any:
    return F.cross_entropy(answer, targets, label_smoothing=0.1)


METRIC, TEACHING = "accuracy", {"augment": forget, "loss": smoothed}
