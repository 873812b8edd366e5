"""Early exits: where a graph is cut, what the head learns, the hand-over, and a certificate that can't be fooled."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from judged import ROWS, known

from accelerando.adoption import adopt
from accelerando.backends.cascade import CONFIDENCES, EXIT, Cascade
from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.backends.openvino import Openvino
from accelerando.bundle import Bundle
from accelerando.errors import BundleError, Reason, RefusalError, UsageError
from accelerando.goal import Goal, Outcome
from accelerando.ladder import Ladder, Rung
from accelerando.machine import Machine
from accelerando.measure.arm import open_samples, save_samples
from accelerando.measure.bench import examine
from accelerando.measure.rounds import Effort
from accelerando.metric import named
from accelerando.model_repository import export_bundle
from accelerando.plugins import discover, find
from accelerando.recipe import Artifact, Backend, Recipe, Runner
from accelerando.report import words
from accelerando.search import cascades
from accelerando.search.budget import Budget
from accelerando.search.cascades import next_cascade, predicted
from accelerando.search.grounds import attempt, check_files
from accelerando.search.site import Site
from accelerando.search.space import Space
from accelerando.signature import Port, Signature
from accelerando.techniques.early_exit import PARTS, EarlyExit
from accelerando.testing.bundles import write_bundle
from accelerando.testing.fakes import fake_artifact, fake_evidence
from accelerando.trial import Evidence, Refused, Trial
from accelerando.workload import Chunk, Form, Lessons, Model, Samples

CLASSES, WIDTH, BLOCKS = 4, 24, 6
PLAIN = Recipe((), Onnxruntime(threads=1))
QUICK = Effort(least=8, most=12, block_seconds=0.03)


# --- graphs -----------------------------------------------------------------------------------------------------


def signature(rows: int | str = "batch", masked: bool = False, outputs: tuple[Port, ...] = ()) -> Signature:
    inputs = [Port("x", "float32", (rows, 8))] + [Port("mask", "float32", (rows, WIDTH))] * masked
    ends = outputs or (Port("logits", "float32", (rows, CLASSES)),)
    names = tuple(port.name for port in inputs)
    result = {"leaf": 0} if len(ends) == 1 else {"tuple": [{"leaf": i} for i in range(len(ends))]}
    return Signature(tuple(inputs), ends, names, len(names), {n: {"leaf": i} for i, n in enumerate(names)}, result)


def chain(
    folder: Path,
    *,
    rows: int | str = "batch",
    blocks: int = BLOCKS,
    width: int = WIDTH,
    masked: bool = False,
    opset: int = 20,
    ending: str = "",
    skip: bool = False,
    turned: bool = False,
) -> Model:
    """Residual blocks h + relu(h A) B between a layer in and a layer out, weights from a seed.

    `masked`: each block multiplies by an input.  `skip`: the first state is added to the last.  `turned`: from the
    first layer on its axes are (width, batch).
    """
    from onnx import TensorProto, checker, helper, numpy_helper, save

    rng, stored, nodes = np.random.default_rng(0), [], []

    def node(kind: str, inputs: list[str], output: str, **more: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **more))
        return output

    def layer(name: str, before: str, shape: tuple[int, int], scale: float = 1.0) -> str:
        weights = (scale * rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        stored.append(numpy_helper.from_array(weights.T.copy() if turned else weights, f"{name}.w"))
        return node("MatMul", [f"{name}.w", before] if turned else [before, f"{name}.w"], name)

    h = first = layer("in", node("Transpose", ["x"], "x.t", perm=[1, 0]) if turned else "x", (8, width))
    for i in range(blocks):
        inner = layer(f"{i}.b", node("Relu", [layer(f"{i}.a", h, (width, width))], f"{i}.r"), (width, width), 0.3)
        h = node("Add", [h, node("Mul", [inner, "mask"], f"{i}.m") if masked else inner], f"h{i}")
    h = node("Add", [h, first], "skipped") if skip else h
    answer = layer("scores" if ending or turned else "logits", h, (width, CLASSES))
    if turned:
        answer = node("Transpose", [answer], "logits", perm=[1, 0])
    if ending:
        node(ending, [answer], "logits", axis=1)
    own = signature(rows, masked)
    ports = [
        [helper.make_tensor_value_info(p.name, TensorProto.FLOAT, p.shape) for p in s]
        for s in (own.inputs, own.outputs)
    ]
    graph = helper.make_graph(nodes, "chain", *ports, stored)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    checker.check_model(made)
    folder.mkdir(parents=True, exist_ok=True)
    save(made, str(folder / "model.onnx"))
    return Model(Form.ONNX, folder / "model.onnx", own)


def leaves(model: Model, count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((count, int(p.shape[1]))).astype(np.float32) for p in model.signature.inputs]


def data(model: Model, count: int = 400, targets: np.ndarray | None = None) -> Samples:
    return Samples((Chunk(tuple(leaves(model, count)), targets),))


def run(model: Model, given: list[np.ndarray]) -> list[np.ndarray]:
    """The answer of a model's file, by the names of its signature."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model.content), providers=["CPUExecutionProvider"])
    named = {p.name: x for p, x in zip(model.signature.inputs, given, strict=True)}
    taken = {i.name for i in session.get_inputs()}
    return list(session.run([p.name for p in model.signature.outputs], {k: x for k, x in named.items() if k in taken}))


