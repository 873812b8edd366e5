"""Structured pruning: any share leaves a network that runs, with fewer weights and outputs of the same shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from accelerando.adoption import adopt
from accelerando.errors import Reason, RefusalError
from accelerando.techniques import _prune_surgery
from accelerando.techniques._prune_attention import attention_of, free_heads
from accelerando.techniques._prune_groups import Group
from accelerando.techniques._prune_ranking import pick, widths
from accelerando.techniques.export_onnx import ExportOnnx
from accelerando.techniques.prune_channels import PruneChannels
from accelerando.testing.technique_contract import answers, capable, floats, stubborn
from accelerando.workload import Model, Samples

NOWHERE = Path("does-not-matter")


class Padded(nn.Module):
    """A residual network whose shortcuts pad channels with zeros, as the first ones for small images do."""

    class Block(nn.Module):
        def __init__(self, inside: int, outside: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
            self.bn1, self.bn2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
            self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
            self.stride, self.extra = stride, outside - inside

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            half = self.extra // 2
            short = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.extra - half))
            return F.relu(y + (short if self.extra else x))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16)
        self.one, self.two, self.three = self.Block(16, 16, 1), self.Block(16, 32, 2), self.Block(32, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.three(self.two(self.one(F.relu(self.norm(self.stem(x))))))
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


class Layer(nn.Module):
    def __init__(self, **knobs: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True, **knobs)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Sees(nn.Module):
    """A small vision transformer: (n, 1, 8, 8) -> (n, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 4, 4)
        self.first = nn.Parameter(torch.randn(1, 1, 32))
        self.place = nn.Parameter(torch.randn(1, 5, 32))
        self.blocks = nn.Sequential(Layer(), Layer())
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.place
        return self.head(self.blocks(x)[:, 0])


class Written(nn.Module):
    """Attention written by hand, queries, keys and values of one layer: (n, 6, 32) -> (n, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head, self.n_embd = 4, 32
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        parts = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (p.view(n, t, self.n_head, -1).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, self.n_embd)
        return self.head((x + self.out(y)).mean(1))


class Apart(Written):
    """The same with three layers: what reads a head is found through their product."""

    def __init__(self) -> None:
        super().__init__()
        del self.qkv
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = (p(x).view(n, t, self.n_head, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = ((q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v).transpose(1, 2).reshape(n, t, -1)
        return self.head((x + self.out(y)).mean(1))


class Remembers(nn.Module):
    """(n, 7, 4) -> (n, 3): two recurrent modules, the second of two layers and both directions."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, last_state: bool = False) -> None:
        super().__init__()
        self.one = kind(4, 24, batch_first=True)
        self.two = kind(24, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.head, self.last_state = nn.Linear(32, 3), last_state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output, states = self.two(F.relu(self.one(x)[0]))
        hidden = states[0] if isinstance(states, tuple) else states
        return self.head(torch.cat([hidden[-2], hidden[-1]], 1) if self.last_state else output[:, -1])


def images(channels: int = 3, size: int = 12) -> np.ndarray:
    return floats(64, channels, size, size)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 20), nn.LayerNorm(20), nn.ReLU(), nn.Linear(20, 4))


