"""Quantization, seen from outside: close answers, fewer bytes, layers that stay in float, and honest refusals."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from accelerando.adoption import adopt
from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Technique
from accelerando.techniques import _sensitivity
from accelerando.techniques._openvino_layers import heavy, quantizers_of
from accelerando.techniques.convert_openvino import ConvertOpenvino
from accelerando.techniques.export_onnx import ExportOnnx
from accelerando.techniques.quantize_dynamic import QuantizeDynamic
from accelerando.techniques.quantize_nncf import QuantizeNncf
from accelerando.techniques.quantize_static import QuantizeStatic
from accelerando.techniques.quantize_weights import QuantizeWeights
from accelerando.techniques.quantize_weights_nncf import QuantizeWeightsNncf
from accelerando.testing.technique_contract import answers, capable
from accelerando.workload import Chunk, Form, Model, Samples

HERE = Machine.look()
NARROW = not HERE.int8 and not HERE.has("neon")  # or sums overflow here, as the techniques know where they choose
ONNX = (QuantizeStatic(narrow=NARROW), QuantizeDynamic(narrow=NARROW), QuantizeWeights())
OPENVINO = (QuantizeNncf(narrow=NARROW), QuantizeWeightsNncf())
ALL = (*ONNX, *OPENVINO)
Ready = tuple[Model, Model, Samples]  # as ONNX, as OPENVINO, calibration rows


class Attentive(nn.Module):
    """(n, 6, 32) -> (n, 4): one transformer block and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm, self.up, self.down, self.head = (
            nn.LayerNorm(32),
            nn.Linear(32, 64),
            nn.Linear(64, 32),
            nn.Linear(32, 4),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))


class Recurrent(nn.Module):
    """(n, 8, 16) -> (n, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 64, batch_first=True), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def net() -> nn.Module:
    """(n, 3, 12, 12) -> (n, 5): four convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 5))


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "net": (net, (3, 12, 12)),
    "mlp": (mlp, (128,)),
    "attentive": (Attentive, (6, 32)),
    "recurrent": (Recurrent, (8, 16)),
}


