"""Rungs in the memory of the process that computes for a server: all together, and coming and going under a cap."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

import numpy as np

from accelerando.backends.cascade import Cascade
from accelerando.bundle import Bundle
from accelerando.errors import BundleError
from accelerando.ladder import Ladder, Rung
from accelerando.memory import resident_bytes
from accelerando.recipe import Recipe
from accelerando.serve.governed import GovernedModel, govern
from accelerando.serve.isolation import Apart
from accelerando.serve.residents import Residents
from accelerando.workload import Form, Model
from benchmarks.figures import Figure, Found, fewer
from benchmarks.ladders import Ground

SWITCHES, WARM = 200, 12
CROWD = 64  # rows of a request: as many as a batch holds
CALLS = 3  # ONNX Runtime lays out a call's memory by what the first of its shape took
TOGETHER, WITH_CASCADE, GROWTH = 1.4, 1.1, 0.02


def held(ground: Ground) -> Found:
    """What all rungs hold, and what they hold at most where not all may."""
    bundle = Bundle.open(ground.path)
    portable = [i for i, rung in enumerate(bundle.ladder) if rung.recipe.backend.portable]
    rows = ground.x[:CROWD]
    alone = {number: resident(bundle, (number,), rows) for number in portable}
    largest, together = max(alone.values()), resident(bundle, portable, rows)
    switched, text = under_cap(ground.path, portable, rows)
    ratio, joined = together / largest, cascade_beside(bundle, rows)
    return Found(
        (
            Figure("all rungs in memory over the largest alone", f"{ratio:.2f}", f"{TOGETHER}", ratio <= TOGETHER),
            joined,
            *switched,
        ),
        f"Resident memory of the process that computes, beyond what it held before its first rung, after {CALLS} "
        f"batches of {CROWD} rows for each: rung by rung alone {', '.join(f'{b / 1e6:.1f}' for b in alone.values())} "
        f"MB, all {len(portable)} together {together / 1e6:.1f} MB. They share the backend's library, and an arena out "
        f"of which whichever runs takes the memory of its call; each was taught apart, so their weights can't be "
        f"shared. The two rungs of a cascade are loaded once, for it and for themselves. The original, which needs its "
        f"own code, is not among them. {text}",
    )


def resident(bundle: Bundle, numbers: Sequence[int], rows: np.ndarray) -> int:
    """Bytes that a new process holds more with these rungs, after each has answered some times."""
    with closing(Apart(bundle.path)) as apart:
        before = empty(apart)
        for number in numbers:
            runner = apart.start(bundle.ladder[number])
            for _ in range(CALLS):
                runner([rows])
        return resident_bytes(apart.pid()) - before


def empty(apart: Apart) -> int:
    """Bytes that a process holds once it has come up, which it has when it finds that there is no such rung."""
    with suppress(BundleError):
        apart.call("0" * 12, [])
    return resident_bytes(apart.pid())


# --- a cascade --------------------------------------------------------------------------------------------------------


def cascade_beside(bundle: Bundle, rows: np.ndarray) -> Figure:
    """What a cascade adds to the two rungs that it is made of."""
    with tempfile.TemporaryDirectory() as folder:
        joined = with_cascade(bundle, Path(folder))
        without, all_three = (resident(joined, numbers, rows) for numbers in ((0, 2), (0, 1, 2)))
    ratio = all_three / without
    return Figure(
        f"two rungs ({without / 1e6:.1f} MB) and a cascade of them, over the two",
        f"{ratio:.2f}", f"{WITH_CASCADE}", ratio <= WITH_CASCADE,
    )  # fmt: skip


def with_cascade(bundle: Bundle, path: Path) -> Bundle:
    """The slowest and the fastest of a bundle's portable rungs, and a cascade of them between.

    Its evidence is a copy of the slower's, for here it is loaded and called, and nothing is read of its speed.
    """
    portable = [rung for rung in bundle.ladder if rung.recipe.backend.portable]
    better, fast = portable[0], portable[-1]
    cascade = Cascade.of(fast.recipe, better.recipe, "margin", 0.9)
    recipe = Recipe((), cascade)
    for rung, place in ((better, better.recipe.key), (fast, fast.recipe.key), (fast, f"{recipe.key}/0"),
                        (better, f"{recipe.key}/1")):  # fmt: skip
        shutil.copytree(bundle.folder(rung), path / "rungs" / place)
    artifact = cascade.compile(Model(Form.ONNX, None, bundle.signature), path / "rungs" / recipe.key)
    return Bundle.write(
        path, goal=bundle.goal, verdict=bundle.goal.judge(better.evidence), best=0,
        ladder=Ladder((better, Rung(recipe, artifact, better.evidence, certified=True), fast)),
        signature=bundle.signature, machine=bundle.machine, workload=bundle.workload, run=bundle.run,
    )  # fmt: skip


# --- under a cap ------------------------------------------------------------------------------------------------------


def under_cap(path: Path, portable: Sequence[int], rows: np.ndarray) -> tuple[tuple[Figure, ...], str]:
    """Rungs that make room for each other, time and again: the highest reading of all, and what stays."""
    *slower, fastest = portable
    cap = room_for(path, {slower[0], fastest})
    switches = fewer(SWITCHES)
    with closing(Apart(path)) as apart:
        nothing = empty(apart)
    with govern(path, goal="p99 <= 10s", memory=cap, audit=0.0, isolated=True) as model:
        residents = model._conductor.company.residents
        while any(r.state == "loading" for r in residents):
            time.sleep(0.05)
        with Highest(residents._pid()) as highest:
            forced, readings = 0, list[int]()
            for i in range(2 * WARM + switches):
                forced += switch(model, residents, slower, i, rows)
                readings.append(resident_bytes(residents._pid()))
        told = residents.memory
    # In the median: what a single reading finds of an allocator's leavings is chance.
    growth = float(np.median(readings[-WARM:]) / np.median(readings[WARM : 2 * WARM])) - 1
    most = highest.bytes - nothing
    figures = (
        Figure(f"highest reading in {switches} switches under a cap", f"{most / 1e6:.1f} MB",
               f"the cap, {cap / 1e6:.1f} MB", most <= cap),
        Figure(f"memory after {switches} cycles of loading and unloading", f"{growth:+.1%}", "+2 % at most",
               growth <= GROWTH),
    )  # fmt: skip
    return figures, (
        f"Under a cap that has room for rungs {slower[0]} and {fastest}, {forced} of {len(readings)} times a slower "
        f"rung made another leave, and answered {CROWD} rows (growth: in the median of {WARM} readings, {switches} "
        f"cycles apart); its process was read {highest.readings:,} times, and "
        f"{nothing / 1e6:.1f} MB were taken off, which it holds without any rung. At the end the runtime told of "
        f"{told / 1e6:.1f} MB."
    )


def room_for(path: Path, numbers: set[int]) -> int:
    """Bytes that the certificates foresee for these rungs together."""
    with govern(path, goal="p99 <= 10s", audit=0.0, isolated=True) as model:
        return model._conductor.company.residents._foreseen(numbers)


def switch(model: GovernedModel, residents: Residents, slower: Sequence[int], turn: int, rows: np.ndarray) -> bool:
    """Load one of the slower rungs, for which another must go, and ask it; whether it was out, and is in memory."""
    number = slower[turn % len(slower)]
    was_out = residents[number].state == "out"
    loaded = residents.load(number, evict=True)
    if loaded:
        model._conductor.company.run(number, [rows])
    return was_out and loaded


class Highest:
    """Reads, all the while, what a process holds."""

    def __init__(self, pid: int) -> None:
        self._pid, self._ended = pid, threading.Event()
        self.bytes = self.readings = 0
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        while not self._ended.wait(0.001):
            self.bytes = max(self.bytes, resident_bytes(self._pid))
            self.readings += 1

    def __enter__(self) -> Highest:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
