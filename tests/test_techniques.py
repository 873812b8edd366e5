"""What is particular to each exact technique; what they share is in the contract."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from accelerando.adoption import adopt
from accelerando.errors import Reason, RefusalError
from accelerando.signature import Port, Signature
from accelerando.techniques import _linear_maps
from accelerando.techniques._parity import ensure_same
from accelerando.techniques.convert_openvino import ConvertOpenvino
from accelerando.techniques.export_onnx import ExportOnnx
from accelerando.techniques.export_torch import ExportTorch
from accelerando.techniques.fold import Fold
from accelerando.techniques.half import Half
from accelerando.testing.technique_contract import answers, capable, floats, stubborn
from accelerando.workload import Chunk, Form, Model, Samples


def take_in(model: nn.Module, data: Any) -> tuple[Model, Samples]:
    workload = adopt(model, data, metric="cosine")
    return workload.model, workload.calibrate


def ensure_alike(before: Model, after: Model, *batches: list[np.ndarray]) -> None:
    for leaves in batches:
        ensure_same(before.signature, answers(before, leaves), answers(after, leaves))


class Reads(nn.Module):
    """Token numbers of several lengths with a mask, to a dict that holds one tensor twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        states = self.encoder(self.embed(ids) * (1 if mask is None else mask[..., None]))
        logits = self.head(states[:, 0])
        return {"logits": logits, "same": logits, "best": logits.argmax(1)}


def sentences() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {"ids": rng.integers(0, 20, (16, n)), "mask": rng.integers(0, 2, (16, n)).astype(np.float32)} for n in (5, 9)
    ]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Samples, Model]:
    torch.manual_seed(0)
    model, data = take_in(Reads().eval(), sentences())
    return model, data, ExportOnnx().apply(model, data, tmp_path_factory.mktemp("reads"))


# --- export_onnx ------------------------------------------------------------------------------------------------


def test_export_keeps_names_order_and_dynamic_axes(read: tuple[Model, Samples, Model]) -> None:
    model, _, exported = read
    proto = onnx.load(exported.content)
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*proto.graph.input, *proto.graph.output)
    }
    assert list(shapes) == ["ids", "mask", "logits", "same", "best"]
    assert shapes["ids"] == shapes["mask"] == list(model.signature.inputs[0].shape)
    assert shapes["logits"] == ["batch", 3]
    rng = np.random.default_rng(1)
    for rows, length in ((1, 5), (3, 9), (32, 4), (1, 1)):
        leaves = [rng.integers(0, 20, (rows, length)), np.ones((rows, length), np.float32)]
        ensure_alike(model, exported, leaves)


def test_export_leaves_nothing_stale_or_private(read: tuple[Model, Samples, Model]) -> None:
    proto = onnx.load(read[2].content)
    assert proto.ir_version <= 13
    assert not proto.graph.value_info
    assert str(Path(__file__).parent).encode() not in Path(read[2].content).read_bytes()
    assert "by dynamo, opset 20" in read[2].log[-1]


def test_a_model_with_attention_may_try_it_as_one_operator(read: tuple[Model, Samples, Model]) -> None:
    model = read[0]
    assert [c.opset for c in ExportOnnx.choices(model, capable())] == [20, 23]
    plain, _ = take_in(nn.Linear(4, 3), floats(16, 4))
    assert list(ExportOnnx.choices(plain, capable())) == [ExportOnnx()]


@pytest.mark.parametrize("technique", [ExportOnnx(), ExportTorch()], ids=lambda t: t.name)
def test_a_model_that_branches_on_values_is_refused_in_the_exporters_words(technique: Any, tmp_path: Path) -> None:
    model, data = take_in(*stubborn())
    with pytest.raises(RefusalError, match="data-dependent") as caught:
        technique.apply(model, data, tmp_path)
    assert caught.value.reason is Reason.EXPORT_FAILED
    assert not list(tmp_path.iterdir())


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


