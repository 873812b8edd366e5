"""Layers that become smaller ones: how much is lost, what is left whole, and that the rest is as before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
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
from accelerando.machine import Machine
from accelerando.techniques import low_rank
from accelerando.techniques._blocks import observe
from accelerando.techniques._factors import Factors, observe_layers
from accelerando.techniques._tucker import three, triple
from accelerando.techniques.export_onnx import ExportOnnx
from accelerando.techniques.low_rank import LowRank
from accelerando.testing import technique_contract as contract
from accelerando.testing.technique_contract import answers, floats
from accelerando.workload import Form, Model, Samples

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the encoder's own


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def take_in(model: nn.Module, data: Any) -> tuple[Model, Samples]:
    workload = adopt(model, data, metric="cosine")
    return workload.model, workload.calibrate


class Encodes(nn.Module):
    """Torch's own encoder layers, whose fast path reads the weights of their linear layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask)[:, 0])


def convolutional() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1, bias=False, padding_mode="reflect"), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=4), nn.ReLU(),
            nn.Conv2d(32, 24, 1), nn.Flatten(), nn.Linear(24 * 16, 32), nn.ReLU(), nn.Linear(32, 5),
        )
    )  # fmt: skip


def signals() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Conv1d(4, 12, 5, 2), nn.ReLU(), nn.Conv1d(12, 12, 3, padding="same")))


def solid() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(nn.Conv3d(2, 12, 3, padding=1), nn.ReLU(), nn.Conv3d(12, 12, (1, 3, 3), (1, 2, 2)))
    )


def wide() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64, bias=False), nn.Linear(64, 9)))


MASK = np.arange(7) >= np.arange(64)[:, None] % 6 + 2
BUILDS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "convolutional": lambda: (convolutional(), floats(64, 1, 8, 8)),
    "signals": lambda: (signals(), floats(64, 4, 40)),
    "solid": lambda: (solid(), floats(48, 2, 4, 8, 8)),
    "wide": lambda: (wide(), floats(64, 16)),
    "sequence": lambda: (wide(), floats(64, 6, 16)),
    "encoder": lambda: (seeded(Encodes), {"x": floats(64, 7, 16), "mask": MASK}),
}
CASES = tuple(BUILDS)


@cache
def case(which: str) -> tuple[Model, Samples]:
    return take_in(*BUILDS[which]())


@pytest.fixture
def by_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopwatch that goes by multiply-adds, for what is faster must not depend on how busy the machine is."""
    monkeypatch.setattr(low_rank, "_speed", lambda f, parts: f.cost / parts.cost)


def parameters(model: Model) -> int:
    return sum(p.numel() for p in model.content.parameters())


def off(before: Model, after: Model, leaves: list[Any]) -> float:
    (want, *_), (have, *_) = answers(before, leaves), answers(after, leaves)
    return float(np.square(want - have).sum() / np.square(want).sum())


# --- factors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", CASES)
def test_full_rank_is_the_same_function(which: str) -> None:
    model, rows = case(which)
    names = LowRank()._names(model.content)
    for name, factors in observe_layers(model, rows, names).items():
        x = torch.randn(3, *factors.shape[1:])
        with torch.no_grad():
            want, have = factors.layer(x), factors.pair(len(factors.energies)).module(x)
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("which", CASES)
def test_a_greater_rank_loses_less_on_the_data(which: str) -> None:
    model, rows = case(which)
    names = LowRank()._names(model.content)
    found = observe_layers(model, rows, names)
    calls = observe(model.content, names, model.signature, [x[:16] for x in rows.chunks[0].inputs])
    assert len(calls) == len(names)
    for name, call in calls.items():
        factors, errors = found[name], []
        with torch.no_grad():
            want = factors.layer(call.first)
            for rank in range(1, len(factors.energies) + 1):
                gap = factors.pair(rank).module(call.first) - want
                errors.append(float(gap.square().sum() / want.square().sum()))
        assert errors[-1] < 1e-6
        assert errors[len(errors) // 2] < errors[0]


def test_directions_that_the_data_never_shows_are_given_up_first() -> None:
    """All inputs lie in a plane, so that two directions of 64 say everything: weights alone would not show it."""
    plane = floats(2, 16, seed=1)
    model, rows = take_in(wide(), floats(64, 2) @ plane)
    factors = observe_layers(model, rows, ["0"])["0"]
    x = torch.from_numpy(floats(8, 2, seed=2) @ plane)
    with torch.no_grad():
        torch.testing.assert_close(factors.pair(2).module(x), factors.layer(x), rtol=1e-2, atol=1e-2)
        by_weights = torch.linalg.svd(factors.layer.weight).U[:, :2]
        whole = x @ factors.layer.weight.T
        assert (whole - whole @ by_weights @ by_weights.T).abs().max() > 0.1


# --- three layers --------------------------------------------------------------------------------------------------


def convolutions(which: str) -> dict[str, Factors]:
    model, rows = case(which)
    found = observe_layers(model, rows, LowRank()._names(model.content))
    return {name: f for name, f in found.items() if f.rows is not None}


@pytest.mark.parametrize("which", ["convolutional", "signals", "solid"])
def test_three_of_full_rank_are_the_same_function(which: str) -> None:
    for name, factors in convolutions(which).items():
        x = torch.randn(3, *factors.shape[1:])
        with torch.no_grad():
            want, have = factors.layer(x), three(factors, factors.shape[1], len(factors.energies)).module(x)
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@settings(deadline=None, max_examples=30)
@given(share=st.floats(0.01, 0.99), which=st.sampled_from(["convolutional", "signals", "solid"]))
def test_three_layers_keep_to_their_budget_and_shape(share: float, which: str) -> None:
    for factors in convolutions(which).values():
        budget = int((1 - share) * factors.cost)
        parts = triple(factors, budget)
        if parts is None:
            assert factors.shape[1] == 1 or budget < factors.cost / 2
            continue
        assert parts.cost <= budget
        assert parts.module(factors.rows).shape == factors.layer(factors.rows).shape
        macs = 0
        value = torch.zeros(factors.shape)
        for part in parts.module:
            value = part(value)
            macs += part.weight.numel() * value[0, 0].numel()
        assert macs == parts.cost


def test_directions_of_the_inputs_follow_the_data() -> None:
    """Of 24 channels only two ever speak, so that two of three layers' first rank lose nothing."""
    x = floats(48, 24, 6, 6) * (np.arange(24) < 2)[:, None, None].astype(np.float32)
    model, rows = take_in(seeded(lambda: nn.Sequential(nn.Conv2d(24, 24, 3, padding=1))), x)
    factors = observe_layers(model, rows, ["0"])["0"]
    assert factors.error(three(factors, 2, 16)) < 1.01 * factors.error(three(factors, 23, 16)) + 1e-6
    assert factors.error(three(factors, 1, 16)) > 1.1 * factors.error(three(factors, 2, 16))


