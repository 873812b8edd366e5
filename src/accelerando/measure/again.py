"""Measuring a bundle again: on this machine, now, against the original."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerando.bundle import Bundle
from accelerando.errors import RefusalError, UsageError
from accelerando.interval import Interval, quantile_interval
from accelerando.ladder import Rung
from accelerando.measure.arm import Arm, Subject, save_samples
from accelerando.measure.rounds import CERTIFY, duel
from accelerando.trial import thin
from accelerando.workload import Chunk, Samples, own_module


@dataclass(frozen=True)
class Remeasured:
    """A rung as it is here: its speedup over the reference and its latency, or why it does not run."""

    rung: Rung
    speedup: Interval | None
    latency: Interval | None
    refusal: str = ""


@dataclass(frozen=True)
class Reference:
    """What rungs are held against: the original, or, where its code is not at hand, the slowest rung that runs."""

    rung: Rung
    skeleton: Any
    is_original: bool


def reference_of(bundle: Bundle, model: Any = None) -> Reference:
    """The reference for a bundle.

    Args:
        model: the user's own module, where the original is one.

    Raises:
        UsageError: the model given is not the bundle's, or nothing in the bundle runs without it.
    """
    original = bundle.ladder.rungs[0]
    if original.recipe.backend.portable:
        return Reference(original, None, True)
    if model is not None:
        return Reference(original, own_module(model), True)
    portable = [r for r in bundle.ladder.rungs if r.recipe.backend.portable]
    if not portable:
        raise UsageError("the only rung is the original, a torch module, which a bundle does not hold; give its code")
    return Reference(portable[0], None, False)


def bench_again(bundle: Bundle, reference: Reference) -> Iterator[Remeasured]:
    """Each rung in a duel with the reference, in fresh processes, on the bundle's own probe inputs.

    Raises:
        UsageError: the bundle has no probe inputs.
    """
    parity = bundle.parity
    if parity is None:
        raise UsageError(f"{bundle.path} holds no inputs to measure with: its search was not finished; resume it first")
    batch = bundle.goal.batch
    with tempfile.TemporaryDirectory() as folder:
        save_samples(Samples((Chunk(parity.inputs, None),)), Path(folder) / "probe")

        def arm(rung: Rung) -> Arm:
            skeleton = None if rung.recipe.backend.portable else reference.skeleton
            subject = Subject(rung.recipe, rung.artifact, bundle.folder(rung), skeleton)
            return Arm(subject, bundle.signature, Path(folder), "probe", batch)

        with arm(reference.rung) as against:
            for rung in bundle.ladder.rungs:
                if not rung.recipe.backend.portable and reference.skeleton is None:
                    yield Remeasured(rung, None, None, "needs the user's own module: give --model")
                    continue
                try:
                    with arm(rung) as one:
                        seen = duel(one, against, CERTIFY, cores=bundle.machine.cores)
                except RefusalError as refusal:
                    yield Remeasured(rung, None, None, str(refusal))
                    continue
                yield Remeasured(rung, seen.speedup, quantile_interval(thin(seen.seconds), 0.5))
