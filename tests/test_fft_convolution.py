"""Convolutions by FFT are the same function: for any stride, padding, dilation, groups and length, in any runtime."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from accelerando.adoption import adopt
from accelerando.errors import Reason, RefusalError
from accelerando.techniques import _fft_plan, fft_convolution
from accelerando.techniques._fft_layer import exact_convolution, fft_layer
from accelerando.techniques._parity import ensure_same
from accelerando.techniques.convert_openvino import ConvertOpenvino
from accelerando.techniques.export_onnx import ExportOnnx
from accelerando.techniques.export_torch import ExportTorch
from accelerando.techniques.fft_convolution import FftConvolution
from accelerando.testing.technique_contract import answers, capable, floats
from accelerando.workload import Model, Samples

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's, of its own direct form
FORCED = FftConvolution(gain=0.0)
OFF = 2e-5  # of the largest answer: float32 in another order
FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def take_in(model: nn.Module, data: Any) -> tuple[Model, Samples]:
    workload = adopt(model.eval(), data, metric="cosine")
    return workload.model, workload.calibrate


def sites(model: Model) -> list[nn.Module]:
    return [m for m in model.content.modules() if type(m).__name__ == "FftLayer"]


# --- the layer ----------------------------------------------------------------------------------------------------


@st.composite
def convolutions(draw: Any, rank: int) -> nn.Module:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = tuple(draw(st.integers(1, 40 if rank == 1 else 9)) for _ in range(rank))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    dilation = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding: Any = draw(st.sampled_from(["same", "valid", "numbers"]))
    if padding == "same":
        stride = (1,) * rank
    elif padding == "numbers":
        padding = tuple(draw(st.integers(0, 8)) for _ in range(rank))
    torch.manual_seed(draw(st.integers(0, 100)))
    kind = nn.Conv1d if rank == 1 else nn.Conv2d
    return kind(
        groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3)), kernel, stride, padding, dilation, groups,
        draw(st.booleans()), mode,
    ).eval().requires_grad_(False)  # fmt: skip


def spans(conv: Any) -> list[int]:
    return [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]


def room(conv: Any, extra: int) -> int:
    """A length that the kernel and its padding fit into."""
    return max(max(spans(conv)), max(conv._reversed_padding_repeated_twice) + 1) + extra


def ensure_equal(conv: Any, layer: nn.Module, x: torch.Tensor) -> None:
    want, got = conv(x), layer(x)
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= OFF * max(float(want.abs().max()), 1.0)
    assert float((exact_convolution(conv, x) - want).abs().max()) <= OFF * max(float(want.abs().max()), 1.0)


@FEW
@given(convolutions(1), st.integers(0, 700), st.integers(1, 3), st.booleans())
def test_a_line_is_the_same_for_any_setting_and_length(conv: Any, extra: int, rows: int, dynamic: bool) -> None:
    length = room(conv, extra)
    edges = sum(conv._reversed_padding_repeated_twice)
    plan = _fft_plan.line(length + edges, spans(conv)[0], conv.in_channels, conv.out_channels, conv.groups, dynamic)
    assert plan is not None
    ensure_equal(conv, fft_layer(conv, plan), torch.randn(rows, conv.in_channels, length))


@FEW
@given(convolutions(2), st.integers(0, 20), st.integers(0, 20), st.integers(1, 3))
def test_an_image_is_the_same_for_any_setting_and_size(conv: Any, tall: int, wide: int, rows: int) -> None:
    height, width = room(conv, tall), room(conv, wide)
    edges = conv._reversed_padding_repeated_twice
    plan = _fft_plan.image(height + sum(edges[2:]), width + sum(edges[:2]), tuple(spans(conv)))
    assert plan is not None
    ensure_equal(conv, fft_layer(conv, plan), torch.randn(rows, conv.in_channels, height, width))


@FEW
@given(st.integers(2, 60), st.lists(st.integers(0, 900), min_size=1, max_size=4))
def test_a_plan_for_any_length_serves_every_length(kernel: int, extras: list[int]) -> None:
    conv = nn.Conv1d(2, 3, kernel).requires_grad_(False)
    plan = _fft_plan.line(kernel + max(extras), kernel, 2, 3, 1, dynamic=True)
    assert plan is not None
    layer = fft_layer(conv, plan)
    for extra in (*extras, 2000):
        ensure_equal(conv, layer, torch.randn(2, 2, kernel + extra))


@FEW
@given(st.integers(1, 5000), st.integers(1, 3000), st.booleans())
def test_blocks_cover_every_answer_and_overlap_by_the_kernel(answers_: int, span: int, dynamic: bool) -> None:
    for plan in _fft_plan._lines(answers_, span, dynamic):
        assert plan.blocks is not None
        assert plan.blocks * plan.fresh * plan.columns >= answers_
        assert plan.overlap * plan.columns >= span - 1
        assert plan.blocks == 1 or plan.overlap <= plan.fresh


def test_an_input_longer_than_planned_is_refused_rather_than_cut() -> None:
    conv = nn.Conv1d(1, 1, 64)
    plan = _fft_plan.line(256, 64, 1, 1, 1, dynamic=False)
    assert plan is not None
    assert plan.blocks == 1
    with pytest.raises(ValueError, match="were planned"):
        fft_layer(conv, plan)(torch.randn(1, 1, 2000))


def test_a_kernel_too_long_for_blocks_has_no_plan() -> None:
    assert _fft_plan.line(1 << 20, 1 << 19, 1, 1, 1, dynamic=False) is None
    assert _fft_plan.image(2000, 20, (9, 9)) is None


# --- the technique ------------------------------------------------------------------------------------------------


class Long(nn.Module):
    """A long convolution used twice, a depthwise one, and a short one."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv1d(4, 4, 129, padding="same")
        self.deep = nn.Conv1d(4, 4, 65, groups=4, stride=2)
        self.short = nn.Conv1d(4, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.twice(x)) + x
        return self.short(self.deep(self.twice(x))).mean(-1)


