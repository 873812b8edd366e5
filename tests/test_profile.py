"""The profile: counts are exact, the roofline is arithmetic, the fit finds what was planted; no test asserts a time."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accelerando.adoption import adopt
from accelerando.errors import ModelError, UsageError
from accelerando.interval import Interval
from accelerando.machine import Machine
from accelerando.profile.ceilings import Ceiling, Ceilings, _threads
from accelerando.profile.growth import Curve, Growth
from accelerando.profile.layers import Layer, Look, rows_of
from accelerando.profile.modules import Modules
from accelerando.profile.nodes import Nodes
from accelerando.profile.operations import count
from accelerando.profile.portrait import Profile
from accelerando.profile.products import node_flops
from accelerando.profile.remedies import helps, hints
from accelerando.profile.roofline import Bound, Roofs, least_seconds, stand
from accelerando.report.profile_text import render
from accelerando.workload import Form, Model

MACHINE = Machine.look()


@pytest.fixture(scope="module")
def ceilings() -> Ceilings:
    """Measured once: a profile can be given them."""
    return Ceilings.measure(MACHINE, 0.2)


def adopted(model: Any, data: Any) -> tuple[Model, Any]:
    work = adopt(model, data)
    return work.model, work.select


def tallies(module: nn.Module, *inputs: torch.Tensor) -> dict[str, Any]:
    module.eval().requires_grad_(False)
    return count(module, lambda: module(*inputs)).tallies


def a_layer(**changes: Any) -> Layer:
    given: dict[str, Any] = {
        "name": "fc", "kind": "Linear", "family": "linear", "precision": "float32", "calls": 1, "operations": 1,
        "seconds": Interval(1e-3, 1e-3, 1e-3), "flops": 2_000_000, "weight_bytes": 4_000_000,
        "activation_bytes": 8000, "moved_bytes": 4_008_000, "peak_bytes": 4000,
    }  # fmt: skip
    return Layer(**{**given, **changes})


def some_roofs(**changes: Any) -> Roofs:
    given: dict[str, Any] = {
        "float32": 1e11, "int8": 4e11, "memory": 2e10, "cache": 1e11, "starts": 1e5, "cache_bytes": 2**25,
        "weight_bytes": 2**28,
    }  # fmt: skip
    return Roofs(**{**given, **changes})


# --- counting ---------------------------------------------------------------------------------------------------


class TestCounting:
    def test_linear_counts_every_product_and_byte(self) -> None:
        found = tallies(nn.Linear(16, 8), torch.randn(4, 16))[""]
        assert found.flops == 2 * 4 * 16 * 8
        assert sum(found.weights.values()) == 4 * (16 * 8 + 8)
        assert found.activation_bytes == 4 * (4 * 16 + 4 * 8)
        assert found.peak_bytes == 4 * 4 * 8

    @pytest.mark.parametrize(("groups", "stride"), [(1, 1), (2, 1), (8, 2)])
    def test_convolution_plain_grouped_depthwise(self, groups: int, stride: int) -> None:
        layer = nn.Conv2d(8, 16, 3, padding=1, stride=stride, groups=groups)
        found = tallies(layer, torch.randn(2, 8, 10, 10))[""]
        side = 10 // stride
        assert found.flops == 2 * (2 * 16 * side * side) * (8 // groups) * 9
        assert found.kernel == 9
        assert sum(found.weights.values()) == 4 * (16 * (8 // groups) * 9 + 16)
        assert found.activation_bytes == 4 * (2 * 8 * 100 + 2 * 16 * side * side)

    def test_transposed_convolution(self) -> None:
        found = tallies(nn.ConvTranspose2d(4, 6, 2, stride=2), torch.randn(1, 4, 5, 5))[""]
        assert found.flops == 2 * (4 * 25) * 6 * 4

    def test_scaled_dot_product_attention_is_counted_in_its_container(self) -> None:
        class Attend(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Identity()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return nn.functional.scaled_dot_product_attention(self.inner(x), x, x)

        found = tallies(Attend(), torch.randn(2, 4, 10, 16))
        assert found[""].flops == 2 * (2 * 4 * 10 * 10 * 16) * 2  # scores, and weighted values
        assert found["inner"].flops == 0
        assert found["inner"].activation_bytes == 0

    def test_multihead_attention_counts_its_projections(self) -> None:
        rows, length, width = 2, 5, 8
        layer = nn.MultiheadAttention(width, 2, batch_first=True).eval()
        x = torch.randn(rows, length, width)
        found = tallies(layer, x, x, x)
        projections = 2 * rows * length * width * (3 * width) + 2 * rows * length * width * width
        assert sum(t.flops for t in found.values()) == projections + 2 * (2 * rows * length * length * width)

    @pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
    def test_recurrent(self, kind: type[nn.Module], gates: int) -> None:
        steps, rows, features, hidden = 5, 3, 8, 16
        found = tallies(kind(features, hidden, batch_first=True), torch.randn(rows, steps, features))[""]
        assert found.flops == 2 * steps * rows * gates * hidden * (features + hidden)
        assert sum(found.weights.values()) == 4 * gates * hidden * (features + hidden + 2)

    def test_embedding_moves_only_the_rows_that_it_looks_up(self) -> None:
        found = tallies(nn.Embedding(1000, 16), torch.zeros(2, 3, dtype=torch.long))[""]
        assert sum(found.weights.values()) == 4 * 1000 * 16
        assert found.weight_reads == 4 * 6 * 16
        assert found.activation_bytes == 6 * 8 + 4 * 6 * 16

    def test_a_module_called_twice_counts_twice_and_weighs_once(self) -> None:
        shared = nn.Linear(8, 8)
        found = tallies(nn.Sequential(shared, shared), torch.randn(1, 8))["0"]
        assert (found.calls, found.flops) == (2, 2 * 2 * 8 * 8)
        assert sum(found.weights.values()) == 4 * 72
        assert found.weight_reads == 2 * 4 * 72

    def test_views_and_dropout_in_eval_move_nothing(self) -> None:
        found = tallies(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Unflatten(1, (2, 4))), torch.randn(3, 8))
        assert all(t.operations == 0 and t.activation_bytes == 0 for t in found.values())

    def test_peak_is_what_is_alive_at_once(self) -> None:
        chain = nn.Sequential(*(nn.Linear(100, 100) for _ in range(6))).eval().requires_grad_(False)
        x = torch.randn(1, 100)
        counted = count(chain, lambda: chain(x))
        assert counted.peak_bytes == 2 * 400  # a layer's input and its output; the rest is gone

    def test_fft_by_the_customary_formula(self) -> None:
        class Fft(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.fft.rfft(x).abs()

        assert tallies(Fft(), torch.randn(3, 1024))[""].flops == round(2.5 * 3 * 1024 * 10)

    def test_an_operation_without_a_formula_is_named(self) -> None:
        layer = nn.Bilinear(4, 5, 6).eval().requires_grad_(False)
        counted = count(layer, lambda: layer(torch.randn(2, 4), torch.randn(2, 5)))
        assert counted.unknown == ("_trilinear",)

    def test_hooks_come_off_after_an_error_too(self) -> None:
        class Fails(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(2, 2)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                raise RuntimeError("as planned")

        module = Fails()
        with pytest.raises(RuntimeError, match="as planned"):
            count(module, lambda: module(torch.randn(1, 2)))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize(
    ("operator", "inputs", "outputs", "attributes", "flops"),
    [
        ("Conv", [(2, 8, 10, 10), (16, 4, 3, 3), (16,)], [(2, 16, 10, 10)], {"group": 2}, 2 * 3200 * 36),
        ("ConvTranspose", [(1, 4, 5, 5), (4, 6, 2, 2)], [(1, 6, 10, 10)], {}, 2 * 100 * 24),
        ("QLinearConv", [(1, 8, 4, 4), (), (), (16, 8, 1, 1)], [(1, 16, 4, 4)], {}, 2 * 256 * 8),
        ("MatMul", [(3, 5, 7), (7, 11)], [(3, 5, 11)], {}, 2 * 3 * 5 * 7 * 11),
        ("Gemm", [(7, 3), (7, 11)], [(3, 11)], {"transA": 1}, 2 * 3 * 7 * 11),
        ("LSTM", [(5, 3, 8), (1, 64, 8), (1, 64, 16)], [(5, 1, 3, 16)], {}, 2 * 15 * 64 * 24),
        ("Einsum", [(2, 3, 4), (2, 4, 5)], [(2, 3, 5)], {"equation": b"bij,bjk->bik"}, 2 * 2 * 3 * 4 * 5),
        ("MultiHeadAttention", [(2, 5, 8), (2, 5, 8), (2, 5, 8)], [(2, 5, 8)], {"num_heads": 2}, 2 * 2 * 400),
        ("Attention", [(2, 5, 8), (8, 24), (24,)], [(2, 5, 8)], {}, 2 * 10 * 8 * 24 + 4 * 2 * 25 * 8),
        ("Relu", [(2, 5)], [(2, 5)], {}, 0),
    ],
)
def test_flops_of_onnx_nodes(operator: str, inputs: Any, outputs: Any, attributes: Any, flops: int) -> None:
    assert node_flops(operator, inputs, outputs, attributes) == flops


# --- the roofline -----------------------------------------------------------------------------------------------

amounts = st.integers(min_value=0, max_value=10**12)


class TestRoofline:
    @given(flops=amounts, weights=amounts, activations=amounts, seconds=st.floats(1e-7, 10))
    def test_least_time_and_attainable_rate_agree(
        self, flops: int, weights: int, activations: int, seconds: float
    ) -> None:
        layer = a_layer(
            flops=flops, activation_bytes=activations, moved_bytes=weights + activations,
            seconds=Interval(seconds, seconds, seconds),
        )  # fmt: skip
        roofs = some_roofs()
        found = stand(layer, roofs)
        assert found.least_seconds >= flops / roofs.float32
        assert found.least_seconds >= (weights + activations) / roofs.cache
        assert 0 <= found.attainable <= roofs.float32 * (1 + 1e-9)
        assert found.attainable * found.least_seconds == pytest.approx(flops)
        assert found.achieved == pytest.approx(found.least_seconds / seconds)

    @given(flops=st.integers(1, 10**12), size=st.integers(1, 10**12))
    def test_the_classic_roof_where_every_byte_comes_from_memory(self, flops: int, size: int) -> None:
        roofs = some_roofs(cache=2e10)
        found = stand(a_layer(flops=flops, activation_bytes=0, moved_bytes=size), roofs)
        assert found.attainable == pytest.approx(min(roofs.float32, flops / size * roofs.memory))

    @given(flops=amounts, weights=amounts, factor=st.floats(1, 10))
    def test_higher_roofs_never_ask_for_more_time(self, flops: int, weights: int, factor: float) -> None:
        layer = a_layer(flops=flops, moved_bytes=weights + 8000)
        low, high = some_roofs(), some_roofs(float32=1e11 * factor, memory=2e10 * factor, cache=1e11 * factor)
        assert stand(layer, high).least_seconds <= stand(layer, low).least_seconds * (1 + 1e-12)

    @pytest.mark.parametrize(
        ("changes", "bound"),
        [
            ({"flops": 10**10, "seconds": Interval.exactly(0.12)}, Bound.COMPUTE),
            ({"seconds": Interval.exactly(3e-4)}, Bound.MEMORY),
            ({"seconds": Interval.exactly(5e-2)}, Bound.KERNEL),
            ({"moved_bytes": 800, "activation_bytes": 800, "flops": 10}, Bound.OVERHEAD),
            ({"seconds": Interval.exactly(5e-2), "container": True}, Bound.OVERHEAD),
        ],
    )
    def test_what_holds_a_layer_back(self, changes: dict[str, Any], bound: Bound) -> None:
        assert stand(a_layer(**changes), some_roofs()).bound is bound

    def test_int8_layers_stand_under_the_int8_roof(self) -> None:
        slow = stand(a_layer(flops=10**10), some_roofs()).least_seconds
        assert stand(a_layer(flops=10**10, precision="int8"), some_roofs()).least_seconds == pytest.approx(slow / 4)

    def test_a_model_that_fits_the_cache_reads_its_weights_from_there(self) -> None:
        small = stand(a_layer(flops=0), some_roofs(weight_bytes=2**20))
        assert small.least_seconds < stand(a_layer(flops=0), some_roofs()).least_seconds

    def test_the_model_takes_at_least_what_its_layers_take(self) -> None:
        standings = [stand(a_layer(flops=f), some_roofs()) for f in (10, 10**9, 10**10)]
        assert least_seconds(standings) == pytest.approx(sum(s.least_seconds for s in standings))


class TestHints:
    def told(self, roofs: Roofs | None = None, **changes: Any) -> list[str]:
        roofs = roofs or some_roofs()
        layer = a_layer(**changes)
        return [h.technique for h in hints(layer, stand(layer, roofs), roofs)]

    def test_compute_bound_products_are_told_of_int8(self) -> None:
        busy = {"flops": 10**10, "seconds": Interval.exactly(0.12)}
        assert "quantize_static" in self.told(**busy)
        assert "quantize_dynamic" in self.told(family="recurrent", **busy)

    def test_no_int8_where_int8_is_no_faster_here(self) -> None:
        told = self.told(some_roofs(int8=1e11), flops=10**10, seconds=Interval.exactly(0.12))
        assert "quantize_static" not in told

    def test_a_layer_that_waits_for_its_weights(self) -> None:
        assert self.told(seconds=Interval.exactly(3e-4))[0] == "quantize_weights"

    def test_batch_norm_is_folded_and_long_kernels_go_by_fft(self) -> None:
        assert "fold" in self.told(kind="BatchNorm2d", family="normalization")
        assert "convolution by FFT" in self.told(kind="Conv1d", family="convolution", kernel=4096)

    def test_helps_count_every_layer_once_and_keep_to_amdahl(self) -> None:
        roofs = some_roofs()
        layers = [a_layer(flops=10**10, seconds=Interval.exactly(0.12)), a_layer(seconds=Interval.exactly(0.04))]
        found = helps(layers, [hints(x, stand(x, roofs), roofs) for x in layers], covered=0.5)
        int8 = next(h for h in found if h.hint.technique == "quantize_static")
        assert int8.share <= 0.5
        assert int8.at_most == pytest.approx(1 / (1 - int8.share))


# --- growth -----------------------------------------------------------------------------------------------------


def planted(fixed: float, unit: float, power: float, noise: float, seed: int) -> tuple[list[int], list[Any]]:
    rng = np.random.default_rng(seed)
    sizes = [2**i for i in range(9)]
    return sizes, [(fixed + unit * n**power) * rng.lognormal(0, noise, 25) for n in sizes]


class TestGrowth:
    @pytest.mark.parametrize(("fixed", "power"), [(0.0, 1.0), (1e-3, 1.0), (2e-3, 0.8), (0.0, 2.0), (1e-3, 1.5)])
    def test_finds_the_planted_exponent(self, fixed: float, power: float) -> None:
        sizes, values = planted(fixed, 1e-4, power, 0.02, seed=1)
        curve = Curve.fit(sizes, values)
        assert curve is not None
        assert curve.exponent.mid == pytest.approx(power, abs=0.05)
        assert curve.exponent.width < 0.2
        truth = (fixed + 1e-4 * 256**power) / (fixed + 1e-4 * 128**power)
        assert curve.doubling.mid == pytest.approx(truth, rel=0.03)

    @pytest.mark.slow
    def test_its_interval_holds_the_truth_about_as_often_as_it_says(self) -> None:
        hits = 0
        for seed in range(60):
            curve = Curve.fit(*planted(1e-3, 1e-4, 1.0, 0.1, seed))
            assert curve is not None
            hits += curve.exponent.low <= 1.0 <= curve.exponent.high
        assert hits >= 50  # 95 % is claimed; 50 of 60 or fewer would come once in thousands

    def test_a_constant_does_not_grow(self) -> None:
        curve = Curve.fit([1, 2, 4, 8, 16], [np.full(5, 3.0)] * 5)
        assert curve is not None
        assert curve.doubling.mid == pytest.approx(1.0)
        assert curve.at(1000) == pytest.approx(3.0)

    @given(scale=st.floats(1e-6, 1e3))
    @settings(max_examples=8, deadline=None)  # a busy machine
    def test_units_do_not_matter(self, scale: float) -> None:
        sizes, values = planted(1e-3, 1e-4, 0.9, 0.05, seed=3)
        one, other = Curve.fit(sizes, values), Curve.fit(sizes, [v * scale for v in values])
        assert one is not None
        assert other is not None
        assert other.exponent.mid == pytest.approx(one.exponent.mid, abs=0.011)
        assert other.at(64) == pytest.approx(one.at(64) * scale, rel=1e-3)

    def test_one_size_is_no_growth(self) -> None:
        assert Curve.fit([1], [np.ones(3)]) is None
        growth = Growth((1,), ((0.1, 0.2),), (10,), "more rows take too long")
        assert "not known" in growth.words()[0]

    def test_stops_before_the_memory_is_full(self) -> None:
        class Hungry:
            def call(self, batch: int) -> Any:
                return lambda: None

            def peak_bytes(self, batch: int) -> int:
                return batch * MACHINE.memory_bytes // 20

            def look(self, batch: int, seconds: float) -> Look:
                raise NotImplementedError

        growth = Growth.measure(Hungry(), MACHINE, 0.1)
        assert growth.batches == (1, 2, 4)
        assert "memory" in growth.stopped
        assert growth.memory is not None
        assert growth.memory.doubling.mid == pytest.approx(2.0, rel=0.01)

    def test_says_what_doubling_costs(self) -> None:
        sizes, values = planted(0.0, 1e-3, 1.0, 0.01, seed=2)
        growth = Growth(tuple(sizes), tuple(map(tuple, values)), tuple(100 * n for n in sizes), "256 rows were enough")
        text = " ".join(growth.words())
        assert "from 128 to 256 multiplies the time by 2.0" in text or "by 1.9" in text
        assert Growth.from_json(json.loads(json.dumps(growth.to_json()))).to_json() == growth.to_json()


# --- the ceilings -----------------------------------------------------------------------------------------------


class TestCeilings:
    def test_the_roof_is_the_best_with_at_most_so_many_threads(self) -> None:
        rate = Interval.exactly(5.0)
        ceilings = Ceilings((Ceiling("float32", 1, rate, 7.0, "a"), Ceiling("float32", 4, rate, 9.0, "b")))
        assert ceilings.roof("float32", 1) == 7.0
        assert ceilings.roof("float32", 2) == 7.0
        assert ceilings.roof("float32", 4) == 9.0
        assert ceilings.roof("int8", 4) == 9.0  # no int8 product here: then it is computed in float32
        with pytest.raises(ValueError, match="no ceiling for 'memory'"):
            ceilings.roof("memory", 4)

    def test_the_number_of_threads_is_put_back(self) -> None:
        before = torch.get_num_threads()
        with pytest.raises(RuntimeError, match="as planned"), _threads(1):
            raise RuntimeError("as planned")
        assert torch.get_num_threads() == before

    def test_measures_every_roof(self, ceilings: Ceilings) -> None:
        found = ceilings
        for what in ("float32", "int8", "memory", "cache", "call", "node"):
            assert {c.threads for c in found.entries if c.what == what} == {1, MACHINE.cores}
        assert all(0 < c.rate.low <= c.rate.high <= c.best * (1 + 1e-9) for c in found.entries)
        assert Ceilings.from_json(json.loads(json.dumps(found.to_json()))) == found


# --- whole profiles ---------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """An embedding, an LSTM and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Flatten(), nn.Linear(16 * 64, 10),
    )  # fmt: skip


