"""What is particular to merging tokens: how many, which, what stays, what is refused."""

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
from accelerando.techniques._parity import ensure_same_onnx
from accelerando.techniques._tokens import Chain, schedule
from accelerando.techniques.export_onnx import ExportOnnx
from accelerando.techniques.merge_tokens import MergeTokens
from accelerando.testing import technique_contract as contract
from accelerando.testing.technique_contract import answers, capable, floats
from accelerando.workload import Model, Samples

SHARES = st.floats(0.01, 0.99)
FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOKENS, WIDTH = 12, 16


class Classifier(nn.Module):
    """(n, 12, 6) -> (n, 4): a transformer that reads its class token, the mean, or something that forbids merging."""

    def __init__(self, reads: str = "class", depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.reads = nn.Linear(6, WIDTH), reads
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, TOKENS + 1, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, norm_first=reads == "mean")
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        for p in self.encoder.parameters():  # else all layers are alike
            nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.2)
        self.head = nn.Linear(WIDTH * (TOKENS + 1 if reads == "all" else 1), 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.embed(x)], 1) + self.places
        mask = torch.zeros(TOKENS + 1, TOKENS + 1) if self.reads == "masked" else None
        x = self.encoder(x, mask=mask)
        if self.reads == "each":
            return self.head(x)
        if self.reads == "all":
            return self.head(x.flatten(1))
        return self.head(x.mean(1) if self.reads == "mean" else x[:, -1] if self.reads == "last" else x[:, 0])


def take_in(module: nn.Module, data: Any) -> tuple[Model, Samples]:
    workload = adopt(module.eval(), data, metric="cosine")
    return workload.model, workload.calibrate


@pytest.fixture(scope="module")
def taken() -> tuple[Model, Samples]:
    return take_in(Classifier(), floats(48, TOKENS, 6))


@pytest.fixture(scope="module")
def vision() -> tuple[Model, Samples]:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=4,
        num_channels=1, num_labels=5,
    )  # fmt: skip
    quarters = np.kron(floats(48, 1, 2, 2), np.ones((8, 8), np.float32))  # neighbours are alike, as in pictures
    return take_in(ViTForImageClassification(config), quarters + 0.1 * floats(48, 1, 16, 16, seed=1))


def tokens_seen(model: Model, kind: str, rows: int = 2) -> list[int]:
    """How many tokens each attention works on."""
    seen: list[int] = []
    module = copy.deepcopy(model.content)

    def see(part: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else next(iter(kwargs.values()))).shape[1])

    for part in module.modules():
        if type(part).__name__ == kind:
            part.register_forward_pre_hook(see, with_kwargs=True)
    shapes = [p.shape[1:] for p in model.signature.inputs]
    args, kwargs = model.signature.call([torch.randn(rows, *s) for s in shapes])
    with torch.no_grad():
        module(*args, **kwargs)
    return seen


@pytest.mark.slow
@FEW
@given(st.lists(SHARES, min_size=2, max_size=3), st.sampled_from(["place", "content"]))
def test_any_share_runs_and_a_greater_one_never_costs_more(
    taken: tuple[Model, Samples], shares: list[float], by: str
) -> None:
    model, data = taken
    before = None
    for share in sorted(shares):
        made = MergeTokens(share, by).apply(model, data, Path())
        for rows in (1, 3):
            assert answers(made, [floats(rows, TOKENS, 6)])[0].shape == (rows, 4)
        seen = tokens_seen(made, "TransformerEncoderLayer")
        assert seen[0] == TOKENS + 1
        assert min(seen) >= 2  # the class token and one more
        assert sum(seen) < 3 * (TOKENS + 1)
        assert before is None or all(a <= b for a, b in zip(seen, before, strict=True))
        before = seen


@given(st.integers(2, 24), st.integers(4, 400), st.integers(0, 2), SHARES)
def test_the_share_is_met_where_it_can_be(depth: int, tokens: int, kept: int, share: float) -> None:
    chain = Chain(tuple(map(str, range(depth))), tokens, kept, 0)
    counts = schedule(chain, share)
    assert counts[0] == tokens
    assert counts == sorted(counts, reverse=True)
    most = (depth - 1) * (tokens - kept - 1)
    assert depth * tokens - sum(counts) >= min(share * depth * tokens, most) - 1e-6


@pytest.mark.parametrize(("by", "near"), [("place", 0.5), ("content", 0.9)])
def test_vision_transformer(vision: tuple[Model, Samples], by: str, near: float) -> None:
    model, data = vision
    made = MergeTokens(0.4, by).apply(model, data, Path())
    seen = tokens_seen(made, "ViTLayer")
    assert seen[0] == 17
    assert sum(seen) <= 0.6 * 4 * 17
    assert "1 stay" in made.log[-1]
    want, have = (answers(m, [data.chunks[0].inputs[0][:16]])[0] for m in (model, made))
    assert want.shape == have.shape
    spread = np.abs(want - want.mean(0)).mean()
    assert np.abs(want - have).mean() < near * spread  # far nearer than another input's answer


