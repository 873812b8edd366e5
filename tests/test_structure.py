"""What a refresh takes for another model: settings and wiring count, weights and names do not."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from accelerando.adoption import adopt
from accelerando.errors import ModelError
from accelerando.renewal import _check_structure
from accelerando.search.structure import differs, structure_of
from accelerando.testing.models import floats

Build = Callable[[], nn.Module]


class Attends(nn.Module):
    """(n, 4, 8, 8) -> (n, 16, 4) by torch's own attention; `heads` stands in one of its modules alone."""

    def __init__(self, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, heads, dropout, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, :, ::2, ::2].flatten(2).transpose(1, 2)
        return self.attention(x, x, x, need_weights=False)[0]


class Own(nn.Module):
    """A class of one's own, with a number that says how, and much that does not."""

    def __init__(self, heads: int = 2, drop: float = 0.1, path: str = "run-1", lessons: int = 0) -> None:
        super().__init__()
        self.heads, self.drop_path, self.name_or_path, self.checkpointing = heads, drop, path, lessons > 0
        self.lessons, self._cached, self.seen = lessons, lessons, (0, lessons)
        self.mix = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.lessons, self.seen = self.lessons + 1, (0, self.lessons + 1)
        return self.mix(x).unflatten(-1, (self.heads, -1)).softmax(-1).flatten(-2)


def conv(*last: nn.Module, **knobs: Any) -> Build:
    return lambda: nn.Sequential(nn.Conv2d(4, 4, 3, **{"padding": 1, **knobs}), *last)


def structure(build: Build) -> str:
    return structure_of(adopt(build().eval(), floats(40, 4, 8, 8), metric="cosine"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (conv(), conv(padding=2, dilation=2)),
        (conv(), conv(padding=0)),
        (conv(), conv(stride=2)),
        (conv(), conv(padding_mode="reflect")),
        (conv(nn.GELU()), conv(nn.GELU("tanh"))),
        (conv(nn.LeakyReLU(0.1)), conv(nn.LeakyReLU(0.2))),
        (conv(nn.ReLU()), conv(nn.GELU())),
        (conv(nn.Softmax(1)), conv(nn.Softmax(2))),
        (lambda: Attends(2), lambda: Attends(4)),
        (Own, lambda: Own(heads=4)),
    ],
    ids=["dilation", "padding", "stride", "padding mode", "gelu", "slope", "activation", "axis", "heads", "own heads"],
)
def test_other_settings_are_another_structure(one: Build, other: Build) -> None:
    assert differs(structure(one), structure(other))
    assert not differs(structure(one), structure(one))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (conv(nn.Dropout(0.1)), conv(nn.Dropout(0.3))),
        (conv(nn.BatchNorm2d(4)), conv(nn.BatchNorm2d(4, momentum=0.01))),
        (lambda: Attends(2), lambda: Attends(2, dropout=0.2)),
        (Own, lambda: Own(drop=0.4, path="elsewhere/run-2", lessons=7)),
    ],
    ids=["dropout", "momentum", "attention", "own"],
)
def test_what_training_changes_is_the_same_structure(one: Build, other: Build) -> None:
    assert not differs(structure(one), structure(other))


def test_to_find_it_leaves_the_module_as_it_was() -> None:
    load = adopt(Own().eval(), floats(40, 4, 8, 8), metric="cosine")
    structure_of(load)
    assert load.model.content.lessons == 0
    assert not load.model.content.training


# --- ONNX -------------------------------------------------------------------------------------------------------


def file(
    path: Path, seed: int = 0, name: str = "w", kind: str = "Relu", alpha: float | None = None, width: int = 6,
    skip: bool = False, shape: tuple[int, ...] = (-1, 4),
) -> Path:  # fmt: skip
    """x -> x @ w -> activation -> @ v -> reshaped."""
    rng = np.random.default_rng(seed)
    w, v = (rng.standard_normal(s).astype(np.float32) for s in ((4, width), (width, 4)))
    attributes = {} if alpha is None else {"alpha": alpha}
    nodes = [
        helper.make_node("MatMul", ["x", name], [f"{name}_1"]),
        helper.make_node(kind, [f"{name}_1"], ["h"], **attributes),
        helper.make_node("MatMul", ["h", "v"], ["z"]),
        helper.make_node("Add", ["z", "x" if skip else "z"], ["s"]),
        helper.make_node("Reshape", ["s", "shape"], ["y"]),
    ]
    weights = [numpy_helper.from_array(x, n) for x, n in ((w, name), (v, "v"), (np.array(shape, np.int64), "shape"))]
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", *shape[1:]]),
    ]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


@pytest.mark.parametrize(
    ("change", "another"),
    [
        ({"seed": 1}, False),
        ({"name": "weight.7"}, False),
        ({"kind": "Tanh"}, True),
        ({"kind": "LeakyRelu", "alpha": 0.3}, True),
        ({"width": 7}, True),
        ({"skip": True}, True),
        ({"shape": (-1, 2, 2)}, True),
    ],
    ids=str,
)
def test_files_are_compared_but_for_weights_and_names(change: dict[str, Any], another: bool, tmp_path: Path) -> None:
    paths = file(tmp_path / "old.onnx", kind="LeakyRelu", alpha=0.1), tmp_path / "new.onnx"
    file(paths[1], **{"kind": "LeakyRelu", "alpha": 0.1, **({"alpha": None} if "kind" in change else {}), **change})
    old, new = (structure_of(adopt(str(p), floats(40, 4), metric="cosine")) for p in paths)
    assert differs(old, new) == another


# --- in a refresh -----------------------------------------------------------------------------------------------


def test_a_refresh_refuses_another_structure_and_takes_what_it_can_not_compare() -> None:
    old, new = (adopt(Attends(heads).eval(), floats(40, 4, 8, 8), metric="cosine") for heads in (2, 4))
    for told, refused in (
        (structure_of(old), True),
        (structure_of(new), False),
        ("6f353bbd2ab9", False),  # as bundles held it before there were versions of it
        ("1:6f353bbd2ab9", False),
        (None, False),
        (7, False),
    ):
        before: Any = SimpleNamespace(signature=old.model.signature, workload={"structure": told})
        if refused:
            with pytest.raises(ModelError, match="built otherwise"):
                _check_structure(before, new)
        else:
            _check_structure(before, new)


def test_evidence_is_of_the_code_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights in a class that was edited and imported again are another model, and no search goes on there."""
    source = (
        "import torch\nclass Edited(torch.nn.Linear):\n    def forward(self, x):\n        return super().forward(x)"
    )
    file = tmp_path / "edited_module.py"
    file.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("edited_module")
    weights = module.Edited(4, 3).state_dict()

    def digest() -> str:
        model = module.Edited(4, 3)
        model.load_state_dict(weights)
        return adopt(model.eval(), floats(40, 4), metric="cosine").digest

    try:
        before = digest()
        assert digest() == before
        file.write_text(source + " * 1.0")  # the same answers, so that nothing but the code tells
        importlib.reload(module)
        assert digest() != before
    finally:
        del sys.modules["edited_module"]
