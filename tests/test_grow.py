"""What is particular to growing: the same function, more to learn with, and what is refused."""

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
from rms_normed import Llama
from torch import nn

from accelerando.adoption import adopt
from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.techniques._parity import ensure_same, ensure_same_onnx
from accelerando.techniques.export_onnx import ExportOnnx
from accelerando.techniques.grow import Grow
from accelerando.techniques.separate_convolutions import SeparateConvolutions
from accelerando.testing import technique_contract as contract
from accelerando.testing.technique_contract import answers, floats
from accelerando.workload import Model, Samples

TIMES = st.floats(1.05, 3.2)
FEW = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(8) for _ in range(3)))
        self.head = nn.Linear(8, 5)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.running_mean, -0.2, 0.2)
                nn.init.uniform_(m.running_var, 0.5, 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


class Encoder(nn.Module):
    def __init__(self, norm_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)
        for p in self.encoder.parameters():
            nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x)[:, 0])


class Mobile(nn.Module):
    """An inverted residual, whose inner width has a depthwise convolution; then a flattened map to a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(
            nn.Conv2d(3, 10, 1, bias=False), nn.BatchNorm2d(10), nn.ReLU6(),
            nn.Conv2d(10, 10, 3, padding=1, groups=10), nn.ReLU6(), nn.Conv2d(10, 3, 1),
        )  # fmt: skip
        self.out = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 7), nn.ReLU())
        self.head = nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.out(x + self.inner(x)))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Dropout(0.1), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 3))


def autoencoder() -> nn.Module:
    """Transposed convolutions that read hidden units and that give them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, 2), nn.ReLU(),
        nn.Conv2d(4, 5, 3), nn.ReLU(), nn.ConvTranspose2d(5, 1, 3), nn.Sigmoid(),
    )  # fmt: skip


def take_in(module: nn.Module, data: Any) -> tuple[Model, Samples]:
    workload = adopt(module.eval(), data, metric="cosine")
    return workload.model, workload.calibrate


SUBJECTS = {
    "residual": lambda: take_in(Residual(), floats(48, 3, 6, 6)),
    "encoder": lambda: take_in(Encoder(), floats(48, 5, 16)),
    "mobile": lambda: take_in(Mobile(), floats(48, 3, 6, 6)),
    "mlp": lambda: take_in(mlp(), floats(48, 6)),
    "autoencoder": lambda: take_in(autoencoder(), floats(48, 1, 8, 8)),
    "network": lambda: take_in(contract.network(), floats(48, 1, 8, 8)),
}


@pytest.fixture(scope="module", params=SUBJECTS)
def taken(request: pytest.FixtureRequest) -> tuple[Model, Samples]:
    return SUBJECTS[request.param]()


def size(model: Model) -> int:
    return sum(p.numel() for p in model.content.parameters())


def ensure_same_function(before: Model, after: Model, data: Samples) -> None:
    for rows in (1, 3, 8):
        leaves = [np.concatenate([x[:rows], -x[:rows]]) for x in data.chunks[0].inputs]
        ensure_same(before.signature, answers(before, leaves), answers(after, leaves))


@FEW
@given(TIMES)
def test_wider_is_the_same_function(taken: tuple[Model, Samples], times: float) -> None:
    model, data = taken
    made = Grow(width=times, depth=1.0).apply(model, data, Path())
    assert size(made) > size(model)
    ensure_same_function(model, made, data)


@FEW
@given(TIMES)
def test_deeper_is_the_same_function(taken: tuple[Model, Samples], times: float) -> None:
    model, data = taken
    made = Grow(depth=times).apply(model, data, Path())
    assert size(made) > size(model)
    ensure_same_function(model, made, data)


def test_both_and_twice(taken: tuple[Model, Samples]) -> None:
    model, data = taken
    first = Grow(width=1.5, depth=1.5).apply(model, data, Path())
    second = Grow(width=1.3, depth=1.3).apply(first, data, Path())
    assert size(model) < size(first) < size(second)
    ensure_same_function(model, second, data)


def test_it_learns_travels_and_leaves_its_input_alone(taken: tuple[Model, Samples]) -> None:
    model, data = taken
    before = {k: v.clone() for k, v in model.content.state_dict().items()}
    made = Grow(width=1.5, depth=1.5).apply(model, data, Path())
    again = Grow(width=1.5, depth=1.5).apply(model, data, Path())
    assert all(torch.equal(v, model.content.state_dict()[k]) for k, v in before.items())
    assert not any(p.requires_grad for p in (*model.content.parameters(), *made.content.parameters()))
    assert not any(m.training for m in made.content.modules())
    assert all(torch.equal(v, again.content.state_dict()[k]) for k, v in made.content.state_dict().items())
    module = cloudpickle.loads(cloudpickle.dumps(copy.deepcopy(made.content))).requires_grad_(True)
    x = torch.from_numpy(data.chunks[0].inputs[0][:16])
    for _ in range(2):  # after one step what was zero is not, and all that was copied learns too
        loss = module(x).square().sum()
        module.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in module.parameters():
                p -= 1e-3 * p.grad
    assert all(bool(p.grad.abs().sum() > 0) for n, p in module.named_parameters() if "in_proj_bias" not in n)


def test_copies_of_a_unit_go_their_own_ways() -> None:
    model, data = SUBJECTS["mlp"]()
    module = Grow(width=2.0, depth=1.0).apply(model, data, Path()).content.requires_grad_(True)
    first = module[0].weight
    assert first.shape == (40, 6)
    assert sorted(map(tuple, first[:20].tolist())) == sorted(map(tuple, first[20:].tolist()))
    step = torch.optim.Adam(module.parameters(), 1e-2)
    x, y = torch.from_numpy(floats(64, 6)), torch.from_numpy(floats(64, 3, seed=1))
    for _ in range(20):
        step.zero_grad()
        (module(x) - y).square().mean().backward()
        step.step()
    assert len({tuple(np.round(row, 4)) for row in first.tolist()}) == 40