@pytest.mark.slow
@pytest.mark.parametrize("by", ["place", "content"])
@pytest.mark.parametrize("subject", ["taken", "vision"])
def test_it_exports(subject: str, by: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model, data = request.getfixturevalue(subject)
    made = MergeTokens(0.5, by).apply(model, data, Path())
    exported = ExportOnnx().apply(made, data, tmp_path)
    assert "by dynamo" in exported.log[-1]
    assert ensure_same_onnx(made, exported.content, data) < 1e-3


def test_tokens_that_say_the_same_are_merged_without_loss() -> None:
    """Three groups of four tokens that are alike for every input: merged by place, a mean reads the same."""

    class Means(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Mixes() for _ in range(2))
            self.head = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.inner(x)

    groups = np.array([0, 1, 2, 0, 1, 2, 2, 1, 0, 0, 1, 2])
    model, data = take_in(Means(), floats(48, 3, 6)[:, groups])
    made = MergeTokens(9 / 24).apply(model, data, Path())
    leaves = [floats(4, 3, 6, seed=9)[:, groups]]
    np.testing.assert_allclose(answers(made, leaves)[0], answers(model, leaves)[0], atol=1e-5)


def test_norms_of_ones_own_keep_their_blocks_tokens() -> None:
    model, data = take_in(Llama(), floats(48, TOKENS, 5))
    made = MergeTokens(0.5).apply(model, data, Path())
    assert "its 4 blocks work on 12, 6, 4, 2 tokens" in made.log[-1]
    assert tokens_seen(made, "Attention") == [12, 6, 4, 2]


def test_what_is_read_by_its_place_stays() -> None:
    for reads, says in (("class", "1 stay"), ("mean", "0 stay"), ("last", "1 stay")):
        model, data = take_in(Classifier(reads), floats(48, TOKENS, 6))
        made = MergeTokens(0.6).apply(model, data, Path())
        assert says in made.log[-1]
        matrix = next(m.matrix for m in made.content.modules() if hasattr(m, "matrix"))
        assert torch.allclose(matrix.sum(1), torch.ones(len(matrix)))
        if reads != "mean":
            end = 0 if reads == "class" else -1
            assert matrix[end, end] == 1
            assert (matrix[:, end] != 0).sum() == 1


def test_it_learns_travels_and_leaves_its_input_alone(taken: tuple[Model, Samples]) -> None:
    model, data = taken
    before = {k: v.clone() for k, v in model.content.state_dict().items()}
    for by in ("place", "content"):
        made = MergeTokens(by=by).apply(model, data, Path())
        assert all(torch.equal(v, model.content.state_dict()[k]) for k, v in before.items())
        assert not any(
            m._forward_pre_hooks or m._forward_hooks for m in (*made.content.modules(), *model.content.modules())
        )
        module = cloudpickle.loads(cloudpickle.dumps(copy.deepcopy(made.content))).requires_grad_(True)
        module(torch.randn(4, TOKENS, 6)).square().sum().backward()
        assert all(p.grad is not None for p in module.parameters())
        with torch.no_grad():
            again = MergeTokens(by=by).apply(model, data, Path())
        leaves = [floats(3, TOKENS, 6)]
        np.testing.assert_array_equal(answers(made, leaves)[0], answers(again, leaves)[0])


@pytest.mark.parametrize(
    ("reads", "words"), [("each", "per token"), ("all", "place"), ("masked", "mask")], ids=lambda x: x
)
def test_models_that_need_every_token_are_refused(reads: str, words: str) -> None:
    model, data = take_in(Classifier(reads), floats(48, TOKENS, 6))
    with pytest.raises(RefusalError, match=words) as caught:
        MergeTokens().apply(model, data, Path())
    assert caught.value.reason is Reason.UNSUPPORTED


def test_lengths_that_change_are_refused() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(6, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.encoder(x)[:, 0]

    model, _ = take_in(Reads(), [floats(16, 5, 6), floats(16, 9, 6), floats(16, 7, 6)])
    refusal = MergeTokens().refuse(model, capable())
    assert refusal is not None
    assert refusal.reason is Reason.UNSUPPORTED


class Mixer(nn.Module):
    """Its blocks have a weight per token."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.fix = nn.Linear(TOKENS, TOKENS), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
            return x + self.fix(x)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(self.Block() for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x).mean(1)


def test_blocks_made_for_one_number_of_tokens_are_refused() -> None:
    model, data = take_in(Mixer(), floats(48, TOKENS, 6))
    with pytest.raises(RefusalError, match="one number of tokens") as caught:
        MergeTokens().apply(model, data, Path())
    assert caught.value.reason is Reason.UNSUPPORTED


def test_a_model_without_blocks_is_refused() -> None:
    model, data = take_in(contract.network(), floats(48, 1, 8, 8))
    refusal = MergeTokens().refuse(model, capable())
    assert refusal is not None
    assert refusal.reason is Reason.NOTHING_TO_DO
    with pytest.raises(RefusalError):
        MergeTokens().apply(model, data, Path())


@pytest.mark.parametrize("knobs", [{"share": 0.0}, {"share": 1.0}, {"by": "luck"}])
def test_wrong_knobs_are_said(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(knobs))):
        MergeTokens(**knobs)


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda c: c.__name__)
def test_contract(check: contract.Check, tmp_path: Path) -> None:
    check(contract.prepare(MergeTokens, tmp_path, Classifier().eval(), floats(64, TOKENS, 6)))