class Crossing(nn.Module):
    """A convolution that mixes four of its 32 inputs into four of its 32 outputs: three layers say it in full."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        with torch.no_grad():
            mix = torch.einsum("oa,abij,bc->ocij", torch.randn(32, 4), torch.randn(4, 4, 3, 3), torch.randn(4, 32))
            self.conv.weight.copy_(mix)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@pytest.mark.parametrize(("slower", "ranks"), [(None, "ranks 4 and 7"), (2, "rank 2"), (1, "ranks 4 and 7")])
def test_the_form_that_loses_least_for_its_time_is_taken(
    slower: int | None, ranks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`slower` is the form, by its number of ranks, that is measured slower than the whole."""
    monkeypatch.setattr(low_rank, "_speed", lambda f, parts: 0.9 if len(parts.ranks) == slower else 2.0)
    model, rows = take_in(seeded(Crossing), floats(48, 32, 8, 8))
    after = LowRank(share=0.93, energy=False).apply(model, rows, tmp_path)
    assert f"conv (32 x 32 x 3 x 3, {ranks})" in after.log[-1]
    assert isinstance(after.content.conv, nn.Sequential)
    assert (off(model, after, [rows.chunks[0].inputs[0]]) < 1e-6) == ("and" in ranks)


# --- the technique -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    share=st.floats(0.3, 1, exclude_max=True),
    more=st.floats(0.3, 1, exclude_max=True),
    energy=st.booleans(),
    which=st.sampled_from(CASES),
)
@pytest.mark.usefixtures("by_arithmetic")
def test_any_share_gives_a_smaller_model_that_runs_and_learns(
    tmp_path: Path, share: float, more: float, energy: bool, which: str
) -> None:
    before, rows = case(which)
    less, least = (LowRank(s, energy).apply(before, rows, tmp_path) for s in sorted((share, more)))
    assert parameters(before) > max(parameters(less), parameters(least))
    for count in (1, 3):
        leaves = [x[:count] for x in rows.chunks[0].inputs]
        for want, have in zip(answers(before, leaves), answers(least, leaves), strict=True):
            assert (have.shape, have.dtype) == (want.shape, want.dtype)
            assert np.isfinite(have).all()
    again = least.changed(Form.TORCH, cloudpickle.loads(cloudpickle.dumps(least.content)), "copied")
    np.testing.assert_array_equal(answers(again, leaves)[0], answers(least, leaves)[0])
    module = copy.deepcopy(least.content).train().requires_grad_(True)
    args, kwargs = least.signature.call([torch.from_numpy(x[:4].copy()) for x in rows.chunks[0].inputs])
    module(*args, **kwargs).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("energy", [False, True])
