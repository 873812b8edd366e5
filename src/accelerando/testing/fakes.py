"""First-class fakes: a technique, a backend, evidence, trials and rungs, without measuring anything.

    evidence = fake_evidence(speedup=4.2, drop=0.005, noise=0.02)
    trial = fake_trial(speedup=4.2, level=3)                 # a recipe of its own for every level
    ladder = Ladder.climb([original_trial(), trial], ORIGINAL)

Nothing here is random from run to run: the same arguments give the same evidence.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from accelerando.errors import Reason, RefusalError
from accelerando.interval import Floats
from accelerando.ladder import Rung
from accelerando.machine import Machine
from accelerando.metric import METRICS
from accelerando.plugins import find
from accelerando.recipe import Artifact, Backend, File, Recipe, Runner, Stage, Technique
from accelerando.signature import Array, Signature
from accelerando.trial import Evidence, Refused, Trial, Verified
from accelerando.workload import Form, Model, Samples

RIGHT_OR_WRONG = ("accuracy", "agreement", "top-5")


class FakeRunner(Runner):
    """Answers each output with the row's mean of the first input: finite, right in shape, and repeatable."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.calls = 0
        self.closed = False

    def __call__(self, leaves: Sequence[Array]) -> list[Array]:
        self.calls += 1
        rows = np.asarray(leaves[0], dtype=np.float64).reshape(len(leaves[0]), -1).mean(axis=1)
        answers = []
        for port in self.signature.outputs:
            shape = [len(rows), *(1 if isinstance(a, str) else a for a in port.shape[1:])]
            column = rows.reshape(-1, *[1] * (len(shape) - 1))
            answers.append(np.broadcast_to(column, shape).astype(port.dtype))
        return answers

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class FakeBackend(Backend):
    """A backend that writes one small file and answers with means; `level` only tells recipes apart."""

    level: int = 0
    refused: bool = False

    takes: ClassVar[frozenset[Form]] = frozenset({Form.TORCH, Form.EXPORTED, Form.ONNX, Form.OPENVINO})

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Backend]:
        return [cls(level) for level in range(3)]

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        return RefusalError(Reason.UNSUPPORTED, "a fake that was told to refuse") if self.refused else None

    def compile(self, model: Model, folder: Path) -> Artifact:
        (folder / "fake.json").write_text(json.dumps(self.to_json()))
        return Artifact.gather(folder)

    def load(self, artifact: Artifact, folder: Path, signature: Signature, skeleton: Any = None) -> FakeRunner:
        return FakeRunner(signature)


@dataclass(frozen=True)
class FakeTechnique(Technique):
    """A technique that leaves the model as it is, and says so in its log; `strength` only tells recipes apart."""

    strength: int = 1
    refused: bool = False

    takes: ClassVar[Form] = Form.TORCH
    gives: ClassVar[Form] = Form.TORCH
    stage: ClassVar[Stage] = Stage.SHAPE

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Technique]:
        return [cls(strength) for strength in (1, 2)]

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        return RefusalError(Reason.NOTHING_TO_DO, "a fake that was told to refuse") if self.refused else None

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        return model.changed(model.form, model.content, f"fake strength {self.strength}")


ORIGINAL = Recipe((), FakeBackend())


@contextmanager
def fakes_known() -> Iterator[None]:
    """Within it, `recipe_from_json` knows the two fakes, so that journals and bundles of them can be read back."""
    modules = {
        "accelerando.backends.fake_backend": FakeBackend,
        "accelerando.techniques.fake_technique": FakeTechnique,
    }
    for name, kind in modules.items():
        stand_in = ModuleType(kind.__module__)  # holds the one class, as a file of that name would
        setattr(stand_in, kind.__name__, kind)
        sys.modules[name] = stand_in
    find.cache_clear()
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)
        find.cache_clear()


