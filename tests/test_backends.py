"""Particulars of each backend; what all of them share is in `test_contracts_backends.py`."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accelerando.adoption import adopt
from accelerando.backends.eager import Eager
from accelerando.backends.inductor import Inductor
from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.backends.openvino import Openvino
from accelerando.errors import ModelError, Reason, RefusalError
from accelerando.machine import Machine
from accelerando.plugins import discover
from accelerando.recipe import Artifact, Backend
from accelerando.signature import Array, Port, Signature, flatten, to_numpy
from accelerando.testing import backend_contract as contract
from accelerando.testing.models import image, two_inputs
from accelerando.workload import Form, Model, Workload, plain_call

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("openvino")

MACHINE = Machine.look()
PLAIN = dataclasses.replace(MACHINE, isa=("avx2",), cores=4)


@pytest.fixture(scope="module")
def image_onnx(tmp_path_factory: pytest.TempPathFactory) -> contract.Subject:
    return contract.prepare(Onnxruntime, "image", tmp_path_factory.mktemp("image"))


def with_knobs(subject: contract.Subject, backend: Backend, folder: Path) -> contract.Subject:
    """The same model, compiled by another backend that takes the same form."""
    folder.mkdir(exist_ok=True)
    artifact = backend.compile(subject.given, folder)
    return dataclasses.replace(subject, backend=backend, folder=folder, artifact=artifact)


def torch_model(module: Any, data: Any) -> Workload:
    return adopt(module.eval(), data, metric="cosine")


def close(expected: list[Array], got: list[Array], tolerance: float = 1e-4) -> None:
    assert len(expected) == len(got)
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_allclose(b, a, atol=tolerance * max(1.0, float(np.abs(a).max())), rtol=0)


# --- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend",
    [
        Onnxruntime(batch=2),
        Onnxruntime(threads=1, batch=5),
        Onnxruntime(optimization="basic", arena=False, spinning=False),
        Onnxruntime(optimization="extended"),
        Openvino(batch=2),
        Openvino(streams=2),
        Openvino(streams=2, batch=5, threads=2),
        Openvino(streams=3),
        Openvino(hint="throughput"),
        Openvino(hint="throughput", batch=5),
    ],
    ids=str,
)
def test_every_setting_answers_alike_at_every_batch(
    backend: Backend, image_onnx: contract.Subject, tmp_path: Path
) -> None:
    subject = with_knobs(image_onnx, backend, tmp_path / "it")
    contract.check_parity(subject)
    contract.check_ready(subject)
    contract.check_inputs(subject)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Onnxruntime(optimization="most"),
        lambda: Onnxruntime(threads=-1),
        lambda: Onnxruntime(batch=-1),
        lambda: Openvino(precision="int4"),
        lambda: Openvino(hint="fast"),
        lambda: Openvino(streams=-1),
        lambda: Eager(threads=-2),
        lambda: Inductor(threads=-2),
    ],
)
def test_a_knob_out_of_range_is_an_error_that_shows_it(make: Any) -> None:
    with pytest.raises(ValueError, match=r"must be .* but"):
        make()


def test_choices_use_what_the_machine_has_and_no_more(image_onnx: contract.Subject) -> None:
    model = image_onnx.original
    assert {c.precision for c in Openvino.choices(model, PLAIN)} == {"f32"}
    amx = dataclasses.replace(PLAIN, isa=("avx512_bf16", "avx512_fp16"))
    assert {c.precision for c in Openvino.choices(model, amx)} == {"f32", "bf16", "f16"}
    one = dataclasses.replace(PLAIN, cores=1)
    assert {c.streams for c in Openvino.choices(model, one)} == {0}
    for kind in discover("backends").values():
        threads = {c.threads for c in kind.choices(model, PLAIN) if hasattr(c, "threads")}
        assert threads <= {0, 1, 2, 4}
        assert len(list(kind.choices(model, PLAIN))) <= 12


def test_a_fixed_batch_leaves_nothing_to_fix_or_to_split(image_onnx: contract.Subject) -> None:
    ports = tuple(Port(p.name, p.dtype, (4, *p.shape[1:])) for p in image_onnx.signature.inputs)
    model = dataclasses.replace(image_onnx.given, signature=dataclasses.replace(image_onnx.signature, inputs=ports))
    for backend, reason in (
        (Onnxruntime(batch=1), Reason.NOTHING_TO_DO),
        (Openvino(batch=1), Reason.NOTHING_TO_DO),
        (Openvino(streams=2), Reason.UNSUPPORTED),
    ):
        refusal = backend.refuse(model, MACHINE)
        assert refusal is not None
        assert refusal.reason is reason
        assert "fixed" in refusal.detail
    assert {c.batch for kind in (Onnxruntime, Openvino) for c in kind.choices(model, MACHINE)} == {0}


# --- threads of the caller --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [Onnxruntime(batch=2), Openvino(batch=2), Openvino(streams=2)], ids=str)
def test_many_callers_at_once_each_get_their_own_answer(
    backend: Backend, image_onnx: contract.Subject, tmp_path: Path
) -> None:
    subject = with_knobs(image_onnx, backend, tmp_path / "it")
    runner, rng = subject.load(), np.random.default_rng(0)
    inputs = [rng.standard_normal((1 + i % 5, 1, 8, 8)).astype(np.float32) for i in range(40)]
    expected = [subject.expected([x]) for x in inputs]
    wrong: list[int] = []

    def work(worker: int) -> None:
        for i in range(worker, len(inputs), 4):
            for _ in range(5):
                if not np.allclose(runner([inputs[i]])[0], expected[i][0], atol=1e-4):
                    wrong.append(i)

    workers = [threading.Thread(target=work, args=(w,)) for w in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# --- eager ------------------------------------------------------------------------------------------------------


def test_shared_weights_are_stored_once_and_stay_shared(tmp_path: Path) -> None:
    subject = contract.prepare(Eager, "two_inputs", tmp_path)
    assert subject.artifact.bytes < 4 * (4 * 6 + 6 + 6 * 6 + 6) + 1000
    contract.check_parity(subject)


def test_the_weights_come_from_the_folder_not_from_the_module_given(tmp_path: Path) -> None:
    subject = contract.prepare(Eager, "image", tmp_path)
    other, _ = image()
    for p in other.parameters():
        p.data.zero_()
    runner = subject.backend.load(subject.artifact, subject.folder, subject.signature, other)
    leaves = subject.batches()[1]
    close(subject.expected(leaves), runner(leaves))
    assert not any(p.any() for p in other.parameters()), "the caller's module must stay as it was"


def test_another_module_is_an_error_in_the_callers_words(tmp_path: Path) -> None:
    subject = contract.prepare(Eager, "image", tmp_path)
    with pytest.raises(ModelError, match="not the one that was optimized"):
        subject.backend.load(subject.artifact, subject.folder, subject.signature, torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="none was given"):
        subject.backend.load(subject.artifact, subject.folder, subject.signature, None)


def test_channels_last_only_where_there_are_images(tmp_path: Path) -> None:
    pictures = torch_model(*image()).model
    pair = torch_model(*two_inputs()).model
    assert Eager(channels_last=True) in list(Eager.choices(pictures, MACHINE))
    assert Eager(channels_last=True) not in list(Eager.choices(pair, MACHINE))
    refusal = Eager(channels_last=True).refuse(pair, MACHINE)
    assert refusal is not None
    assert refusal.reason is Reason.NOTHING_TO_DO
    contract.check_parity(contract.prepare(Eager, "image", tmp_path, channels_last=True))


def test_eager_takes_gradients_inside_the_model(tmp_path: Path) -> None:
    class Force(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def forward(self, x: Any) -> Any:
            with torch.enable_grad():
                x = x.clone().requires_grad_()
                (force,) = torch.autograd.grad(torch.tanh(self.layer(x)).sum(), x)
            return force

    model = torch_model(Force(), np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)).model
    artifact = Eager().compile(model, tmp_path)
    runner = Eager().load(artifact, tmp_path, model.signature, model.content)
    x = np.ones((2, 3), np.float32)
    for _ in range(2):
        close([to_numpy(plain_call(model)([x]))], runner([x]))


def test_eager_has_a_model_without_weights(tmp_path: Path) -> None:
    model = torch_model(torch.nn.ReLU(), np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)).model
    artifact = Eager().compile(model, tmp_path)
    runner = Eager().load(artifact, tmp_path, model.signature, model.content)
    assert runner([-np.ones((1, 3), np.float32)])[0].tolist() == [[0, 0, 0]]


def test_weights_that_can_not_be_written_are_refused(tmp_path: Path) -> None:
    model = torch_model(torch.nn.Linear(3, 2), np.zeros((20, 3), np.float32)).model
    model.content.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(RefusalError) as caught:
        Eager().compile(model, tmp_path)
    assert caught.value.reason is Reason.UNSUPPORTED


# --- inductor ---------------------------------------------------------------------------------------------------


def test_without_a_compiler_inductor_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, image_onnx: contract.Subject
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    refusal = Inductor().refuse(image_onnx.original, MACHINE)
    assert refusal is not None
    assert refusal.reason is Reason.MISSING_TOOL
    assert "install" in refusal.detail
    with pytest.raises(RefusalError):
        Inductor().compile(image_onnx.given, tmp_path)


@pytest.mark.slow
def test_inductor_runs_where_there_is_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = contract.prepare(Inductor, "two_inputs", tmp_path, threads=1)
    monkeypatch.setenv("PATH", str(tmp_path))
    contract.check_fresh_process(subject)


# --- onnxruntime ------------------------------------------------------------------------------------------------


def test_weights_that_lie_beside_the_model_come_along(image_onnx: contract.Subject, tmp_path: Path) -> None:
    import onnx

    source = tmp_path / "source"
    source.mkdir()
    (source / "notes.txt").write_text("not of the model")
    proto = onnx.load(image_onnx.given.content)
    onnx.save(proto, source / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    subject = dataclasses.replace(image_onnx, given=dataclasses.replace(image_onnx.given, content=source / "m.onnx"))
    for backend in (Onnxruntime(), Openvino()):
        moved = with_knobs(subject, backend, tmp_path / backend.name)
        assert "notes.txt" not in {f.path for f in moved.artifact.files}
        (source / "m.data").rename(source / "away.data")
        contract.check_parity(moved)
        (source / "away.data").rename(source / "m.data")


def test_a_file_that_onnx_runtime_does_not_take_is_refused(image_onnx: contract.Subject, tmp_path: Path) -> None:
    import onnx

    proto = onnx.load(image_onnx.given.content)
    proto.ir_version = 99
    onnx.save(proto, tmp_path / "new.onnx")
    (tmp_path / "text.onnx").write_text("this is no model")
    for name in ("new.onnx", "text.onnx"):
        for backend in (Onnxruntime(), Openvino()):
            if name == "new.onnx" and backend == Openvino():
                continue  # OpenVINO does not look at the version
            folder = tmp_path / f"{name}-{backend.name}"
            folder.mkdir()
            with pytest.raises(RefusalError) as caught:
                backend.compile(dataclasses.replace(image_onnx.given, content=tmp_path / name), folder)
            assert caught.value.reason is Reason.UNSUPPORTED


def test_a_file_with_other_ports_than_the_signature_is_refused(image_onnx: contract.Subject, tmp_path: Path) -> None:
    port = Port("other", "float32", ("batch", 1, 8, 8))
    signature = dataclasses.replace(image_onnx.signature, inputs=(port,))
    given = dataclasses.replace(image_onnx.given, signature=signature)
    with pytest.raises(RefusalError, match="other"):
        Onnxruntime().compile(given, tmp_path)
    artifact = with_knobs(image_onnx, Openvino(), tmp_path / "ov").artifact
    with pytest.raises(RefusalError, match="other"):
        Openvino().load(artifact, tmp_path / "ov", signature)


def test_loading_and_running_onnx_runtime_needs_no_torch_and_no_onnx(image_onnx: contract.Subject) -> None:
    code = f"""