@pytest.mark.parametrize("which", CASES)
@pytest.mark.usefixtures("by_arithmetic")
def test_a_greater_share_is_further_off(which: str, energy: bool, tmp_path: Path) -> None:
    before, rows = case(which)
    leaves = list(rows.chunks[0].inputs)
    gaps = [off(before, LowRank(s, energy).apply(before, rows, tmp_path), leaves) for s in (0.3, 0.98)]
    assert gaps[0] < gaps[1]


@pytest.mark.usefixtures("by_arithmetic")
def test_grouped_tied_and_fused_layers_are_left_alone(tmp_path: Path) -> None:
    grouped = LowRank(0.6).apply(*case("convolutional"), tmp_path)
    assert isinstance(grouped.content[5], nn.Conv2d)
    attends = LowRank(0.6).apply(*case("encoder"), tmp_path).content.encoder.layers[0]
    assert isinstance(attends.self_attn.out_proj, nn.Linear)
    assert isinstance(attends.linear1, nn.Sequential)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(self.embed(ids)))

    model, rows = take_in(seeded(Tied), np.random.default_rng(0).integers(0, 20, (64, 5)))
    tied = LowRank(0.6).apply(model, rows, tmp_path).content
    assert tied.head.weight is tied.embed.weight
    assert isinstance(tied.inner, nn.Sequential)


@pytest.mark.usefixtures("by_arithmetic")
def test_a_layer_whose_owner_reads_its_weight_stays(tmp_path: Path) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x).to(self.two.weight.dtype))

    after = LowRank(energy=False).apply(*take_in(seeded(Reads), floats(64, 16)), tmp_path)
    assert isinstance(after.content.one, nn.Sequential)
    assert isinstance(after.content.two, nn.Linear)
    assert "two (16 x 16, rank 4) is read by its owner" in after.log[-1]


@pytest.mark.usefixtures("by_arithmetic")
def test_convolutions_are_left_where_that_is_asked(tmp_path: Path) -> None:
    after = LowRank(energy=False, convolutions=False).apply(*case("convolutional"), tmp_path).content
    assert [i for i, m in enumerate(after) if isinstance(m, nn.Sequential)] == [9, 11]


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.usefixtures("by_arithmetic")
def test_contract(check: contract.Check, tmp_path: Path) -> None:
    check(contract.prepare(LowRank, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("which", CASES)
@pytest.mark.usefixtures("by_arithmetic")
def test_what_is_left_exports(which: str, tmp_path: Path) -> None:
    before, rows = case(which)
    after = LowRank().apply(before, rows, tmp_path)
    assert ExportOnnx().apply(after, rows, tmp_path).content.is_file()


# --- what is measured ----------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_a_layer_so_large_that_two_are_faster_on_any_machine_is_factored(tmp_path: Path) -> None:
    model, rows = take_in(seeded(lambda: nn.Sequential(nn.Linear(512, 512))), floats(64, 64, 512))
    after = LowRank(share=0.95).apply(model, rows, tmp_path)
    assert "1 of 1 layers became smaller ones: 0 (512 x 512, rank 8)" in after.log[-1]


def test_where_no_layer_gains_the_figures_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_speed", lambda f, parts: 0.71)
    with pytest.raises(RefusalError, match=r"0 \(64 x 16, rank 6\) 0\.71 x") as caught:
        LowRank(energy=False).apply(*case("wide"), tmp_path)
    assert caught.value.reason is Reason.NOTHING_TO_DO


def test_a_layer_that_is_measured_slower_stays_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "_speed", lambda f, parts: 0.9 if f.layer.in_features == 16 else 2.0)
    after = LowRank(energy=False).apply(*case("wide"), tmp_path)
    assert isinstance(after.content[0], nn.Linear)
    assert isinstance(after.content[2], nn.Sequential)
    assert "left whole" in after.log[-1]
    assert "0 (64 x 16, rank 6) 0.90 x" in after.log[-1]


def test_parts_with_no_fewer_multiply_adds_are_not_even_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*_: Any) -> float:
        raise AssertionError("timed")

    monkeypatch.setattr(low_rank, "_seconds", timed)
    model, rows = case("wide")
    factors = observe_layers(model, rows, ["2"])["2"]
    assert low_rank._speed(factors, factors.pair(32)) == 0.0


# --- refusals ------------------------------------------------------------------------------------------------------


def test_a_model_without_such_layers_is_refused(tmp_path: Path) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.GRU(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)[0]

    model, rows = take_in(seeded(Recurrent), floats(64, 5, 4))
    planned = LowRank().refuse(model, Machine.look())
    assert planned is not None
    assert planned.reason is Reason.NOTHING_TO_DO
    with pytest.raises(RefusalError, match="no linear layer or convolution"):
        LowRank().apply(model, rows, tmp_path)
    assert LowRank(convolutions=False).refuse(case("signals")[0], Machine.look()) is not None


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_that_means_nothing_is_turned_away(share: float) -> None:
    with pytest.raises(ValueError, match="share must"):
        LowRank(share)
