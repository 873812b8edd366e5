"""Zeros: as many as were asked for; and a backend that answers as a dense one does, skipping them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from accelerando.adoption import adopt
from accelerando.backends import onnxruntime_sparse
from accelerando.backends._sparse_products import Compressed, Product, make_sparse, products
from accelerando.backends.onnxruntime_sparse import OnnxruntimeSparse
from accelerando.errors import Reason, RefusalError
from accelerando.signature import Port, Signature
from accelerando.techniques.export_onnx import ExportOnnx
from accelerando.techniques.sparsify import NO_KERNEL, Sparsify
from accelerando.testing.technique_contract import answers, capable, floats
from accelerando.workload import Form, Model, Samples

FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
FEWER = settings(FEW, max_examples=15)


def take_in(model: nn.Module, data: Any) -> tuple[Model, Samples]:
    workload = adopt(model.eval(), data, metric="cosine")
    return workload.model, workload.calibrate


class Tied(nn.Module):
    """An embedding whose weight is the head's too, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(600, 512)
        self.twice = nn.Linear(512, 512)
        self.head = nn.Linear(512, 600, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.twice(torch.relu(self.twice(self.embed(ids))))).mean(1)


# --- the technique ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide() -> tuple[Model, Samples]:
    torch.manual_seed(0)
    return take_in(nn.Sequential(nn.Linear(512, 513), nn.ReLU(), nn.Linear(513, 7)), floats(30, 512))


@FEWER
@given(st.floats(0.0, 1.0, exclude_min=True, exclude_max=True))
def test_a_layer_has_the_zeros_that_were_asked_for_and_they_are_its_smallest(
    wide: tuple[Model, Samples], share: float
) -> None:
    model, data = wide
    before = model.content[0].weight.detach()
    if not round(share * before.numel()):
        with pytest.raises(RefusalError, match="zeros already"):
            Sparsify(share).apply(model, data, Path())
        return
    made = Sparsify(share).apply(model, data, Path()).content
    after = made[0].weight.detach()
    zero = after == 0
    assert int(zero.sum()) == round(share * before.numel())
    assert torch.equal(after[~zero], before[~zero])
    assert not zero.any() or zero.all() or before[zero].abs().max() <= before[~zero].abs().min()
    assert torch.equal(made[2].weight, model.content[2].weight), "a small layer is left alone"


def test_more_is_never_less_and_what_is_zero_stays_so(wide: tuple[Model, Samples]) -> None:
    model, data = wide
    some = Sparsify(0.4).apply(model, data, Path())
    more = Sparsify(0.8).apply(some, data, Path())
    assert bool((more.content[0].weight[some.content[0].weight == 0] == 0).all())
    assert torch.equal(more.content[0].weight, Sparsify(0.8).apply(model, data, Path()).content[0].weight)
    with pytest.raises(RefusalError, match="zeros already"):
        Sparsify(0.5).apply(more, data, Path())


def test_the_original_is_left_as_it_was_and_the_new_one_can_be_trained(wide: tuple[Model, Samples]) -> None:
    model, data = wide
    before = [p.clone() for p in model.content.parameters()]
    made = Sparsify().apply(model, data, Path())
    assert all(torch.equal(a, b) for a, b in zip(model.content.parameters(), before, strict=True))
    made.content.requires_grad_(True)(torch.randn(3, 512)).sum().backward()
    assert all(p.grad is not None for p in made.content.parameters())


def test_a_weight_that_others_hold_is_left_alone() -> None:
    model, data = take_in(Tied(), np.random.default_rng(0).integers(0, 600, (20, 4)))
    made = Sparsify().apply(model, data, Path()).content
    assert torch.equal(made.embed.weight, model.content.embed.weight)
    assert made.head.weight is made.embed.weight
    assert float((made.twice.weight == 0).float().mean()) == pytest.approx(0.95, abs=1e-5)


