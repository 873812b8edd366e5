"""Leaving residual blocks out: which ones go, and that what is left is a model like the one before."""

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
from rms_normed import Llama
from torch import nn

from accelerando.adoption import adopt
from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.techniques._blocks import blocks
from accelerando.techniques.drop_layers import DropLayers
from accelerando.techniques.export_onnx import ExportOnnx
from accelerando.techniques.export_torch import ExportTorch
from accelerando.testing import technique_contract as contract
from accelerando.testing.technique_contract import answers, floats
from accelerando.workload import Form, Model, Samples

WIDTH = 8


class Residual(nn.Module):
    """x + f(x), where f is scaled."""

    def __init__(self, strength: float = 1.0, width: int = WIDTH) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
        self.kind = "residual"
        with torch.no_grad():
            self.branch[2].weight.mul_(strength)
            self.branch[2].bias.mul_(strength)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


class Unlike(Residual):
    """A residual block's class, without the path around."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.branch(x)


class Normed(nn.Module):
    """A convolutional block that ends in a ReLU, as ResNet's do; narrower ones change the shape."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inside, outside, 3, stride, 1), nn.BatchNorm2d(outside)
        same = inside == outside and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)) + self.skip(x))


class Owner(nn.Module):
    """Blocks in a ModuleList, run in one of the ways in which people run them."""

    def __init__(self, way: str, count: int = 4) -> None:
        super().__init__()
        self.way, self.stem, self.head = way, nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList(Residual() for _ in range(count))

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        if self.way == "iterated":
            for layer in self.layers:
                x = layer(x)
        elif self.way == "counted":
            for i in range(4):
                x = self.layers[i](x)
        elif self.way == "read":
            for i, layer in enumerate(self.layers):
                assert layer.kind == "residual"
                x = layer(x) * (i + 1)
        elif self.way == "collected":
            states = [x := layer(x) for layer in self.layers]
            return self.head(x), states
        return self.head(x)


class Tupled(nn.Module):
    """Layers that answer with tuples, and take their input by name."""

    class Layer(Residual):
        def forward(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, None]:  # type: ignore[override]
            return states + self.branch(states), None

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (Tupled.Layer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.a, self.b, self.c):
            x, _ = layer(states=x, mask=None)
        return x


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def take_in(model: nn.Module, data: Any) -> tuple[Model, Samples]:
    workload = adopt(model, data, metric="cosine")
    return workload.model, workload.calibrate


def chain(*strengths: float) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(5, WIDTH), *map(Residual, strengths), nn.Linear(WIDTH, 3)))


def convolutional() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()),
            nn.Sequential(Normed(4, 4), Normed(4, 4), Normed(4, 4)),
            nn.Sequential(Normed(4, 8, 2), Normed(8, 8), Normed(8, 8)),
            nn.Flatten(),
            nn.Linear(8 * 16, 3),
        )
    )


WAYS = ("iterated", "counted", "read", "collected")
BUILDS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "sequential": lambda: (chain(1.0, 1.0, 1.0, 1.0, 1.0), floats(64, 5)),
    "convolutional": lambda: (convolutional(), floats(64, 1, 8, 8)),
    "tupled": lambda: (seeded(Tupled), floats(64, WIDTH)),
    **{way: lambda way=way: (seeded(lambda: Owner(way)), floats(64, 5)) for way in WAYS},  # type: ignore[misc]
}


@cache
def case(which: str) -> tuple[Model, Samples]:
    return take_in(*BUILDS[which]())


def drop(model: nn.Module, data: Any, folder: Path, **knobs: Any) -> tuple[Model, Model, Samples]:
    given, rows = take_in(model, data)
    return given, DropLayers(**knobs).apply(given, rows, folder), rows


def parameters(model: Model) -> int:
    return sum(p.numel() for p in model.content.parameters())


# --- which blocks there are ----------------------------------------------------------------------------------------


def names(model: nn.Module, data: Any) -> list[str]:
    given, rows = take_in(model, data)
    return [name for name, _ in blocks(given.content, given.signature, [x[:2] for x in rows.chunks[0].inputs])]


def test_blocks_keep_their_shape_and_run_in_order() -> None:
    assert names(convolutional(), floats(64, 1, 8, 8)) == ["1.0", "1.1", "1.2", "2.1", "2.2"]
    assert names(seeded(Tupled), floats(64, WIDTH)) == ["a", "b", "c"]


def test_a_part_without_a_path_around_its_weights_is_no_block() -> None:
    model = seeded(lambda: nn.Sequential(Unlike(), Unlike(), Residual(), Residual()))
    assert names(model, floats(64, WIDTH)) == ["2", "3"]