def fake_evidence(
    speedup: float = 2.0,
    drop: float = 0.0,
    noise: float = 0.01,
    n: int = 200,
    rounds: int = 20,
    seed: int = 0,
    *,
    calls: int = 400,
    metric: str = "accuracy",
    higher_is_better: bool | None = None,
    quality: float = 0.9,
    original_seconds: float = 0.01,
    batch: int = 1,
    split: str = "select",
    stolen: float = 0.0,
    load_seconds: float = 0.1,
    peak_bytes: int = 50_000_000,
    original_peak_bytes: int = 100_000_000,
    disk_bytes: int = 1_000_000,
    original_disk_bytes: int = 4_000_000,
    machine: str = "fake",
) -> Evidence:
    """Evidence of a recipe that is `speedup` times faster than an original of `original_seconds` per call.

    Args:
        drop: how much worse in the metric's own unit, negative for better; exact to 1 / n where right or wrong.
        noise: relative standard deviation of every time (log-normal).
        n: samples judged.
        rounds: of the duel.
        calls: timed calls kept of each arm.
        quality: the original's.  Metrics other than right-or-wrong ones get one score per sample around it.
        stolen: share of the processor's time taken by others in every round.
    """
    rng = np.random.default_rng(seed)
    higher = _direction(metric) if higher_is_better is None else higher_is_better
    ours, theirs = _scores(metric, higher, quality, drop, n, rng)
    seconds = original_seconds / speedup

    def times(middle: float, count: int) -> Floats:
        return middle * np.exp(noise * rng.standard_normal(count))

    return Evidence(
        split=split,
        batch=batch,
        rounds=np.stack([times(seconds, rounds), times(original_seconds, rounds)], axis=1),
        stolen=np.full(rounds, stolen),
        seconds=times(seconds, calls),
        original_seconds=times(original_seconds, calls),
        scores=ours,
        original_scores=theirs,
        metric=metric,
        higher_is_better=higher,
        load_seconds=load_seconds,
        peak_bytes=peak_bytes,
        original_peak_bytes=original_peak_bytes,
        disk_bytes=disk_bytes,
        original_disk_bytes=original_disk_bytes,
        machine=machine,
    )


def _direction(metric: str) -> bool:
    return METRICS[metric].higher_is_better if metric in METRICS else True


def _scores(
    metric: str, higher: bool, quality: float, drop: float, n: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Scores (n, 1) of the candidate and of the original."""
    if metric in METRICS and metric not in RIGHT_OR_WRONG and _columns(metric) != 1:
        raise ValueError(f"no fake scores for {metric!r}: it has several statistics per sample; build the Evidence")
    if metric in RIGHT_OR_WRONG:
        right, lost = round(quality * n), round(drop * n)
        theirs = (np.arange(n) < right).astype(np.float64)
        ours = (np.arange(n) < right - lost).astype(np.float64)
        order = rng.permutation(n)
        return ours[order, None], theirs[order, None]
    theirs = quality * (1 + 0.1 * rng.standard_normal(n))
    change = 0.01 * abs(quality) * rng.standard_normal(n)
    ours = theirs - (drop if higher else -drop) + (change - change.mean() if drop else 0.0)
    return ours[:, None], theirs[:, None]


def _columns(metric: str) -> int:
    """How many statistics per sample a named metric has."""
    return {"f1": 3, "mean-iou": 3, "r2": 3, "cross-entropy": 2, "perplexity": 2}.get(metric, 1)


def fake_recipe(level: int = 0, strengths: Sequence[int] = ()) -> Recipe:
    """A recipe of fakes; level 0 without techniques is `ORIGINAL`."""
    return Recipe(tuple(FakeTechnique(s) for s in strengths), FakeBackend(level))


def fake_artifact(disk_bytes: int = 1_000_000) -> Artifact:
    """One file of this size, which does not exist."""
    return Artifact((File("fake.json", disk_bytes, "0" * 64),))


def fake_trial(
    speedup: float = 2.0,
    drop: float = 0.0,
    noise: float = 0.01,
    *,
    level: int = 1,
    recipe: Recipe | None = None,
    refused: Reason | None = None,
    seconds: float = 1.0,
    **evidence: Any,
) -> Trial:
    """A verified trial, or one refused for `refused`; further arguments go to `fake_evidence`."""
    recipe = recipe or fake_recipe(level)
    if refused is not None:
        return Trial(recipe, Refused(refused, "a fake refusal"), seconds)
    found = fake_evidence(speedup, drop, noise, **evidence)
    return Trial(recipe, Verified(fake_artifact(found.disk_bytes), found), seconds)


def original_trial(**evidence: Any) -> Trial:
    """The original's own trial: speedup 1, no drop."""
    given = {"disk_bytes": 4_000_000, "peak_bytes": 100_000_000, **evidence}
    return fake_trial(speedup=1.0, drop=0.0, level=0, **given)


def fake_rung(speedup: float = 2.0, drop: float = 0.0, noise: float = 0.01, **kwargs: Any) -> Rung:
    """A rung of fakes; arguments as for `fake_trial`, and `certified`."""
    certified = bool(kwargs.pop("certified", False))
    trial = fake_trial(speedup, drop, noise, **kwargs)
    verified = trial.verified
    assert verified is not None
    return Rung(trial.recipe, verified.artifact, verified.evidence, certified)