@pytest.mark.slow
def test_where_the_first_exporter_fails_the_second_is_tried_and_the_log_says_so(tmp_path: Path) -> None:
    model, data = take_in(LastState().eval(), [floats(16, 5, 3), floats(16, 9, 3)])
    exported = ExportOnnx().apply(model, data, tmp_path)
    if len(exported.log) > 1:  # a later torch may not need the second
        assert "the dynamo" in exported.log[0]
        assert "by torchscript" in exported.log[1]
    ensure_alike(model, exported, [floats(1, 5, 3)], [floats(4, 12, 3)])
    ensure_alike(model, model, [floats(4, 12, 3)])  # tracing left the original's weight lists as they were


class Counts(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * len(x.tolist())


def test_a_size_that_was_baked_in_is_seen(tmp_path: Path) -> None:
    """A tracer writes the number of rows into the graph as a constant: right for the example only."""
    model, data = take_in(nn.Sequential(nn.Linear(4, 3), Counts()).eval(), floats(16, 4))
    with pytest.raises(RefusalError) as caught:
        ExportOnnx(exporter="torchscript").apply(model, data, tmp_path)
    assert caught.value.reason is Reason.NOT_SAME


def test_half_precision_weights_do_not_go_to_onnx() -> None:
    model, _ = take_in(nn.Linear(4, 3), floats(16, 4))
    refusal = ExportOnnx().refuse(replace(model, content=nn.Linear(4, 3).bfloat16()), capable())
    assert refusal is not None
    assert refusal.reason is Reason.UNSUPPORTED
    assert ExportOnnx().refuse(model, capable()) is None


def test_knobs_are_checked() -> None:
    with pytest.raises(ValueError, match="exporter must be one of"):
        ExportOnnx(exporter="magic")
    with pytest.raises(ValueError, match="dtype must be one of"):
        Half(dtype="int3")


# --- parity: the judge of all exact techniques ------------------------------------------------------------------

ONE = Signature((), (Port("y", "float32", ("batch", 2)),), (), 0, {}, {"leaf": 0})
WANT = np.array([[1.0, -2.0]], np.float32)


@pytest.mark.parametrize(
    ("have", "reason"),
    [
        (WANT + 0.01, Reason.NOT_SAME),
        (WANT * np.nan, Reason.NOT_SAME),
        (WANT.astype(np.float64), Reason.WRONG_OUTPUT),
        (WANT[:, :1], Reason.WRONG_OUTPUT),
    ],
)
def test_sabotaged_answers_are_seen(have: np.ndarray, reason: Reason) -> None:
    assert ensure_same(ONE, [WANT], [WANT + np.float32(1e-6)]) < 1e-5
    with pytest.raises(RefusalError) as caught:
        ensure_same(ONE, [WANT], [have])
    assert caught.value.reason is reason


def test_other_labels_are_seen() -> None:
    with pytest.raises(RefusalError, match=r"differs in 50.0% of its entries"):
        ensure_same(ONE, [np.array([1, 2])], [np.array([1, 3])])


# --- export_torch and half --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Samples, Model]:
    torch.manual_seed(0)
    model, data = take_in(Reads().eval(), sentences())
    return model, data, ExportTorch().apply(model, data, tmp_path_factory.mktemp("program"))


def test_a_program_takes_one_row_and_other_lengths(program: tuple[Model, Samples, Model]) -> None:
    model, _, exported = program
    rng = np.random.default_rng(2)
    for rows, length in ((1, 5), (7, 3)):
        ensure_alike(model, exported, [rng.integers(0, 20, (rows, length)), np.ones((rows, length), np.float32)])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_computes_in_16_bits_and_answers_as_before(
    dtype: str, program: tuple[Model, Samples, Model], tmp_path: Path
) -> None:
    _, data, exported = program
    halved = Half(dtype=dtype).apply(exported, data, tmp_path)
    kinds = {str(t.dtype) for t in halved.content.state_dict.values()}
    assert kinds == {"torch.bfloat16" if dtype == "bf16" else "torch.float16"}
    leaves = [np.arange(12).reshape(2, 6), np.ones((2, 6), np.float32)]
    want, have = answers(exported, leaves), answers(halved, leaves)
    assert [x.dtype for x in have] == [x.dtype for x in want]
    off = np.abs(have[0] - want[0]).max() / np.abs(want[0]).max()
    assert 0 < off < 0.05
    again = Half(dtype=dtype).refuse(halved, capable())
    assert again is not None
    assert again.reason is Reason.NOTHING_TO_DO


def test_half_is_refused_where_the_machine_has_no_such_products(program: tuple[Model, Samples, Model]) -> None:
    old = replace(capable(), isa=("avx2",))
    for half in (Half(), Half(dtype="fp16")):
        refusal = half.refuse(program[0], old)
        assert refusal is not None
        assert refusal.reason is Reason.NOT_NATIVE
    assert Half().refuse(program[2], capable()) is None


def test_half_that_overflows_is_refused(tmp_path: Path) -> None:
    class Large(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 300.0) * 300.0

    model, data = take_in(Large(), floats(16, 4) + 5)
    exported = ExportTorch().apply(model, data, tmp_path)
    with pytest.raises(RefusalError) as caught:
        Half(dtype="fp16").apply(exported, data, tmp_path)
    assert caught.value.reason is Reason.NOT_FINITE


# --- fold -------------------------------------------------------------------------------------------------------


def graph_of(nodes: list[Any], weights: dict[str, Any], x: tuple[Any, ...], path: Path) -> tuple[Model, Samples]:
    """An ONNX model from x to y, whose other values are named in its nodes, and data for it."""
    tensors = [numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items()]
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x), onnx.ValueInfoProto(name="y")]
    ends[1].type.tensor_type.elem_type = TensorProto.FLOAT
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    proto = onnx.shape_inference.infer_shapes(proto)
    onnx.checker.check_model(proto)
    path.mkdir(exist_ok=True)
    onnx.save(proto, path / "given.onnx")
    ins = Port("x", "float32", tuple(x))
    signature = Signature((ins,), (Port("y", "float32", ("batch",)),), ("x",), 1, {"x": {"leaf": 0}}, {"leaf": 0})
    rows = floats(8, *(a if isinstance(a, int) else 6 for a in x[1:]))
    return Model(Form.ONNX, path / "given.onnx", signature), Samples((Chunk((rows,), None),))