def rows(shape: tuple[int, ...], seed: int = 0, count: int = 96) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> the model as ONNX and as OPENVINO, and calibration rows; made once."""
    made: dict[str, Ready] = {}

    def make(name: str) -> Ready:
        if name not in made:
            build, shape = MODELS[name]
            torch.manual_seed(0)
            workload = adopt(build().eval(), rows(shape), metric="cosine")
            forms = []
            model = workload.model
            for step in (ExportOnnx(), ConvertOpenvino()):
                model = step.apply(model, workload.calibrate, tmp_path_factory.mktemp(step.name))
                forms.append(replace(model, log=()))
            made[name] = (forms[0], forms[1], workload.calibrate)
        return made[name]

    return make


def given_form(technique: Technique, ready: Ready) -> Model:
    return ready[0] if technique.takes is Form.ONNX else ready[1]


def error(original: Model, made: Model, name: str) -> float:
    """The mean squared error over the variance, on rows that calibration has not seen."""
    leaves = [rows(MODELS[name][1], seed=9, count=32)]
    want, got = answers(original, leaves)[0], answers(made, leaves)[0]
    return float(np.square(want - got).mean() / want.var())


def size(model: Model) -> int:
    """Bytes of weights."""
    path = Path(model.content)
    return path.with_suffix(".bin").stat().st_size if model.form is Form.OPENVINO else path.stat().st_size


def digest(model: Model) -> str:
    folder = Path(model.content).parent
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.iterdir()))).hexdigest()


def operators(model: Model) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(model.content).graph.node)


@pytest.mark.slow
@pytest.mark.parametrize("technique", ALL, ids=str)
@pytest.mark.parametrize("name", ["net", "mlp", "attentive"])
def test_answers_stay_close_and_nothing_that_was_given_changes(
    technique: Technique, name: str, ready: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    original = given_form(technique, ready(name))
    calibrate = ready(name)[2]
    before, data = digest(original), [x.copy() for c in calibrate.chunks for x in c.inputs]
    capfd.readouterr()
    made = technique.apply(original, calibrate, tmp_path)
    assert capfd.readouterr() == ("", ""), "a library's chatter reached the terminal"
    assert error(original, made, name) < 0.01
    assert made.form is original.form
    assert "in int8" in made.log[0]
    assert digest(original) == before
    for was, now in zip(data, (x for c in calibrate.chunks for x in c.inputs), strict=True):
        np.testing.assert_array_equal(was, now)


@pytest.mark.parametrize("technique", ONNX, ids=str)
def test_an_mlp_gets_three_times_smaller(technique: Technique, ready: Any, tmp_path: Path) -> None:
    original = given_form(technique, ready("mlp"))
    assert size(technique.apply(original, ready("mlp")[2], tmp_path)) < size(original) / 3


@pytest.mark.slow
@pytest.mark.parametrize("technique", OPENVINO, ids=str)
def test_an_openvino_mlp_gets_three_times_smaller(technique: Technique, ready: Any, tmp_path: Path) -> None:
    original = given_form(technique, ready("mlp"))
    assert size(technique.apply(original, ready("mlp")[2], tmp_path)) < size(original) / 3


@pytest.mark.parametrize("calibration", ["minmax", "percentile", "entropy"])
@pytest.mark.parametrize("ops", ["all", "heavy"])
def test_every_calibration_is_close(calibration: str, ops: str, ready: Any, tmp_path: Path) -> None:
    original, _, data = ready("net")
    made = QuantizeStatic(calibration=calibration, ops=ops).apply(original, data, tmp_path)
    assert error(original, made, "net") < 0.02


def test_static_leaves_no_convolution_in_float_and_the_outputs_unquantized(ready: Any, tmp_path: Path) -> None:
    original, _, data = ready("net")
    graph = onnx.load(QuantizeStatic().apply(original, data, tmp_path).content).graph
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            assert {makers[name].op_type for name in node.input[:2]} == {"DequantizeLinear"}
    assert makers[graph.output[0].name].op_type != "DequantizeLinear"
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def floats_of(made: Model) -> list[str]:
    """The heavy layers of an ONNX model whose weights are float."""
    graph = onnx.load(made.content).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    return [
        n.name
        for n in graph.node
        if n.op_type in ("Conv", "Gemm", "MatMul") and makers.get(n.input[1]) != "DequantizeLinear"
    ]


@pytest.mark.parametrize(("keep", "count"), [(0.05, 1), (0.3, 2), (0.4, 2), (0.6, 3)])
def test_static_keeps_just_the_layers_that_it_names(keep: float, count: int, ready: Any, tmp_path: Path) -> None:
    original, _, data = ready("net")
    made = QuantizeStatic(keep=keep).apply(original, data, tmp_path)
    kept = floats_of(made)
    assert len(kept) == count
    assert f"{5 - count} of 5 layers in int8" in made.log[0]
    assert sorted(made.log[0].partition("sensitive first: ")[2].split(", ")) == sorted(kept)


def test_the_layer_that_is_kept_is_the_one_that_hurts(tmp_path: Path) -> None:
    """One layer's input has an outlier a thousand times larger than the rest: 8 bits lose everything but it."""

    class Outlier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.hurt, self.last = nn.Linear(16, 16), nn.Linear(17, 16, bias=False), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.first(x))
            return self.last(torch.relu(self.hurt(torch.cat([y, 1000 + 0 * y[:, :1]], 1))))

    torch.manual_seed(0)
    module = Outlier().eval()
    with torch.no_grad():
        module.hurt.weight[:, -1] = 0.0
    workload = adopt(module, rows((16,)), metric="cosine")
    for folder in ("export", "whole", "kept"):
        (tmp_path / folder).mkdir()
    original = ExportOnnx().apply(workload.model, workload.calibrate, tmp_path / "export")
    whole = QuantizeStatic(ops="heavy").apply(original, workload.calibrate, tmp_path / "whole")
    kept = QuantizeStatic(ops="heavy", keep=0.3).apply(original, workload.calibrate, tmp_path / "kept")
    [name] = floats_of(kept)
    node = next(n for n in onnx.load(kept.content).graph.node if n.name == name)
    shapes = {w.name: tuple(w.dims) for w in onnx.load(kept.content).graph.initializer}
    assert 17 in shapes[node.input[1]]
    leaves = [rows((16,), seed=3)]
    want = answers(original, leaves)[0]
    lost, left = (np.square(answers(m, leaves)[0] - want).mean() for m in (whole, kept))
    assert left < lost / 20


@pytest.mark.slow
def test_nncf_keeps_just_the_layers_that_it_names(ready: Any, tmp_path: Path) -> None:
    _, original, data = ready("net")
    made = QuantizeNncf(keep=0.3).apply(original, data, tmp_path)
    import openvino

    layers = heavy(openvino.Core().read_model(str(made.content)))
    kept = [n.get_friendly_name() for n in layers if not quantizers_of(n)]
    assert len(kept) == 2
    assert sorted(made.log[0].partition("sensitive first: ")[2].split(", ")) == sorted(kept)
    assert error(original, made, "net") < 0.01


