from __future__ import annotations

import dataclasses
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import accelerando
from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.bundle import Bundle
from accelerando.errors import BundleError, DataError, MissingExtraError, ModelError, UsageError
from accelerando.machine import Machine
from accelerando.plugins import find
from accelerando.recipe import Artifact, Backend, Recipe, Runner
from accelerando.serve.binding import fit
from accelerando.serve.runtime import FastModel, MachineWarning, load
from accelerando.signature import Fields, Port, Signature
from accelerando.testing.bundles import SIGNATURE, write_bundle
from accelerando.testing.fakes import FakeRunner, fake_recipe, fakes_known
from accelerando.workload import Form, Model

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)
TABLE = np.arange(20, dtype=np.float32).reshape(10, 2)
ORT = Recipe((), Onnxruntime())
ORT_ONE = Recipe((), Onnxruntime(threads=1))


def linear(path: Path, batch: int | str = "batch") -> Path:
    """x (batch, 4) -> x @ WEIGHT."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["logits"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    return save(graph, path)


def lookup(path: Path) -> Path:
    """ids (batch, length) and mask (batch, length) -> TABLE[ids] * mask, and the ids."""
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"]),
            helper.make_node("Cast", ["mask"], ["float_mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["float_mask", "last"], ["wide"]),
            helper.make_node("Mul", ["rows", "wide"], ["hidden"]),
            helper.make_node("Identity", ["ids"], ["same"]),
        ],
        "lookup",
        [helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "length"]) for n in ("ids", "mask")],
        [
            helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "length", 2]),
            helper.make_tensor_value_info("same", TensorProto.INT64, ["batch", "length"]),
        ],
        [numpy_helper.from_array(TABLE, "table"), numpy_helper.from_array(np.array([2]), "last")],
    )
    return save(graph, path)


def save(graph: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


LOOKUP = Signature(
    inputs=(Port("ids", "int64", ("batch", "length")), Port("mask", "int64", ("batch", "length"))),
    outputs=(Port("hidden", "float32", ("batch", "length", 2)), Port("same", "int64", ("batch", "length"))),
    parameters=("ids", "mask", "return_dict"),
    positional=0,
    arguments={"ids": {"leaf": 0}, "mask": {"leaf": 1}, "return_dict": {"const": True}},
    result={"object": "ModelOutput", "fields": {"hidden": {"leaf": 0}, "more": {"tuple": [{"leaf": 1}]}}},
)
IDS, MASK = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[1, 1, 0], [1, 0, 0]])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    write_bundle(folder / "b", recipes=[ORT, ORT_ONE], content=linear(folder / "m" / "model.onnx"))
    return folder / "b"


@pytest.fixture(scope="module")
def fast(plain: Path) -> FastModel:
    return load(plain)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> FastModel:
    folder = tmp_path_factory.mktemp("words")
    content = lookup(folder / "m" / "model.onnx")
    write_bundle(folder / "b", recipes=[ORT], content=content, signature=LOOKUP, inputs=[IDS, MASK])
    return load(folder / "b")


X = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)


# --- called like the model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [lambda f: f(X), lambda f: f(x=X), lambda f: f(X.tolist())])
def test_arrays_in_arrays_out(fast: FastModel, call: Any) -> None:
    answer = call(fast)
    assert type(answer) is np.ndarray
    assert np.allclose(answer, X @ WEIGHT, atol=1e-5)


def test_tensors_in_tensors_out(fast: FastModel) -> None:
    answer = fast(torch.from_numpy(X).requires_grad_())
    assert isinstance(answer, torch.Tensor)
    assert torch.allclose(answer, torch.from_numpy(X @ WEIGHT), atol=1e-5)
    assert torch.equal(fast(torch.from_numpy(X).bfloat16()), fast(torch.from_numpy(X).bfloat16().float()))
    answer += 1  # it is the caller's own


def test_keywords_and_the_originals_structure(words: FastModel) -> None:
    for answer in (words(ids=IDS, mask=MASK), words(IDS, mask=MASK), words(IDS, MASK, return_dict=True)):
        assert isinstance(answer, Fields)
        assert np.array_equal(answer.hidden, TABLE[IDS] * MASK[..., None])
        assert np.array_equal(answer["more"][0], IDS)
        assert answer[0] is answer.hidden
    tensors = words(ids=torch.from_numpy(IDS), mask=MASK)
    assert isinstance(tensors.hidden, torch.Tensor)
    assert isinstance(tensors.more[0], torch.Tensor)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(rows=st.integers(1, 6), step=st.sampled_from([1, 2, -1]), order=st.sampled_from("CF"))
def test_the_layout_in_memory_does_not_matter(fast: FastModel, rows: int, step: int, order: Any) -> None:
    array = np.asarray(np.arange(rows * 2 * 4, dtype=np.float32).reshape(rows * 2, 4), order=order)[::step]
    assert np.allclose(fast(array), np.ascontiguousarray(array) @ WEIGHT)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64", "uint8", "bool"])
def test_numbers_become_the_models_floats(fast: FastModel, dtype: str) -> None:
    given = np.arange(8).reshape(2, 4).astype(dtype)
    answer = fast(given)
    assert answer.dtype == np.float32
    assert np.allclose(answer, given.astype(np.float32) @ WEIGHT)


def test_whole_numbers_become_the_models_where_they_fit(words: FastModel) -> None:
    assert np.array_equal(words(IDS.astype(np.int32), MASK.astype(bool)).more[0], IDS)
    narrow = Port("x", "int8", ("batch",))
    assert fit(np.array([-128, 127]), narrow).dtype == np.int8
    with pytest.raises(DataError, match="holds 0 to 128, but the model takes x: int8"):
        fit(np.array([0, 128]), narrow)


# --- what does not fit ------------------------------------------------------------------------------------------


def test_floats_never_become_whole_numbers(words: FastModel) -> None:
    with pytest.raises(DataError, match=r"an input of float64 was given, but the model takes ids: int64"):
        words(IDS.astype(float), MASK)


def test_a_wrong_shape_is_told_in_one_message(fast: FastModel) -> None:
    with pytest.raises(DataError, match=r"shape \(5, 3\) was given, but the model takes x: float32 \(batch, 4\)"):
        fast(X[:, :3])
    with pytest.raises(DataError, match=r"a single sample goes in as x\[None\]"):
        fast(X[0])
    with pytest.raises(DataError, match=r"shape \(5, 1, 4\)"):
        fast(X[:, None])


def test_a_wrong_call_is_told_in_one_message(fast: FastModel, words: FastModel) -> None:
    with pytest.raises(DataError, match="'mask' is missing"):
        words(IDS)
    with pytest.raises(DataError, match="'token' was not there"):
        words(IDS, MASK, token=X)
    with pytest.raises(DataError, match="2 arguments were given"):
        fast(X, X)
    with pytest.raises(DataError, match="'x' was given twice"):
        fast(X, x=X)
    with pytest.raises(DataError, match="'ids' was given twice"):
        words(IDS, ids=IDS)
    with pytest.raises(DataError, match="'ids' is None, but must be an array or a tensor"):
        words(None, MASK)
    with pytest.raises(DataError, match="'x' is of type str, but must be an array or a tensor"):
        fast("hi")
    with pytest.raises(DataError, match="length is 3 in 'ids', but 2 in 'mask'"):
        words(IDS, MASK[:, :2])
    with pytest.raises(DataError, match="batch is 2 in 'ids', but 1 in 'mask'"):
        words(IDS, MASK[:1])


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"pair": [X]}, "'pair' is a list of 1, but must be a tuple or list of 2"),
        ({"pair": (X, "hi")}, "'pair[1]' is of type str, but must be an array or a tensor"),
        ({"pair": (X, X), "more": {"b": X}}, "'more' is a dict of 1, but must be a dict of a, b"),
    ],
)
def test_an_argument_of_another_structure_is_told_in_words(keywords: dict[str, Any], said: str) -> None:
    nodes = {"pair": {"tuple": [{"leaf": 0}, {"leaf": 1}]}, "more": {"dict": {"a": {"leaf": 2}, "b": {"leaf": 3}}}}
    ports = tuple(Port(name, "float32", ("batch", 4)) for name in "wxyz")
    signature = dataclasses.replace(SIGNATURE, inputs=ports, parameters=tuple(nodes), arguments=nodes)
    with pytest.raises(DataError, match=re.escape(said)):
        signature.bind((), keywords)


def test_a_fixed_batch_takes_no_other(tmp_path: Path) -> None:
    ports = (Port("x", "float32", (2, 4)),), (Port("logits", "float32", (2, 3)),)
    signature = dataclasses.replace(SIGNATURE, inputs=ports[0], outputs=ports[1])
    content = linear(tmp_path / "m" / "model.onnx", batch=2)
    write_bundle(tmp_path / "b", recipes=[ORT], content=content, signature=signature, inputs=[X[:2]])
    fixed = load(tmp_path / "b")
    assert np.allclose(fixed(X[:2]), X[:2] @ WEIGHT)
    with pytest.raises(DataError, match="exported for batches of 2 rows and takes no others"):
        fixed(X)


def test_after_closing_it_says_so(plain: Path) -> None:
    with load(plain) as fast:
        fast(X)
    with pytest.raises(UsageError, match="closed"):
        fast(X)
    fast.close()


# --- which rung -------------------------------------------------------------------------------------------------


def test_it_stands_on_the_best_rung_and_says_what_it_is(plain: Path, fast: FastModel) -> None:
    assert fast.number == 1
    assert fast.recipe == ORT_ONE
    assert fast.rung is fast.bundle.ladder.rungs[1]
    assert fast.speedup.mid == pytest.approx(3, rel=0.05)
    assert fast.drop.mid == 0
    assert fast.note == ""
    assert repr(fast).splitlines()[0] == "FastModel(onnxruntime(threads=1)), rung 1 of 1"
    assert "takes x: float32 (batch, 4)" in repr(fast)


def test_any_rung_by_number_or_key(plain: Path) -> None:
    assert load(plain, rung=0).recipe == ORT
    assert load(plain, rung=-1).recipe == ORT_ONE
    assert load(plain, rung=ORT.key).recipe == ORT
    for wrong in (2, -3, "best of all", True):
        with pytest.raises(UsageError, match="there is no rung"):
            load(plain, rung=wrong)


@dataclasses.dataclass(frozen=True)
class Selfish(Backend):
    """A backend like eager: it runs the user's own module."""

    takes: ClassVar[frozenset[Form]] = frozenset({Form.TORCH})
    portable: ClassVar[bool] = False

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Backend]:
        return [cls()]

    def compile(self, model: Model, folder: Path) -> Artifact:
        (folder / "weights").write_bytes(b"w")
        return Artifact.gather(folder)

    def load(self, artifact: Artifact, folder: Path, signature: Signature, skeleton: Any = None) -> Runner:
        assert skeleton is not None
        return FakeRunner(signature)


