"""The roofline: what each layer could take at best on this machine, and what holds it back.

A layer that computes F operations and moves B bytes can't take less than max(F / peak, B / bandwidth); it attains
min(peak, F / B * bandwidth) operations per second (Williams, Waterman & Patterson, "Roofline: an insightful visual
performance model for multicore architectures", *Communications of the ACM* 52(4), 2009).  Bytes that stay in a cache
move at the cache's speed (Ilic, Pratas & Sousa, "Cache-aware roofline model", *IEEE Computer Architecture Letters*
13, 2014): so weights count at the memory's speed only where the model does not fit into the last cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from accelerando.machine import Machine
from accelerando.profile.ceilings import Ceilings
from accelerando.profile.layers import Layer, Look

NEAR = 0.25  # from this share of its roof on, a layer is bound by that roof
DWARFS = 10.0  # starting a layer costs so many times its work: no kernel could help it
STARTS = 3.0  # a layer within so many times the cost of starting its operations is bound by that


class Bound(Enum):
    """What holds a layer back."""

    COMPUTE = "compute"
    MEMORY = "memory"
    OVERHEAD = "overhead"  # starting its operations takes most of its time
    KERNEL = "kernel"  # none of these: the kernel that runs is far from what the machine can do


@dataclass(frozen=True)
class Roofs:
    """The roofs over one model: operations, bytes and operations started per second."""

    float32: float
    int8: float
    memory: float
    cache: float
    starts: float
    cache_bytes: int
    weight_bytes: int
    watching_seconds: float = 0.0  # what timing one layer cost

    @classmethod
    def over(cls, ceilings: Ceilings, machine: Machine, look: Look, start: str) -> Roofs:
        """The roofs over a model as it was looked at; `start` says what it starts, `call` or `node`."""
        threads = look.threads
        memory = ceilings.roof("memory", threads)
        return cls(
            float32=ceilings.roof("float32", threads),
            int8=ceilings.roof("int8", threads),
            memory=memory,
            cache=max(ceilings.roof("cache", threads), memory),
            starts=ceilings.roof(start, threads),
            cache_bytes=max((size for _, size in machine.caches), default=0),
            weight_bytes=look.weight_bytes,
            watching_seconds=look.watching_seconds,
        )

    def products(self, precision: str) -> float:
        return self.int8 if precision == "int8" else self.float32

    def move_seconds(self, weights: int, activations: int) -> float:
        """The least time to move these bytes: each kind at the speed of where it can lie."""
        weight_rate = self.cache if self.weight_bytes <= self.cache_bytes else self.memory
        activation_rate = self.cache if activations <= self.cache_bytes else self.memory
        return weights / weight_rate + activations / activation_rate


@dataclass(frozen=True)
class Standing:
    """Where a layer stands under the roofs.

    `intensity` operations per byte; `attainable` operations per second; `least_seconds` for all its calls;
    `achieved` the share of its roof that it reaches (above 1 where the machine was busier when the roof was measured).
    """

    intensity: float
    attainable: float
    least_seconds: float
    achieved: float
    bound: Bound

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "bound": self.bound.value}


def stand(layer: Layer, roofs: Roofs) -> Standing:
    """Where one layer stands."""
    computing = layer.flops / roofs.products(layer.precision)
    moving = roofs.move_seconds(layer.moved_bytes - layer.activation_bytes, layer.activation_bytes)
    least = max(computing, moving)
    taken = layer.seconds.mid
    achieved = least / taken if taken > 0 else 0.0
    return Standing(
        intensity=layer.flops / layer.moved_bytes if layer.moved_bytes else 0.0,
        attainable=layer.flops / least if least else 0.0,
        least_seconds=least,
        achieved=achieved,
        bound=_bound(layer, roofs, computing, moving, achieved),
    )


def _bound(layer: Layer, roofs: Roofs, computing: float, moving: float, achieved: float) -> Bound:
    starting = max(layer.operations, layer.calls) / roofs.starts + layer.calls * roofs.watching_seconds
    work = max(computing, moving)
    if achieved < NEAR:
        # What a container takes beyond its kernels is Python between them.
        near_start = layer.seconds.mid <= STARTS * starting + work or starting >= DWARFS * work
        return Bound.OVERHEAD if layer.container or near_start else Bound.KERNEL
    return Bound.COMPUTE if computing >= moving else Bound.MEMORY


def least_seconds(standings: Sequence[Standing]) -> float:
    """The least time of the whole model here: its layers one after the other, each at its roof."""
    return sum(s.least_seconds for s in standings)


def least_seconds_int8(layers: Sequence[Layer], roofs: Roofs) -> float:
    """The same, were every weight and every product of the float layers in int8, activations in between in float32."""
    found = 0.0
    for layer in layers:
        shrink = 1 if layer.precision == "int8" else 4
        weights = (layer.moved_bytes - layer.activation_bytes) / shrink
        moving = roofs.move_seconds(int(weights), layer.activation_bytes)
        found += max(layer.flops / max(roofs.int8, roofs.products(layer.precision)), moving)
    return found