def test_depth_is_spread_over_the_chain_and_adds_nothing_yet() -> None:
    model, data = SUBJECTS["residual"]()
    made = Grow(depth=2.0).apply(model, data, Path())
    blocks = made.content.blocks
    assert len(blocks) == 6
    assert all(bool((blocks[i].bn2.weight == 0).all()) for i in (1, 3, 5))
    assert all(torch.equal(blocks[2 * i].conv1.weight, blocks[2 * i + 1].conv1.weight) for i in range(3))
    assert "3 of 3 blocks" in made.log[-1]


def test_an_identity_layer_fits_what_it_is_given() -> None:
    """Channels may be moved between a convolution and the ReLU after it, and convolutions be transposed."""
    moved = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.PixelShuffle(2), nn.ReLU(), nn.ConvTranspose2d(2, 5, 2, 2), nn.ReLU(),
        nn.Conv2d(5, 2, 3),
    )  # fmt: skip
    model, data = take_in(moved, floats(48, 1, 4, 4))
    made = Grow(depth=1.5).apply(model, data, Path())
    ensure_same_function(model, made, data)
    assert [type(m).__name__ for m in made.content[4:7]] == ["ReLU", "Conv2d", "ReLU"]
    assert len(made.content) == 8


def test_norms_of_ones_own_are_copied_with_their_blocks() -> None:
    model, data = take_in(Llama(), floats(48, 6, 5))
    made = Grow(depth=1.5).apply(model, data, Path())
    ensure_same_function(model, made, data)
    assert len(made.content.blocks) == 6
    assert "2 of 4 blocks" in made.log[-1]


@pytest.mark.slow
def test_transformers_vit_grows_both_ways() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=8,
        num_channels=1, num_labels=5,
    )  # fmt: skip
    model, data = take_in(ViTForImageClassification(config), floats(48, 1, 16, 16))
    made = Grow(width=1.5, depth=1.5).apply(model, data, Path())
    ensure_same_function(model, made, data)
    inner = [m.out_features for m in made.content.modules() if isinstance(m, nn.Linear)]
    assert inner.count(72) == 3
    assert inner.count(48) == 0


@pytest.mark.slow
def test_what_is_grown_can_be_cut_and_exported(tmp_path: Path) -> None:
    model, data = SUBJECTS["residual"]()
    grown = Grow(width=1.5, depth=1.5).apply(model, data, Path())
    made = SeparateConvolutions(0.7).apply(grown, data, Path())
    exported = ExportOnnx().apply(made, data, tmp_path)
    assert ensure_same_onnx(made, exported.content, data) < 1e-3


class ByNumber(Residual):
    """Runs three blocks, however many there are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        for i in range(3):
            x = self.blocks[i](x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("module", "shape", "knobs"),
    [
        (ByNumber, (3, 6, 6), {}),
        (lambda: Encoder(norm_first=False), (5, 16), {}),
        (Mobile, (3, 6, 6), {"depth": 1.0, "width": 1.0001}),
        (lambda: nn.Linear(4, 4), (4,), {}),
        (lambda: nn.Linear(4, 4), (4,), {"width": 2.0, "depth": 1.0}),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)), (4,), {"width": 2.0, "depth": 1.0}),
    ],
    ids=["by number", "post-norm", "a little", "no blocks", "no hidden units", "layer norm"],
)
def test_what_cannot_grow_is_refused_by_name(module: Any, shape: tuple[int, ...], knobs: dict[str, float]) -> None:
    model, data = take_in(module(), floats(48, *shape))
    if "width" in knobs and knobs["width"] < 1.1:
        assert size(Grow(**knobs).apply(model, data, Path())) > size(model)  # one unit at least
        return
    with pytest.raises(RefusalError) as caught:
        Grow(**knobs).apply(model, data, Path())
    assert caught.value.reason in (Reason.UNSUPPORTED, Reason.NOTHING_TO_DO)
    assert caught.value.detail


def test_a_model_that_would_answer_otherwise_is_refused() -> None:
    """Softmax over hidden units knows how many there are, which the dependency graph does not say."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(self.one(x).softmax(-1))

    model, data = take_in(Gated(), floats(48, 4))
    with pytest.raises(RefusalError) as caught:
        Grow(width=2.0, depth=1.0).apply(model, data, Path())
    assert caught.value.reason is Reason.UNSUPPORTED


def test_it_is_taught_with_labels_or_not_at_all() -> None:
    module, rows, labels = mlp().eval(), floats(96, 6), np.arange(96) % 3

    def planned(train: Any, data: Any, metric: str) -> RefusalError | None:
        return Grow().refuse(adopt(module, data, train=train, metric=metric).teachable, Machine.look())

    assert planned((rows, labels), (rows, labels), "accuracy") is None
    for train, data, metric in ((rows, (rows, labels), "accuracy"), ((rows, labels), rows, "agreement")):
        refusal = planned(train, data, metric)
        assert refusal is not None
        assert refusal.reason is Reason.NOTHING_TO_DO
        assert "give train= with targets" in refusal.detail


@pytest.mark.parametrize("knobs", [{"width": 0.9}, {"depth": 0.5}, {"width": 1.0, "depth": 1.0}])
def test_wrong_knobs_are_said(knobs: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Grow(**knobs)


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda c: c.__name__)
def test_contract(check: contract.Check, tmp_path: Path) -> None:
    check(contract.prepare(Grow, tmp_path))