def check_page(profile: Profile) -> str:
    """JSON goes round, and the page fits 80 columns."""
    data = json.loads(json.dumps(profile.to_json(), allow_nan=False))
    assert Profile.from_json(data).to_json() == data
    text = render(data)
    assert max(map(len, text.splitlines())) <= 80
    assert "outside the layers" in text
    return text


class TestProfile:
    def test_a_module_as_it_came_stays_as_it_came(self, ceilings: Ceilings) -> None:
        model, samples = adopted(small_cnn(), torch.randn(24, 3, 8, 8))
        state = {k: v.clone() for k, v in model.content.state_dict().items()}
        modes = [m.training for m in model.content.modules()]
        profile = Profile.take(model, samples, MACHINE, seconds=0.4, ceilings=ceilings)
        assert all(torch.equal(v, state[k]) for k, v in model.content.state_dict().items())
        assert [m.training for m in model.content.modules()] == modes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.content.modules())
        rows = {row["name"]: row for row in profile.rows}
        assert set(rows) == {"0", "1", "2", "3", "4", "5"}
        assert rows["3"]["flops"] == 2 * 16 * 64 * 9
        assert rows["5"]["weight_bytes"] == 4 * (16 * 64 * 10 + 10)
        assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
        assert 0 < profile.covered.low <= profile.covered.high <= 1
        assert "fold" in rows["1"]["hint"]
        text = check_page(profile)
        assert "Conv2d" in text
        assert "Sequential, torch, batch 1" in text

    def test_lstm_over_tokens(self, ceilings: Ceilings) -> None:
        model, samples = adopted(Classifier(), torch.randint(0, 50, (24, 7)))
        profile = Profile.take(model, samples, MACHINE, seconds=0.4, batch=2, ceilings=ceilings)
        rows = {row["name"]: row for row in profile.rows}
        assert rows["lstm"]["flops"] == 2 * 7 * 2 * 4 * 16 * (8 + 16)
        assert rows["lstm"]["family"] == "recurrent"
        assert rows["embedding"]["moved_bytes"] == 14 * 8 + 2 * 4 * 14 * 8
        check_page(profile)

    @pytest.mark.slow  # importing transformers takes seconds
    def test_a_transformer_with_keyword_inputs(self, ceilings: Ceilings) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import BertConfig, BertForSequenceClassification

            config = BertConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100
            )
            bert = BertForSequenceClassification(config)
        tokens = torch.randint(0, 100, (16, 10))
        model, samples = adopted(bert, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
        profile = Profile.take(model, samples, MACHINE, seconds=0.4, ceilings=ceilings)
        rows = {row["name"]: row for row in profile.rows}
        assert rows["bert.encoder.layer.0.attention.self"]["flops"] == 2 * 2 * 10 * 10 * 32
        assert rows["bert.encoder.layer.0.attention.self"]["container"]
        assert rows["bert.encoder.layer.1.intermediate.dense"]["flops"] == 2 * 10 * 32 * 64
        check_page(profile)

    def test_an_onnx_file_by_its_nodes(self, tmp_path: Path, ceilings: Ceilings) -> None:
        model, samples = adopted(onnx_file(tmp_path), np.random.default_rng(0).random((24, 20), dtype=np.float32))
        profile = Profile.take(model, samples, MACHINE, seconds=0.4, batch=3, ceilings=ceilings)
        products = [row for row in profile.rows if row["flops"]]
        assert sum(row["flops"] for row in products) == 2 * 3 * (20 * 32 + 32 * 5)
        assert sum(row["weight_bytes"] for row in products) == 4 * (20 * 32 + 32 + 32 * 5 + 5)
        fused = not any(row["kind"] == "Relu" for row in profile.rows)
        assert profile.look.peak_bytes == 4 * 3 * (32 + 5 if fused else 2 * 32)
        assert profile.growth is not None
        assert profile.growth.memory is not None
        assert profile.growth.memory.exponent.mid == pytest.approx(1, abs=0.02)
        assert not list(tmp_path.glob("*profile*"))  # the runtime's files lie elsewhere, and are gone
        check_page(profile)

    def test_weights_in_a_file_of_their_own(self, tmp_path: Path) -> None:
        import onnx

        path = onnx_file(tmp_path)
        onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        model, samples = adopted(path, np.zeros((16, 20), dtype=np.float32))
        look = Nodes(model, samples).look(1, 0.05)
        assert sum(layer.flops for layer in look.layers) == 2 * (20 * 32 + 32 * 5)

    def test_what_it_can_not_take_is_said_before_any_work(self) -> None:
        model, samples = adopted(nn.Linear(4, 2), torch.randn(16, 4))
        with pytest.raises(UsageError, match="seconds > 0"):
            Profile.take(model, samples, MACHINE, seconds=0)
        with pytest.raises(ModelError, match="openvino"):
            Profile.take(model.changed(Form.OPENVINO, "x.xml"), samples, MACHINE, seconds=1)
        with pytest.raises(UsageError, match="schema"):
            Profile.from_json({"schema": 99})

    def test_rows_repeat_where_there_are_too_few(self) -> None:
        _, samples = adopted(nn.Linear(4, 2), torch.randn(16, 4))
        (x,) = rows_of(samples, 100)
        assert x.shape == (100, 4)
        assert np.array_equal(x[: len(samples)], x[len(samples) : 2 * len(samples)])

    def test_many_layers_alike_are_shown_as_one(self) -> None:
        deep = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(10)))
        model, samples = adopted(deep, torch.randn(16, 4))
        look = Modules(model, samples).look(1, 0.05)
        one = Interval.exactly(1.0)
        roofs = tuple(Ceiling(what, 1, one, 1.0, "fake") for what in ("float32", "memory", "cache", "call"))
        text = check_page(Profile("torch", "Deep", 1, MACHINE, look, Ceilings(roofs), None, 0.1))
        assert "*.* Linear x10" in text


