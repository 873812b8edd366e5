"""What every backend must keep, as checks that anyone can run on a backend of their own.

    from accelerando.testing import backend_contract as contract

    @pytest.mark.parametrize("check", contract.CHECKS, ids=lambda c: c.__name__)
    def test_contract(check, tmp_path):
        check(contract.prepare(MyBackend, "image", tmp_path))

A check raises AssertionError with what was expected and what was found.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.adoption import adopt
from accelerando.errors import BrokenPluginError, RefusalError
from accelerando.machine import Machine
from accelerando.measure.child import Child
from accelerando.plugins import discover
from accelerando.recipe import Artifact, Backend, Runner, plugin_from_json
from accelerando.signature import Array, Signature, flatten, to_numpy
from accelerando.testing import plugin_contract
from accelerando.testing.models import CASES
from accelerando.workload import Form, Model, Samples, Workload, plain_call

LOAD_SECONDS = 240.0


@dataclass(frozen=True)
class Subject:
    """A backend, and a small model that it has compiled.

    Args:
        backend: with its knobs.
        original: the torch model.
        given: the same in a form that the backend takes.
        folder: the folder that the backend compiled into, `artifact` its description.
        samples: rows of data, each chunk of another shape.
    """

    backend: Backend
    original: Model
    given: Model
    folder: Path
    artifact: Artifact
    samples: Samples

    @property
    def signature(self) -> Signature:
        return self.original.signature

    def load(self, folder: Path | None = None) -> Runner:
        """A fresh runner, from another folder where one is given."""
        skeleton = None if self.backend.portable else self.original.content
        return self.backend.load(self.artifact, folder or self.folder, self.signature, skeleton)

    def compile(self, folder: Path) -> Artifact:
        """Compile it into a folder to come, after the members that the backend runs together, if it has any."""
        folder.mkdir()
        for i, member in enumerate(self.backend.members):
            (folder / str(i)).mkdir()
            with tempfile.TemporaryDirectory() as steps:
                model = self.original
                for j, step in enumerate(member.steps):
                    (Path(steps) / str(j)).mkdir()
                    model = step.apply(model, self.samples, Path(steps) / str(j))
                member.backend.compile(model, folder / str(i))
        return self.backend.compile(self.given, folder)

    def batches(self) -> list[list[Array]]:
        """Inputs of one, a few and several rows, of every shape that was seen."""
        return [[np.array(x[:n]) for x in chunk.inputs] for chunk in self.samples.chunks for n in plugin_contract.ROWS]

    def expected(self, leaves: Sequence[Array]) -> list[Array]:
        """The original's own answer, flat."""
        return [to_numpy(x) for x in flatten(plain_call(self.original)(leaves))[0]]


def prepare(kind: type[Backend], case: str, folder: Path, **knobs: Any) -> Subject:
    """Compile the model of a case with a backend, into a folder that is empty.

    Raises:
        RefusalError: the backend, or the export that it needs, turns the model away.
        BrokenPluginError: no exact technique gives a form that the backend takes.
    """
    model, data = CASES[case]()
    workload = adopt(model, data, metric="cosine")
    backend = kind(**knobs)
    given = _in_form(workload, backend, folder)
    if refusal := backend.refuse(given, Machine.look()):
        raise refusal
    subject = Subject(backend, workload.model, given, folder / "compiled", Artifact(()), workload.select)
    return dataclasses.replace(subject, artifact=subject.compile(subject.folder))


def _in_form(workload: Workload, backend: Backend, folder: Path) -> Model:
    if Form.TORCH in backend.takes or backend.members:
        return workload.model
    for technique in discover("techniques").values():
        if technique.takes is Form.TORCH and technique.gives in backend.takes and technique.exact:
            (folder / "exported").mkdir()
            return technique().apply(workload.model, workload.calibrate, folder / "exported")
    raise BrokenPluginError(f"no exact technique turns a torch model into what {backend.name} takes: {backend.takes}")


