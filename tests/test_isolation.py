"""Rungs in a process of their own: whatever becomes of it, the server goes on and says what was lost."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accelerando import load
from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.bundle import Bundle
from accelerando.errors import BundleError
from accelerando.recipe import Recipe
from accelerando.serve.footprint import held_bytes
from accelerando.serve.isolation import Apart, LostError, Unfinished
from accelerando.signature import Signature
from accelerando.testing.bundles import SIGNATURE, write_bundle

pytest.importorskip("onnx")
ROW = np.ones((1, 4), np.float32)
HEAVY = 50_000_000  # bytes


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


def heavy(path: Path) -> Path:
    """The same with `HEAVY` bytes of weights."""
    import onnx
    from onnx import helper, numpy_helper

    linear(path)
    model = onnx.load(path)
    width = HEAVY // 4 // 7
    weights = np.random.default_rng(0).standard_normal((7, width), dtype=np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weights[:4], "wide"))
    model.graph.initializer.append(numpy_helper.from_array(weights[4:].T.copy(), "narrow"))
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("MatMul", ["x", "wide"], ["between"]))
    model.graph.node.append(helper.make_node("MatMul", ["between", "narrow"], ["logits"]))
    onnx.save(model, path)
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


def test_who_has_no_patience_leaves_the_waiting_to_another(bundle: Path, apart: Apart) -> None:
    runner = apart.start(Bundle.open(bundle, hashes=False).ladder[0])
    np.testing.assert_allclose(runner.run([ROW], 64, patience=30), [[[18, 22, 26]]])
    os.kill(apart.pid(), signal.SIGSTOP)
    with pytest.raises(Unfinished) as first:
        runner.run([ROW], 64, patience=0.001)
    with pytest.raises(Unfinished) as second:  # the line is taken
        runner.run([2 * ROW], 64, patience=0.001)
    os.kill(apart.pid(), signal.SIGCONT)
    np.testing.assert_allclose(first.value.wait(), [[[18, 22, 26]]])
    np.testing.assert_allclose(second.value.wait(), [[[36, 44, 52]]])
    os.kill(apart.pid(), signal.SIGKILL)
    with pytest.raises(LostError):
        runner(ROW[None])
    with pytest.raises(Unfinished) as third:  # another process takes longer to come up
        runner.run([ROW], 64, patience=0.001)
    np.testing.assert_allclose(third.value.wait(), [[[18, 22, 26]]])


def test_who_is_served_does_not_wait_for_a_rung_that_is_being_loaded(bundle: Path, apart: Apart) -> None:
    runner = apart.start(Bundle.open(bundle, hashes=False).ladder[0])
    answers: list[list[np.ndarray[Any, Any]]] = []
    serving = threading.Thread(target=lambda: answers.append(runner([ROW])))
    with apart._loading:  # as long as a rung takes to load
        serving.start()
        serving.join(60)
    np.testing.assert_allclose(answers, [[[[18, 22, 26]]]])
    with apart._calling:  # as long as a call takes
        np.testing.assert_allclose(runner.aside()([ROW]), [[[18, 22, 26]]])


def test_many_rows_are_computed_over_there_piece_by_piece(bundle: Path, apart: Apart) -> None:
    runner = apart.start(Bundle.open(bundle, hashes=False).ladder[0])
    rows = np.arange(1000, dtype=np.float32)[:, None] * ROW
    (answer,) = runner.run([rows], 64, patience=math.inf)
    np.testing.assert_allclose(answer, rows[:, :1] * [[18, 22, 26]], rtol=1e-5)


def test_an_event_loop_goes_on_while_the_process_hangs(bundle: Path) -> None:
    async def ask() -> None:
        loop = asyncio.get_running_loop()
        with load(bundle, goal="p99 <= 60s", isolated=True, audit=0) as model:
            for _ in range(3):
                await asyncio.wrap_future(model.submit_soon([ROW], loop.call_soon).future)
            pid = model._conductor.company.residents._pid()
            os.kill(pid, signal.SIGSTOP)
            tickets = [model.submit_soon([ROW * i], loop.call_soon) for i in range(4)]
            for _ in range(20):
                await asyncio.sleep(0.01)
            assert not any(ticket.future.done() for ticket in tickets)
            os.kill(pid, signal.SIGCONT)
            for i, ticket in enumerate(tickets):
                answer = await asyncio.wrap_future(ticket.future)
                np.testing.assert_allclose(answer.leaves, [[[18 * i, 22 * i, 26 * i]]], rtol=1e-5)

    asyncio.run(ask())


def test_a_rung_that_is_unloaded_gives_its_memory_back(tmp_path: Path) -> None:
    recipes = [Recipe((), Onnxruntime(threads=1)), Recipe((), Onnxruntime(threads=1, optimization="basic"))]
    write_bundle(tmp_path / "b", recipes=recipes, content=heavy(tmp_path / "m" / "model.onnx"))
    process = Apart(tmp_path / "b")
    try:
        light, runner = (process.start(rung) for rung in Bundle.open(tmp_path / "b", hashes=False).ladder)
        runner([ROW])
        before = held_bytes(process.pid())
        light.close()
        assert before - held_bytes(process.pid()) > 0.6 * HEAVY
        np.testing.assert_array_equal(runner([ROW])[0].shape, (1, 3))
    finally:
        process.close()


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
    assert apart._life is not None
    apart._life.calls.close()
    assert apart._life.process.wait(60) == 0


def test_a_bundle_that_was_replaced_is_not_mixed_with_the_old_one(bundle: Path, apart: Apart, tmp_path: Path) -> None:
    rung = Bundle.open(bundle, hashes=False).ladder[1]
    shutil.rmtree(bundle)
    recipes = [Recipe((), Onnxruntime(threads=1))]
    write_bundle(bundle, recipes=recipes, content=linear(tmp_path / "n" / "model.onnx"))
    with pytest.raises(BundleError, match="another bundle by now"):
        apart.start(rung)
