"""What is particular to separable convolutions: the fit, the share, what is refused."""

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
from accelerando.techniques._parity import ensure_same, ensure_same_onnx
from accelerando.techniques.export_onnx import ExportOnnx
from accelerando.techniques.separate_convolutions import SeparateConvolutions
from accelerando.testing import technique_contract as contract
from accelerando.testing.technique_contract import answers, capable, floats
from accelerando.workload import Model, Samples

SHARES = st.floats(0.01, 0.99)
FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def network(kernel: int = 3, stride: int = 1, padding_mode: str = "zeros") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, kernel, stride, padding=kernel // 2, padding_mode=padding_mode), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, dilation=1, groups=24), nn.ReLU(),
        nn.Conv2d(24, 32, 3, padding="same"), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    ).eval()  # fmt: skip


def take_in(module: nn.Module, data: Any) -> tuple[Model, Samples]:
    workload = adopt(module, data, metric="cosine")
    return workload.model, workload.calibrate


@pytest.fixture(scope="module")
def taken() -> tuple[Model, Samples]:
    return take_in(network(), floats(48, 3, 12, 12))


def separable(conv: nn.Module) -> bool:
    return isinstance(conv, nn.Sequential)


def multiply_adds(model: Model) -> int:
    """Of one row, by hooks of its own."""
    total = 0

    def count(conv: Any, _: Any, answer: Any) -> None:
        nonlocal total
        total += answer[0].numel() * conv.weight[0].numel()

    module = copy.deepcopy(model.content)
    for part in module.modules():
        if isinstance(part, (nn.Conv1d, nn.Conv2d)):
            part.register_forward_hook(count)
    port = model.signature.inputs[0]
    with torch.no_grad():
        module(torch.zeros(1, *port.shape[1:]))
    return total


@pytest.mark.slow
@FEW
@given(st.lists(SHARES, min_size=2, max_size=3), st.sampled_from([1, 2]))
def test_any_share_runs_and_a_greater_one_never_costs_more(
    taken: tuple[Model, Samples], shares: list[float], filters: int
) -> None:
    model, data = taken
    costs = []
    for share in sorted(shares):
        made = SeparateConvolutions(share, filters).apply(model, data, Path())
        for rows in (1, 3):
            leaves = [floats(rows, 3, 12, 12)]
            assert [y.shape for y in answers(made, leaves)] == [y.shape for y in answers(model, leaves)]
        costs.append(multiply_adds(made))
    assert costs == sorted(costs, reverse=True)
    assert costs[0] < multiply_adds(model)


def test_the_share_is_met_where_it_can_be(taken: tuple[Model, Samples]) -> None:
    model, data = taken
    whole = multiply_adds(model)
    made = SeparateConvolutions(0.5).apply(model, data, Path())
    assert multiply_adds(made) <= 0.5 * whole
    most = SeparateConvolutions(0.999).apply(model, data, Path())
    assert 0.05 * whole < multiply_adds(most) < 0.3 * whole
    assert [separable(most.content[i]) for i in (0, 3, 5, 7)] == [True, True, False, True]
    assert isinstance(most.content[1], nn.BatchNorm2d)


@pytest.mark.parametrize(("kernel", "stride", "mode"), [(3, 1, "zeros"), (5, 2, "reflect"), (3, 2, "circular")])
def test_a_separable_kernel_comes_out_exactly(kernel: int, stride: int, mode: str) -> None:
    module = network(kernel, stride, mode)
    for i in (0, 3, 7):
        conv = module[i]
        mix = torch.randn(conv.out_channels, conv.in_channels, 1, 1)
        filters = torch.randn(1, conv.in_channels, *conv.kernel_size)
        with torch.no_grad():
            conv.weight.copy_(mix * filters / (conv.in_channels * 9) ** 0.5)
    model, data = take_in(module, floats(48, 3, 12, 12))
    made = SeparateConvolutions(0.99).apply(model, data, Path())
    assert all(separable(made.content[i]) for i in (0, 3, 7))
    leaves = [floats(4, 3, 12, 12, seed=5)]
    ensure_same(model.signature, answers(model, leaves), answers(made, leaves))