def convolutions() -> nn.Module:
    """A depthwise, a grouped and a transposed one, and a linear layer that reads flat images."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 1), nn.PReLU(32), nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=4), nn.GroupNorm(4, 32),
        nn.ReLU(), nn.ConvTranspose2d(32, 12, 2, 2), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(108, 5),
    )  # fmt: skip


NETS: dict[str, tuple[Callable[[], nn.Module], np.ndarray]] = {
    "mlp": (plain, floats(64, 10)),
    "convolutions": (convolutions, images()),
    "padded shortcuts": (Padded, images()),
    "transformer": (Sees, images(1, 8)),
    "attention of one layer": (Written, floats(64, 6, 32)),
    "attention of three": (Apart, floats(64, 6, 32)),
    "lstm": (Remembers, floats(64, 7, 4)),
    "gru, by its states": (lambda: Remembers(nn.GRU, True), floats(64, 7, 4)),
}


def take_in(model: nn.Module, data: Any) -> tuple[Model, Samples]:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # else it would do nothing
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
    workload = adopt(model.eval(), data, metric="cosine")
    return workload.model, workload.calibrate


def network(name: str) -> tuple[Model, Samples]:
    torch.manual_seed(0)
    build, data = NETS[name]
    return take_in(build(), data)


def prune(model: Model, data: Samples, **knobs: Any) -> Model:
    return PruneChannels(**knobs).apply(model, data, NOWHERE)


def weights(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def ensure_good(before: Model, after: Model) -> None:
    rng = np.random.default_rng(0)
    for rows in (1, 3):
        leaves = [rng.standard_normal((rows, *port.shape[1:])).astype(np.float32) for port in before.signature.inputs]
        for port, want, have in zip(
            before.signature.outputs, answers(before, leaves), answers(after, leaves), strict=True
        ):
            assert have.shape == want.shape
            assert port.fits(have)
            assert np.isfinite(have).all()


@pytest.fixture(scope="module")
def nets() -> dict[str, tuple[Model, Samples]]:
    return {name: network(name) for name in NETS}


@pytest.mark.slow
@given(
    name=st.sampled_from(sorted(NETS)),
    shares=st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)),
    importance=st.sampled_from(["magnitude", "taylor"]),
    everywhere=st.booleans(),
)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_share_runs_and_more_leaves_less(
    nets: dict[str, tuple[Model, Samples]],
    name: str,
    shares: tuple[float, float],
    importance: str,
    everywhere: bool,
) -> None:
    model, data = nets[name]
    few, many = (prune(model, data, share=s, importance=importance, everywhere=everywhere) for s in sorted(shares))
    for made in (few, many):
        ensure_good(model, made)
    assert weights(many.content) <= weights(few.content) < weights(model.content)


@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_layer_is_cut(nets: dict[str, tuple[Model, Samples]], name: str) -> None:
    model, data = nets[name]
    before = {k: v.clone() for k, v in model.content.state_dict().items()}
    made = prune(model, data, share=0.5, everywhere=False)
    ensure_good(model, made)
    assert weights(made.content) < 0.75 * weights(model.content), made.log
    assert made.content.state_dict().keys() == before.keys() or "transformer" in name
    assert all(torch.equal(before[k], v) for k, v in model.content.state_dict().items()), "its input was changed"
    assert not any(p.requires_grad for p in made.content.parameters()), "the original's wanted no gradients"
    assert not made.content.training


@pytest.mark.slow
@pytest.mark.parametrize("name", ["padded shortcuts", "transformer", "lstm"])
def test_what_is_left_exports(nets: dict[str, tuple[Model, Samples]], name: str, tmp_path: Path) -> None:
    model, data = nets[name]
    made = prune(model, data)
    exported = ExportOnnx().apply(made, data, tmp_path)
    ensure_good(model, exported)
    for want, have in zip(answers(made, data.chunks[0].inputs), answers(exported, data.chunks[0].inputs), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-3, atol=1e-4)


def test_blocks_with_padded_shortcuts_are_cut_inside(nets: dict[str, tuple[Model, Samples]]) -> None:
    model, data = nets["padded shortcuts"]
    made = prune(model, data, share=0.9).content
    for block in (made.one, made.two, made.three):
        assert block.conv1.out_channels == block.conv2.in_channels < 16
    ensure_good(model, model.changed(model.form, made))


def test_heads_go_whole(nets: dict[str, tuple[Model, Samples]]) -> None:
    model, data = nets["transformer"]
    made = prune(model, data, share=0.5, everywhere=False)
    for block in made.content.blocks:
        assert block.attention.num_heads == 2
        assert block.attention.q.out_features == block.attention.out.in_features == 16
        assert block.attention.out.out_features == 32
        assert block.mlp[0].out_features == 32
    assert "heads" in made.log[-1]


def test_what_is_left_trains(nets: dict[str, tuple[Model, Samples]]) -> None:
    model, data = nets["transformer"]
    made = copy.deepcopy(prune(model, data).content).train().requires_grad_(True)
    made(torch.from_numpy(data.chunks[0].inputs[0])).square().sum().backward()
    assert all(p.grad is not None for p in made.parameters())


def test_pruning_goes_on_where_it_stopped(nets: dict[str, tuple[Model, Samples]]) -> None:
    model, data = nets["transformer"]
    once = prune(model, data, share=0.3)
    twice = prune(once, data, share=0.3)
    assert weights(twice.content) < weights(once.content)
    assert len(twice.log) == 2
    ensure_good(model, twice)


@pytest.mark.slow  # imports transformers
def test_a_transformer_of_the_library() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    bert = transformers.BertModel(config).eval()
    tokens = np.random.default_rng(0).integers(0, 50, (64, 9))
    model, data = take_in(bert, {"input_ids": tokens, "attention_mask": np.ones_like(tokens)})
    made = prune(model, data, share=0.5, everywhere=False)
    for layer in made.content.encoder.layer:
        assert layer.attention.self.num_attention_heads == 2
        assert layer.intermediate.dense.out_features == 32
    leaves = [tokens[:3], np.ones_like(tokens[:3])]
    assert [y.shape for y in answers(made, leaves)] == [y.shape for y in answers(model, leaves)]


def test_taylor_finds_the_units_that_work() -> None:
    """Half of the units are great in weight, but what they say is always the same: only a gradient knows."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        net[0].weight[::2] *= 9
        net[0].bias[::2] = -500  # never awake
    model, data = take_in(net, floats(256, 6))
    made = prune(model, data, share=0.5, importance="taylor")
    leaves = [floats(20, 6, seed=1)]
    assert np.allclose(answers(made, leaves)[0], answers(model, leaves)[0], atol=1e-5)
    other = prune(model, data, share=0.5, importance="magnitude")
    assert not np.allclose(answers(other, leaves)[0], answers(model, leaves)[0], atol=1e-1)


