"""A governed ladder without models: runners that do as they are told."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.bundle import Bundle
from accelerando.goal import Goal
from accelerando.ladder import Ladder, Rung
from accelerando.recipe import Runner
from accelerando.serve.aims import Aims
from accelerando.serve.company import Company
from accelerando.serve.conductor import Conductor
from accelerando.serve.governor import RESPONSIVE, Decides
from accelerando.serve.residents import Residents
from accelerando.serve.tickets import Ticket
from accelerando.signature import Array, Signature
from accelerando.testing.bundles import SIGNATURE, write_bundle
from accelerando.testing.fakes import FakeRunner, fake_evidence

POISON = np.float32(-1e9)


@dataclass
class Script:
    """What a rung does: how long a call takes, what it raises, and what was asked of it."""

    seconds: float = 0.0
    error: BaseException | None = None
    gate: threading.Event | None = None  # a call waits for it
    most_rows: int | None = None  # of a call; more are too many
    calls: list[int] = field(default_factory=list)  # rows of each
    closed: int = 0
    started: int = 0


class ScriptedRunner(Runner):
    """Row means, as `FakeRunner` gives them; rows that hold `POISON` make it fail."""

    def __init__(self, script: Script, signature: Signature = SIGNATURE) -> None:
        self.script, self.inner = script, FakeRunner(signature)
        script.started += 1

    def __call__(self, leaves: Sequence[Array]) -> list[Array]:
        script = self.script
        script.calls.append(len(leaves[0]))
        if script.gate:
            script.gate.wait(10)
        if script.seconds:
            time.sleep(script.seconds)
        if script.error:
            raise script.error
        if script.most_rows and len(leaves[0]) > script.most_rows:
            raise MemoryError("too many rows")
        if (leaves[0] == POISON).any():
            raise ValueError("a poisonous row")
        return self.inner(leaves)

    def close(self) -> None:
        self.script.closed += 1


def ladder_of(bundle: Bundle, drops: Sequence[float], **evidence: Any) -> Bundle:
    """The same bundle, its rungs with these drops and whatever else their evidence should say."""
    rungs = [
        Rung(r.recipe, r.artifact, fake_evidence(1.0 + 2 * i, drop, n=500, seed=i, split="certify", **evidence), True)
        for i, (r, drop) in enumerate(zip(bundle.ladder, drops, strict=True))
    ]
    return replace(bundle, ladder=Ladder(tuple(rungs)))


@dataclass
class Troupe:
    """A conductor with its rungs and their scripts, from the original to the fastest."""

    bundle: Bundle
    scripts: list[Script]
    residents: Residents
    conductor: Conductor

    def ask(self, rows: Any = 1, seconds: float = 30.0, **wanted: Any) -> Ticket:
        """Submit a request of so many rows, or of these."""
        leaf = np.full((rows, 4), 0.5, np.float32) if isinstance(rows, int) else rows
        now = time.monotonic()
        ticket = Ticket([leaf], len(leaf), now, now + seconds, **wanted)
        self.conductor.submit(ticket)
        return ticket

    def close(self) -> None:
        for script in self.scripts:
            if script.gate:
                script.gate.set()
        self.conductor.close()
        self.residents.close()


def troupe(
    folder: Path,
    scripts: Sequence[Script] = (),
    drops: Sequence[float] = (0.0, 0.02, 0.05),
    goal: str = "p99 <= 30s",
    governor: Decides = RESPONSIVE,
    cap: int | None = None,
    order: Sequence[int] = (2, 0, 1),
    watch: Any = None,
    waiting_rows: int = 10_000,
    signature: Signature = SIGNATURE,
    **evidence: Any,
) -> Troupe:
    """Three rungs that follow their scripts, with this evidence; all are loaded before this returns."""
    bundle = ladder_of(write_bundle(folder, signature=signature), drops, **evidence)
    found = list(scripts) or [Script() for _ in bundle.ladder]
    cores = threading.Lock()

    def start(rung: Rung) -> Runner:
        number = bundle.ladder.index(rung.recipe)
        assert number is not None
        return ScriptedRunner(found[number], signature)

    residents = Residents(bundle, start, cores, cap)
    residents.begin(order, first=len(order))
    for script in found:
        script.calls.clear()
    aims = Aims.of(Goal.parse(goal), bundle.ladder)
    conductor = Conductor(Company(residents, aims, watch, None, 1), governor, cores, waiting_rows)
    return Troupe(bundle, found, residents, conductor)