@pytest.fixture(scope="module")
def long() -> tuple[Model, Samples]:
    torch.manual_seed(0)
    return take_in(Long(), floats(24, 4, 400))


@pytest.mark.slow
def test_every_runtime_answers_as_before(long: tuple[Model, Samples], tmp_path: Path) -> None:
    model, data = long
    made = FORCED.apply(model, data, tmp_path)
    assert len(sites(made)) == 2
    assert any("short" not in line and "goes by FFT" in line for line in made.log)
    for folder in ("onnx", "openvino", "torch"):
        (tmp_path / folder).mkdir()
    onnx = ExportOnnx().apply(made, data, tmp_path / "onnx")
    others = [made, onnx, ExportTorch().apply(made, data, tmp_path / "torch")]
    others.append(ConvertOpenvino().apply(onnx, data, tmp_path / "openvino"))
    for rows in (1, 3):
        leaves = [floats(rows, 4, 400, seed=rows)]
        expected = answers(model, leaves)
        for other in others:
            assert ensure_same(model.signature, expected, answers(other, leaves)) < 1e-4, other.form


def test_the_original_is_left_as_it_was(long: tuple[Model, Samples], tmp_path: Path) -> None:
    model, data = long
    before = copy.deepcopy(model.content)
    made = FORCED.apply(model, data, tmp_path)
    assert repr(model.content) == repr(before)
    assert all(torch.equal(a, b) for a, b in zip(model.content.parameters(), before.parameters(), strict=True))
    assert not any("forward" in vars(m) for m in (*model.content.modules(), *made.content.modules()))
    again = cloudpickle.loads(cloudpickle.dumps(copy.deepcopy(made.content)))
    x = torch.randn(2, 4, 400)
    assert torch.equal(again(x), made.content(x))