@pytest.mark.slow
def test_an_lstm_is_quantized_dynamically(ready: Any, tmp_path: Path) -> None:
    original, _, data = ready("recurrent")
    made = QuantizeDynamic().apply(original, data, tmp_path)
    assert operators(made)["DynamicQuantizeLSTM"] == 1
    assert error(original, made, "recurrent") < 0.01
    assert size(made) < size(original) / 2.5


@pytest.mark.parametrize("technique", [QuantizeStatic(keep=0.3), QuantizeDynamic(), QuantizeWeights()], ids=str)
def test_the_same_twice(technique: Technique, ready: Any, tmp_path: Path) -> None:
    original, _, data = ready("attentive")
    leaves, made = [rows((6, 32), seed=4)], []
    for folder in ("once", "again"):
        (tmp_path / folder).mkdir()
        made.append(technique.apply(original, data, tmp_path / folder))
    assert made[0].log == made[1].log
    np.testing.assert_array_equal(answers(made[0], leaves)[0], answers(made[1], leaves)[0])


def test_calibration_sees_the_rows_that_it_is_given_and_no_others(ready: Any, tmp_path: Path) -> None:
    """Rows in [0, 0.1] must give the input a range of just that, whatever other rows there are."""
    original, _, _ = ready("mlp")
    narrow = Samples((Chunk((np.linspace(0, 0.1, 40 * 128, dtype=np.float32).reshape(40, 128),), None),))
    graph = onnx.load(QuantizeStatic().apply(original, narrow, tmp_path).content).graph
    quantize = next(n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == graph.input[0].name)
    scale = next(onnx.numpy_helper.to_array(w) for w in graph.initializer if w.name == quantize.input[1])
    assert float(scale) == pytest.approx(0.1 / 255, rel=1e-3)


@pytest.mark.parametrize("technique", ONNX, ids=str)
def test_what_is_quantized_already_is_refused(technique: Technique, ready: Any, tmp_path: Path) -> None:
    original, _, data = ready("mlp")
    made = QuantizeStatic().apply(original, data, tmp_path)
    refusal = technique.refuse(made, capable())
    assert refusal is not None
    assert refusal.reason is Reason.NOTHING_TO_DO
    assert "already" in refusal.detail


@pytest.mark.parametrize("technique", ALL, ids=str)
def test_a_model_without_layers_is_refused(technique: Technique, tmp_path: Path) -> None:
    workload = adopt(nn.Sequential(nn.ReLU(), nn.Softmax(-1)).eval(), rows((8,)), metric="cosine")
    model = workload.model
    for number, step in enumerate((ExportOnnx(), ConvertOpenvino())):
        if model.form is not technique.takes:
            (tmp_path / str(number)).mkdir()
            model = step.apply(model, workload.calibrate, tmp_path / str(number))
    (tmp_path / "out").mkdir()
    with pytest.raises(RefusalError) as caught:
        raise technique.refuse(model, capable()) or technique.apply(model, workload.calibrate, tmp_path / "out")
    assert caught.value.reason is Reason.NOTHING_TO_DO


@pytest.mark.parametrize("technique", [QuantizeDynamic(), QuantizeWeights()], ids=str)
def test_convolutions_alone_are_nothing_for_dynamic_and_weights(technique: Technique, tmp_path: Path) -> None:
    workload = adopt(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), rows((3, 8, 8)), metric="cosine")
    model = ExportOnnx().apply(workload.model, workload.calibrate, tmp_path)
    refusal = technique.refuse(model, capable())
    assert refusal is not None
    assert refusal.reason is Reason.NOTHING_TO_DO


def test_a_fixed_batch_is_calibrated_in_batches_of_its_size(ready: Any, tmp_path: Path) -> None:
    original, _, _ = ready("mlp")
    graph = onnx.load(original.content)
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].ClearField("dim_param")
        value.type.tensor_type.shape.dim[0].dim_value = 3
    del graph.graph.value_info[:]
    onnx.save(graph, tmp_path / "fixed.onnx")
    signature = replace(
        original.signature,
        inputs=tuple(replace(p, shape=(3, *p.shape[1:])) for p in original.signature.inputs),
        outputs=tuple(replace(p, shape=(3, *p.shape[1:])) for p in original.signature.outputs),
    )
    fixed = Model(Form.ONNX, tmp_path / "fixed.onnx", signature)
    (tmp_path / "out").mkdir()
    made = QuantizeStatic().apply(fixed, Samples((Chunk((rows((128,), count=20),), None),)), tmp_path / "out")
    assert answers(made, [rows((128,), count=3)])[0].shape == (3, 5)
    with pytest.raises(RefusalError, match="batches of 3"):
        QuantizeStatic().apply(fixed, Samples((Chunk((rows((128,), count=2),), None),)), tmp_path / "out")


