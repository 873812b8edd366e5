"""What every technique must keep, as checks that anyone can run on a technique of their own.

    from accelerando.testing import technique_contract as contract

    @pytest.mark.parametrize("check", contract.CHECKS, ids=lambda c: c.__name__)
    def test_contract(check, tmp_path):
        check(contract.prepare(MyTechnique, tmp_path))

A check raises AssertionError with what was expected and what was found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from accelerando.adoption import adopt
from accelerando.errors import BrokenPluginError, Reason, RefusalError
from accelerando.machine import ISA, Machine
from accelerando.plugins import discover
from accelerando.recipe import Artifact, Stage, Technique, snake
from accelerando.signature import Array, to_numpy
from accelerando.testing import plugin_contract
from accelerando.testing.models import floats, network, stubborn
from accelerando.workload import Chunk, Form, Lessons, Model, Samples, Workload, flat_module

BRIEF_SECONDS = 2  # of retraining, where a technique has a knob for it
LESSONS = "lessons"  # a folder in which techniques that retrain leave checkpoints


@dataclass(frozen=True)
class Subject:
    """A technique, and what it made of a small model.

    Args:
        technique: at its defaults.
        original: the torch model.
        given: the same in the form that the technique takes.
        made: what the technique made of it.
        before, after: fingerprints of `given` and the data, from before and after it was applied.
        strays: files that it left outside of its folder.
    """

    technique: Technique
    original: Model
    given: Model
    made: Model
    before: dict[str, Any]
    after: dict[str, Any]
    strays: tuple[str, ...]


def prepare(kind: type[Technique], folder: Path, model: Any = None, data: Any = None) -> Subject:
    """Apply a technique at its defaults to a small model; one that has a knob `seconds` takes `BRIEF_SECONDS`.

    Args:
        folder: an empty folder.
        model, data: a torch module and what `accelerate` takes as data, where the technique needs others than a
            convolutional network with batch norm, dropout and two consecutive linear layers.

    Raises:
        RefusalError: the technique turns the model away: give one that it takes.
        BrokenPluginError: no chain of exact techniques leads to the form that it takes.
    """
    if model is None:
        model, data = network(), floats(64, 1, 8, 8)
    workload = adopt(model, data, metric="cosine")
    given = _in_form(workload.model, kind.takes, workload.calibrate, folder)
    if kind.stage is Stage.HEAL:
        given = dataclasses.replace(given, lessons=_lessons(workload, folder))
    room = folder / "applied"
    room.mkdir()
    around = {p for p in folder.rglob("*") if p.is_file()}
    before = _fingerprint(given, workload.calibrate)
    made = _brief(kind).apply(given, workload.calibrate, room)
    after = _fingerprint(given, workload.calibrate)
    own = (room, folder / LESSONS)
    strays = {p for p in folder.rglob("*") if p.is_file() and not any(o in p.parents for o in own)} - around
    return Subject(kind(), workload.model, given, made, before, after, tuple(sorted(map(str, strays))))


def _brief(kind: type[Technique]) -> Technique:
    """At its defaults, but for how long it may train."""
    technique: Any = kind()
    return dataclasses.replace(technique, seconds=BRIEF_SECONDS) if hasattr(technique, "seconds") else technique


def _lessons(workload: Workload, folder: Path) -> Lessons:
    """What a technique that retrains is given: the calibration rows to learn from, without labels."""
    rows = Samples(tuple(Chunk(c.inputs, None) for c in workload.calibrate.chunks))
    own = workload.metric, workload.loss, workload.augment
    return Lessons(workload.model.content, rows, workload.select, *own, folder / LESSONS / "0", lambda text: None)


def _in_form(model: Model, form: Form, data: Samples, folder: Path) -> Model:
    """The model in another form, by the shortest chain of exact techniques."""
    chains: list[tuple[type[Any], ...]] = [()]
    for chain in chains:
        at = chain[-1].gives if chain else model.form
        if at is form:
            for step in chain:
                room = folder / snake(step.__name__)
                room.mkdir()
                model = step().apply(model, data, room)
            return model
        passed = {model.form, *(step.gives for step in chain)}
        steps = discover("techniques").values()
        chains += [(*chain, s) for s in steps if s.exact and s.takes is at and s.gives not in passed]
    raise BrokenPluginError(f"no chain of exact techniques turns {model.form.value} into {form.value}")


# --- the checks -------------------------------------------------------------------------------------------------


def check_input_is_unchanged(subject: Subject) -> None:
    """Applying changes neither the model that was given, nor its files, nor the data."""
    changed = [what for what, before in subject.before.items() if subject.after[what] != before]
    assert not changed, f"apply changed {' and '.join(changed)} that it was given: work on a copy"
    assert not subject.strays, f"apply left {', '.join(subject.strays)} outside of its folder"


def check_made(subject: Subject) -> None:
    """It gives the form that it declares, with the same signature, and says something in the log."""
    made, given, gives = subject.made, subject.given, type(subject.technique).gives
    assert made.form is gives, f"it declares {gives}, but gives {made.form}"
    assert made.signature == given.signature, f"the signature became {made.signature}, but was {given.signature}"
    kept = made.log[: len(given.log)] == given.log
    assert kept, f"the log must go on from {given.log}, but is {made.log}: use model.changed(form, content, *lines)"
    assert len(made.log) > len(given.log), "it must say in the log what it did"
    holds = {Form.TORCH: "Module", Form.EXPORTED: "ExportedProgram"}.get(made.form)
    if holds:
        bases = [base.__name__ for base in type(made.content).__mro__]
        assert holds in bases, f"content must be a {holds} in the form {made.form}, but is {type(made.content)}"
    else:
        assert Path(made.content).is_file(), f"content must be the path of a file, but is {made.content!r}"


def check_answers(subject: Subject) -> None:
    """What it made answers in the signature's types and shapes, finite; the same as before where it is exact."""
    ports, rng = subject.original.signature.outputs, np.random.default_rng(7)
    for rows in plugin_contract.ROWS:
        leaves = [_random(port, rows, rng) for port in subject.original.signature.inputs]
        expected, got = answers(subject.original, leaves), answers(subject.made, leaves)
        plugin_contract.ensure_answers(
            ports, expected, got, f"{rows} rows", "it says that it is exact" if subject.technique.exact else ""
        )