@pytest.mark.slow
def test_a_norm_of_ones_own_is_no_block(tmp_path: Path) -> None:
    after = drop(Llama(), floats(64, 6, 5), tmp_path)[1]
    assert names(Llama(), floats(64, 6, 5)) == [f"blocks.{i}" for i in range(4)]
    assert "2 of 4 residual blocks left out: blocks." in after.log[-1]


def test_a_block_that_runs_twice_is_none() -> None:
    class Twice(Tupled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.a(x)[0])

    assert names(seeded(Twice), floats(64, WIDTH)) == ["b", "c"]


def test_finding_blocks_leaves_the_model_as_it_was() -> None:
    given, rows = take_in(convolutional(), floats(64, 1, 8, 8))
    before = copy.deepcopy(given.content.state_dict())
    found = blocks(given.content, given.signature, [x[:2] for x in rows.chunks[0].inputs])
    assert all(part is given.content.get_submodule(name) for name, part in found)
    assert all(torch.equal(before[k], v) for k, v in given.content.state_dict().items())
    assert not any(m._forward_hooks for m in given.content.modules())


# --- which ones go -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("idle", [0, 2, 3])
def test_the_block_that_does_nothing_goes_first(idle: int, tmp_path: Path) -> None:
    model = chain(*(0.0 if i == idle else 1.0 for i in range(4)))
    before, after, rows = drop(model, floats(64, 5), tmp_path, share=0.25)
    assert f"1 of 4 residual blocks left out: {idle + 1}" in after.log[-1]
    leaves = list(rows.chunks[0].inputs)
    np.testing.assert_array_equal(answers(before, leaves)[0], answers(after, leaves)[0])


def test_answers_are_judged_as_class_probabilities_where_there_are_labels(tmp_path: Path) -> None:
    class Shifts(Residual):  # moves all logits alike: no probability changes
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 100 * self.branch(x).mean(1, keepdim=True)

    model = seeded(lambda: nn.Sequential(*map(Residual, (0.1, 0.1)), *map(Shifts, (1.0, 1.0))))
    x = floats(64, WIDTH)
    workload = adopt(model, (x, np.arange(64) % WIDTH), metric="accuracy")
    after = DropLayers(share=0.25).apply(workload.model, workload.calibrate, tmp_path)
    assert after.log[-1].endswith(("left out: 2", "left out: 3"))
    after = drop(model, x, tmp_path, share=0.25)[1]
    assert after.log[-1].endswith(("left out: 0", "left out: 1"))


def test_the_last_go_first_where_that_is_asked(tmp_path: Path) -> None:
    after = drop(convolutional(), floats(64, 1, 8, 8), tmp_path, rank="last", share=0.6)[1]
    assert after.log[-1].endswith("3 of 5 residual blocks left out: 1.2, 2.1, 2.2")


def test_a_ranking_is_the_same_again(tmp_path: Path) -> None:
    logs = {drop(convolutional(), floats(64, 1, 8, 8), tmp_path)[1].log for _ in range(2)}
    assert len(logs) == 1


# --- what is left --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    share=st.floats(0, 1, exclude_min=True, exclude_max=True),
    more=st.floats(0, 1, exclude_min=True, exclude_max=True),
    rank=st.sampled_from(("greedy", "last")),
    which=st.sampled_from(tuple(BUILDS)),
)
def test_any_share_gives_a_smaller_model_that_runs_and_learns(
    tmp_path: Path, share: float, more: float, rank: str, which: str
) -> None:
    before, rows = case(which)
    less, least = (DropLayers(s, rank).apply(before, rows, tmp_path) for s in sorted((share, more)))
    assert parameters(before) > parameters(less) >= parameters(least)
    for leaves in ([x[:3] for x in rows.chunks[0].inputs], [x[:1] for x in rows.chunks[0].inputs]):
        for port, want, have in zip(
            before.signature.outputs, answers(before, leaves), answers(least, leaves), strict=True
        ):
            assert (have.shape, have.dtype) == (want.shape, want.dtype), port
    ensure_trains(least, rows)
    again = least.changed(Form.TORCH, cloudpickle.loads(cloudpickle.dumps(copy.deepcopy(least.content))), "copied")
    for one, other in zip(answers(least, leaves), answers(again, leaves), strict=True):
        np.testing.assert_array_equal(one, other)


def ensure_trains(model: Model, rows: Samples) -> None:
    module = copy.deepcopy(model.content).train().requires_grad_(True)
    args, kwargs = model.signature.call([torch.from_numpy(x[:4].copy()) for x in rows.chunks[0].inputs])
    answer = torch.utils._pytree.tree_leaves(module(*args, **kwargs))[0]
    answer.square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize(("way", "left"), [("iterated", 2), ("counted", 4), ("read", 4), ("collected", 4)])
def test_a_container_is_shortened_only_where_its_owner_does_not_count(way: str, left: int, tmp_path: Path) -> None:
    before, rows = case(way)
    after = DropLayers().apply(before, rows, tmp_path)
    assert len(after.content.layers) == left
    assert sum(isinstance(m, Residual) for m in after.content.layers) == 2


