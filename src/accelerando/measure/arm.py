"""One arm of a duel: a recipe's files, loaded in a process of its own.

Each arm has its own process, always: thread settings, memory and crashes stay apart, and the memory that is
measured is that arm's own.  The two take turns (`docs/decisions/0002-two-processes.md`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from accelerando import memory
from accelerando.interval import Floats
from accelerando.measure import clock, quality
from accelerando.measure.child import Child, empty_bytes
from accelerando.metric import Metric
from accelerando.plugins import find
from accelerando.recipe import Artifact, Recipe, Runner, plugin_from_json
from accelerando.signature import Array, Signature
from accelerando.workload import Chunk, Samples

TIMED_BATCHES = 32  # distinct inputs that a block goes round
PROBE_ROWS = 8  # are asked at once
ANSWER_SECONDS = 3.0  # in which answers are asked for, and
ANSWER_BYTES = 8 * 2**20  # of them that are wanted at most
LOAD_SECONDS = 120.0
# A block of a model whose time depends on what its inputs hold: so many rows at least, for a path that one in twenty
# takes must come a few times in every block, or the median over rounds is not the mean; but no more seconds or bytes.
MIX_ROWS = 96
MIX_SECONDS = 2.0
MIX_BYTES = 64 * 2**20
LEAST_BATCHES = 8


@dataclass(frozen=True)
class Subject:
    """What an arm loads: a recipe and its files.

    `skeleton` is the user's own module for the backends that need it, and None for all others.
    """

    recipe: Recipe
    artifact: Artifact
    folder: Path
    skeleton: Any = None


class Arm:
    """A subject, loaded and ready in a fresh process.

    Args:
        subject: what to load.
        signature: how it is called.
        data: folder with the splits, as `save_samples` wrote them.
        split: the split that its timed batches are drawn from.
        batch: rows per timed call.
        memory_limit: bytes, or None.
        patience: seconds that loading and the first answer may take.

    Raises:
        RefusalError: it can't be loaded, or gives a wrong answer to its first batch.
    """

    def __init__(
        self,
        subject: Subject,
        signature: Signature,
        data: Path,
        split: str,
        batch: int,
        memory_limit: int | None = None,
        patience: float = LOAD_SECONDS,
    ) -> None:
        self.subject = subject
        self._child = Child(str(subject.recipe), memory_limit)
        try:
            backend = subject.recipe.backend.to_json()
            self.load_seconds: float = self._child.call(
                _load, backend, subject.artifact, str(subject.folder), signature, subject.skeleton,
                str(data / split), batch, timeout=patience,
            )  # fmt: skip
        except BaseException:
            self._child.close()
            raise

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child.alive

    def block(self, seconds: float, timeout: float, core: int = 0) -> Floats:
        """Seconds of each call in one block, which begins on a core, counted round and round.

        What is `steady` goes round the same few batches.  What is not gets others in every block, until every row of
        the split has come; so which rows were drawn shows in how the rounds differ, and is in their interval.
        """
        return self._child.call(_block, seconds, core, timeout=timeout)

    def typical(self, block: Floats) -> float:
        """Seconds per call of a block."""
        steady = self.subject.recipe.backend.steady
        return float(np.median(block)) if steady else clock.mix_seconds(block)

    def peak_bytes(self) -> int:
        """The most memory that the process has held beyond what an empty one holds, since it was loaded."""
        return self._child.call(_peak, timeout=LOAD_SECONDS)

    def scores(self, split: Path, metric: Metric, timeout: float) -> Floats:
        """Per-sample statistics of every sample of a split."""
        return self._child.call(_scores, str(split), metric, timeout=timeout)

    def each_row(self, split: Path, function: Callable[[list[Array]], Floats], timeout: float) -> Floats:
        """What a function makes of the flat outputs, (rows, ...) each, for every sample of a split, in its order."""
        return self._child.call(_each_row, str(split), function, timeout=timeout)

    def answers(
        self,
        inputs: tuple[Array, ...],
        timeout: float,
        most_seconds: float = ANSWER_SECONDS,
        most_bytes: int = ANSWER_BYTES,
    ) -> list[Array]:
        """The flat outputs for some rows, asked a few at a time: for the first in any case, and on until the bounds."""
        return self._child.call(_answers, inputs, most_seconds, most_bytes, timeout=timeout)

    def close(self) -> None:
        self._child.close()

    def __enter__(self) -> Arm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def save_samples(samples: Samples, folder: Path) -> None:
    """Write rows so that every arm can map them into its memory; overwrites."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.npy"):
        old.unlink()
    for i, chunk in enumerate(samples.chunks):
        for j, array in enumerate(chunk.inputs):
            np.save(folder / f"{i:04}-{j:03}.npy", array, allow_pickle=False)
        if chunk.targets is not None:
            np.save(folder / f"{i:04}-targets.npy", chunk.targets, allow_pickle=False)


def open_samples(folder: Path) -> Samples:
    """Rows that `save_samples` wrote, mapped, not read."""

    def read(path: Path) -> Array:
        return np.load(path, mmap_mode="r", allow_pickle=False)

    chunks = []
    for first in sorted(folder.glob("*-000.npy")):
        number = first.name.partition("-")[0]
        targets = folder / f"{number}-targets.npy"
        inputs = tuple(read(p) for p in sorted(folder.glob(f"{number}-[0-9]*.npy")))
        chunks.append(Chunk(inputs, read(targets) if targets.exists() else None))
    return Samples(tuple(chunks))