def test_weights_that_two_layers_share_are_quantized_once_each(tmp_path: Path) -> None:
    shared = nn.Linear(16, 16)
    workload = adopt(nn.Sequential(shared, nn.ReLU(), shared).eval(), rows((16,)), metric="cosine")
    for folder in ("export", "dynamic", "static", "weights"):
        (tmp_path / folder).mkdir()
    original = ExportOnnx().apply(workload.model, workload.calibrate, tmp_path / "export")
    leaves = [rows((16,), seed=5)]
    want = answers(original, leaves)[0]
    for technique in ONNX:
        made = technique.apply(original, workload.calibrate, tmp_path / technique.name.removeprefix("quantize_"))
        assert np.square(answers(made, leaves)[0] - want).mean() < 0.01 * want.var(), technique


@pytest.mark.parametrize(
    "knobs", [{"calibration": "max"}, {"ops": "none"}, {"keep": 1.0}, {"keep": -0.1}, {"activations": "int4"}], ids=str
)
def test_a_wrong_knob_says_what_is_right(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        QuantizeStatic(**knobs)


def test_choices_fit_the_processor() -> None:
    machine = Machine.look()
    old = replace(machine, isa=("avx2",))
    arm = replace(machine, isa=("dotprod", "neon"))
    onnx_model = Model(Form.ONNX, Path("none.onnx"), None)
    for technique in (QuantizeStatic, QuantizeDynamic, QuantizeNncf):
        assert all(c.narrow for c in technique.choices(onnx_model, old)), technique
        assert not any(c.narrow for c in technique.choices(onnx_model, arm)), technique
    assert all(c.activations == "int8" and not c.narrow for c in QuantizeStatic.choices(onnx_model, arm))
    assert next(iter(QuantizeStatic.choices(onnx_model, capable()))) == QuantizeStatic()


@pytest.mark.slow
def test_smoothing_is_for_transformers(ready: Any, tmp_path: Path) -> None:
    refusal = QuantizeNncf(smooth=True).refuse(ready("net")[1], capable())
    assert refusal is not None
    assert "attention" in refusal.detail
    _, original, data = ready("attentive")
    assert QuantizeNncf(smooth=True).refuse(original, capable()) is None
    made = QuantizeNncf(smooth=True).apply(original, data, tmp_path)
    assert error(original, made, "attentive") < 0.5


# --- the ranking -------------------------------------------------------------------------------------------------


@given(
    errors=st.lists(st.floats(0, 10), min_size=1, max_size=20),
    keep=st.sampled_from([0.0, 0.05, 0.15, 0.3, 0.99]),
)
def test_the_layers_kept_are_the_worst(errors: list[float], keep: float) -> None:
    layers = [str(i) for i in range(len(errors))]
    zero = [[np.ones((1, 1), np.float32)]]
    kept = _sensitivity.kept_layers(
        layers, keep, lambda: zero, lambda layer: [[np.full((1, 1), 1 + errors[int(layer)], np.float32)]]
    )
    assert len(kept) == len(set(kept)) == _sensitivity.keep_count(keep, len(layers))
    seen = [np.square(np.float64(np.float32(1 + e)) - 1) for e in errors]
    if 0 < len(kept) < len(layers):
        assert min(seen[int(k)] for k in kept) >= max(s for i, s in enumerate(seen) if str(i) not in kept)


def test_nothing_is_measured_where_nothing_is_kept() -> None:
    def never(layer: str = "") -> Any:
        raise AssertionError("measured without need")

    assert _sensitivity.kept_layers(["a", "b"], 0.0, never, never) == []


def test_a_layer_that_gives_nan_is_the_worst() -> None:
    expected = [[np.ones(3, np.float32), np.arange(3)]]
    assert _sensitivity.output_error(expected, [[np.full(3, np.nan, np.float32), np.arange(3)]]) == np.inf
    assert _sensitivity.output_error(expected, expected) == 0.0
