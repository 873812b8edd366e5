"""Every backend keeps the contract; and every check of the contract raises the alarm where it is broken."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from accelerando.backends.cascade import Cascade
from accelerando.backends.eager import Eager
from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.errors import RefusalError
from accelerando.machine import Machine
from accelerando.plugins import discover
from accelerando.recipe import Artifact, Backend, Recipe, Runner
from accelerando.signature import Array, Signature
from accelerando.techniques.export_onnx import ExportOnnx
from accelerando.testing import backend_contract as contract
from accelerando.workload import Form, Model

BACKENDS = discover("backends")
ABOUT_ANSWERS = (contract.check_parity, contract.check_fresh_process, contract.check_ready, contract.check_inputs)
Prepare = Callable[[str, str], contract.Subject]
EXPORTED = [Recipe((ExportOnnx(),), Onnxruntime(threads=n)) for n in (1, 0)]
# What a backend can't be without; half of the rows go on to the second.
KNOBS: dict[str, dict[str, Any]] = {"cascade": Cascade.of(*EXPORTED, "entropy", 0.02).knobs}


def slow(name: str, case: str) -> bool:
    return BACKENDS[name].typical_seconds > 10 or case in ("recurrent", "tokens")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepare:
    """The subject of a backend and a case, compiled once."""
    subjects: dict[tuple[str, str], contract.Subject] = {}

    def get(name: str, case: str) -> contract.Subject:
        kind = BACKENDS[name]
        if kind.missing():
            pytest.skip(f"{name} needs {', '.join(kind.missing())}")
        if (name, case) not in subjects:
            folder = tmp_path_factory.mktemp(f"{name}-{case}")
            subjects[name, case] = contract.prepare(kind, case, folder, **KNOBS.get(name, {}))
        return subjects[name, case]

    return get


def parameters(cases: Iterable[str], checks: Iterable[contract.Check]) -> list[Any]:
    return [
        pytest.param(
            name,
            case,
            check,
            id=f"{name}-{case}-{check.__name__}",
            # one worker compiles a case once, and checks it in every way
            marks=[pytest.mark.xdist_group(f"{name}-{case}"), *([pytest.mark.slow] if slow(name, case) else [])],
        )
        for name in BACKENDS
        for case in cases
        for check in checks
        if (case == "zeros") == ("sparse products" in BACKENDS[name].offers)  # which has nothing to do without zeros
    ]


@pytest.mark.parametrize(
    ("name", "case", "check"),
    [
        *parameters(["image", "zeros"], contract.CHECKS),
        *parameters([c for c in contract.CASES if c not in ("image", "zeros")], ABOUT_ANSWERS),
    ],
)
def test_contract(name: str, case: str, check: contract.Check, prepared: Prepare) -> None:
    check(prepared(name, case))


# --- sabotage ---------------------------------------------------------------------------------------------------


class Bent(Runner):
    """A runner that does something else to what another answers."""

    def __init__(self, inner: Runner, bend: Callable[[Sequence[Array], list[Array]], list[Array]]) -> None:
        self.inner, self.bend = inner, bend

    def __call__(self, leaves: Sequence[Array]) -> list[Array]:
        return self.bend(leaves, self.inner(leaves))


@dataclass(frozen=True)
class Broken(Eager):
    """Eager, broken in one way."""

    def load(self, artifact: Artifact, folder: Path, signature: Signature, skeleton: Any = None) -> Runner:
        return Bent(super().load(artifact, folder, signature, skeleton), self.bend)

    def bend(self, leaves: Sequence[Array], answers: list[Array]) -> list[Array]:
        return answers


@dataclass(frozen=True)
class Wrong(Broken):
    def bend(self, leaves: Sequence[Array], answers: list[Array]) -> list[Array]:
        return [x + np.abs(x).max() * np.float32(0.01) for x in answers]


@dataclass(frozen=True)
class OtherType(Broken):
    def bend(self, leaves: Sequence[Array], answers: list[Array]) -> list[Array]:
        return [x.astype(np.float64) for x in answers]


@dataclass(frozen=True)
class Lists(Broken):
    def bend(self, leaves: Sequence[Array], answers: list[Array]) -> list[Array]:
        return [x.tolist() for x in answers]


BUFFER = np.zeros((5, 10), np.float32)
CLOSED = threading.Event()


@dataclass(frozen=True)
class Reuses(Broken):
    """Answers in memory that the next call overwrites."""

    def bend(self, leaves: Sequence[Array], answers: list[Array]) -> list[Array]:
        BUFFER[: len(answers[0])] = answers[0]
        return [BUFFER[: len(answers[0])]]


@dataclass(frozen=True)
class Scribbles(Broken):
    def bend(self, leaves: Sequence[Array], answers: list[Array]) -> list[Array]:
        for x in leaves:
            x += 1
        return answers


@dataclass(frozen=True)
class Selfish(Broken):
    """Answers wrongly once any of its runners was closed."""

    def load(self, artifact: Artifact, folder: Path, signature: Signature, skeleton: Any = None) -> Runner:
        runner = super().load(artifact, folder, signature, skeleton)
        runner.close = CLOSED.set  # type: ignore[method-assign]
        return runner

    def bend(self, leaves: Sequence[Array], answers: list[Array]) -> list[Array]:
        return [x * 0 for x in answers] if CLOSED.is_set() else answers


@dataclass(frozen=True)
class Minded(Eager):
    """Says in its recipe what it was told for a process."""

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), **self.settings}


@dataclass(frozen=True)
class Hides(Eager):
    """Writes a file that it does not describe."""

    def compile(self, model: Model, folder: Path) -> Artifact:
        artifact = super().compile(model, folder)
        (folder / "hidden").write_text("x")
        return artifact


@dataclass(frozen=True)
class Remembers(Eager):
    """Reads what lies outside its artifact."""

    def compile(self, model: Model, folder: Path) -> Artifact:
        super().compile(model, folder)
        (folder / "weights.safetensors").rename(folder.parent / "weights.safetensors")
        (folder / "nothing").write_text("x")
        return Artifact.gather(folder)

    def load(self, artifact: Artifact, folder: Path, signature: Signature, skeleton: Any = None) -> Runner:
        return super().load(artifact, folder.parent.parent / "elsewhere", signature, skeleton)


@dataclass(frozen=True)
class Meddles(Eager):
    """Changes the model that it compiles."""

    def compile(self, model: Model, folder: Path) -> Artifact:
        model.content[0].weight.data += 1
        return super().compile(model, folder)


@dataclass(frozen=True)
class Litters(Eager):
    def compile(self, model: Model, folder: Path) -> Artifact:
        (folder.parent / "cache").mkdir(exist_ok=True)
        return super().compile(model, folder)


@dataclass(frozen=True)
class Repeats(Eager):
    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Eager]:
        return [cls(), cls(threads=1), cls(threads=1)]


@dataclass(frozen=True)
class Backwards(Eager):
    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Eager]:
        return [cls(threads=1), cls()]


@dataclass(frozen=True)
class Contradicts(Eager):
    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        from accelerando.errors import Reason

        return RefusalError(Reason.UNSUPPORTED) if self.threads else None


@dataclass(frozen=True)
class Grumbles(Eager):
    """Answers with words where a refusal is asked for."""

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        return "no" if model.form is Form.TORCH else None


class Thawed(Eager):
    """Not frozen, as it sets its knobs by hand."""

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Forgets(Eager):
    """Does not say all of its settings."""

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name}


@dataclass(frozen=True)
class Takes(Eager):
    takes: ClassVar[frozenset[Form]] = frozenset()


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (Wrong, contract.check_parity),
        (Wrong, contract.check_fresh_process),
        (Wrong, contract.check_inputs),
        (OtherType, contract.check_parity),
        (Lists, contract.check_ready),
        (Reuses, contract.check_ready),
        (Scribbles, contract.check_inputs),
        (Selfish, contract.check_shared),
        (Minded, contract.check_shared),
        (Hides, contract.check_artifact),
        (Meddles, contract.check_model_is_unchanged),
        (Litters, contract.check_model_is_unchanged),
        (Repeats, contract.check_choices),
        (Backwards, contract.check_choices),
        (Contradicts, contract.check_choices),
        (Thawed, contract.check_frozen),
        (Forgets, contract.check_json),
        (Eager, contract.check_declared),
        (Eager, contract.check_lean_import),
    ],
    ids=lambda x: x.__name__,
)
def test_sabotage_is_caught(
    kind: type[Backend], check: contract.Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = contract.prepare(Eager, "image", tmp_path)
    check(subject)  # sound as it is
    if kind is Eager:  # about the class's file
        kind = dataclasses.make_dataclass("Imposter", [], bases=(Eager,), frozen=True)
        kind.__module__ = "torch" if check is contract.check_lean_import else "accelerando.backends.eager"
    check_of_broken = dataclasses.replace(subject, backend=kind())
    if kind in (Hides, Meddles, Litters):
        (tmp_path / "broken").mkdir()
        check_of_broken = contract.prepare(kind, "image", tmp_path / "broken")
    with pytest.raises(AssertionError):
        check(check_of_broken)


def test_a_backend_that_reads_outside_its_artifact_is_caught(tmp_path: Path) -> None:
    subject = contract.prepare(Remembers, "image", tmp_path)
    with pytest.raises((RefusalError, AssertionError)):
        contract.check_fresh_process(subject)


def test_a_refusal_that_is_no_refusal_is_caught(tmp_path: Path) -> None:
    subject = contract.prepare(Eager, "image", tmp_path)
    with pytest.raises(AssertionError, match="refuse gave 'no'"):
        contract.check_refusal(dataclasses.replace(subject, backend=Grumbles()))


def test_a_backend_that_takes_nothing_is_caught(tmp_path: Path) -> None:
    subject = contract.prepare(Eager, "image", tmp_path)
    with pytest.raises(AssertionError, match="at least one form"):
        contract.check_declared(dataclasses.replace(subject, backend=Takes()))
