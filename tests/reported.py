"""Bundles in memory for the tests of the reports: plugins with names that reports know, and made-up evidence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from accelerando.backends.cascade import Cascade
from accelerando.backends.onnxruntime import Onnxruntime as RealOnnxruntime
from accelerando.bundle import Bundle
from accelerando.errors import Reason
from accelerando.goal import Goal
from accelerando.interval import Interval
from accelerando.ladder import Ladder, Rung
from accelerando.machine import Machine
from accelerando.recipe import Artifact, Backend, Recipe, Runner, Stage, Technique
from accelerando.techniques.distil import Distil
from accelerando.techniques.drop_layers import DropLayers
from accelerando.techniques.export_onnx import ExportOnnx as RealExport
from accelerando.techniques.prune_channels import PruneChannels
from accelerando.techniques.quantize_static import QuantizeStatic as RealQuantize
from accelerando.testing.bundles import RUN, SIGNATURE, WORKLOAD
from accelerando.testing.fakes import fake_artifact, fake_evidence, fake_trial
from accelerando.trial import Evidence, Refused, Trial
from accelerando.workload import Form, Model, Samples

HOSTILE = "<script>alert(1)</script> \x1b[31mred\x1b[0m [bold]markup[/bold] <img src=https://evil.test/x.png>"


class Still(Technique):
    """A technique that is only named."""

    takes: ClassVar[Form] = Form.TORCH
    gives: ClassVar[Form] = Form.ONNX
    stage: ClassVar[Stage] = Stage.LOWER

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Technique]:
        return ()

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        raise AssertionError("reports never apply anything")


class Parked(Backend):
    """A backend that is only named."""

    takes: ClassVar[frozenset[Form]] = frozenset(Form)

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Backend]:
        return ()

    def compile(self, model: Model, folder: Path) -> Artifact:
        raise AssertionError("reports never compile anything")

    def load(self, *_: Any, **__: Any) -> Runner:
        raise AssertionError("reports never load anything")


@dataclass(frozen=True)
class ExportOnnx(Still):
    opset: int = 20


@dataclass(frozen=True)
class QuantizeStatic(Still):
    method: str = "minmax"
    per_channel: bool = True
    keep: int = 0


@dataclass(frozen=True)
class Eager(Parked):
    threads: int = 2


@dataclass(frozen=True)
class Onnxruntime(Parked):
    threads: int = 0
    arena: bool = True
    optimization: str = "all"


@dataclass(frozen=True)
class Openvino(Parked):
    threads: int = 0
    hint: str = "latency"


X, Q, E = ExportOnnx(), QuantizeStatic(), QuantizeStatic("entropy")
ORIGINAL = Recipe((), Eager())
PLAIN = Recipe((X,), Onnxruntime())
INT8 = Recipe((X, Q), Onnxruntime())
ENTROPY = Recipe((X, E), Onnxruntime())
BEST = Recipe((X, E), Onnxruntime(threads=1))

# A search that cuts, by the real plugins, as a cascade reads its members back: half the layers go, two lessons heal it,
# a third of the rest goes, and one lesson heals that.
HALF = (DropLayers(0.491),)
TAUGHT = (*HALF, Distil(120), Distil(360))
THIRD = (*TAUGHT, DropLayers(0.363))
TAIL = (RealExport(), RealQuantize())
FLOAT, WHOLE = Recipe(TAIL[:1], RealOnnxruntime()), Recipe(TAIL, RealOnnxruntime())
BRIEFLY = Recipe((*HALF, Distil(120), *TAIL), RealOnnxruntime())
HEALED = Recipe((*TAUGHT, *TAIL), RealOnnxruntime())
NARROW = Recipe((*THIRD, Distil(120), *TAIL), RealOnnxruntime(threads=1))
CASCADE = Recipe((), Cascade.of(BRIEFLY, WHOLE, "margin", 0.83))
CUT = "drop_layers: 3 of 6 residual blocks left out: blocks.1, blocks.3, blocks.4"
CUT_AGAIN = "drop_layers: 1 of 3 residual blocks left out: blocks.2"
LESSONS = tuple(
    (f"distil: 3.2 epochs in {seconds} s, accuracy on 1000 watch rows, learning rate 0.003", f"distil: curve {curve}")
    for seconds, curve in (
        (120, "0.0:0.3120 12.1:0.7120 40.0:0.8010 118.5:0.8330"), (360, "0.0:0.8330 90.0:0.8700 351.0:0.8910"),
        (120, "0.0:0.5010 30.0:0.8400 119.2:0.8800"),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Kept(Bundle):
    """A bundle that keeps its journal and profile in memory."""

    kept: tuple[Trial, ...] = ()
    kept_profile: Any = None

    @property
    def trials(self) -> tuple[Trial, ...]:
        return self.kept

    @property
    def profile(self) -> Any:
        return self.kept_profile


def verified(recipe: Recipe, speedup: float, drop: float = 0.0, **evidence: Any) -> Trial:
    return fake_trial(speedup, drop, recipe=recipe, **evidence)


def refused(recipe: Recipe, reason: Reason, detail: str, *, seen: Evidence | None = None, speed: float = 0.0) -> Trial:
    timed = Interval(0.95 * speed, speed, 1.05 * speed) if speed else None
    return Trial(recipe, Refused(reason, detail, None, seen, timed), 1.0)


def trials(**evidence: Any) -> tuple[Trial, ...]:
    """A search: the original, its ways to the best, and one refusal of every kind that looks different."""
    lost = fake_evidence(6.5, 0.5, **evidence)
    return (
        verified(ORIGINAL, 1.0, **evidence),
        verified(PLAIN, 3.0, **evidence),
        verified(INT8, 5.0, **evidence),
        verified(BEST, 6.0, **evidence),
        refused(Recipe((X,), Openvino()), Reason.TOO_SLOW, "2.1x against 3.0x", speed=2.1),
        refused(Recipe((X, Q), Openvino()), Reason.CRASHED, HOSTILE),
        refused(Recipe((X, QuantizeStatic(keep=2)), Onnxruntime()), Reason.BELOW_QUALITY, "drop 50 points", seen=lost),
    )


def healed_trials(**evidence: Any) -> tuple[Trial, ...]:
    """A search with lessons: shapes that were only measured, one that was not healed enough, two rungs, a cascade."""

    def shaped(front: tuple[Technique, ...], speed: float, drop: float, log: tuple[str, ...]) -> Trial:
        seen = fake_evidence(speed, drop, **evidence)
        refusal = Refused(Reason.BELOW_QUALITY, f"drop {drop:.1%}", None, seen, None)
        return Trial(Recipe((*front, *TAIL), RealOnnxruntime()), refusal, 5.0, log)

    (_, two, three), first = LESSONS, (CUT, *LESSONS[0])
    return (
        verified(ORIGINAL, 1.0, **evidence),
        verified(FLOAT, 3.0, **evidence),
        verified(WHOLE, 5.0, **evidence),
        shaped(HALF, 9.0, 0.6, (CUT,)),
        refused(Recipe((PruneChannels(), *TAIL), RealOnnxruntime()), Reason.TOO_SLOW, "4x", speed=4.0),
        replace(shaped((*HALF, Distil(120)), 9.1, 0.07, first), seconds=128.0),
        replace(verified(HEALED, 9.2, 0.01, **evidence), seconds=368.0, log=(*first, *two)),
        shaped(THIRD, 13.0, 0.4, (*first, *two, CUT_AGAIN)),
        replace(verified(NARROW, 14.0, 0.02, **evidence), seconds=127.0, log=(*first, *two, CUT_AGAIN, *three)),
        verified(CASCADE, 7.0, 0.005, **evidence),
    )


def healed_bundle(goal: str = "speedup >= 12, drop <= 8%", *, best: int = -1, **given: Any) -> Kept:
    """A bundle of that search."""
    climbed = (ORIGINAL, FLOAT, WHOLE, CASCADE, HEALED, NARROW)
    return bundle(goal, kept=given.pop("kept", healed_trials()), climbed=climbed, best=best, **given)


def bundle(
    goal: str = "speedup >= 4, drop <= 5%",
    *,
    kept: tuple[Trial, ...] | None = None,
    climbed: tuple[Recipe, ...] = (ORIGINAL, PLAIN, BEST),
    best: int = -1,
    certified: bool = True,
    profile: Any = None,
    run: dict[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    **evidence: Any,
) -> Kept:
    """A bundle whose rungs are those of `climbed`, from the trials that were `kept`."""
    kept = trials(**evidence) if kept is None else kept
    by = {t.recipe: t for t in kept}
    rungs = tuple(Rung(r, fake_artifact(), _evidence(by[r], certified), certified) for r in climbed)
    asked, number = Goal.parse(goal), range(len(rungs))[best]
    workload = {**WORKLOAD, "metric": rungs[0].evidence.metric, "notes": list(notes)}
    return Kept(
        Path("bundle"), asked, asked.judge(rungs[number].evidence), number, Ladder(rungs), SIGNATURE, Machine.look(),
        workload, {**RUN, **(run or {})}, kept=kept, kept_profile=profile,
    )  # fmt: skip


def _evidence(trial: Trial, certified: bool) -> Evidence:
    assert trial.evidence is not None
    return replace(trial.evidence, split="certify" if certified else "select")