def test_small_layers_and_patterns_without_a_kernel_are_refused_when_planning(wide: tuple[Model, Samples]) -> None:
    small, _ = take_in(nn.Linear(40, 4), floats(20, 40))
    refusal = Sparsify().refuse(small, capable())
    assert refusal is not None
    assert refusal.reason is Reason.NOTHING_TO_DO
    refusal = Sparsify(0.5, "2:4").refuse(wide[0], capable())
    assert refusal is not None
    assert refusal.reason is Reason.NOT_NATIVE
    assert "1,814 us" in refusal.detail


@pytest.mark.parametrize(("share", "pattern"), [(0.0, "unstructured"), (1.0, "unstructured"), (0.5, "half")])
def test_settings_out_of_range_are_refused(share: float, pattern: str) -> None:
    with pytest.raises(ValueError, match="must"):
        Sparsify(share, pattern)


# --- the backend --------------------------------------------------------------------------------------------------


def run(model: Model, folder: Path, leaves: list[np.ndarray]) -> list[np.ndarray]:
    folder.mkdir()
    backend = OnnxruntimeSparse()
    return backend.load(backend.compile(model, folder), folder, model.signature)(leaves)


@pytest.mark.slow
def test_the_whole_chain_answers_as_the_sparsified_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = take_in(Tied(), np.random.default_rng(0).integers(0, 600, (20, 4)))
    made = Sparsify().apply(model, data, tmp_path)
    (tmp_path / "onnx").mkdir()
    onnx_model = ExportOnnx().apply(made, data, tmp_path / "onnx")
    leaves = [np.random.default_rng(1).integers(0, 600, (3, 4))]
    (want,), (got,) = answers(made, leaves), run(onnx_model, tmp_path / "sparse", leaves)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    proto = onnx.load(tmp_path / "sparse" / "model.onnx")
    assert sum(n.op_type == "SparseToDenseMatMul" for n in proto.graph.node) == 2
    assert len(json.loads((tmp_path / "sparse" / "matrices.json").read_text())) == 1, "one weight, used twice"
    assert (tmp_path / "sparse" / "model.onnx").stat().st_size < 600 * 512 * 4 + 100_000, "the dense weight is gone"


def product(kind: str, rank: int, weight: np.ndarray, turn: bool, bias: bool) -> onnx.ModelProto:
    """x times a weight, given as it is or transposed, by a Gemm or a MatMul."""
    k, n = weight.shape
    stored, nodes, source = weight, [], "w"
    if turn and kind == "MatMul":
        stored, source = weight.T, "turned"
        nodes.append(helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0]))
    elif turn:
        stored = weight.T
    inputs = ["x", source, *(["b"] if bias and kind == "Gemm" else [])]
    nodes.append(helper.make_node(kind, inputs, ["y"], **({"transB": int(turn)} if kind == "Gemm" else {})))
    lead = [f"axis_{i}" for i in range(rank - 1)]
    weights = [numpy_helper.from_array(np.ascontiguousarray(stored), "w")]
    if bias:
        weights.append(numpy_helper.from_array(np.linspace(-1, 1, n, dtype=np.float32), "b"))
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [*lead, size]) for name, size in (("x", k), ("y", n))
    ]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def onnx_model(proto: onnx.ModelProto, path: Path) -> Model:
    onnx.save(proto, path)
    x, y = (
        Port(v.name, "float32", tuple(d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim))
        for v in (*proto.graph.input, *proto.graph.output)
    )
    return Model(Form.ONNX, path, Signature((x,), (y,), ("x",), 1, {"x": {"leaf": 0}}, {"leaf": 0}))