@dataclasses.dataclass(frozen=True)
class Absent(Selfish):
    """A backend whose package is not installed."""

    portable: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("a_package_that_nobody_has",)


@pytest.fixture
def strangers() -> Iterator[None]:
    for kind in (Selfish, Absent):
        stand_in = ModuleType(kind.__module__)
        setattr(stand_in, kind.__name__, kind)
        sys.modules[f"accelerando.backends.{kind.__name__.lower()}"] = stand_in
    with fakes_known():
        yield
    for name in ("selfish", "absent"):
        del sys.modules[f"accelerando.backends.{name}"]
    find.cache_clear()


@pytest.fixture
def mixed(tmp_path: Path, strangers: None) -> Path:
    """The original, a fake, one that needs a package, and the best one, which needs the module."""
    recipes = [fake_recipe(0), fake_recipe(1), Recipe((), Absent()), Recipe((), Selfish())]
    write_bundle(tmp_path / "b", recipes=recipes, skeleton="a module")
    return tmp_path / "b"


def test_without_the_module_it_stands_on_the_best_portable_rung(mixed: Path) -> None:
    fast = load(mixed)
    assert fast.recipe == fake_recipe(1)
    assert fast.note == (
        "not the best rung, selfish: the rung selfish runs the original's own code; give the module: "
        "load(..., model=model)"
    )
    assert fast.note in repr(fast)
    assert load(mixed, model="a module").recipe == Recipe((), Selfish())


