"""The clock: seconds of each call in a block, and what else the computer did meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from accelerando.interval import Floats
from accelerando.recipe import Runner
from accelerando.signature import Array

MOST_CALLS = 20_000
WARM_NANOSECONDS = 5_000_000  # the other arm's idle threads have stopped spinning by then
LONG_CALL = 2  # blocks: a call this long needs no company, and no warming up that would be seen in it
MIX_REPEATS = 3


def settle_on(core: int) -> None:
    """Move this thread to a core, counted round and round; from there it may go where the system sends it.

    A process that happened to be put on a core that others use is slow for as long as it sits there, which may be
    longer than a duel: it would lose against itself.
    """
    if hasattr(os, "sched_setaffinity"):
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {sorted(allowed)[core % len(allowed)]})
        os.sched_setaffinity(0, allowed)


def time_block(run: Runner, batches: Sequence[Sequence[Array]], seconds: float, least: int = 2) -> Floats:
    """Seconds of each call in a block of about `seconds`, after at least one call and 5 ms to warm up.

    The batches are taken in order, over and over: both arms of a duel see the same ones.  A call that takes as long
    as two blocks is a block by itself, without a warm-up, which would only make slow models slower to measure.
    """
    now = time.perf_counter_ns
    start = now()
    run(batches[-1])
    if (first := now() - start) >= LONG_CALL * seconds * 1e9:
        return np.array([first / 1e9])
    _warm_up(run, batches[-1])
    taken: list[int] = []
    end, i, count = now() + int(seconds * 1e9), 0, len(batches)
    while len(taken) < MOST_CALLS:
        batch = batches[i % count]
        start = now()
        run(batch)
        stop = now()
        taken.append(stop - start)
        i += 1
        if stop >= end and i >= least:
            break
    return np.array(taken, dtype=np.float64) / 1e9


def time_mix(run: Runner, batches: Sequence[Sequence[Array]]) -> Floats:
    """Seconds of each call to a model whose time depends on what its inputs hold: `mix_seconds` is the block's figure.

    All batches in order, then all of them again: a call finds the caches as the call before it, on another batch, has
    left them, as it would at its owner's.
    """
    now = time.perf_counter_ns
    _warm_up(run, batches[-1])
    taken: list[int] = []
    for _ in range(MIX_REPEATS):
        for batch in batches:
            start = now()
            run(batch)
            taken.append(now() - start)
    return np.array(taken, dtype=np.float64) / 1e9


def mix_seconds(block: Floats) -> float:
    """Seconds per call over the mix of inputs of a block by `time_mix`.

    A median over calls would not see a path that fewer than half of them take; a mean would count every time that
    somebody else had the processor.  Others' load only ever adds, and only an input's own work comes back each time:
    so it is the mean over batches of each one's quickest call, times what a usual call takes over the quickest one.
    """
    calls = block.reshape(MIX_REPEATS, -1)
    quickest = calls.min(axis=0)
    usual = np.median(np.median(calls, axis=0) / quickest)
    return float(quickest.mean() * usual)


def _warm_up(run: Runner, batch: Sequence[Array]) -> None:
    end = time.perf_counter_ns() + WARM_NANOSECONDS
    run(batch)
    while time.perf_counter_ns() < end:
        run(batch)


@dataclass(frozen=True)
class Activity:
    """Processor time so far, in seconds: of the whole machine, of some processes, and the wall clock."""

    busy: float
    ours: float
    wall: float

    @classmethod
    def now(cls, pids: Sequence[int]) -> Activity:
        """Read the counters; zeros where the system has none."""
        tick = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
        try:
            user, nice, system, _idle, _wait, irq, soft, steal = (
                int(v) for v in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
            )
            busy = (user + nice + system + irq + soft + steal) / tick
        except (OSError, ValueError):
            return cls(0.0, 0.0, time.monotonic())
        return cls(busy, sum(_processor_seconds(pid, tick) for pid in (os.getpid(), *pids)), time.monotonic())

    def stolen_until(self, later: Activity, cores: int) -> float:
        """The share of the cores' time that neither these processes nor idleness had in between."""
        wall = (later.wall - self.wall) * cores
        others = (later.busy - self.busy) - (later.ours - self.ours)
        return min(1.0, max(0.0, others / wall)) if wall > 0 else 0.0


def _processor_seconds(pid: int, tick: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / tick