def cut(
    model: Model, rows: Samples, folder: Path, share: float = 0.5, parts: tuple[str, ...] = PARTS
) -> dict[str, Model]:
    """The three parts of an exit, or some."""
    made = {}
    for part in parts:
        (folder / part).mkdir(parents=True)
        made[part] = EarlyExit(share, part).apply(model, rows, folder / part)
    return made


# --- the technique ----------------------------------------------------------------------------------------------


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    share=st.floats(0.05, 0.95),
    masked=st.booleans(),
    rows=st.sampled_from(["batch", 4]),
    opset=st.sampled_from([13, 20]),
)
def test_front_and_rest_are_the_whole_wherever_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, share: float, masked: bool, rows: int | str, opset: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    model = chain(folder, rows=rows, masked=masked, opset=opset)
    made = cut(model, data(model), folder, share)
    for count in [rows] if isinstance(rows, int) else (1, 3):
        given = leaves(model, count, seed=9)
        answer, state = run(made["front"], given)
        assert made["front"].signature.outputs[-1].fits(state)
        assert made["front"].signature.outputs[-1].name == EXIT
        np.testing.assert_array_equal(run(made["exit"], given)[0], answer)
        np.testing.assert_allclose(run(made["rest"], [*given, state])[0], run(model, given)[0], rtol=1e-4, atol=1e-5)
    assert made["exit"].signature == model.signature
    assert [p.name for p in made["rest"].signature.inputs] == [*(p.name for p in model.signature.inputs), EXIT]


def test_the_share_says_how_many_layers_lie_behind(tmp_path: Path) -> None:
    import onnx

    model = chain(tmp_path)
    layers = [2 * BLOCKS + 1 - 2 * k for k in (1, 3, 5)]  # behind that many blocks
    for share, expected in zip((0.85, 0.54, 0.23), layers, strict=True):
        rest = cut(model, data(model), tmp_path / str(share), share, ("rest",))["rest"]
        assert sum(n.op_type == "MatMul" for n in onnx.load(rest.content).graph.node) == expected


@pytest.mark.slow
@pytest.mark.parametrize("backend", [Onnxruntime(), Onnxruntime(batch=1), Openvino()], ids=str)
def test_a_quantized_chain_is_cut_and_handed_over_in_every_backend(backend: Backend, tmp_path: Path) -> None:
    model, room = chain(tmp_path / "given"), tmp_path / "quantized"
    room.mkdir()
    quantized = find("techniques", "quantize_static")().apply(model, data(model), room)
    made = cut(quantized, data(model), tmp_path)
    given = leaves(model, 40, seed=5)
    fast, better = run(made["front"], given)[0], run(quantized, given)[0]
    middle = float(np.median(CONFIDENCES["margin"](fast)))
    runner = joined(made, tmp_path / "joined", backend, middle)
    sure = CONFIDENCES["margin"](fast) >= middle
    got = runner(given)[0]
    scale = np.abs(better).max()
    close = np.abs(got - np.where(sure[:, None], fast, better)).max(axis=1) < 0.03 * scale
    assert close.mean() > 0.9  # but for rows whose confidence lies at the threshold in other int8 kernels
    np.testing.assert_allclose(runner([x[:1] for x in given])[0], got[:1], rtol=0.02, atol=0.02 * scale)