def test_a_way_that_depends_on_values_is_refused_by_name() -> None:
    model, data = take_in(*stubborn())
    with pytest.raises(RefusalError, match="Stubborn") as caught:
        prune(model, data)
    assert caught.value.reason is Reason.UNSUPPORTED
    assert "DataDependent" in caught.value.detail


class Gated(nn.Module):
    """(n, 16, 8) -> (n, 3): gated linear units, which halve their channels unseen; `beside` stands a plain pair."""

    def __init__(self, beside: nn.Module) -> None:
        super().__init__()
        self.beside, self.one, self.two = beside, nn.Conv1d(16, 64, 3), nn.Conv1d(32, 64, 3)
        self.head = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.glu(self.one(self.beside(x)), 1)
        return self.head(F.glu(self.two(x), 1).mean(-1))


def test_a_group_that_is_not_as_the_graph_says_is_left_whole_by_name() -> None:
    pair = nn.Sequential(nn.Conv1d(16, 48, 1), nn.ReLU(), nn.Conv1d(48, 16, 1))
    model, data = take_in(Gated(pair), floats(64, 16, 8))
    made = prune(model, data, importance="magnitude")
    ensure_good(model, made)
    assert "in beside.0" in made.log[-2]
    assert made.log[-1].endswith(": one, two")
    assert made.content.one.out_channels == made.content.two.out_channels == 64
    assert made.content.beside[0].out_channels < 48


def test_where_no_group_is_as_the_graph_says_all_are_named() -> None:
    model, data = take_in(Gated(nn.Identity()), floats(64, 16, 8))
    with pytest.raises(RefusalError, match="none proved to be right: one, two") as caught:
        prune(model, data)
    assert caught.value.reason is Reason.UNSUPPORTED


def test_a_model_without_layers_is_refused_when_planning() -> None:
    model, _ = take_in(nn.Sequential(nn.Flatten(), nn.Softmax(1)), floats(32, 2, 3))
    refusal = PruneChannels().refuse(model, capable())
    assert refusal is not None
    assert refusal.reason is Reason.NOTHING_TO_DO


def test_one_layer_has_nothing_inside() -> None:
    model, data = take_in(nn.Linear(5, 3), floats(32, 5))
    with pytest.raises(RefusalError, match="no layer of Linear can be cut"):
        prune(model, data)


