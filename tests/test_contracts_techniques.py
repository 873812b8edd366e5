"""The published contract, held against every technique that there is, and against techniques that break it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from accelerando.errors import RefusalError
from accelerando.machine import Machine
from accelerando.plugins import discover
from accelerando.recipe import Stage, Technique
from accelerando.techniques import low_rank
from accelerando.testing import technique_contract as contract
from accelerando.workload import Form, Model, Samples


def long_kernel() -> tuple[torch.nn.Module, Any]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return torch.nn.Conv1d(4, 4, 1024, padding=512).eval(), contract.floats(24, 4, 4096)


def wide() -> tuple[torch.nn.Module, Any]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(512, 520), torch.nn.Linear(520, 4)).eval(), contract.floats(40, 512)


def layered() -> tuple[torch.nn.Module, Any]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        return torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval(), contract.floats(40, 6, 16)


def broad() -> tuple[torch.nn.Module, Any]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(512, 512)).eval(), contract.floats(40, 64, 512)


class Tokens(torch.nn.Module):
    """Reads the mean of its tokens: a model that may lose some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, _ = layered()
        self.head = torch.nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean(1))


def read_by_mean() -> tuple[torch.nn.Module, Any]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Tokens().eval(), contract.floats(40, 6, 16)


# Techniques that have nothing to do on the contract's own model, and what they are given instead.
OWN: dict[str, Callable[[], tuple[Any, Any]]] = {
    "fft_convolution": long_kernel,
    "sparsify": wide,
    "drop_layers": layered,
    "low_rank": broad,
    "merge_tokens": read_by_mean,
}


@pytest.fixture(scope="module", params=sorted(discover("techniques")))
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[contract.Subject]:
    kind = discover("techniques")[request.param]
    if missing := kind.missing():
        pytest.skip(f"{request.param} needs {', '.join(missing)}")
    model, data = OWN[request.param]() if request.param in OWN else (None, None)
    with pytest.MonkeyPatch.context() as patch:  # on a busy machine it may find no layer faster in parts
        patch.setattr(low_rank, "_speed", lambda factors, parts: factors.cost / parts.cost)
        yield contract.prepare(kind, tmp_path_factory.mktemp(request.param), model, data)


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_contract(check: contract.Check, subject: contract.Subject) -> None:
    check(subject)


# --- sabotage: each check must catch a technique that breaks it ---------------------------------------------------


@dataclass(frozen=True)
class Honest(Technique):
    """Doubles the last weight and halves the one before: the same function, for nothing non-linear is between."""

    strength: int = 2

    takes: ClassVar[Form] = Form.TORCH
    gives: ClassVar[Form] = Form.TORCH
    stage: ClassVar[Stage] = Stage.SHAPE
    exact: ClassVar[bool] = True

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Technique]:
        return [cls(), cls(strength=4)]

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        import copy

        return model.changed(Form.TORCH, self.rescaled(copy.deepcopy(model.content)), "rescaled")

    def rescaled(self, module: Any) -> Any:
        if isinstance(module, torch.nn.Sequential):
            with torch.no_grad():
                module[6].weight.div_(self.strength)
                module[6].bias.div_(self.strength)
                module[8].weight.mul_(self.strength)
        return module


class MeddlesWithItsInput(Honest):
    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        return model.changed(Form.TORCH, self.rescaled(model.content), "rescaled")


class MeddlesWithTheData(Honest):
    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        data.chunks[0].inputs[0][0] = 0.0
        return super().apply(model, data, folder)


class LeavesFiles(Honest):
    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        (folder.parent / "scratch.bin").write_bytes(b"")
        return super().apply(model, data, folder)


class GivesAnotherForm(Honest):
    gives: ClassVar[Form] = Form.ONNX


class GivesNoFile(Honest):
    gives: ClassVar[Form] = Form.ONNX

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        return model.changed(Form.ONNX, folder / "model.onnx", "wrote nothing")


class ForgetsTheLog(Honest):
    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        return replace(super().apply(model, data, folder), log=())


class IsNotExact(Honest):
    def rescaled(self, module: Any) -> Any:
        with torch.no_grad():
            module[-1].bias.add_(0.01)
        return module


class GivesNan(Honest):
    exact: ClassVar[bool] = False

    def rescaled(self, module: Any) -> Any:
        with torch.no_grad():
            module[-1].bias.fill_(float("nan"))
        return module


class ChoosesTwice(Honest):
    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Technique]:
        return [cls(), cls(strength=4), cls(strength=4)]


class HidesTheDefault(Honest):
    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Technique]:
        return [cls(strength=4), cls()]


class RefusesInWords(Honest):
    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        return "no" if not machine.isa else None


class RaisesItsOwn(Honest):
    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        if len(list(model.content.children())) < 9:
            raise KeyError("6.weight")
        return super().apply(model, data, folder)


@dataclass  # not frozen
class Thawed(Technique):
    takes: ClassVar[Form] = Form.TORCH
    gives: ClassVar[Form] = Form.TORCH
    stage: ClassVar[Stage] = Stage.SHAPE
    choices = Honest.choices
    apply = Honest.apply
    rescaled = Honest.rescaled
    strength: int = 2


@dataclass(frozen=True)
class ForgetsAKnob(Honest):
    def to_json(self) -> dict[str, Any]:
        return {"name": self.name}


@pytest.mark.parametrize(
    ("kind", "check", "words"),
    [
        (MeddlesWithItsInput, contract.check_input_is_unchanged, "the weights"),
        (MeddlesWithTheData, contract.check_input_is_unchanged, "the data"),
        (LeavesFiles, contract.check_input_is_unchanged, "scratch.bin"),
        (GivesAnotherForm, contract.check_made, "declares"),
        (GivesNoFile, contract.check_made, "path of a file"),
        (ForgetsTheLog, contract.check_made, "log"),
        (IsNotExact, contract.check_answers, "says that it is exact"),
        (GivesNan, contract.check_answers, "not finite"),
        (ChoosesTwice, contract.check_choices, "twice"),
        (HidesTheDefault, contract.check_choices, "first choice"),
        (RefusesInWords, contract.check_refuse, "not a RefusalError"),
        (Thawed, contract.check_frozen, "frozen"),
        (ForgetsAKnob, contract.check_json, "came back"),
        (Honest, contract.check_declared, "must lie in honest.py"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_sabotage_is_caught(kind: type[Technique], check: Callable[..., None], words: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=words):
        check(contract.prepare(kind, tmp_path))


def test_an_error_that_is_no_refusal_is_not_swallowed(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        contract.check_refusal(contract.prepare(RaisesItsOwn, tmp_path))


def test_an_honest_technique_passes(tmp_path: Path) -> None:
    subject = contract.prepare(Honest, tmp_path)
    for check in contract.CHECKS:
        if check not in (contract.check_declared, contract.check_lean_import):  # it lies in a file of tests
            check(subject)


def test_a_heavy_import_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(__file__).parent / "toys" / "toy_technique.py"
    (tmp_path / "heavy_technique.py").write_text(
        source.read_text(encoding="utf-8").replace("ToyTechnique", "HeavyTechnique") + "\n\nimport onnx\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    kind = importlib.import_module("heavy_technique").HeavyTechnique
    whole = contract.prepare(Honest, tmp_path)
    contract.check_declared(dataclasses.replace(whole, technique=kind()))
    with pytest.raises(AssertionError, match="also imports"):
        contract.check_lean_import(dataclasses.replace(whole, technique=kind()))