def fold(model: Model, data: Samples, folder: Path) -> tuple[Model, Counter[str]]:
    folder.mkdir(exist_ok=True)
    folded = Fold().apply(model, data, folder)
    return folded, Counter(n.op_type for n in onnx.load(folded.content).graph.node)


def node(kind: str, inputs: str, out: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), [out], **attributes)


def test_two_linear_layers_become_one_where_that_is_cheaper(tmp_path: Path) -> None:
    weights = {"w": floats(6, 9), "b": floats(9), "v": floats(9, 4, seed=1), "c": floats(4)}
    nodes = [node("MatMul", "x w", "h"), node("Add", "h b", "i"), node("MatMul", "i v", "j"), node("Add", "c j", "y")]
    model, data = graph_of(nodes, weights, ("batch", 6), tmp_path)
    folded, found = fold(model, data, tmp_path / "out")
    assert found["MatMul"] + found["Gemm"] == 1
    assert "through 9 features became one" in " ".join(folded.log)
    ensure_alike(model, folded, [floats(1, 6, seed=3)], [floats(5, 6, seed=3)])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    widths=st.lists(st.integers(1, 12), min_size=3, max_size=5),
    transposed=st.booleans(),
    biased=st.booleans(),
    gemm=st.lists(st.booleans(), min_size=4, max_size=4),
)
@example(widths=[2, 1, 2, 1], transposed=False, biased=False, gemm=[False] * 4)  # merged twice into one output
def test_any_chain_of_linear_layers_stays_the_same_and_never_gets_dearer(
    widths: list[int], transposed: bool, biased: bool, gemm: list[bool], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, nodes, weights, before = tmp_path_factory.mktemp("chain"), [], {}, "x"
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        out = "y" if i == len(widths) - 2 else f"h{i}"
        flip = transposed and gemm[i]
        weights[f"w{i}"] = floats(*((b, a) if flip else (a, b)), seed=i)
        attributes = {"transB": int(flip), "alpha": 0.5, "beta": 2.0} if gemm[i] else {}
        bias = f" b{i}" if biased and gemm[i] else ""
        if bias:
            weights[f"b{i}"] = floats(b, seed=9 + i)
        nodes.append(node("Gemm" if gemm[i] else "MatMul", f"{before} w{i}{bias}", out, **attributes))
        before = out
    model, data = graph_of(nodes, weights, ("batch", widths[0]), path)
    work = sum(a * b for a, b in itertools.pairwise(widths))
    try:
        folded, _ = fold(model, data, path / "out")
    except RefusalError as refusal:
        assert refusal.reason is Reason.NOTHING_TO_DO  # noqa: PT017  hypothesis needs both ways
        return
    ensure_alike(model, folded, [floats(3, widths[0], seed=5)])
    sizes = [t.dims for t in onnx.load(folded.content).graph.initializer if len(t.dims) == 2]
    assert sum(int(np.prod(d)) for d in sizes) <= work


def test_what_is_not_cheaper_or_read_elsewhere_stays(tmp_path: Path) -> None:
    narrow = {"w": floats(8, 2), "v": floats(2, 8)}  # a bottleneck: 32 products, merged it would be 64
    model, data = graph_of([node("MatMul", "x w", "h"), node("MatMul", "h v", "y")], narrow, ("batch", 8), tmp_path)
    with pytest.raises(RefusalError) as caught:
        fold(model, data, tmp_path / "a")
    assert caught.value.reason is Reason.NOTHING_TO_DO
    shared = [node("MatMul", "x w", "h"), node("MatMul", "h w", "i"), node("Add", "h i", "y")]
    model, data = graph_of(shared, {"w": floats(8, 8)}, ("batch", 8), tmp_path / "s")
    with pytest.raises(RefusalError) as caught:
        fold(model, data, tmp_path / "b")
    assert caught.value.reason is Reason.NOTHING_TO_DO


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        ({"kernel": 3, "pads": 1, "strides": 2}, {"kernel": 1}, True),
        ({"kernel": 1}, {"kernel": 3, "strides": 2}, True),
        ({"kernel": 1}, {"kernel": 3, "pads": 1}, False),  # the padding would see the first one's bias
        ({"kernel": 3}, {"kernel": 1, "strides": 2}, False),
        ({"kernel": 3}, {"kernel": 3}, False),
    ],
)
def test_convolutions_merge_where_that_is_provable(first: Any, second: Any, merged: bool, tmp_path: Path) -> None:
    def conv(name: str, before: str, out: str, kernel: int, pads: int = 0, strides: int = 1) -> Any:
        attributes = {"pads": [pads] * 4, "strides": [strides] * 2, "kernel_shape": [kernel] * 2}
        return node("Conv", f"{before} {name} {name}b", out, **attributes)

    def weight(out: int, into: int, kernel: int, seed: int) -> np.ndarray:
        return floats(out, into, kernel, kernel, seed=seed)

    weights = {
        "v": weight(12, 2, first["kernel"], 0), "vb": floats(12), "w": weight(3, 12, second["kernel"], 1),
        "wb": floats(3, seed=4),
    }  # fmt: skip
    nodes = [conv("v", "x", "h", **first), conv("w", "h", "y", **second)]
    model, data = graph_of(nodes, weights, ("batch", 2, 9, 9), tmp_path)
    if merged:
        folded, found = fold(model, data, tmp_path / "out")
        assert found == {"Conv": 1}
        ensure_alike(model, folded, [floats(3, 2, 9, 9, seed=8)])
    else:
        with pytest.raises(RefusalError) as caught:
            fold(model, data, tmp_path / "out")
        assert caught.value.reason is Reason.NOTHING_TO_DO