def timed_batches(samples: Samples, size: int, count: int = TIMED_BATCHES, seed: int = 0) -> list[tuple[Array, ...]]:
    """Batches of exactly `size` rows, drawn at random over all shapes in proportion to their rows.

    Rows come again where a shape has fewer than `size`; every array is contiguous and in memory.
    """
    rng = np.random.default_rng(seed)
    shares = np.array([len(c) for c in samples.chunks], dtype=np.float64)
    batches = []
    for which in rng.choice(len(shares), size=count, p=shares / shares.sum()):
        chunk = samples.chunks[which]
        rows = rng.choice(len(chunk), size=size, replace=len(chunk) < size)
        batches.append(tuple(np.ascontiguousarray(x[np.sort(rows)]) for x in chunk.inputs))
    return batches


def mixed_batches(samples: Samples, size: int, seed: int | None = None) -> Iterator[tuple[Array, ...]]:
    """Batches of exactly `size` rows without end: in random order, and no row again before all have come.

    What is left over of a shape, fewer than `size` rows, waits for another turn; a shape that has no more is filled up
    with its own rows.  Without a seed the order is another in every process, so that rounds of several can be pooled.
    """
    rng = np.random.default_rng(seed)
    while True:
        turn = []
        for chunk in samples.chunks:
            rows = np.resize(rng.permutation(len(chunk)), max(1, len(chunk) // size) * size)
            turn += [(chunk, part) for part in rows.reshape(-1, size)]
        for which in rng.permutation(len(turn)):
            chunk, rows = turn[which]
            yield tuple(np.ascontiguousarray(x[np.sort(rows)]) for x in chunk.inputs)


# --- in the child -----------------------------------------------------------------------------------------------


@dataclass
class _Loaded:
    run: Runner
    signature: Signature
    batches: list[tuple[Array, ...]]
    mix: Iterator[tuple[Array, ...]] | None  # None for what is steady
    pace: float = 0.0  # seconds per call of the mix, once it is known


_loaded: list[_Loaded] = []  # the one model that this process holds


def _load(
    backend: dict[str, Any],
    artifact: Artifact,
    folder: str,
    signature: Signature,
    skeleton: Any,
    rows: str,
    batch: int,
) -> float:
    samples = open_samples(Path(rows))
    batches = timed_batches(samples, batch)
    start = time.perf_counter()
    plugin = plugin_from_json(find("backends", backend["name"]), backend)
    run = plugin.load(artifact, Path(folder), signature, skeleton)
    outputs = run(batches[0])
    taken = time.perf_counter() - start
    quality.check(outputs, signature, batch)
    _loaded.append(_Loaded(run, signature, batches, None if plugin.steady else mixed_batches(samples, batch)))
    return taken


def _block(seconds: float, core: int) -> Floats:
    loaded = _loaded[0]
    clock.settle_on(core)
    if loaded.mix is None:
        return clock.time_block(loaded.run, loaded.batches, seconds)
    if not loaded.pace:
        loaded.pace = float(clock.time_mix(loaded.run, loaded.batches[:LEAST_BATCHES]).mean())
    batches = list(islice(loaded.mix, _mix_count(loaded, seconds)))
    block = clock.time_mix(loaded.run, batches)
    loaded.pace = float(block.mean())
    return block


def _mix_count(loaded: _Loaded, seconds: float) -> int:
    """How many batches a block of the mix has."""
    first = loaded.batches[0]
    least = max(LEAST_BATCHES, -(-MIX_ROWS // len(first[0])))
    wanted = max(least, int(seconds / (clock.MIX_REPEATS * loaded.pace)))
    most = min(MIX_SECONDS / (clock.MIX_REPEATS * loaded.pace), MIX_BYTES / sum(x.nbytes for x in first))
    return max(LEAST_BATCHES, int(min(wanted, most, clock.MOST_CALLS / clock.MIX_REPEATS)))


def _peak() -> int:
    return max(0, memory.peak_bytes() - empty_bytes())


def _scores(split: str, metric: Metric) -> Floats:
    return quality.score(_loaded[0].run, _loaded[0].signature, open_samples(Path(split)), metric)


def _each_row(split: str, function: Callable[[list[Array]], Floats]) -> Floats:
    found = quality.answers(_loaded[0].run, _loaded[0].signature, open_samples(Path(split)))
    return np.concatenate([function(outputs) for outputs, _ in found])


def _answers(inputs: tuple[Array, ...], most_seconds: float, most_bytes: int) -> list[Array]:
    loaded, found = _loaded[0], []
    size, until = loaded.signature.fixed_batch or PROBE_ROWS, time.monotonic() + most_seconds
    for start in range(0, len(inputs[0]), size):
        part = tuple(x[start : start + size] for x in inputs)
        outputs = loaded.run(part)
        quality.check(outputs, loaded.signature, len(part[0]))
        found.append([np.array(o) for o in outputs])
        if time.monotonic() > until or sum(o.nbytes for o in found[0]) * (len(found) + 1) > most_bytes:
            break
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]