def check_frozen(subject: Subject) -> None:
    """It is a frozen dataclass whose fields are knobs with defaults."""
    plugin_contract.ensure_frozen(subject.technique)


def check_json(subject: Subject) -> None:
    """Settings come back from their JSON equal and with the same hash; an unknown knob is refused."""
    kind = type(subject.technique)
    plugin_contract.ensure_kept_as_json(kind, kind.choices(subject.original, capable()))


def check_choices(subject: Subject) -> None:
    """The settings worth trying start with the defaults and hold none twice, for the original in any form."""
    kind = type(subject.technique)
    for model in (subject.original, subject.given):
        plugin_contract.ensure_choices(kind, list(kind.choices(model, capable())))


def check_refuse(subject: Subject) -> None:
    """`refuse` answers rather than raises, in any form, on a machine that can everything and on one that can't."""
    for model in (subject.original, subject.given):
        for machine in (capable(), dataclasses.replace(capable(), isa=(), cores=1)):
            answer = subject.technique.refuse(model, machine)
            if answer is not None:
                assert isinstance(answer, RefusalError), f"refuse gave {answer!r}, not a RefusalError"
                assert isinstance(answer.reason, Reason), f"its reason is {answer.reason!r}"
    answer = subject.technique.refuse(subject.given, capable())
    assert answer is None, f"it was applied, but is refused on a machine that can everything: {answer}"


def check_refusal(subject: Subject) -> None:
    """A torch model that is beyond it is turned away by a RefusalError, not by some library's own."""
    if type(subject.technique).takes is not Form.TORCH:
        return
    model, data = stubborn()
    workload = adopt(model, data, metric="cosine")
    with TemporaryDirectory() as folder:
        try:
            subject.technique.apply(workload.model, workload.calibrate, Path(folder))
        except RefusalError as refusal:
            turned_away = refusal
        else:
            return
    assert isinstance(turned_away.reason, Reason), f"its reason is {turned_away.reason!r}"
    assert turned_away.detail, "a refusal needs a detail: the library's own reason"


def check_declared(subject: Subject) -> None:
    """The class is named like its file, and says what it takes, gives and needs, and when."""
    kind = type(subject.technique)
    for name, wanted in (("takes", Form), ("gives", Form), ("stage", Stage), ("exact", bool), ("needs", tuple)):
        value = getattr(kind, name)
        assert isinstance(value, wanted), f"{name} must be a {wanted.__name__}, but is {value!r}"
    plugin_contract.ensure_named_like_its_file(kind)


def check_lean_import(subject: Subject) -> None:
    """Importing the technique's file brings none of the heavy libraries."""
    plugin_contract.ensure_lean_import(type(subject.technique))


Check = Callable[[Subject], None]
CHECKS: tuple[Check, ...] = (
    check_input_is_unchanged,
    check_made,
    check_answers,
    check_frozen,
    check_json,
    check_choices,
    check_refuse,
    check_refusal,
    check_declared,
    check_lean_import,
)


# --- machines, answers ------------------------------------------------------------------------------------------


def answers(model: Model, leaves: Sequence[Array]) -> list[Array]:
    """The flat answer of a model in any form, by the plainest way to run it."""
    named = {port.name: x for port, x in zip(model.signature.inputs, leaves, strict=True)}
    outputs = [port.name for port in model.signature.outputs]
    if model.form is Form.ONNX:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(model.content), options, providers=["CPUExecutionProvider"])
        return list(session.run(outputs, named))
    if model.form is Form.OPENVINO:
        import openvino

        compiled = openvino.compile_model(str(model.content), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        answer = compiled(named)
        return [np.array(answer[name]) for name in outputs]
    import torch

    module = flat_module(model) if model.form is Form.TORCH else model.content.module(check_guards=False)
    with torch.no_grad():
        return [to_numpy(y) for y in module(*(torch.from_numpy(x.copy()) for x in leaves))]


def capable() -> Machine:
    """This machine, if it had every instruction set that there is on x86."""
    return dataclasses.replace(Machine.look(), isa=tuple(sorted(set(ISA.values()) - {"neon", "dotprod", "sve"})))


def _random(port: Any, rows: int, rng: Any) -> Array:
    shape = [rows, *(axis if isinstance(axis, int) else 7 for axis in port.shape[1:])]
    return (rng.standard_normal(shape) if port.dtype.startswith("float") else rng.integers(0, 5, shape)).astype(
        port.dtype
    )


def _fingerprint(model: Model, data: Samples) -> dict[str, Any]:
    """What must not change when a technique is applied."""
    import hashlib

    digest = hashlib.sha256()
    data.digest(digest)
    found: dict[str, Any] = {"the data": digest.hexdigest()}
    if model.form in (Form.ONNX, Form.OPENVINO):
        return {**found, "the files of the model": Artifact.gather(Path(model.content).parent)}
    state = model.content.state_dict if model.form is Form.EXPORTED else model.content.state_dict()
    found["the weights"] = {k: (str(v.dtype), to_numpy(v).tobytes()) for k, v in state.items()}
    if model.form is Form.TORCH:
        found["the structure of the module"] = repr(model.content), model.content.training
    else:
        found["the program"] = str(model.content.graph)
    return found