def test_the_head_learns_labels_where_there_are_some_and_the_models_own_answers_elsewhere(tmp_path: Path) -> None:
    model = chain(tmp_path)
    answers = run(model, leaves(model, 2000))[0]
    turned = (answers.argmax(1) + 1) % CLASSES  # labels that the model itself gets wrong
    half = np.where(np.arange(2000) % 2, turned, -1)
    unseen = leaves(model, 500, seed=3)
    right = run(model, unseen)[0].argmax(1)
    other = (right + 1) % CLASSES
    for number, (targets, expected) in enumerate(((None, right), (turned, other), (turned[:, None], other))):
        made = cut(model, data(model, 2000, targets), tmp_path / str(number), parts=("exit",))["exit"]
        assert (run(made, unseen)[0].argmax(1) == expected).mean() > 0.8
    got = run(cut(model, data(model, 2000, half), tmp_path / "half", parts=("exit",))["exit"], unseen)[0].argmax(1)
    assert ((got == right) | (got == other)).mean() > 0.8


def test_it_learns_from_the_training_rows_and_by_what_answers_are_judged(tmp_path: Path) -> None:
    model = chain(tmp_path)
    train = data(model, 900, np.zeros(900, np.int64))
    kept = {"watch": train, "loss": None, "augment": None, "folder": tmp_path, "say": print}
    for metric, constant in (("accuracy", True), ("agreement", False)):
        lessons = Lessons(None, train, metric=named(metric), **kept)
        made = cut(replace(model, lessons=lessons), data(model, 40), tmp_path / metric, parts=("exit",))["exit"]
        assert "learned from 900 rows" in made.log[-1]
        assert bool((run(made, leaves(model, 200, 4))[0].argmax(1) == 0).all()) is constant


@pytest.mark.parametrize("ending", ["Softmax", "LogSoftmax"])
def test_answers_that_are_chances_stay_chances(ending: str, tmp_path: Path) -> None:
    model = chain(tmp_path, ending=ending)
    made = cut(model, data(model), tmp_path, parts=("exit",))["exit"]
    got = run(made, leaves(model, 9))[0].astype(np.float64)
    np.testing.assert_allclose((np.exp(got) if ending == "LogSoftmax" else got).sum(1), 1, atol=1e-5)


def refusal_of(model: Model, rows: Samples, folder: Path) -> RefusalError:
    with pytest.raises(RefusalError) as caught:
        EarlyExit().apply(model, rows, folder)
    return caught.value


def test_what_is_no_chain_is_refused_by_name(tmp_path: Path) -> None:
    model = chain(tmp_path / "skip", skip=True)
    found = refusal_of(model, data(model), tmp_path)
    assert found.reason is Reason.NOTHING_TO_DO
    assert "chain of blocks" in found.detail


def test_a_state_whose_first_axis_is_not_the_batch_is_refused_by_name(tmp_path: Path) -> None:
    model = chain(tmp_path / "turned", turned=True)
    found = refusal_of(model, data(model), tmp_path)
    assert found.reason is Reason.UNSUPPORTED
    assert "no float32 tensor (batch, ...)" in found.detail


def test_numbers_and_several_answers_are_refused_by_name(tmp_path: Path) -> None:
    model = chain(tmp_path)
    found = refusal_of(model, data(model, 400, np.random.default_rng(0).random(400)), tmp_path)
    assert (found.reason, "numbers" in found.detail) == (Reason.UNSUPPORTED, True)
    two = (Port("logits", "float32", ("batch", CLASSES)), Port("state", "float32", ("batch", WIDTH)))
    for ports in ((Port("y", "float32", ("batch", 1)),), (Port("y", "int64", ("batch", CLASSES)),), two):
        other = replace(model, signature=signature(outputs=ports))
        refusal = EarlyExit().refuse(other, Machine.look())
        assert refusal is not None
        assert refusal.reason is Reason.UNSUPPORTED
        assert refusal_of(other, data(model), tmp_path).detail == refusal.detail