# --- the checks -------------------------------------------------------------------------------------------------


def check_parity(subject: Subject) -> None:
    """It answers as the original does, at every size of batch and every shape that was seen."""
    runner = subject.load()
    for leaves in subject.batches():
        _ensure_close(subject, subject.expected(leaves), runner([x.copy() for x in leaves]))
    runner.close()


def check_fresh_process(subject: Subject) -> None:
    """What `compile` wrote, and no more, comes to life in a process that knows nothing else."""
    alone = subject.folder.parent / "alone"
    for file in subject.artifact.files:
        (alone / file.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(subject.folder / file.path, alone / file.path)
    leaves = subject.batches()[-1]
    skeleton = None if subject.backend.portable else subject.original.content
    kind = type(subject.backend)
    child = Child(subject.backend.name)
    try:
        got = child.call(
            _answer_afresh, kind, json.dumps(subject.backend.to_json()), json.dumps(subject.artifact.to_json()),
            str(alone), json.dumps(subject.signature.to_json()), skeleton, leaves, timeout=LOAD_SECONDS,
        )  # fmt: skip
    finally:
        child.close()
        shutil.rmtree(alone)
    _ensure_close(subject, subject.expected(leaves), got)


def _answer_afresh(
    kind: type[Backend], knobs: str, artifact: str, folder: str, signature: str, skeleton: Any, leaves: list[Array]
) -> list[Array]:
    backend = plugin_from_json(kind, json.loads(knobs))
    described = Artifact.from_json(json.loads(artifact))
    runner = backend.load(described, Path(folder), Signature.from_json(json.loads(signature)), skeleton)
    return [np.array(x) for x in runner(leaves)]


def check_ready(subject: Subject) -> None:
    """Answers are arrays, whole on return, and later calls do not change them."""
    runner = subject.load()
    batches = subject.batches()
    answers = [runner([x.copy() for x in leaves]) for leaves in batches]
    for answer in answers:
        wrong = [type(x).__name__ for x in answer if not isinstance(x, np.ndarray)]
        assert not wrong, f"answers must be numpy arrays, but some are {wrong}"
    now = [[x.copy() for x in answer] for answer in answers]
    for leaves in reversed(batches):
        runner([x.copy() for x in leaves])
    for before, after in zip(now, answers, strict=True):
        same = all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
        assert same, "an answer changed when the runner was called again: it must be in memory of its own"


def check_inputs(subject: Subject) -> None:
    """Inputs stay as they are, and may be read-only or not contiguous."""
    runner = subject.load()
    for leaves in subject.batches():
        expected, kept = subject.expected(leaves), [x.copy() for x in leaves]
        for _ in range(2):  # the first call may be special
            runner(leaves)
        same = all(np.array_equal(a, b) for a, b in zip(leaves, kept, strict=True))
        assert same, "the runner changed its caller's inputs"
        awkward = [np.repeat(x, 2, axis=0)[::2] for x in leaves]
        for x in awkward:
            x.flags.writeable = False
        _ensure_close(subject, expected, runner(awkward))


def check_shared(subject: Subject) -> None:
    """Told to share memory with its like, it stays the same recipe, and goes on where another like it is closed."""
    backend = subject.backend.here(shared=True, no_such_setting=1)
    told, plain = ((b.to_json(), str(b), hash(b)) for b in (backend, subject.backend))
    assert told == plain, f"a setting of this process changed the recipe: {plain} became {told}"
    one, other = (dataclasses.replace(subject, backend=backend).load() for _ in range(2))
    leaves = subject.batches()[-1]
    expected = subject.expected(leaves)
    _ensure_close(subject, expected, one([x.copy() for x in leaves]))
    one.close()
    del one
    _ensure_close(subject, expected, other([x.copy() for x in leaves]))
    other.close()


def check_model_is_unchanged(subject: Subject) -> None:
    """Compiling changes neither the model that was given nor its files."""
    before = _fingerprint(subject.given)
    again = subject.folder.parent / "again"
    subject.compile(again)
    shutil.rmtree(again)
    assert _fingerprint(subject.given) == before, "compile changed the model that it was given"
    leftover = {p.name for p in subject.folder.parent.iterdir()} - {"exported", "compiled"}
    assert not leftover, f"compile left {sorted(leftover)} beside its folder"


def check_artifact(subject: Subject) -> None:
    """Every file that was written is described, with its size and hash; there is at least one."""
    found = Artifact.gather(subject.folder)
    assert found.files, "compile wrote no file"
    assert subject.artifact == found, f"described are {subject.artifact.files}, but there are {found.files}"


def check_frozen(subject: Subject) -> None:
    """Settings are a frozen dataclass whose fields are knobs with defaults."""
    plugin_contract.ensure_frozen(subject.backend)


def check_json(subject: Subject) -> None:
    """Settings come back from their JSON equal and with the same hash; an unknown knob is refused."""
    kind = type(subject.backend)
    plugin_contract.ensure_kept_as_json(kind, (subject.backend, *kind.choices(subject.original, Machine.look())))


def check_choices(subject: Subject) -> None:
    """The settings worth trying start with the defaults, hold none twice, and none that is refused here.

    One of members is made of what was measured, and has none to begin with.
    """
    kind, machine = type(subject.backend), Machine.look()
    choices = list(kind.choices(subject.original, machine))
    if subject.backend.members:
        assert not choices, f"a backend of members has no choices of its own, but gives {choices}"
        return
    plugin_contract.ensure_choices(kind, choices)
    for choice in choices:
        refusal = choice.refuse(subject.given, machine)
        assert refusal is None, f"{choice} is a choice, but is refused here: {refusal}"


def check_refusal(subject: Subject) -> None:
    """Asked while planning, with the original in whatever form, `refuse` answers rather than raises."""
    for model in (subject.original, subject.given):
        answer = subject.backend.refuse(model, Machine.look())
        assert answer is None or isinstance(answer, RefusalError), f"refuse gave {answer!r}"


def check_declared(subject: Subject) -> None:
    """The class is named like its file, and says what it takes and needs; one of members takes nothing itself."""
    kind = type(subject.backend)
    assert bool(kind.takes) != bool(subject.backend.members), "takes must name at least one form, or there be members"
    assert all(isinstance(form, Form) for form in kind.takes), f"takes must hold forms, but is {kind.takes}"
    assert isinstance(kind.needs, tuple), f"needs must be a tuple of import names, but is {kind.needs!r}"
    plugin_contract.ensure_named_like_its_file(kind)


def check_lean_import(subject: Subject) -> None:
    """Importing the backend's file brings none of the heavy libraries: the runtime must start at once."""
    plugin_contract.ensure_lean_import(type(subject.backend))


Check = Callable[[Subject], None]
CHECKS: tuple[Check, ...] = (
    check_parity,
    check_fresh_process,
    check_ready,
    check_inputs,
    check_shared,
    check_model_is_unchanged,
    check_artifact,
    check_frozen,
    check_json,
    check_choices,
    check_refusal,
    check_declared,
    check_lean_import,
)


def _ensure_close(subject: Subject, expected: Sequence[Array], got: Sequence[Array]) -> None:
    plugin_contract.ensure_answers(
        subject.signature.outputs, expected, got, f"{len(expected[0])} rows", "it must answer as the original does"
    )


def _fingerprint(model: Model) -> Any:
    """What must not change when a model is compiled."""
    if model.form in (Form.ONNX, Form.OPENVINO):
        return Artifact.gather(Path(model.content).parent)
    if model.form is Form.EXPORTED:
        return {k: to_numpy(v).tobytes() for k, v in model.content.state_dict.items()}, str(model.content.graph)
    state = {k: to_numpy(v).tobytes() for k, v in model.content.state_dict().items()}
    return state, model.content.training