import json, sys
from pathlib import Path
import numpy as np
from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.recipe import Artifact
from accelerando.signature import Signature
signature = Signature.from_json(json.loads({__import__("json").dumps(image_onnx.signature.to_json())!r}))
folder = Path({str(image_onnx.folder)!r})
out = Onnxruntime().load(Artifact.gather(folder), folder, signature)([np.zeros((2, 1, 8, 8), np.float32)])
print(out[0].shape, [m for m in ("torch", "onnx", "openvino") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "(2, 10) []", done.stderr
    assert done.stderr == ""


# --- openvino ---------------------------------------------------------------------------------------------------


def test_openvino_keeps_full_precision_unless_asked(image_onnx: contract.Subject, tmp_path: Path) -> None:
    subject = with_knobs(image_onnx, Openvino(), tmp_path / "it")
    compiled = subject.backend._compiled(subject.folder, 0)
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    runner = subject.load()
    for leaves in subject.batches():
        close(subject.expected(leaves), runner(leaves), tolerance=1e-5)  # bf16 is off by more than 1e-3


def test_openvino_refuses_arithmetic_that_the_processor_lacks(image_onnx: contract.Subject) -> None:
    for precision in ("bf16", "f16"):
        refusal = Openvino(precision=precision).refuse(image_onnx.given, PLAIN)
        assert refusal is not None
        assert refusal.reason is Reason.NOT_NATIVE
        assert precision in refusal.detail


def test_openvino_takes_its_own_files(image_onnx: contract.Subject, tmp_path: Path) -> None:
    first = with_knobs(image_onnx, Openvino(), tmp_path / "first")
    own = Model(Form.OPENVINO, first.folder / "model.xml", image_onnx.signature)
    second = with_knobs(dataclasses.replace(first, given=own), Openvino(), tmp_path / "second")
    assert second.artifact == first.artifact
    contract.check_parity(second)


# --- a real model -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", [Eager(), Onnxruntime(batch=1), Openvino(batch=1, streams=2)], ids=str)
def test_a_text_classifier_with_a_mask_and_a_model_output(backend: Backend, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=3
    )
    torch.manual_seed(0)
    module = transformers.BertForSequenceClassification(config)
    rng = np.random.default_rng(0)
    data = [{"input_ids": rng.integers(0, 60, (20, n)), "attention_mask": np.ones((20, n), np.int64)} for n in (7, 12)]
    workload = torch_model(module, data)
    given, folder = contract._in_form(workload, backend, tmp_path), tmp_path / "it"
    folder.mkdir()
    artifact = backend.compile(given, folder)
    runner = backend.load(artifact, folder, workload.model.signature, None if backend.portable else module)
    for rows in (1, 3):
        leaves = [rng.integers(0, 60, (rows, 9)), np.ones((rows, 9), np.int64)]
        close([to_numpy(x) for x in flatten(plain_call(workload.model)(leaves))[0]], runner(leaves))


def test_the_signature_survives_its_json(image_onnx: contract.Subject) -> None:
    runner = image_onnx.backend.load(
        Artifact.from_json(image_onnx.artifact.to_json()),
        image_onnx.folder,
        Signature.from_json(image_onnx.signature.to_json()),
    )
    leaves = image_onnx.batches()[0]
    close(image_onnx.expected(leaves), runner(leaves))