def test_without_rows_to_learn_from_it_says_what_to_give(tmp_path: Path) -> None:
    model = chain(tmp_path)
    found = refusal_of(model, data(model, 9), tmp_path)
    assert found.reason is Reason.UNSUPPORTED
    assert "pass train=" in found.detail


def test_a_graph_that_branches_is_refused_by_name(tmp_path: Path) -> None:
    import onnx
    from onnx import helper

    model = chain(tmp_path)
    graph = onnx.load(model.content)
    inner = helper.make_graph(
        [helper.make_node("Identity", ["h3"], ["o"])], "b", [], [helper.make_tensor_value_info("o", 1, None)]
    )
    graph.graph.node.append(helper.make_node("If", ["c"], ["unused"], then_branch=inner, else_branch=inner))
    onnx.save(graph, str(model.content))
    assert "branches or loops at run time (If)" in refusal_of(model, data(model), tmp_path).detail


@pytest.mark.parametrize("knobs", [{"share": 0.0}, {"share": 1.0}, {"share": float("nan")}, {"part": "middle"}])
def test_settings_that_are_no_exit_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        EarlyExit(**knobs)


# --- the hand-over ----------------------------------------------------------------------------------------------


def ends(share: float = 0.5, backend: Backend = PLAIN.backend) -> tuple[Recipe, Recipe]:
    return Recipe((EarlyExit(share, "front"),), backend), Recipe((EarlyExit(share, "rest"),), backend)


def joined(made: dict[str, Model], folder: Path, backend: Backend = PLAIN.backend, threshold: float = 0.5) -> Runner:
    cascade = Cascade.of(*ends(backend=backend), "margin", threshold)
    for i, part in enumerate(("front", "rest")):
        (folder / str(i)).mkdir(parents=True)
        backend.compile(made[part], folder / str(i))
    whole = replace(made["exit"].signature)
    return cascade.load(cascade.compile(Model(Form.ONNX, None, whole), folder), folder, whole)


@pytest.mark.parametrize("rows", ["batch", 4])
def test_each_row_has_the_answer_of_the_exit_or_of_the_whole(tmp_path: Path, rows: int | str) -> None:
    model = chain(tmp_path, rows=rows)
    made = cut(model, data(model), tmp_path)
    runner, seen = joined(made, tmp_path / "joined", threshold=0.6), set()
    for seed in range(10):
        given = leaves(model, rows if isinstance(rows, int) else 1 + seed, seed)
        fast, better = run(made["exit"], given)[0], run(model, given)[0]
        sure = CONFIDENCES["margin"](fast) >= 0.6
        seen |= set(sure)
        np.testing.assert_allclose(runner(given)[0], np.where(sure[:, None], fast, better), rtol=1e-4, atol=1e-5)
    assert seen == {True, False}
    runner.close()


def test_the_rest_is_given_the_state_of_the_rows_that_are_not_sure_and_of_no_others(tmp_path: Path) -> None:
    model = chain(tmp_path)
    runner: Any = joined(cut(model, data(model), tmp_path), tmp_path / "joined", threshold=0.5)
    given, asked = leaves(model, 50), []
    rest, front = runner._better, runner._fast
    runner._better = lambda x: asked.append(x) or rest(x)
    runner(given)
    unsure = CONFIDENCES["margin"](front(given)[0]) < 0.5
    np.testing.assert_array_equal(asked[0][0], given[0][unsure])
    np.testing.assert_array_equal(asked[0][1], front(given)[1][unsure])