def test_parts_of_a_named_sequential_keep_their_names(tmp_path: Path) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential()
            for key in ("first", "second", "last"):
                self.body.add_module(key, Residual())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) + self.body.first.branch[0].bias.sum()

    after = drop(seeded(Reads), floats(64, WIDTH), tmp_path, rank="last")[1]
    assert list(dict(after.content.body.named_children())) == ["first"]


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_contract(check: contract.Check, tmp_path: Path) -> None:
    check(contract.prepare(DropLayers, tmp_path, convolutional(), floats(64, 1, 8, 8)))


def test_the_input_keeps_its_flags(tmp_path: Path) -> None:
    before, rows = case("counted")
    DropLayers().apply(before, rows, tmp_path)
    assert not any(p.requires_grad for p in before.content.parameters())
    assert not any(m.training for m in before.content.modules())
    assert not any("forward" in vars(m) for m in before.content.modules())


# --- transformers --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torch_encoder(tmp_path: Path) -> None:
    class Encodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 4)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.encoder(x, src_key_padding_mask=mask)[:, 0]

    mask = np.arange(7) >= np.arange(64)[:, None] % 6 + 2
    before, after, rows = drop(seeded(Encodes), {"x": floats(64, 7, 16), "mask": mask}, tmp_path)
    assert len(after.content.encoder.layers) == 2
    ensure_trains(after, rows)
    ExportTorch().apply(after, rows, tmp_path)
    assert parameters(after) == parameters(before) // 2


def bert() -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16}
    model = seeded(lambda: BertForSequenceClassification(BertConfig(vocab_size=20, num_hidden_layers=4, **sizes)))
    return model, {"input_ids": np.random.default_rng(0).integers(0, 20, (64, 9))}


def distilbert() -> tuple[nn.Module, Any]:
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(vocab_size=20, dim=16, n_heads=2, hidden_dim=32, n_layers=4, max_position_embeddings=16)
    return seeded(lambda: DistilBertModel(config)), {"input_ids": np.random.default_rng(0).integers(0, 20, (64, 9))}


def vit() -> tuple[nn.Module, Any]:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 4}
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes)
    return seeded(lambda: ViTForImageClassification(config)), {"pixel_values": floats(64, 1, 8, 8)}


@pytest.mark.slow
@pytest.mark.parametrize("build", [bert, distilbert, vit])
def test_encoders_of_transformers_lose_layers_and_export(build: Any, tmp_path: Path) -> None:
    model, data = build()
    before, after, rows = drop(model, data, tmp_path)
    assert "2 of 4 residual blocks" in after.log[-1]
    assert parameters(after) < parameters(before)
    ensure_trains_some(after, rows)
    ExportTorch().apply(after, rows, tmp_path)


def ensure_trains_some(model: Model, rows: Samples) -> None:
    module = copy.deepcopy(model.content).train().requires_grad_(True)
    args, kwargs = model.signature.call([torch.from_numpy(x[:4].copy()) for x in rows.chunks[0].inputs])
    next(iter(module(*args, **kwargs).values())).square().sum().backward()
    assert sum(p.grad is not None for p in module.parameters()) > 10


@pytest.mark.slow
@pytest.mark.parametrize("which", ["convolutional", "counted"])
def test_what_is_left_exports(which: str, tmp_path: Path) -> None:
    before, rows = case(which)
    after = DropLayers().apply(before, rows, tmp_path)
    assert ExportOnnx().apply(after, rows, tmp_path).content.is_file()


# --- refusals ------------------------------------------------------------------------------------------------------


def test_a_model_without_layers_of_one_class_is_refused_when_planning() -> None:
    given, _ = take_in(contract.network(), floats(64, 1, 8, 8))
    refusal = DropLayers().refuse(given, Machine.look())
    assert refusal is not None
    assert refusal.reason is Reason.NOTHING_TO_DO


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(Unlike(), Unlike(), Unlike()),
        lambda: nn.Sequential(Residual(), Residual(width=WIDTH), Unlike())[1:],
        lambda: nn.Sequential(Residual()),
    ],
)
def test_a_model_with_fewer_than_two_blocks_is_refused(build: Any, tmp_path: Path) -> None:
    given, rows = take_in(seeded(build), floats(64, WIDTH))
    with pytest.raises(RefusalError) as caught:
        DropLayers().apply(given, rows, tmp_path)
    assert caught.value.reason is Reason.NOTHING_TO_DO


@pytest.mark.parametrize("knobs", [{"share": 0.0}, {"share": 1.0}, {"share": float("nan")}, {"rank": "first"}])
def test_settings_that_mean_nothing_are_turned_away(knobs: Any) -> None:
    with pytest.raises(ValueError, match="must"):
        DropLayers(**knobs)