def test_a_rung_that_was_asked_for_by_name_is_that_or_an_error(mixed: Path) -> None:
    with pytest.raises(ModelError, match=r"give the module: load\(\.\.\., model=model\)"):
        load(mixed, rung=3)
    with pytest.raises(MissingExtraError, match="pip install a_package_that_nobody_has"):
        load(mixed, rung=2)


def test_damage_counts_where_it_is_used(tmp_path: Path) -> None:
    content = linear(tmp_path / "m" / "model.onnx")
    bundle = write_bundle(tmp_path / "b", recipes=[ORT, ORT_ONE], content=content)
    file = bundle.folder(bundle.ladder.rungs[1]) / "model.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert load(tmp_path / "b", rung=0)(X).shape == (5, 3)
    with pytest.raises(BundleError, match="hash"):
        load(tmp_path / "b")


# --- elsewhere --------------------------------------------------------------------------------------------------


def elsewhere(path: Path, **changed: Any) -> None:
    content = linear(path / "m" / "model.onnx")
    machine = dataclasses.replace(Machine.look(), **changed)
    write_bundle(path / "b", recipes=[ORT], content=content, machine=machine)


def test_another_machine_or_runtime_is_warned_of(tmp_path: Path) -> None:
    elsewhere(tmp_path, cpu="another", versions=(("onnxruntime", "0.1"),))
    with pytest.warns(MachineWarning, match=r"cpu: .*, was another; onnxruntime: .*, was 0\.1.*accelerando bench"):
        load(tmp_path / "b")


def test_versions_that_the_rung_does_not_use_are_not(tmp_path: Path) -> None:
    elsewhere(tmp_path, versions=(("torch", "0.1"), ("openvino", "0.1")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path / "b")
    assert len(Bundle.open(tmp_path / "b").differences()) == 2


def test_the_public_name_is_the_same_function() -> None:
    assert accelerando.load is load
