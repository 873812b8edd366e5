"""One layer of a model, and a look at all of them: plain data, whatever the model is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from accelerando.interval import Floats, Interval, median_interval
from accelerando.signature import Array
from accelerando.workload import Samples

LEAST_RUNS = 3
MOST_RUNS = 2000
NOTABLE = 0.25  # a difference between timed and whole that is worth a word


@dataclass(frozen=True)
class Layer:
    """One layer in one call of the model: all its calls together.

    Args:
        name: the module's path, or the node's name.
        kind: the module's class, or the node's operator; `family` is what it does (convolution, linear, matmul,
            attention, recurrent, embedding, normalization, pointwise, view).
        precision: `float32` or `int8`, the kind of its products; it decides which ceiling holds.
        calls: how often the model calls it; `operations`, how many kernels that starts (views are none).
        seconds: median over runs with its interval, without what its children took.
        flops: two per multiplication with addition, of products only (linear, convolution, attention, recurrent,
            FFT): pointwise work is bound by the bytes it moves.
        weight_bytes: what its weights occupy.
        activation_bytes: the activations that it reads and writes.
        moved_bytes: these and the weights that it reads (of an embedding only the rows that are looked up): a layer
            without children reads its inputs and its weights and writes its outputs once per call; where a container
            works between its children, every operation reads and writes.
        peak_bytes: the most that it adds to the tensors alive while it runs (a library's own scratch is not seen).
        kernel: positions that a convolution's kernel spans (0 elsewhere).
        container: it has layers inside; what is told here is only what it does between them.
    """

    name: str
    kind: str
    family: str
    precision: str
    calls: int
    operations: int
    seconds: Interval
    flops: int
    weight_bytes: int
    activation_bytes: int
    moved_bytes: int
    peak_bytes: int
    kernel: int = 0
    container: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "seconds": self.seconds.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Layer:
        return cls(**{**data, "seconds": Interval.from_json(data["seconds"])})


@dataclass(frozen=True)
class Look:
    """All layers at one batch size.

    `whole` is the model's own time, nothing attached; `timed` its time while its layers were timed; `covered` the
    share of `timed` that the layers add up to: the rest is Python and glue between them.
    """

    layers: tuple[Layer, ...]
    whole: Interval
    timed: Interval
    covered: Interval
    threads: int
    weight_bytes: int
    peak_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def watching_seconds(self) -> float:
        """What timing one layer costs, on average; a layer that takes little more can't be told from that."""
        return max(self.timed.mid - self.whole.mid, 0.0) / len(self.layers) if self.layers else 0.0


class Subject(Protocol):
    """A model that can be profiled."""

    def call(self, batch: int) -> Callable[[], Any]:
        """A function of no arguments that calls the model with this many rows."""

    def peak_bytes(self, batch: int) -> int:
        """The most bytes of activations alive at once, one call with this many rows."""

    def look(self, batch: int, seconds: float) -> Look:
        """Every layer, in about this many seconds."""


def rows_of(samples: Samples, batch: int) -> tuple[Array, ...]:
    """The inputs of `batch` rows of one shape, the commonest; rows repeat where there are too few."""
    chunk = max(samples.chunks, key=len)
    return tuple(np.ascontiguousarray(x[np.arange(batch) % len(x)]) for x in chunk.inputs)


def call_seconds(call: Callable[[], Any], seconds: float, least: int = LEAST_RUNS) -> Floats:
    """Seconds of single calls, (n,), for about this long and at least `least` times; the first call is not counted."""
    call()
    found: list[float] = []
    stop = perf_counter() + seconds
    while len(found) < least or (perf_counter() < stop and len(found) < MOST_RUNS):
        start = perf_counter()
        call()
        found.append(perf_counter() - start)
    return np.array(found)


def covered_share(by_layer: Floats, total: Floats) -> Interval:
    """The share of each run, (runs,), that its layers, (runs, layers), add up to."""
    return median_interval(by_layer.sum(axis=1) / np.maximum(total, 1e-12))


def disturbance(timed: Interval, whole: Interval, layers: int, also: str = "") -> tuple[str, ...]:
    """What to say where timing the layers slowed the model."""
    slower = timed.mid / whole.mid if whole.mid else 1.0
    if slower <= 1 + NOTABLE:
        return ()
    return (
        f"timing {layers} layers one by one made the model {slower:.1f}x slower: small layers look dearer than they "
        f"are{also}",
    )


def layer_medians(by_layer: Floats) -> Sequence[Interval]:
    """The median seconds of every layer over the runs, (runs, layers)."""
    return [median_interval(column) for column in by_layer.T]