def test_as_many_filters_as_a_kernel_has_taps_are_exact() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv1d(2, 40, 3), nn.ReLU(), nn.Conv1d(40, 30, 3)).eval()
    model, data = take_in(module, floats(48, 2, 20))
    made = SeparateConvolutions(0.1, filters=2).apply(model, data, Path())
    assert "1 of 1" in made.log[-1] or "of 2" in made.log[-1]
    rough = SeparateConvolutions(0.1, filters=1).apply(model, data, Path())
    leaves = [floats(8, 2, 20, seed=3)]
    want = answers(model, leaves)[0]
    off = [float(np.square(answers(m, leaves)[0] - want).mean()) for m in (made, rough)]
    assert off[0] < off[1] < np.square(want).mean()


def test_the_fit_is_better_than_the_weights_own_decomposition() -> None:
    """Inputs whose channels and neighbours go together: what the data says is worth more than the weights alone."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1)).eval()
    base = np.cumsum(np.cumsum(floats(64, 1, 10, 10), 2), 3) * 0.1
    model, data = take_in(module, (base + 0.1 * floats(64, 8, 10, 10, seed=1)).astype(np.float32))
    made = SeparateConvolutions(0.5).apply(model, data, Path())
    weight = module[0].weight.detach().reshape(16, 8, 9).transpose(0, 1)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    plain = copy.deepcopy(made)
    with torch.no_grad():
        plain.content[0][0].weight.copy_(v[:, 0].reshape(8, 1, 3, 3))
        plain.content[0][1].weight.copy_((u[..., 0] * s[:, :1]).T.reshape(16, 8, 1, 1))
    leaves = [data.chunks[0].inputs[0][:8]]
    want, fitted, by_weights = (answers(m, leaves)[0] for m in (model, made, plain))
    assert np.square(fitted - want).sum() < 0.5 * np.square(by_weights - want).sum()


def test_it_learns_travels_and_leaves_its_input_alone(taken: tuple[Model, Samples]) -> None:
    model, data = taken
    before = {k: v.clone() for k, v in model.content.state_dict().items()}
    made = SeparateConvolutions().apply(model, data, Path())
    again = SeparateConvolutions().apply(model, data, Path())
    assert all(torch.equal(v, model.content.state_dict()[k]) for k, v in before.items())
    assert not any(p.requires_grad for p in (*model.content.parameters(), *made.content.parameters()))
    assert all(torch.equal(v, again.content.state_dict()[k]) for k, v in made.content.state_dict().items())
    module = cloudpickle.loads(cloudpickle.dumps(copy.deepcopy(made.content))).requires_grad_(True).train()
    module(torch.randn(4, 3, 12, 12)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())


@pytest.mark.slow
def test_it_exports(taken: tuple[Model, Samples], tmp_path: Path) -> None:
    model, data = taken
    made = SeparateConvolutions(0.9).apply(model, data, Path())
    exported = ExportOnnx().apply(made, data, tmp_path)
    assert ensure_same_onnx(made, exported.content, data) < 1e-4


def test_what_has_nothing_to_separate_is_refused() -> None:
    torch.manual_seed(0)
    for module in (
        nn.Linear(4, 3),
        nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 1, 3)),
    ):
        shape = (48, 4) if isinstance(module, nn.Linear) else (48, 4, 6, 6)
        model, data = take_in(module.eval(), floats(*shape))
        refusal = SeparateConvolutions().refuse(model, capable())
        assert refusal is not None
        assert refusal.reason is Reason.NOTHING_TO_DO
        with pytest.raises(RefusalError) as caught:
            SeparateConvolutions().apply(model, data, Path())
        assert caught.value.reason is Reason.NOTHING_TO_DO


class LooksInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) * self.conv.weight.mean()


def test_code_that_looks_into_its_convolution_is_refused() -> None:
    model, data = take_in(LooksInside().eval(), floats(48, 3, 6, 6))
    with pytest.raises(RefusalError, match="weight") as caught:
        SeparateConvolutions().apply(model, data, Path())
    assert caught.value.reason is Reason.UNSUPPORTED


def test_a_second_time_there_is_nothing_left(taken: tuple[Model, Samples]) -> None:
    model, data = taken
    made = SeparateConvolutions(0.99).apply(model, data, Path())
    assert SeparateConvolutions().refuse(made, capable()) is not None


@pytest.mark.parametrize("knobs", [{"share": 0.0}, {"share": 1.0}, {"filters": 0}])
def test_wrong_knobs_are_said(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(knobs))):
        SeparateConvolutions(**knobs)


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda c: c.__name__)
def test_contract(check: contract.Check, tmp_path: Path) -> None:
    check(contract.prepare(SeparateConvolutions, tmp_path))