def test_batch_norm_and_dropout_go(tmp_path: Path) -> None:
    weights = {"w": floats(4, 2, 3, 3), "s": floats(4), "b": floats(4), "m": floats(4), "v": np.abs(floats(4)) + 1}
    nodes = [node("Conv", "x w", "h"), node("BatchNormalization", "h s b m v", "i"), node("Dropout", "i", "y")]
    model, data = graph_of(nodes, weights, ("batch", 2, 6, 6), tmp_path)
    folded, found = fold(model, data, tmp_path / "out")
    assert found == {"Conv": 1}
    ensure_alike(model, folded, [floats(3, 2, 6, 6, seed=2)])


def feed_forward(index: int, path: Path, second_reader: bool = False) -> tuple[Model, Samples]:
    """A residual feed-forward block over (batch, length, 8), of which one row of the length is read."""
    weights = {
        "g": floats(8), "w": floats(8, 16), "b": floats(16), "v": floats(16, 8), "i": np.int64(index),
        "t": np.float32([1, 2]).reshape(1, 2, 1)[:, :1],
    }  # fmt: skip
    nodes = [
        node("Relu", "x", "r"), node("LayerNormalization", "r g", "n"), node("MatMul", "n w", "h"),
        node("Add", "h b", "j"), node("Relu", "j", "k"), node("MatMul", "k v", "l"), node("Mul", "l t", "m"),
        node("Add", "r m", "s"), node("Gather", "s i", "p", axis=1),
    ]  # fmt: skip
    if second_reader:
        return graph_of(
            [*nodes, node("ReduceMax", "s", "z", keepdims=0), node("Add", "p z", "y")], weights, ("batch", 6, 8), path
        )
    return graph_of([*nodes, node("Neg", "p", "y")], weights, ("batch", "length", 8), path)


