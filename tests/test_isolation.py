"""Rungs in a process of their own: whatever becomes of it, the server goes on and says what was lost."""

from __future__ import annotations

import asyncio
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forking import forked

from accelerando import GovernedModel, load
from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.bundle import Bundle
from accelerando.errors import BundleError, ClosedError, RowsError
from accelerando.memory import resident_bytes
from accelerando.recipe import Recipe
from accelerando.serve.isolation import CALL_SECONDS, LEAST_SECONDS, Apart, LostError, Unfinished
from accelerando.serve.salvage import FAILURES
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


def kill(pid: int) -> None:
    """End a process, and wait until it has ended."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def when_all_is_loaded(model: GovernedModel) -> int:
    """Wait for that; the process where it is."""
    while any(rung.state in ("out", "loading") for rung in model.status().rungs):
        time.sleep(0.01)
    assert [rung.state for rung in model.status().rungs] == ["ready"] * len(model.bundle.ladder)
    return model._conductor.company.residents._pid()


def test_a_hung_process_is_noticed_by_what_a_call_should_take(bundle: Path) -> None:
    with load(bundle, goal="p99 <= 60s", isolated=True, audit=0) as model:
        os.kill(when_all_is_loaded(model), signal.SIGSTOP)
        answer, why = model.explain(ROW)
        np.testing.assert_allclose(answer, [[18, 22, 26]])
        hung = re.search("no answer came within (.*) s; the process was killed", why.reason)
        assert hung is not None
        assert LEAST_SECONDS <= float(hung[1]) < CALL_SECONDS


def test_the_first_call_of_a_size_may_take_longer(bundle: Path, apart: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a session may have to be built for it."""
    monkeypatch.setattr("accelerando.serve.isolation.LEAST_SECONDS", 0.1)
    runner = apart.start(Bundle.open(bundle, hashes=False).ladder[0])
    for rows in (ROW, ROW.repeat(5, axis=0)):
        os.kill(apart.pid(), signal.SIGSTOP)
        goes_on = threading.Timer(1.0, os.kill, (apart.pid(), signal.SIGCONT))
        goes_on.start()
        np.testing.assert_allclose(runner.run([rows], 64, math.inf, expected=1e-6)[0], rows[:, :1] * [[18, 22, 26]])
        goes_on.join()
    os.kill(apart.pid(), signal.SIGSTOP)
    with pytest.raises(LostError, match=r"no answer came within 0\.1 s"):
        runner.run([ROW], 64, math.inf, expected=1e-6)


def spoil(bundle: Path, *numbers: int) -> None:
    """Turn a bit of a byte of these rungs' files; a second time, turn it back."""
    opened = Bundle.open(bundle, hashes=False)
    for number in numbers:
        file = opened.folder(opened.ladder[number]) / "model.onnx"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)


def test_a_rung_that_can_not_be_loaded_again_is_given_up_and_costs_nothing(bundle: Path) -> None:
    with load(bundle, goal="p99 <= 60s", isolated=True, audit=0) as model:
        pid, number = when_all_is_loaded(model), model.explain(ROW)[1].rung
        spoil(bundle, number)
        kill(pid)
        answer, why = model.explain(ROW)
        np.testing.assert_allclose(answer, [[18, 22, 26]])
        assert why.rung != number
        assert model.status().rungs[number].state == "failed"
        assert "could not be loaded again: [hash]" in model.status().rungs[number].why
        assert model.ready


def test_where_no_rung_can_be_loaded_again_it_is_not_ready_until_its_bundle_is_mended(bundle: Path) -> None:
    with load(bundle, goal="p99 <= 60s", isolated=True, audit=0) as model:
        kill(when_all_is_loaded(model))
        spoil(bundle, 0, 1)
        for _ in range(2):
            with pytest.raises(
                ClosedError, match=r"rung 0 is failed: .*\[hash\].*load it again, once its bundle is whole"
            ):
                model(ROW)
            assert not model.ready
        with pytest.raises(ClosedError):
            model.submit([ROW])
        spoil(bundle, 0, 1)
        model.update(bundle)
        np.testing.assert_allclose(model(ROW), [[18, 22, 26]])
        assert model.ready


def test_where_the_process_comes_up_no_more_it_is_not_ready(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(bundle, goal="p99 <= 60s", isolated=True, audit=0) as model:
        kill(when_all_is_loaded(model))
        monkeypatch.setattr(sys, "executable", shutil.which("false"))
        for _ in range(FAILURES - 1):
            with pytest.raises(RowsError, match="died with status 1"):
                model(ROW)
        assert model.ready
        for _ in range(2):
            with pytest.raises(ClosedError, match=f"failed {FAILURES} times in a row: .* died with status 1"):
                model(ROW)
        assert not model.ready


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
        before = resident_bytes(process.pid())
        light.close()
        assert before - resident_bytes(process.pid()) > 0.6 * HEAVY
        np.testing.assert_array_equal(runner([ROW])[0].shape, (1, 3))
    finally:
        process.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("asks", [[], ["asks"]])
def test_a_forked_child_ends_nothing_of_its_parents(bundle: Path, asks: list[str]) -> None:
    assert forked(bundle, "isolated", *asks) == "0 True"


def test_it_is_up_before_its_memory_is_read(apart: Apart) -> None:
    """Else the interpreter and what it imports, some 60 MB, would count as memory that the rungs hold."""
    before = resident_bytes(apart.pid())
    with pytest.raises(BundleError, match="another bundle"):
        apart.call("0" * 12, [])  # it has to be up to say so
    assert resident_bytes(apart.pid()) - before < 20e6
    assert before > 20e6


def test_a_process_that_does_not_come_up_is_an_error(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(LostError, match="died with status 1"):
        Apart(bundle)


def test_the_process_ends_with_its_server(apart: Apart) -> None:
    assert apart._life is not None
    apart._life.calls.close()
    assert apart._life.process.wait(60) == 0


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="this system does not tell which files are open")
def test_a_closed_model_keeps_nothing_open(bundle: Path) -> None:
    def lines() -> list[str]:
        names = [str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
        return sorted(name for name in names if name.startswith(("socket:", "/memfd:accelerando")))

    before = lines()
    model = load(bundle, goal="p99 <= 60s", isolated=True, audit=0)
    model(ROW)
    assert len(lines()) == len(before) + 6
    kill(model._conductor.company.residents._pid())
    model(ROW)
    assert len(lines()) == len(before) + 6
    model.close()
    assert lines() == before


def test_who_waits_for_a_process_that_is_ended_is_told_so(bundle: Path, apart: Apart) -> None:
    runner = apart.start(Bundle.open(bundle, hashes=False).ladder[0])
    os.kill(apart.pid(), signal.SIGSTOP)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(one, [ROW]) for one in (runner, runner.aside())]
        assert apart._life is not None
        while not (apart._life.calls._using.locked() and apart._life.loads._using.locked()):
            time.sleep(0.001)
        apart.close()
        for call in waiting:
            with pytest.raises(LostError):
                call.result(20)


def test_a_bundle_that_was_replaced_is_not_mixed_with_the_old_one(bundle: Path, apart: Apart, tmp_path: Path) -> None:
    rung = Bundle.open(bundle, hashes=False).ladder[1]
    shutil.rmtree(bundle)
    recipes = [Recipe((), Onnxruntime(threads=1))]
    write_bundle(bundle, recipes=recipes, content=linear(tmp_path / "n" / "model.onnx"))
    with pytest.raises(BundleError, match="another bundle by now"):
        apart.start(rung)