class TestSabotage:
    """Break a judge, expect the alarm."""

    @pytest.mark.parametrize(("noise", "doubted"), [(0.01, False), (1.5, True)])
    def test_noise_that_hides_the_growth_is_admitted(self, noise: float, doubted: bool) -> None:
        sizes, values = planted(0.0, 1e-3, 1.0, noise, seed=5)
        growth = Growth(tuple(sizes), tuple(tuple(v[:6]) for v in values), tuple(sizes), "256 rows were enough")
        assert any("too busy" in words for words in growth.words()) is doubted

    def test_a_time_outside_the_layers_is_not_hidden(self) -> None:
        class Slow(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 2)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                sum(range(200_000))  # glue that no layer owns
                return self.fc(x)

        model, samples = adopted(Slow(), torch.randn(16, 4))
        look = Modules(model, samples).look(1, 0.2)
        assert [layer.name for layer in look.layers] == ["fc"]
        assert look.covered.high < 0.5

    def test_a_roof_that_is_too_low_raises_a_doubt(self) -> None:
        model, samples = adopted(nn.Linear(64, 64), torch.randn(16, 64))
        look = Modules(model, samples).look(1, 0.05)
        low = tuple(
            Ceiling(what, 1, Interval.exactly(1.0), 1.0, "fake") for what in ("float32", "memory", "cache", "call")
        )
        profile = Profile("torch", "Linear", 1, MACHINE, look, Ceilings(low), None, 0.1)
        assert any("faster than their roof" in doubt for doubt in profile.doubts())


def onnx_file(folder: Path) -> Path:
    """Gemm, Relu, Gemm; 20 -> 32 -> 5, the first two without names."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in (("w1", (20, 32)), ("b1", (32,)), ("w2", (32, 5)), ("b2", (5,)))
    ]
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
            helper.make_node("Relu", ["h"], ["a"]),
            helper.make_node("Gemm", ["a", "w2", "b2"], ["y"], name="last"),
        ],
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 20])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])],
        weights,
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])
    path = folder / "mlp.onnx"
    onnx.save(model, path)
    return path
