"""Training of the benchmarks' own models: one plain loop, and a folder where what was learned is kept."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.metric import named, source_of

Rows = tuple[np.ndarray, np.ndarray]
Augment = Callable[[tuple[Any, ...]], tuple[Any, ...]]


@dataclass(frozen=True)
class Course:
    """How a module is taught: AdamW under a one-cycle schedule.

    Args:
        epochs: times that every row is seen.
        rate: the learning rate at the schedule's peak.
        decay: AdamW's weight decay.
    """

    epochs: int
    batch: int = 32
    rate: float = 2e-3
    decay: float = 0.05
    seed: int = 0


def weights_folder() -> Path:
    """Where trained weights are kept: ACCELERANDO_BENCH_FOLDER, or a folder in the user's cache directory."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("ACCELERANDO_BENCH_FOLDER") or cache / "accelerando-benchmarks")


def learned(
    name: str,
    module: Any,
    rows: Rows,
    course: Course,
    loss: Callable[[Any, Any], Any],
    augment: Augment | None = None,
) -> Any:
    """The module, taught in place and in eval mode; where it was taught the same before, from the kept weights.

    Args:
        name: of the file with the weights; what they depend on (the weights before, rows, course, loss, augmentation)
            is in its name too, as a hash.
        rows: inputs (n, ...) and targets (n, ...).
        loss: a function, (answer, targets) -> a scalar tensor.
        augment: a tuple of input tensors to another, drawing from torch's own generator.
    """
    from safetensors.torch import load_file, save_file

    path = weights_folder() / f"{name}-{_digest(module, rows, course, loss, augment)}.safetensors"
    if path.is_file():
        module.load_state_dict(load_file(path))
    else:
        _teach(name, module, rows, course, loss, augment)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, draft)
        draft.replace(path)  # at once: a benchmark that runs beside this one never sees half a file
    return module.eval()


def _digest(module: Any, rows: Rows, course: Course, loss: Any, augment: Any) -> str:
    digest = hashlib.sha256(f"{course}{source_of(loss)}{source_of(augment) if augment else ''}".encode())
    for array in (*(t.numpy() for t in module.state_dict().values()), *rows):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:12]


def _teach(name: str, module: Any, rows: Rows, course: Course, loss: Any, augment: Augment | None) -> None:
    import torch

    inputs, targets = (torch.from_numpy(a) for a in rows)
    steps = -(-len(inputs) // course.batch)
    optimizer = torch.optim.AdamW(module.parameters(), course.rate, weight_decay=course.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, course.rate, steps * course.epochs)
    module.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(course.seed)
        for epoch in range(course.epochs):
            start, total = time.monotonic(), 0.0
            for picked in torch.randperm(len(inputs)).split(course.batch):
                given = (inputs[picked],)
                answer = module(*(augment(given) if augment else given))
                cost = loss(answer, targets[picked])
                optimizer.zero_grad()
                cost.backward()
                torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                total += float(cost.detach()) * len(picked)
            seconds = time.monotonic() - start
            print(f"{name}: epoch {epoch + 1} of {course.epochs}, loss {total / len(inputs):.4f}, {seconds:.0f} s")


def score(module: Any, rows: Rows, metric: str) -> float:
    """The metric's value on all rows."""
    import torch

    judge, found = named(metric), []
    with torch.inference_mode():
        for start in range(0, len(rows[0]), 256):
            part = slice(start, start + 256)
            found.append(judge.scores(module(torch.from_numpy(rows[0][part])), rows[1][part]))
    return float(judge.value(np.concatenate(found).mean(axis=0)))
