"""How a step is done fastest here: threads, number format, batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

BATCHES = (256, 128, 64, 32, 16)
TRIAL_BATCH = 64
LEAST_EPOCH = 20  # steps of an epoch, else the batch is too large for the data
LEAST_STEPS = 250  # of the whole budget, else the batch is too large for the time
TRIALS = 0.1  # of the budget
PAYS = 0.95  # of the time of the usual way: what is less clear is noise


@dataclass(frozen=True)
class Pace:
    """How steps are done: with so many threads, in bfloat16 where its products are native, rows of a batch."""

    threads: int = 1
    bf16: bool = False
    batch: int = TRIAL_BATCH


def find_pace(seconds_of: Callable[[Pace], float], rows: int, budget: float, bf16: bool) -> Pace:
    """The fastest way, by trying.

    A single thread is the first, for it is never far off: threads that wait for each other on a busy machine are.

    Args:
        seconds_of: makes a step at a pace -> what it took.
        rows: in an epoch.
        budget: seconds of the whole training, of which trials take a tenth at most, if steps are not very long.
        bf16: whether that is worth a trial.
    """
    best = Pace(batch=max(1, min(TRIAL_BATCH, rows)))
    spent = seconds_of(best)  # the first step prepares what later ones reuse
    took = seconds_of(best)
    for change in ("threads", "bf16"):
        other = replace(best, threads=_cores()) if change == "threads" else replace(best, bf16=bf16)
        if other == best:
            continue
        if spent + 5 * took > TRIALS * budget:
            break
        trials = [seconds_of(other) for _ in range(3)][1:]
        took = min(took, seconds_of(best))
        spent += sum(trials) + 3 * took
        if min(trials) < PAYS * took:
            best, took = other, min(trials)
    each = took / best.batch
    for batch in BATCHES:
        if rows >= LEAST_EPOCH * batch and budget >= LEAST_STEPS * batch * each:
            return replace(best, batch=batch)
    return replace(best, batch=max(1, min(BATCHES[-1], rows)))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def threads_kept() -> Iterator[None]:
    """Torch has as many threads afterwards as before."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