@FEWER
@given(
    st.sampled_from(["MatMul", "Gemm"]),
    st.integers(2, 4),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(1, 5),
    st.floats(0.0, 1.0),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
def test_any_mask_in_any_product_answers_as_dense(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str, rank: int, shape: tuple[int, int], rows: int, zeros: float, turn: bool, bias: bool, seed: int,
) -> None:  # fmt: skip
    rng, rank = np.random.default_rng(seed), 2 if kind == "Gemm" else rank
    weight = (rng.standard_normal(shape) * (rng.random(shape) >= zeros)).astype(np.float32)
    folder = tmp_path_factory.mktemp("mask")
    model = onnx_model(product(kind, rank, weight, turn, bias), folder / "model.onnx")
    leaves = [rng.standard_normal((rows, *[2] * (rank - 2), shape[0])).astype(np.float32)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime_sparse, "LEAST_ZEROS", 0.0)
        patch.setattr(onnxruntime_sparse, "LEAST_NUMBERS", 0)
        (got,) = run(model, folder / "sparse", leaves)
    (want,) = answers(model, leaves)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_scaled_product_and_a_changing_weight_stay_dense() -> None:
    weight = np.zeros((4, 4), np.float32)
    proto = product("Gemm", 2, weight, False, False)
    assert len(list(products(proto.graph))) == 1
    proto.graph.node[0].attribute.append(helper.make_attribute("alpha", 2.0))
    assert not list(products(proto.graph))
    proto = product("MatMul", 2, weight, False, False)
    del proto.graph.initializer[:]
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 4]))
    assert not list(products(proto.graph))


@pytest.mark.parametrize(("zeros", "words"), [(0.8, "with 80.0% zeros"), (None, "512 x 512 has")])
def test_a_model_without_enough_zeros_is_refused_with_figures(zeros: float | None, words: str, tmp_path: Path) -> None:
    weight = np.ones((640, 500) if zeros else (8, 8), np.float32)
    weight[: int(640 * (zeros or 0))] = 0
    model = onnx_model(product("MatMul", 2, weight, False, False), tmp_path / "model.onnx")
    with pytest.raises(RefusalError, match=words) as refusal:
        run(model, tmp_path / "sparse", [])
    assert refusal.value.reason is Reason.NOTHING_TO_DO


@FEW
@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.floats(0, 1), st.integers(0, 1000))
def test_a_compressed_matrix_comes_back_whole(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int], zeros: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    matrix = (rng.standard_normal(shape) * (rng.random(shape) >= zeros)).astype(np.float32)
    folder = tmp_path_factory.mktemp("compressed")
    Compressed.of(matrix).save(folder, "m")
    again, dense = Compressed.open(folder, "m", shape), np.zeros(shape, np.float32)
    rows = np.repeat(np.arange(shape[0]), np.diff(again.starts))
    dense[rows, again.columns] = again.values
    assert np.array_equal(dense, matrix)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("columns", lambda a: np.full_like(a, 1 << 20)),
        ("columns", lambda a: np.full_like(a, -1)),
        ("columns", lambda a: a[:-1]),
        ("columns", lambda a: a.astype(np.int64)),
        ("starts", lambda a: a * 2),
        ("starts", lambda a: np.concatenate([a[:1], a[-1:] + 5, a[2:]])),
        ("starts", lambda a: a[:-1]),
        ("values", lambda a: a[:3]),
        ("values", lambda a: a.reshape(1, -1)),
    ],
)
def test_a_matrix_that_points_outside_is_not_loaded(part: str, change: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((520, 512)) * (rng.random((520, 512)) > 0.95)).astype(np.float32)
    model = onnx_model(product("MatMul", 2, weight, False, False), tmp_path / "model.onnx")
    folder = tmp_path / "sparse"
    folder.mkdir()
    artifact = OnnxruntimeSparse().compile(model, folder)
    path = folder / f"accelerando_sparse_0-{part}.npy"
    np.save(path, change(np.load(path)))
    with pytest.raises(RefusalError) as refusal:
        OnnxruntimeSparse().load(artifact, folder, model.signature)
    assert refusal.value.reason is Reason.DAMAGED


def test_dense_products_beside_sparse_ones_are_untouched() -> None:
    proto = product("Gemm", 2, np.eye(6, dtype=np.float32), True, True)
    before = proto.SerializeToString()
    assert not make_sparse(proto, [])
    again = onnx.load_from_string(before)
    assert list(again.graph.node) == list(proto.graph.node)
    assert list(again.graph.initializer) == list(proto.graph.initializer)


def test_the_makers_figures_are_said_to_be_of_their_own_machine() -> None:
    for said in (onnxruntime_sparse._too_dense([Product(None, "weight", floats(600, 600), 0.5)]), NO_KERNEL):
        assert "on a 2-core AVX-512 machine" in said