@pytest.mark.parametrize("index", [0, -1])
def test_rows_that_nobody_reads_are_dropped_before_the_work(index: int, tmp_path: Path) -> None:
    model, data = feed_forward(index, tmp_path)
    folded, _ = fold(model, data, tmp_path / "out")
    graph = onnx.load(folded.content).graph
    kinds = [n.op_type for n in graph.node]
    assert kinds.index("Gather") < kinds.index("MatMul")
    assert "work on the one row that is read" in " ".join(folded.log)
    ensure_alike(model, folded, [floats(1, 6, 8, seed=3)], [floats(3, 11, 8, seed=3)], [floats(3, 1, 8, seed=3)])


def test_rows_that_somebody_else_reads_stay(tmp_path: Path) -> None:
    model, data = feed_forward(0, tmp_path, second_reader=True)
    with pytest.raises(RefusalError) as caught:
        fold(model, data, tmp_path / "out")
    assert caught.value.reason is Reason.NOTHING_TO_DO


def test_sabotage_a_rewrite_that_is_wrong_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear_maps, "_bias", lambda first, second, mixing: first.bias[: len(mixing)])
    weights = {"w": floats(6, 9), "b": floats(9), "v": floats(9, 4)}
    nodes = [node("Gemm", "x w b", "h"), node("Gemm", "h v", "y")]
    model, data = graph_of(nodes, weights, ("batch", 6), tmp_path)
    with pytest.raises(RefusalError) as caught:
        fold(model, data, tmp_path / "out")
    assert caught.value.reason is Reason.NOT_SAME


# --- convert_openvino -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_openvino_keeps_names_and_full_precision(read: tuple[Model, Samples, Model], tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model, data, exported = read
    converted = ConvertOpenvino().apply(exported, data, tmp_path)
    ports = openvino.Core().read_model(converted.content)
    assert [p.any_name for p in ports.inputs] == ["ids", "mask"]
    assert [p.any_name for p in ports.outputs] == ["logits", "same", "best"]
    assert not any(o.get_element_type().to_string() == "f16" for o in ports.get_ops() if o.get_output_size() == 1
                   for o in [o.output(0)])  # fmt: skip
    ensure_alike(model, converted, [np.arange(12).reshape(2, 6), np.ones((2, 6), np.float32)])


def test_what_openvino_does_not_take_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(RefusalError, match="OpenVINO does not take it") as caught:
        ConvertOpenvino().apply(Model(Form.ONNX, tmp_path / "broken.onnx", ONE), Samples(()), tmp_path)
    assert caught.value.reason is Reason.UNSUPPORTED