@pytest.mark.parametrize("share", [0, 1, -0.5, 2])
def test_a_share_lies_between_0_and_1(share: float) -> None:
    with pytest.raises(ValueError, match="share must lie between"):
        PruneChannels(share=share)


def test_an_unknown_importance_is_refused() -> None:
    with pytest.raises(ValueError, match="magnitude, taylor"):
        PruneChannels(importance="luck")


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal", "added", "padding"])
def test_freed_heads_say_the_same(batch_first: bool, mask: str) -> None:
    torch.manual_seed(0)
    original = nn.MultiheadAttention(12, 3, batch_first=batch_first, kdim=8, vdim=5).eval()
    x, k, v = torch.randn(2, 6, 12), torch.randn(2, 4, 8), torch.randn(2, 4, 5)
    masks: dict[str, dict[str, Any]] = {
        "none": {},
        "causal": {"attn_mask": torch.ones(6, 4, dtype=torch.bool).triu(1)},
        "added": {"attn_mask": torch.randn(2 * 3, 6, 4)},
        "padding": {"key_padding_mask": torch.tensor([[False, False, True, True], [False] * 4])},
    }
    given = (x, k, v) if batch_first else tuple(t.transpose(0, 1) for t in (x, k, v))
    for need_weights in (True, False):
        want = original(*given, need_weights=need_weights, **masks[mask])
        have = attention_of(original)(*given, need_weights=need_weights, **masks[mask])
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_freed_heads_stand_in_torchs_own_encoder() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().requires_grad_(False)
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(free_heads(copy.deepcopy(encoder))(x), encoder(x), rtol=1e-4, atol=1e-5)
    model, data = take_in(encoder, floats(64, 5, 16))
    made = prune(model, data, everywhere=False)
    assert made.content.layers[0].self_attn.num_heads == 1
    ensure_good(model, made)


# --- ranking ----------------------------------------------------------------------------------------------------------


def group(name: str, units: int) -> Group:
    return Group(name, tuple((i,) for i in range(units)), ())


@given(
    sizes=st.lists(st.integers(2, 70), min_size=1, max_size=4),
    shares=st.tuples(st.floats(0.001, 0.999), st.floats(0.001, 0.999)),
    everywhere=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_what_goes_for_a_share_goes_for_a_larger_one(
    sizes: list[int], shares: tuple[float, float], everywhere: bool, seed: int
) -> None:
    groups, rng = [group(f"g{i}", n) for i, n in enumerate(sizes)], np.random.default_rng(seed)
    scores = [rng.random(n).tolist() for n in sizes]
    few, many = (pick(groups, scores, share, everywhere) for share in sorted(shares))
    assert all(set(units) <= set(many[i]) for i, units in few.items())
    assert few, "something always goes"
    assert all(sizes[i] - len(units) in widths(sizes[i]) for i, units in many.items())


@given(st.integers(2, 5000))
def test_widths_fit_registers(width: int) -> None:
    smaller = widths(width)
    assert smaller == sorted(set(smaller), reverse=True)
    assert 0 < smaller[-1] <= smaller[0] < width
    assert smaller[-1] <= 4
    assert all(w % 16 == 0 or w in (4, 8) for w in smaller) or width < 32


def test_the_least_important_go_first() -> None:
    picked = pick([group("a", 4), group("b", 4)], [[3, 1, 2, 4], [9, 9, 9, 9]], 0.25, everywhere=True)
    assert picked == {0: [1, 2]}


# --- the judge --------------------------------------------------------------------------------------------------------


def test_a_wrong_group_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: the reader loses other columns than the maker loses rows."""
    model, data = network("mlp")
    right = _prune_surgery._merged

    def wrong(groups: Any, picked: Any) -> Any:
        merged = right(groups, picked)
        return {
            k: (cut, {(w + 1) % 20 for w in where} if cut.side == "in" else where) for k, (cut, where) in merged.items()
        }

    def half_wrong(model: Any, groups: Any, picked: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(_prune_surgery, "_merged", wrong)
            return operate(model, groups, picked)

    operate = _prune_surgery.operate
    monkeypatch.setattr(_prune_surgery, "operate", half_wrong)
    with pytest.raises(RefusalError, match="proved to be right"):
        prune(model, data)
