"""Rungs of one process share what they can of memory: an arena, and whole sessions."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from accelerando.backends.cascade import Cascade
from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.backends.openvino import Openvino
from accelerando.bundle import Bundle
from accelerando.errors import AccelerandoError
from accelerando.recipe import Backend, Recipe, Runner
from accelerando.serve.residents import Residents
from accelerando.testing.bundles import write_bundle
from benchmarks.resident import with_cascade

pytest.importorskip("onnx")
BETTER, FAST = Recipe((), Onnxruntime(threads=1)), Recipe((), Onnxruntime(threads=1, optimization="basic"))
LADDER = [BETTER, *(Recipe((), Cascade.of(FAST, BETTER, "margin", t)) for t in (0.9, 0.2)), FAST]
X = np.random.default_rng(0).standard_normal((64, 4), np.float32)


def network(path: Path, width: int) -> Path:
    """An ONNX model of a wide hidden layer: (rows, 4) -> (rows, width) -> (rows, 3)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = [(name, rng.standard_normal(shape, np.float32)) for name, shape in (("a", (4, width)), ("b", (width, 3)))]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("MatMul", ["t", "b"], ["logits"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", k]) for n, k in (("x", 4), ("logits", 3))]
    stored = [numpy_helper.from_array(w, name) for name, w in weights]
    graph = helper.make_graph(nodes, "wide", ends[:1], ends[1:], stored)
    path.parent.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def made(folder: Path, recipes: list[Recipe], width: int = 8) -> Bundle:
    return write_bundle(folder / "b", recipes=recipes, content=network(folder / "m" / "model.onnx", width))


def sessions() -> int:
    """How many sessions of ONNX Runtime are alive in this process."""
    return alive("InferenceSession")


def alive(kind: str) -> int:
    """How many objects of a class are alive in this process."""
    gc.collect()
    return sum(type(x).__name__ == kind for x in gc.get_objects())


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A cascade's members are rungs by themselves, and there are two cascades of them."""
    bundle = made(tmp_path, LADDER)
    bundle.start(bundle.ladder[0], shared=True).close()  # what stays in a process stays from now on
    return bundle


# --- whole sessions -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_files_with_the_same_settings_are_loaded_once_and_close_with_the_last(bundle: Bundle) -> None:
    before = sessions()
    alone = [bundle.start(rung) for rung in bundle.ladder]
    expected = [runner([X])[0] for runner in alone]
    assert sessions() == before + 6
    del alone
    runners = [bundle.start(rung, shared=True) for rung in bundle.ladder]
    assert sessions() == before + 2
    for runner, answer in zip(runners, expected, strict=True):
        np.testing.assert_array_equal(runner([X])[0], answer)
    left = []
    while runners:
        runners.pop(0).close()
        left.append(sessions() - before)
        for runner, answer in zip(runners, expected[-len(runners) :], strict=False):
            np.testing.assert_array_equal(runner([X])[0], answer)
    assert left == [2, 2, 1, 0]


def test_other_settings_and_other_files_are_other_sessions(bundle: Bundle, tmp_path: Path) -> None:
    before = sessions()
    other = made(tmp_path / "other", LADDER, width=16)
    of = [
        bundle.start(bundle.ladder[0], shared=True),
        bundle.start(bundle.ladder[0], shared=True, spinning=False),
        bundle.start(bundle.ladder[0]),
        other.start(other.ladder[0], shared=True),
    ]
    assert sessions() == before + 4
    again = Bundle.open(bundle.path)
    of.append(again.start(again.ladder[0], shared=True))
    assert sessions() == before + 4
    del of


def test_openvino_compiles_once_what_has_the_same_files_and_settings(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    better, fast = Recipe((), Openvino(threads=1)), Recipe((), Openvino(threads=2))
    bundle = made(tmp_path, [better, Recipe((), Cascade.of(fast, better, "margin", 0.9)), fast])
    expected = [bundle.start(rung)([X])[0] for rung in bundle.ladder]
    before = alive("CompiledModel")
    runners = [bundle.start(rung, shared=True) for rung in bundle.ladder]
    assert alive("CompiledModel") == before + 2
    while runners:
        for runner, answer in zip(runners, expected[-len(runners) :], strict=True):
            np.testing.assert_allclose(runner([X])[0], answer, rtol=1e-5, atol=1e-6)
        runners.pop(0).close()
    assert alive("CompiledModel") == before


def test_threads_that_load_and_call_at_once_share_one_session(bundle: Bundle) -> None:
    before, rung = sessions(), bundle.ladder[0]
    together = threading.Barrier(8)

    def load_and_call(rows: int) -> tuple[Runner, np.ndarray]:
        together.wait(30)
        runner = bundle.start(rung, shared=True)
        return runner, runner([X[:rows]])[0]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(load_and_call, range(1, 9)))
    assert sessions() == before + 1
    for rows, (_, answer) in enumerate(found, 1):
        np.testing.assert_allclose(answer, bundle.start(rung)([X[:rows]])[0], rtol=1e-5, atol=1e-6)


def test_a_rung_that_leaves_the_memory_takes_nothing_from_a_cascade_of_it(bundle: Bundle) -> None:
    cores = threading.Lock()
    residents = Residents(bundle, lambda rung: bundle.start(rung, spinning=False, shared=True), cores, most_rows=8)
    try:
        assert all(residents.load(i) for i in range(4))
        expected = residents[1].runner([X[:8]])[0]  # type: ignore[misc]
        for i in (0, 3):
            residents.evict(i)
        np.testing.assert_array_equal(residents[1].runner([X[:8]])[0], expected)  # type: ignore[misc]
        assert residents.load(0)
    finally:
        residents.close()


def test_what_can_not_be_loaded_leaves_nothing_behind(bundle: Bundle) -> None:
    before, file = sessions(), bundle.folder(bundle.ladder[0]) / "model.onnx"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(AccelerandoError):
        bundle.start(bundle.ladder[0], shared=True)
    assert sessions() == before
    file.write_bytes(content)
    assert len(bundle.start(bundle.ladder[0], shared=True)([X])[0]) == 64


def test_a_closed_runner_says_so(bundle: Bundle) -> None:
    runner = bundle.start(bundle.ladder[0])
    runner.close()
    runner.close()
    with pytest.raises(RuntimeError, match="was closed"):
        runner([X])


def test_the_ladder_of_the_benchmark_has_a_cascade_of_its_rungs(tmp_path: Path) -> None:
    joined = with_cascade(made(tmp_path, [BETTER, FAST]), tmp_path / "joined")
    assert [rung.recipe.backend.name for rung in joined.ladder] == ["onnxruntime", "cascade", "onnxruntime"]
    before = sessions()
    better, cascade, fast = (Bundle.open(joined.path).start(rung, shared=True) for rung in joined.ladder)
    assert sessions() == before + 2
    answers = [runner([X])[0] for runner in (better, cascade, fast)]
    assert all(answer.shape == (64, 3) for answer in answers)


# --- one arena ------------------------------------------------------------------------------------------------------

WIDTH = 200_000  # a call of 64 rows takes 51 MB
CALL = 64 * WIDTH * 4
CODE = """
import sys, numpy as np
from accelerando.bundle import Bundle
from accelerando.memory import give_back, resident_bytes
import onnxruntime, os
{first}
bundle, x = Bundle.open("b"), np.ones((64, 4), np.float32)
def held():
    give_back()
    return resident_bytes(os.getpid())
def start(number):
    runner = bundle.start(bundle.ladder[number], spinning=False, shared={shared})
    runner([x[:1]])
    return runner
runners = [start(number) for number in range(len(bundle.ladder))]
found = [held()]
for runner in runners:
    runner([x])
    found.append(held())
while runners:
    runners.pop(0).close()
    runner = None
    found.append(held())
print(*found)
"""
REGISTERED = """
info = onnxruntime.OrtMemoryInfo("Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0,
                                 onnxruntime.OrtMemType.DEFAULT)
onnxruntime.create_and_register_allocator(info, None)
"""


def held(folder: Path, *backends: Backend, shared: bool, first: str = "") -> list[int]:
    """Bytes that a new process holds: with all rungs loaded, after a large call of each, after each was closed."""
    made(folder, [Recipe((), backend) for backend in backends], WIDTH)
    code = CODE.format(shared=shared, first=first)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    return [int(text) for text in done.stdout.split()]


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system tells no resident memory")
TWO = (Onnxruntime(threads=1), Onnxruntime(threads=1, optimization="basic"))


@needs_proc
@pytest.mark.parametrize("first", ["", REGISTERED], ids=["ours", "an arena that was registered before"])
def test_one_arena_does_for_all_and_gives_back_what_a_closed_rung_no_longer_needs(tmp_path: Path, first: str) -> None:
    loaded, one, both, one_closed, all_closed = held(tmp_path, *TWO, shared=True, first=first)
    assert one - loaded > 0.8 * CALL
    assert both - one < 0.2 * CALL
    assert one_closed - loaded < 0.2 * CALL
    assert all_closed - loaded < 0.2 * CALL


@needs_proc
def test_unless_told_to_share_each_has_its_own(tmp_path: Path) -> None:
    loaded, _, both, one_closed, _ = held(tmp_path, *TWO, shared=False)
    assert both - loaded > 1.6 * CALL
    assert one_closed - loaded > 0.5 * CALL


@needs_proc
def test_a_rung_without_an_arena_keeps_none(tmp_path: Path) -> None:
    loaded, *after, _ = held(tmp_path, *(Onnxruntime(threads=1, arena=False, batch=b) for b in (0, 64)), shared=True)
    assert max(after) - loaded < 0.2 * CALL
