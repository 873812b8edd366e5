"""Rungs in a process of their own: whatever becomes of it, the server goes on and says what was lost."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from accelerando import load
from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.bundle import Bundle
from accelerando.errors import BundleError
from accelerando.recipe import Recipe
from accelerando.serve.footprint import held_bytes
from accelerando.serve.isolation import Apart, LostError
from accelerando.signature import Signature
from accelerando.testing.bundles import SIGNATURE, write_bundle

pytest.importorskip("onnx")
ROW = np.ones((1, 4), np.float32)


def linear(path: Path, signature: Signature = SIGNATURE) -> Path:
    """An ONNX model of one product."""
    import onnx
    from onnx import TensorProto, helper

    weights = helper.make_tensor("w", TensorProto.FLOAT, [4, 3], [float(i) for i in range(12)])
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["logits"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [weights],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    recipes = [Recipe((), Onnxruntime(threads=1)), Recipe((), Onnxruntime(threads=1, optimization="basic"))]
    write_bundle(tmp_path / "b", recipes=recipes, content=linear(tmp_path / "m" / "model.onnx"))
    return tmp_path / "b"


@pytest.fixture
def apart(bundle: Path) -> Iterator[Apart]:
    process = Apart(bundle, seconds=30)
    yield process
    process.close()


def test_it_answers_from_another_process(bundle: Path) -> None:
    with load(bundle, goal="p99 <= 30s", isolated=True) as model:
        answer = model(ROW)
        np.testing.assert_allclose(answer, [[18, 22, 26]])
        pid = model._conductor.company.residents._pid()
        assert pid != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_killed_process_costs_nothing_that_was_accepted(bundle: Path) -> None:
    with load(bundle, goal="p99 <= 60s", isolated=True, audit=0) as model:
        assert model(ROW).shape == (1, 3)
        tickets = []
        for i in range(60):
            tickets.append(model.submit([ROW * i]))
            if i == 20:
                os.kill(model._conductor.company.residents._pid(), signal.SIGKILL)
        for i, ticket in enumerate(tickets):
            np.testing.assert_allclose(ticket.future.result(60).leaves[0], [[18 * i, 22 * i, 26 * i]], rtol=1e-5)
        assert model.status().failed == 0


def test_a_call_that_hangs_is_given_up_and_the_next_one_answered(bundle: Path) -> None:
    process = Apart(bundle, seconds=1.0)
    runner = process.start(Bundle.open(bundle, hashes=False).ladder[0])
    assert runner([ROW])[0].shape == (1, 3)
    os.kill(process.pid(), signal.SIGSTOP)
    with pytest.raises(LostError, match="no answer came within 1 s"):
        runner([ROW])
    assert runner([ROW])[0].shape == (1, 3)
    process.close()
    with pytest.raises(LostError):
        runner([ROW])


def test_it_is_up_before_its_memory_is_read(apart: Apart) -> None:
    """Else the interpreter and what it imports, some 60 MB, would count as memory that the rungs hold."""
    before = held_bytes(apart.pid())
    with pytest.raises(BundleError, match="another bundle"):
        apart.call("0" * 12, [])  # it has to be up to say so
    assert held_bytes(apart.pid()) - before < 20e6
    assert before > 20e6


def test_a_process_that_does_not_come_up_is_an_error(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(LostError, match="died with status 1"):
        Apart(bundle)


def test_the_process_ends_with_its_server(apart: Apart) -> None:
    pid = apart.pid()
    assert apart._line is not None
    apart._line.close()
    for _ in range(3000):
        if apart._process is None or apart._process.poll() is not None:
            break
        time.sleep(0.01)
    assert apart._process is not None
    assert apart._process.poll() is not None
    assert pid == apart._process.pid


def test_a_bundle_that_was_replaced_is_not_mixed_with_the_old_one(bundle: Path, apart: Apart, tmp_path: Path) -> None:
    rung = Bundle.open(bundle, hashes=False).ladder[1]
    shutil.rmtree(bundle)
    recipes = [Recipe((), Onnxruntime(threads=1))]
    write_bundle(bundle, recipes=recipes, content=linear(tmp_path / "n" / "model.onnx"))
    with pytest.raises(BundleError, match="another bundle by now"):
        apart.start(rung)