@pytest.mark.slow
def test_lengths_may_change(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = take_in(nn.Conv1d(3, 5, 100, padding=7), [floats(20, 3, n, seed=n) for n in (150, 333, 700)])
    made = FORCED.apply(model, data, tmp_path)
    (tmp_path / "onnx").mkdir()
    onnx = ExportOnnx().apply(made, data, tmp_path / "onnx")
    for length in (120, 333, 1000):
        leaves = [floats(2, 3, length)]
        for other in (made, onnx):
            assert ensure_same(model.signature, answers(model, leaves), answers(other, leaves)) < 1e-4


def test_only_what_is_measured_faster_is_rewritten(
    long: tuple[Model, Samples], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = long
    asked = []

    def figures(layers: dict[str, Any], x: Any) -> dict[str, tuple[float, str]]:
        asked.append(layers["direct"])
        return {"direct": (2.0 if layers["direct"].groups == 1 else 1.1, "A"), "fft": (1.0, "B")}

    monkeypatch.setattr(fft_convolution, "fastest", figures)
    made = FftConvolution().apply(model, data, tmp_path)
    assert [m for m, _ in made.content.named_children()] == ["twice", "deep", "short"]
    assert [type(m).__name__ for m in made.content.children()] == ["FftLayer", "Conv1d", "Conv1d"]
    assert len(asked) == 2, "a layer is timed once"
    assert any("deep" in line and "left alone" in line and "1.1e+03 ms direct (A)" in line for line in made.log)
    with pytest.raises(RefusalError, match="left alone") as refusal:
        FftConvolution(gain=3.0).apply(model, data, tmp_path)
    assert refusal.value.reason is Reason.NOTHING_TO_DO


@pytest.mark.slow
def test_layers_are_really_timed() -> None:
    torch.manual_seed(0)
    conv = nn.Conv1d(4, 4, 1024).eval().requires_grad_(False)
    plan = _fft_plan.line(4096, 1024, 4, 4, 1, dynamic=False)
    assert plan is not None
    found = fft_convolution.fastest({"direct": conv, "fft": fft_layer(conv, plan)}, torch.randn(1, 4, 4096))
    assert set(found) == {"direct", "fft"}
    assert all(0 < seconds < 60 and tool in ("ONNX Runtime", "OpenVINO") for seconds, tool in found.values())


@pytest.mark.parametrize(
    ("model", "rows"),
    [
        (nn.Conv1d(2, 2, 9), floats(20, 2, 64)),
        (nn.Conv2d(2, 2, 3), floats(20, 2, 9, 9)),
        (nn.Sequential(nn.Flatten(), nn.Linear(128, 4)), floats(20, 2, 64)),
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 100)), floats(20, 2, 200)),
    ],
    ids=["short line", "small image", "none", "parametrized"],
)
def test_a_model_without_large_kernels_is_refused_when_planning(model: nn.Module, rows: Any) -> None:
    taken, _ = take_in(model, rows)
    refusal = FftConvolution().refuse(taken, capable())
    assert refusal is not None
    assert refusal.reason is Reason.NOTHING_TO_DO


def test_images_of_several_sizes_are_left_alone(tmp_path: Path) -> None:
    model, data = take_in(nn.Conv2d(1, 1, 20), [floats(20, 1, n, n) for n in (24, 30)])
    with pytest.raises(RefusalError, match="several sizes"):
        FORCED.apply(model, data, tmp_path)


def test_a_layer_that_answers_differently_is_caught(
    long: tuple[Model, Samples], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(nn.Module):
        def __init__(self, conv: nn.Module, plan: Any) -> None:
            super().__init__()
            self.inner = fft_layer(conv, plan)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * 1.01

    monkeypatch.setattr(fft_convolution, "fft_layer", Wrong)
    with pytest.raises(RefusalError) as refusal:
        FORCED.apply(*long, tmp_path)
    assert refusal.value.reason is Reason.NOT_SAME


def test_a_weight_that_the_model_reads_itself_is_a_refusal(tmp_path: Path) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 100)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) * self.conv.weight.abs().mean()

    with pytest.raises(RefusalError, match="rewritten model fails"):
        FORCED.apply(*take_in(Reads(), floats(20, 2, 300)), tmp_path)


def test_gain_must_be_a_number() -> None:
    with pytest.raises(ValueError, match="gain must be"):
        FftConvolution(gain=-1.0)
    assert np.isfinite(FftConvolution().gain)
