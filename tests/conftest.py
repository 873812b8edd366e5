"""What tests share: a small ONNX model with data, and the toys, a package of one backend and one technique."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from accelerando import plugins
from accelerando.serve import costs

settings.register_profile("house", deadline=None)  # no verdict may hang on how fast the machine is
settings.load_profile("house")

TOYS = Path(__file__).parent / "toys"
Rows = tuple[np.ndarray, np.ndarray]


def pytest_collection_finish() -> None:
    """What was imported stays: each closing of a model would look through all of it for what can be given back."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call of a rung takes is found by a few calls without pauses: nothing here depends on it."""
    for name, value in (("SIZES", (1, 4)), ("CALLS", 5), ("PAUSE", 0.0)):
        monkeypatch.setattr(costs, name, value)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package `toys` is installed, here and in child processes."""
    monkeypatch.syspath_prepend(str(TOYS))
    plugins.discover.cache_clear()
    plugins.find.cache_clear()
    yield
    plugins.discover.cache_clear()
    plugins.find.cache_clear()
    for name in ("toy_backend", "toy_technique"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def onnx_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """(n, 16) float32 -> (n, 4) logits: an MLP of 16-256-256-4 with weights from a seed, dynamic batch."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, weights, width, before = [], [], 16, "x"
    for i, out in enumerate((256, 256, 4)):
        w = (rng.standard_normal((width, out)) / np.sqrt(width)).astype(np.float32)
        weights += [numpy_helper.from_array(w, f"w{i}"), numpy_helper.from_array(np.zeros(out, np.float32), f"b{i}")]
        name = "logits" if i == 2 else f"h{i}"
        nodes.append(helper.make_node("Gemm", [before, f"w{i}", f"b{i}"], [name]))
        before = name
        if i < 2:
            nodes.append(helper.make_node("Relu", [name], [f"r{i}"]))
            before = f"r{i}"
        width = out
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", k]) for n, k in (("x", 16), ("logits", 4))]
    graph = helper.make_graph(nodes, "mlp", ends[:1], ends[1:], weights)
    path = tmp_path_factory.mktemp("model") / "mlp.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


@pytest.fixture(scope="session")
def labelled(onnx_model: Path) -> Rows:
    """600 inputs with the labels that the model gives to 95 % of them."""
    import onnxruntime

    rng = np.random.default_rng(1)
    x = rng.standard_normal((600, 16)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(onnx_model), providers=["CPUExecutionProvider"])
    y = session.run(None, {"x": x})[0].argmax(1)
    flip = rng.random(600) < 0.05
    return x, np.where(flip, (y + 1) % 4, y).astype(np.int64)