def test_a_bundle_with_a_hand_over_serves_without_torch_the_search_or_a_technique(tmp_path: Path) -> None:
    model = chain(tmp_path / "given")
    wrote = write_bundle(
        tmp_path / "b", recipes=[PLAIN], content=model.content, signature=model.signature, inputs=leaves(model, 4)
    )
    recipe, parts = Recipe((), Cascade.of(*ends(), "margin", 0.6)), cut(model, data(model), tmp_path)
    folder = tmp_path / "b" / "rungs" / recipe.key
    joined(parts, folder, threshold=0.6).close()
    rung = Rung(recipe, Artifact.gather(folder), fake_evidence(3.0, n=500, split="certify"), certified=True)
    names = ("goal", "verdict", "signature", "machine", "workload", "run", "profile")
    ladder = Ladder((wrote.ladder.rungs[0], rung))
    Bundle.write(wrote.path, **{n: getattr(wrote, n) for n in names}, ladder=ladder, best=1, parity=None)
    given = leaves(model, 9, seed=3)
    fast, better = run(parts["exit"], given)[0], run(model, given)[0]
    sure = CONFIDENCES["margin"](fast) >= 0.6
    assert set(sure) == {True, False}
    np.savez(tmp_path / "known.npz", x=given[0], y=np.where(sure[:, None], fast, better))
    code = (
        "import sys, accelerando, numpy as np\n"
        "fast, known = accelerando.load('b'), np.load('known.npz')\n"
        "assert 'early_exit > onnxruntime' in repr(fast), fast\n"
        "assert np.allclose(fast(known['x']), known['y'], rtol=1e-4, atol=1e-5)\n"
        "bad = ('torch', 'onnx.', 'scipy', 'accelerando.search', 'accelerando.techniques', 'accelerando.measure')\n"
        "print(*sorted(m for m in sys.modules if m.startswith(bad)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
    with pytest.raises(UsageError, match="no single model file"):
        export_bundle(tmp_path / "b", "onnx", tmp_path / "repository")


def test_parts_of_other_exits_are_not_joined() -> None:
    front, rest = ends()
    other = Recipe((EarlyExit(0.7, "rest"),), PLAIN.backend)
    later = Recipe((find("techniques", "quantize_dynamic")(), *rest.steps), PLAIN.backend)
    for pair in ((front, PLAIN), (PLAIN, rest), (rest, front), (front, front), (front, other), (front, later)):
        with pytest.raises(ValueError, match="one early exit"):
            Cascade.of(*pair, "margin", 0.5)
    assert Cascade.of(front, rest, "margin", 0.5).hands_over
    alone = Cascade.of(Recipe((EarlyExit(),), PLAIN.backend), PLAIN, "margin", 0.5)
    assert not alone.hands_over  # an exit that is a smaller model, asked before any other


def test_how_a_hand_over_reads() -> None:
    front, rest = ends(0.7)
    told = words.recipe(Recipe((), Cascade.of(front, rest, "margin", 0.83)))
    assert told == "ONNX Runtime, 1 thread, early exit before the last 70 % when sure (margin 0.83)"
    assert "early exit before the last 50 % when sure" in words.recipe(Recipe((), Cascade.of(*ends(), "entropy", 0.5)))


def test_parts_that_run_otherwise_are_told_each() -> None:
    front, (_, rest) = ends()[0], ends(backend=Onnxruntime(threads=2))
    told = words.recipe(Recipe((), Cascade.of(front, rest, "margin", 0.83)))
    part = "ONNX Runtime, early exit (50 %, part {}), {}"
    assert told == (
        f"cascade: {part.format('front', '1 thread')}, when sure (margin 0.83); else {part.format('rest', '2 threads')}"
    )


def test_routes_have_no_exits_for_only_a_cascade_gains_by_them(tmp_path: Path) -> None:
    model = chain(tmp_path)
    space = Space.plan(model, Machine.look(), discover("techniques"), discover("backends"))
    assert space.routes
    assert not any("early_exit" in route.names for route in space.routes)
    assert not any(s.name == "early_exit" for recipe, _ in space.turned_away for s in recipe.steps)


# --- the search -------------------------------------------------------------------------------------------------

WHOLE = Recipe((), Onnxruntime())
HALF = Recipe((EarlyExit(0.5),), Onnxruntime())


@dataclass
class World:
    """A whole model, three times as fast as the original, and what an exit of it would show."""

    whole: tuple[Trial, ...]
    exit: Trial
    grounds: Any


def world(folder: Path, goal: str = "drop <= 1%", speed: float = 6.0, loss: float = 0.06, knows: bool = True) -> World:
    rng = np.random.default_rng(0)
    original, lost, sure = rng.random(ROWS) < 0.95, rng.random(ROWS) < loss, rng.random(ROWS)
    if knows:
        sure[lost] *= 0.3
    arm = SimpleNamespace(each_row=lambda *_: np.stack([sure] * len(CONFIDENCES), axis=1))

    @contextmanager
    def open_arm(subject: Any, split: str, patience: float) -> Iterator[Any]:
        yield arm

    port = signature()
    save_samples(Samples((Chunk((np.zeros((8, 8), np.float32),), np.zeros(8, np.int64)),)), folder / "select")
    bench = SimpleNamespace(signature=port, data=folder, arm=open_arm, scoring_limit=10.0)
    workshop = SimpleNamespace(build=lambda recipe, into, timeout: SimpleNamespace(artifact=fake_artifact()))
    grounds = SimpleNamespace(
        bench=bench, workshop=workshop, goal=Goal.parse(goal), into=folder, subject=lambda recipe, artifact: None
    )
    trials = (
        known(Recipe((), find("backends", "eager")()), 1.0, original, original),
        known(WHOLE, 3.0, original, original),
    )
    return World(trials, known(HALF, speed, original & ~lost, original, Reason.BELOW_QUALITY), grounds)


def test_an_exit_is_measured_first_and_then_joined_with_the_rest(tmp_path: Path) -> None:
    here, tuned = world(tmp_path), set[Any]()
    first = next_cascade(here.whole, here.grounds, 100, tuned)
    assert first is not None
    assert first.recipe == HALF
    found = next_cascade((*here.whole, here.exit), here.grounds, 100, tuned)
    assert found is not None
    cascade: Any = found.recipe.backend
    assert cascade.members == ends(backend=WHOLE.backend)
    assert cascade.hands_over
    assert 0.1 < cascade.threshold < 0.3  # all that is lost lies below 0.3


def test_it_is_tuned_once_also_after_a_resume_and_other_places_follow(tmp_path: Path) -> None:
    here = world(tmp_path)
    found = next_cascade((*here.whole, here.exit), here.grounds, 100, set())
    assert found is not None
    resumed = (*here.whole, here.exit, Trial(found.recipe, Refused(Reason.TOO_SLOW, ""), 1.0))
    then = next_cascade(resumed, here.grounds, 100, set())
    assert then is not None
    assert then.recipe == Recipe((EarlyExit(cascades.EXITS[1]),), WHOLE.backend)


def test_where_it_can_not_be_cut_it_is_not_tried_elsewhere(tmp_path: Path) -> None:
    here = world(tmp_path)
    no = Trial(HALF, Refused(Reason.NOTHING_TO_DO, "no chain of blocks", 0), 1.0)
    assert next_cascade((*here.whole, no), here.grounds, 100, set()) is None


@pytest.mark.parametrize("changed", [{"knows": False}, {"speed": 3.1}, {"loss": 0.9}])
def test_an_exit_that_does_not_pay_is_not_joined(tmp_path: Path, changed: dict[str, Any]) -> None:
    here = world(tmp_path, **changed)
    found = next_cascade((*here.whole, here.exit), here.grounds, 100, set())
    assert found is None or found.recipe.steps  # another exit to look at, and no cascade


def test_none_is_measured_where_even_an_exit_that_is_always_sure_would_not_win_or_time_is_out(tmp_path: Path) -> None:
    here = world(tmp_path)
    best = known(PLAIN, 60.0, *[here.whole[0].evidence.original_scores[:, 0]] * 2)  # type: ignore[union-attr]
    slow = Trial(WHOLE, here.whole[1].outcome, 1.0)
    in_openvino = replace(best, recipe=Recipe((find("techniques", "convert_openvino")(),), Openvino()))
    assert next_cascade((here.whole[0], slow, in_openvino), here.grounds, 100, set()) is None
    assert next_cascade(here.whole, here.grounds, 1.0, set()) is None


def test_what_is_foreseen_of_a_hand_over_is_the_exit_for_all_and_the_rest_for_some() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(ROWS) < 0.9
    fast, better = (known(HALF, s, right, right).evidence for s in (6.0, 3.0))
    assert fast is not None
    assert better is not None
    unsure = rng.random(ROWS) < 0.3
    for handed, again in ((False, 1 / 3), (True, 1 / 3 - 1 / 6)):
        seen = predicted(fast, better, unsure, handed=handed)
        assert seen.speedup.mid == pytest.approx(1 / (1 / 6 + again * unsure.mean()) / cascades.GAIN, rel=0.02)


# --- for real ---------------------------------------------------------------------------------------------------


@pytest.fixture
def real(tmp_path: Path) -> Iterator[tuple[Site, tuple[Trial, ...]]]:
    """A search that has measured a chain of wide blocks, and an exit of it."""
    model = chain(tmp_path / "given", width=640)
    x = leaves(model, 4000, seed=1)[0]
    workload = adopt(str(model.content), (x, run(model, [x])[0].argmax(1)), metric="accuracy")
    original, goal = Recipe((), Onnxruntime()), Goal.parse("drop <= 2%")
    with Site(tmp_path / "b", workload, Machine.look(), goal, Budget.parse("120s"), original) as site:
        history: tuple[Trial, ...] = ()
        for proposal in (SimpleNamespace(recipe=original, again=False), None):
            proposal = proposal or next_cascade(history, site.grounds, 100.0, set())
            history = site.note(history, attempt(proposal, site.grounds, history, 100.0))
        yield site, history


@pytest.mark.alone
@pytest.mark.slow
def test_a_hand_over_is_found_measured_and_certified_and_the_certificate_can_not_be_fooled(
    real: tuple[Site, tuple[Trial, ...]],
) -> None:
    site, history = real
    assert history[1].recipe == Recipe((EarlyExit(),), Onnxruntime())
    assert history[1].evidence is not None, history[1].outcome
    found = next_cascade(history, site.grounds, 100.0, set())
    assert found is not None
    assert getattr(found.recipe.backend, "hands_over", False), found.recipe
    trial = attempt(found, site.grounds, history, 100.0)
    assert trial.verified is not None, trial.outcome
    artifact = trial.verified.artifact
    verdict = certified(site, found.recipe, artifact)
    assert site.goal.judge(verdict).outcome is Outcome.MET

    turned: Any = replace(found.recipe.backend, threshold=0.0)  # type: ignore[call-arg]
    folder = site.grounds.folder(found.recipe)
    file, before = folder / "cascade.json", (folder / "cascade.json").read_bytes()
    file.unlink()  # it is a link to what is published
    file.write_bytes(turned._record(site.workload.model.signature))
    with pytest.raises(RefusalError, match=r"cascade\.json"):
        check_files(artifact, folder)
    with pytest.raises(BundleError, match="otherwise than the recipe"):
        certified(site, found.recipe, Artifact.gather(folder))
    subject = replace(site.grounds.subject(found.recipe, Artifact.gather(folder)), recipe=Recipe((), turned))
    assert examine(subject, site.grounds.bench, "certify", QUICK).relative_drop.mid > verdict.relative_drop.mid
    file.write_bytes(before)

    split = site.work / "data" / "certify"
    rng, samples = np.random.default_rng(0), open_samples(split)
    mixed = [Chunk(tuple(map(np.array, c.inputs)), rng.permutation(c.targets)) for c in samples.chunks]  # type: ignore[arg-type]
    save_samples(Samples(tuple(mixed)), split)
    assert site.goal.judge(certified(site, found.recipe, artifact)).outcome is Outcome.NOT_MET


def certified(site: Site, recipe: Recipe, artifact: Artifact) -> Evidence:
    return examine(site.grounds.subject(recipe, artifact), site.grounds.bench, "certify", QUICK)
