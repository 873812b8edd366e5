"""Cascades: they answer by row, are timed on the mix, tuned on one split and certified on another."""

from __future__ import annotations

import json
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

import accelerando
from accelerando.adoption import adopt
from accelerando.backends.cascade import CONFIDENCES, Cascade
from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.errors import BundleError, Reason, RefusalError
from accelerando.goal import Goal, Outcome
from accelerando.machine import Machine
from accelerando.measure.arm import open_samples, save_samples
from accelerando.measure.bench import examine
from accelerando.measure.rounds import Effort
from accelerando.plugins import find
from accelerando.recipe import Artifact, Recipe, Runner
from accelerando.search import cascades
from accelerando.search.budget import Budget
from accelerando.search.cascades import next_cascade, predicted
from accelerando.search.grounds import attempt, check_files
from accelerando.search.history import Proposal
from accelerando.search.site import Site
from accelerando.search.space import Space
from accelerando.signature import Port, Signature
from accelerando.techniques.early_exit import EarlyExit
from accelerando.techniques.export_onnx import ExportOnnx
from accelerando.testing.bundles import SIGNATURE as SMALL
from accelerando.testing.bundles import write_bundle
from accelerando.testing.fakes import fake_artifact
from accelerando.trial import Evidence, Refused, Trial
from accelerando.workload import Chunk, Form, Model, Samples

PLAIN = Recipe((), Onnxruntime())
SINGLE = Recipe((), Onnxruntime(threads=1))
QUICK = Effort(least=8, most=12, block_seconds=0.03)


def signature(rows: int | str = "batch") -> Signature:
    ports = (Port("x", "float32", (rows, 6)),), (Port("logits", "float32", (rows, 4)), Port("twice", "int64", (rows,)))
    return Signature(*ports, ("x",), 1, {"x": {"leaf": 0}}, {"dict": {"logits": {"leaf": 0}, "twice": {"leaf": 1}}})


def network(folder: Path, seed: int, rows: int | str = "batch") -> Path:
    """(rows, 6) -> logits (rows, 4) of an MLP with weights from a seed, and its class, whole (rows,)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    weights = [(w, rng.standard_normal(shape).astype(np.float32)) for w, shape in (("a", (6, 32)), ("b", (32, 4)))]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["logits"]),
        helper.make_node("ArgMax", ["logits"], ["twice"], axis=1, keepdims=0),
    ]
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 6]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, [rows, 4]),
        helper.make_tensor_value_info("twice", TensorProto.INT64, [rows]),
    ]
    stored = [numpy_helper.from_array(w, name) for name, w in weights]
    graph = helper.make_graph(nodes, "mlp", ends[:1], ends[1:], stored)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


@dataclass(frozen=True)
class Pair:
    """Two networks, each compiled, that cascades are made of."""

    folder: Path
    signature: Signature

    def member(self, number: int) -> Runner:
        return PLAIN.backend.load(Artifact(()), self.folder / str(number), self.signature)

    def cascade(self, confidence: str = "margin", threshold: float = 0.5) -> Runner:
        backend = Cascade.of(SINGLE, PLAIN, confidence, threshold)
        (self.folder / "cascade.json").unlink(missing_ok=True)
        artifact = backend.compile(Model(Form.ONNX, None, self.signature), self.folder)
        assert [f.path for f in artifact.files] == ["0/model.onnx", "1/model.onnx", "cascade.json"]
        return backend.load(artifact, self.folder, self.signature)


def pair(folder: Path, rows: int | str = "batch") -> Pair:
    for number in (0, 1):
        given = Model(Form.ONNX, network(folder / "given" / str(number), number, rows), signature(rows))
        (folder / "made" / str(number)).mkdir(parents=True)
        PLAIN.backend.compile(given, folder / "made" / str(number))
    return Pair(folder / "made", signature(rows))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(tmp_path_factory.mktemp("two"))


def inputs(count: int, seed: int = 0) -> list[np.ndarray]:
    return [np.random.default_rng(seed).standard_normal((count, 6)).astype(np.float32)]


# --- the backend ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.sampled_from([1, 2, 7, 32]),
    threshold=st.one_of(st.just(0.0), st.just(1.5), st.floats(0, 1)),
    confidence=st.sampled_from(sorted(CONFIDENCES)),
    seed=st.integers(0, 10_000),
)
def test_each_row_has_the_answer_of_the_one_that_it_was_left_to(
    two: Pair, count: int, threshold: float, confidence: str, seed: int
) -> None:
    x = inputs(count, seed)
    fast, better, got = two.member(0)(x), two.member(1)(x), two.cascade(confidence, threshold)(x)
    sure = CONFIDENCES[confidence](fast[0]) >= threshold
    for ours, a, b in zip(got, fast, better, strict=True):
        expected = np.where(sure.reshape(-1, *[1] * (a.ndim - 1)), a, b)
        assert ours.dtype == expected.dtype
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    if threshold == 0.0:
        np.testing.assert_array_equal(got[0], fast[0])
    if threshold > 1:
        np.testing.assert_array_equal(got[0], better[0])


def test_settings_of_a_process_reach_its_members(two: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a governor no session spins, for it would take the cores from the others."""
    seen, load = [], Onnxruntime.load

    def recorded(self: Onnxruntime, *given: Any) -> Runner:
        seen.append((self.spinning, self.threads))
        return load(self, *given)

    monkeypatch.setattr(Onnxruntime, "load", recorded)
    backend = Cascade.of(SINGLE, PLAIN, "margin", 0.5)
    (two.folder / "cascade.json").unlink(missing_ok=True)
    artifact = backend.compile(Model(Form.ONNX, None, two.signature), two.folder)
    runner = backend.here(spinning=False, streams=3).load(artifact, two.folder, two.signature)
    assert seen == [(False, 1), (False, 0)]
    assert len(runner(inputs(4))[0]) == 4
    assert backend.here(spinning=False) == backend


def test_some_rows_are_left_to_each(two: Pair) -> None:
    fast = two.member(0)(inputs(200))
    for confidence, of in CONFIDENCES.items():
        sure = of(fast[0])
        assert ((sure >= 0) & (sure <= 1)).all()
        middle = float(np.median(sure))
        differs = (two.cascade(confidence, middle)(inputs(200))[0] != fast[0]).any(axis=1)
        assert 80 <= differs.sum() <= 120


def test_confidences_of_known_logits() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3], [0.1, 0.45, 0.45]], np.float32))
    np.testing.assert_allclose(CONFIDENCES["margin"](logits), [0.5, 0, 0], atol=1e-6)
    entropy = [-sum(p * np.log(p) for p in row) for row in ((0.7, 0.2, 0.1), (0.1, 0.45, 0.45))]
    np.testing.assert_allclose(CONFIDENCES["entropy"](logits)[[0, 2]], 1 - np.array(entropy) / np.log(3), rtol=1e-5)
    assert CONFIDENCES["entropy"](logits)[1] == pytest.approx(0, abs=1e-6)
    huge = np.array([[1000.0, -1000.0]], np.float32)
    assert [float(of(huge)[0]) for of in CONFIDENCES.values()] == [1.0, 1.0]


def test_nothing_that_is_not_a_number_is_sure(two: Pair) -> None:
    """A fast answer of NaN is asked again, whatever the threshold."""
    x = inputs(3)
    x[0][1] = np.nan
    got = two.cascade(threshold=0.0)(x)
    np.testing.assert_array_equal(got[0][[0, 2]], two.member(0)(x)[0][[0, 2]])


def test_a_model_of_one_size_of_batch_is_asked_in_that_size(tmp_path: Path) -> None:
    fixed = pair(tmp_path, rows=4)
    for seed in range(20):
        x = inputs(4, seed)
        fast, better = fixed.member(0)(x), fixed.member(1)(x)
        sure = CONFIDENCES["margin"](fast[0]) >= 0.5
        np.testing.assert_allclose(fixed.cascade()(x)[0], np.where(sure[:, None], fast[0], better[0]), atol=1e-5)


def test_how_it_prints_and_that_its_settings_come_back() -> None:
    cascade = Cascade.of(SINGLE, Recipe((ExportOnnx(),), Onnxruntime()), "margin", 0.6234567)
    assert str(cascade) == "cascade(margin >= 0.6235: onnxruntime, else export_onnx > onnxruntime)"
    assert cascade.members == (SINGLE, Recipe((ExportOnnx(),), Onnxruntime()))
    assert cascade.stored_members == cascade.members
    assert str(Cascade()) == "cascade"


@pytest.mark.parametrize(
    "knobs",
    [
        {"confidence": "hope"},
        {"threshold": float("nan")},
        {"threshold": "0.5"},
        {"threshold": -0.1},
        {"fast": json.dumps(PLAIN.to_json())},  # one alone
        {"fast": "[]", "better": "[]"},
        {"fast": "{", "better": "{"},
        {"fast": 3, "better": 3},
        {"fast": json.dumps(PLAIN.to_json()), "better": json.dumps(PLAIN.to_json())},  # not canonical
        {"fast": '{"backend":{"a":[]},"steps":[]}', "better": '{"backend":{"a":[]},"steps":[]}'},
        {"fast": '{"backend":{"name":"../x"},"steps":[]}', "better": '{"backend":{"name":"../x"},"steps":[]}'},
    ],
)
def test_settings_that_are_no_cascade_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|needs two"):
        Cascade(**knobs)


def test_a_cascade_of_cascades_is_refused() -> None:
    with pytest.raises(ValueError, match="plain recipe"):
        Cascade.of(Recipe((), Cascade.of(SINGLE, PLAIN, "margin", 0.5)), PLAIN, "margin", 0.5)


def test_it_refuses_what_has_no_classes_and_what_runs_the_users_code() -> None:
    machine, good = Machine.look(), Cascade.of(SINGLE, PLAIN, "margin", 0.5)
    model = Model(Form.ONNX, None, signature())
    assert good.refuse(model, machine) is None
    for port in (
        Port("y", "float32", ("batch", 1)),
        Port("y", "float32", ("batch",)),
        Port("y", "int64", ("batch", 3)),
    ):
        other = replace(signature(), outputs=(port,), result={"leaf": 0})
        refusal = good.refuse(replace(model, signature=other), machine)
        assert refusal is not None
        assert refusal.reason is Reason.UNSUPPORTED
    own = Cascade.of(SINGLE, Recipe((), find("backends", "eager")()), "margin", 0.5)
    refusal = own.refuse(model, machine)
    assert refusal is not None
    assert "own code" in str(refusal)


def test_planning_makes_no_route_of_it_and_says_nothing_of_it() -> None:
    backends = {name: find("backends", name) for name in ("onnxruntime", "cascade")}
    space = Space.plan(Model(Form.ONNX, "model.onnx", signature()), Machine.look(), {}, backends)
    assert space.routes
    assert not any("cascade" in route.names for route in space.routes)
    assert not any(recipe.backend.name == "cascade" for recipe, _ in space.turned_away)


@pytest.mark.parametrize("change", [(b"0.5", b"0.4"), (b"margin", b"entropy"), (b'"output":0', b'"output":1')])
def test_sabotage_a_file_that_says_otherwise_than_the_recipe_is_refused(two: Pair, change: tuple[bytes, bytes]) -> None:
    two.cascade()
    file = two.folder / "cascade.json"
    assert change[0] in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(*change))
    with pytest.raises(BundleError, match="otherwise than the recipe"):
        Cascade.of(SINGLE, PLAIN, "margin", 0.5).load(Artifact.gather(two.folder), two.folder, two.signature)


# --- the runtime ------------------------------------------------------------------------------------------------


def linear(path: Path) -> Path:
    import onnx
    from onnx import TensorProto, helper

    weights = helper.make_tensor("w", TensorProto.FLOAT, [4, 3], [float(i % 5) for i in range(12)])
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", k]) for n, k in (("x", 4), ("logits", 3))]
    node = helper.make_node("MatMul", ["x", "w"], ["logits"])
    graph = helper.make_graph([node], "linear", ends[:1], ends[1:], [weights])
    path.parent.mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), str(path))
    return path


def test_a_bundle_with_a_cascade_serves_without_torch_the_search_or_a_technique(tmp_path: Path) -> None:
    quantized = Recipe((find("techniques", "quantize_dynamic")(),), Onnxruntime(threads=1))
    rung = Recipe((), Cascade.of(quantized, PLAIN, "margin", 0.9))
    bundle = write_bundle(tmp_path / "b", recipes=[PLAIN, rung], content=linear(tmp_path / "m" / "model.onnx"))
    assert all(finding.passed for finding in bundle.verify())
    code = (
        "import sys, accelerando, numpy as np\n"
        "fast = accelerando.load('b')\n"
        "assert fast.recipe.backend.name == 'cascade', fast\n"
        "assert 'quantize_dynamic > onnxruntime' in repr(fast), fast\n"
        "x = np.ones((5, 4), np.float32)\n"
        "for n in (1, 5): assert np.allclose(fast(x[:n]), accelerando.load('b', rung=0)(x[:n]))\n"
        "bad = ('torch', 'onnx.', 'openvino', 'accelerando.search', 'accelerando.techniques', 'accelerando.measure')\n"
        "print(*sorted(m for m in sys.modules if m.startswith(bad)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_the_versions_of_what_its_members_use_bear_on_a_cascade(tmp_path: Path) -> None:
    rung = Recipe((), Cascade.of(SINGLE, PLAIN, "margin", 0.9))
    here = Machine.look()
    elsewhere = replace(here, versions=tuple({**dict(here.versions), "onnxruntime": "1", "torch": "1"}.items()))
    content = linear(tmp_path / "m" / "model.onnx")
    write_bundle(tmp_path / "b", recipes=[PLAIN, rung], content=content, machine=elsewhere)
    with pytest.warns(accelerando.MachineWarning, match=r"onnxruntime") as warned:
        accelerando.load(tmp_path / "b").close()
    assert "torch" not in str(warned[0].message)


def test_a_member_whose_backend_is_not_here_costs_its_rung_alone(tmp_path: Path) -> None:
    rung = Recipe((), Cascade.of(SINGLE, PLAIN, "margin", 0.9))
    bundle = write_bundle(tmp_path / "b", recipes=[PLAIN, rung], content=linear(tmp_path / "m" / "model.onnx"))
    unknown = PLAIN.to_json() | {"backend": {"name": "no_such_backend"}}
    absent = replace(rung.backend, better=json.dumps(unknown, sort_keys=True, separators=(",", ":")))
    assert "no_such_backend" in str(absent)
    refusal = absent.refuse(Model(Form.ONNX, None, SMALL), Machine.look())
    assert refusal is not None
    assert refusal.reason is Reason.MISSING_PACKAGE
    made = bundle.ladder.rungs[1]
    (bundle.folder(made) / "cascade.json").write_bytes(absent._record(SMALL))
    with pytest.raises(RefusalError, match="no_such_backend"):
        absent.load(made.artifact, bundle.folder(made), SMALL)
    with pytest.raises(BundleError):
        accelerando.load(tmp_path / "b")  # and that file is not what was written


# --- the threshold ----------------------------------------------------------------------------------------------


@dataclass
class FakeArm:
    """Answers with confidences; being asked is counted."""

    sure: np.ndarray
    asked: list[int]

    def each_row(self, split: Path, function: Any, timeout: float) -> np.ndarray:
        self.asked.append(1)
        return np.stack([self.sure] * len(CONFIDENCES), axis=1)


@dataclass
class World:
    """A fast recipe that is unsure of what it gets wrong, or not; a better one; and the original."""

    history: tuple[Trial, ...]
    grounds: Any
    unsure_right: float
    asked: list[int]


def world(folder: Path, goal: str = "drop <= 1%", knows: bool = True, speed: float = 12.0, loss: float = 0.06) -> World:
    rng = np.random.default_rng(0)
    original = rng.random(ROWS) < 0.95
    lost = rng.random(ROWS) < loss
    sure = rng.random(ROWS)
    if knows:
        sure[lost] *= 0.3  # what it gets wrong lies low
    reason = Reason.BELOW_QUALITY if knows else None
    history = (
        known(Recipe((), find("backends", "eager")()), 1.0, original, original),
        known(PLAIN, 3.0, original, original),
        known(SINGLE, speed, original & ~lost, original, reason),
        Trial(Recipe((EarlyExit(),), PLAIN.backend), Refused(Reason.NOTHING_TO_DO, "no chain of blocks", 0), 1.0),
    )
    save_samples(Samples((Chunk((np.zeros((8, 4), np.float32),), np.zeros(8, np.int64)),)), folder / "select")
    asked: list[int] = []

    @contextmanager
    def arm(subject: Any, split: str, patience: float) -> Iterator[FakeArm]:
        yield FakeArm(sure, asked)

    bench = SimpleNamespace(signature=SMALL, data=folder, arm=arm, scoring_limit=10.0)
    workshop = SimpleNamespace(build=lambda recipe, into, timeout: SimpleNamespace(artifact=fake_artifact()))
    grounds = SimpleNamespace(
        bench=bench, workshop=workshop, goal=Goal.parse(goal), into=folder, subject=lambda recipe, artifact: None
    )
    return World(history, grounds, float(np.mean(lost)), asked)


def test_a_pair_that_pays_is_proposed_with_a_threshold_that_is_safe_and_no_higher_than_it_must(tmp_path: Path) -> None:
    here = world(tmp_path)
    found = next_cascade(here.history, here.grounds, 100, set())
    assert found is not None
    assert not found.recipe.steps
    cascade: Any = found.recipe.backend
    assert cascade.members == (SINGLE, PLAIN)
    assert 0.1 < cascade.threshold < 0.3  # all that is lost lies below 0.3, and nobody must be asked above it
    assert "expected" in found.why


def test_it_is_tuned_once_and_not_again_after_a_resume(tmp_path: Path) -> None:
    here, tuned = world(tmp_path), set()
    found = next_cascade(here.history, here.grounds, 100, tuned)
    assert found is not None
    assert next_cascade(here.history, here.grounds, 100, tuned) is None
    resumed = (*here.history, Trial(found.recipe, Refused(Reason.TOO_SLOW, ""), 1.0))
    assert next_cascade(resumed, here.grounds, 100, set()) is None
    assert len(here.asked) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"knows": False},  # it does not know what it does not know
        {"speed": 4.0},  # hardly faster than the better one
        {"loss": 0.6},  # wrong too often: most rows would be asked twice
        {"goal": "drop <= 1%, size <= 1B"},  # nothing helps that goal, so nothing would be better than what is there
    ],
)
def test_nothing_is_proposed_where_it_does_not_pay(tmp_path: Path, changed: dict[str, Any]) -> None:
    here = world(tmp_path, **changed)
    assert next_cascade(here.history, here.grounds, 100, set()) is None


def test_nothing_is_proposed_without_classes_time_or_one_shape(tmp_path: Path) -> None:
    here = world(tmp_path)
    assert next_cascade(here.history, here.grounds, 1.0, set()) is None
    whole = replace(SMALL, outputs=(Port("y", "float32", ("batch", 1)),))
    here.grounds.bench.signature = whole
    assert next_cascade(here.history, here.grounds, 100, set()) is None
    here.grounds.bench.signature = SMALL
    chunk = Chunk((np.zeros((8, 4), np.float32),), np.zeros(8, np.int64))
    save_samples(Samples((chunk, chunk)), tmp_path / "select")
    assert next_cascade(here.history, here.grounds, 100, set()) is None
    assert not here.asked


def test_with_a_speed_asked_for_the_better_answers_win(tmp_path: Path) -> None:
    """3x is what the better one has; 4x asks for a cascade, and then for the highest threshold that is fast enough."""
    here = world(tmp_path, goal="speedup >= 4, drop <= 5%")
    found = next_cascade(here.history, here.grounds, 100, set())
    only_speed = next_cascade(here.history, world(tmp_path, goal="drop <= 5%").grounds, 100, set())
    assert found is not None
    assert only_speed is not None
    assert found.recipe.backend.knobs["threshold"] > only_speed.recipe.backend.knobs["threshold"]


def test_what_is_foreseen_is_the_row_wise_choice() -> None:
    rng = np.random.default_rng(0)
    right = [rng.random(ROWS) < share for share in (0.8, 0.95, 0.95)]
    fast, better = (known(PLAIN, s, r, right[2]).evidence for s, r in ((10.0, right[0]), (2.0, right[1])))
    assert fast is not None
    assert better is not None
    unsure = rng.random(ROWS) < 0.2
    seen = predicted(fast, better, unsure)
    assert seen.quality.mid == pytest.approx(np.where(unsure, right[1], right[0]).mean())
    assert seen.speedup.mid == pytest.approx(1 / (0.1 + 0.5 * unsure.mean()) / cascades.GAIN, rel=0.02)
    at_32 = predicted(replace(fast, batch=32), replace(better, batch=32), unsure, fixed=True)
    assert at_32.speedup.mid == pytest.approx(1 / (0.1 + 0.5) / cascades.GAIN, rel=0.02)  # hardly a batch has none


# --- for real ---------------------------------------------------------------------------------------------------


@pytest.fixture
def real(toys: None, onnx_model: Path, tmp_path: Path) -> Iterator[tuple[Site, tuple[Trial, ...]]]:
    """A search that has measured the original, a lossless recipe and one that is twenty times faster and loses."""
    import onnxruntime

    x = np.random.default_rng(1).standard_normal((9000, 16)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(onnx_model), providers=["CPUExecutionProvider"])
    y = session.run(None, {"x": x})[0].argmax(1)
    workload = adopt(str(onnx_model), (x, y), metric="accuracy")
    toy, coarse = find("backends", "toy_backend"), find("techniques", "toy_technique")
    original, lossless = Recipe((), toy(slower=30.0)), Recipe((), toy(slower=20.0))
    lossy = Recipe((coarse(bits=1),), toy())
    goal, budget = Goal.parse("drop <= 2%"), Budget.parse("120s")
    with Site(tmp_path / "b", workload, Machine.look(), goal, budget, original) as site:
        history: tuple[Trial, ...] = ()
        for recipe in (original, lossless, lossy):
            trial = attempt(Proposal(recipe, ""), site.grounds, history, 100.0)
            history = site.note(history, trial)
        yield site, history


@pytest.mark.alone
def test_a_cascade_is_found_measured_and_certified_and_the_certificate_can_not_be_fooled(
    real: tuple[Site, tuple[Trial, ...]],
) -> None:
    site, history = real
    _, lossless, lossy = history
    assert isinstance(lossy.outcome, Refused), lossy.evidence
    assert lossy.outcome.reason is Reason.BELOW_QUALITY
    found = next_cascade(history, site.grounds, 100.0, set())
    assert found is not None
    trial = attempt(found, site.grounds, history, 100.0)
    assert trial.verified is not None, trial.outcome
    assert lossless.evidence
    assert trial.verified.evidence.speedup.mid > lossless.evidence.speedup.mid
    verdict = certified(site, found.recipe, trial.verified.artifact)
    assert verdict.relative_drop.mid < 0.02
    assert site.goal.judge(verdict).outcome is Outcome.MET
    check_threshold(site, found.recipe, trial.verified.artifact)

    shuffle_labels(site.work / "data" / "certify")
    verdict = certified(site, found.recipe, trial.verified.artifact)  # against the original by the labels as they were
    assert site.goal.judge(verdict).outcome is Outcome.NOT_MET
    site.grounds.bench._scores.clear()
    verdict = certified(site, found.recipe, trial.verified.artifact)  # and against it by the shuffled ones
    assert Goal.parse("quality >= 0.9").judge(verdict).outcome is Outcome.NOT_MET


def certified(site: Site, recipe: Recipe, artifact: Artifact) -> Evidence:
    return examine(site.grounds.subject(recipe, artifact), site.grounds.bench, "certify", QUICK)


def check_threshold(site: Site, recipe: Recipe, artifact: Artifact) -> None:
    """Turned down after tuning: in the file it is damage; in the recipe it is another one, which does not certify."""
    folder = site.grounds.folder(recipe)
    file, before = folder / "cascade.json", (folder / "cascade.json").read_bytes()
    turned: Any = replace(recipe.backend, threshold=0.0)  # type: ignore[call-arg]
    try:
        file.unlink()  # it is a link to what is published
        file.write_bytes(turned._record(site.workload.model.signature))
        with pytest.raises(RefusalError, match=r"cascade\.json"):
            check_files(artifact, folder)
        with pytest.raises(BundleError, match="otherwise than the recipe"):
            certified(site, recipe, Artifact.gather(folder))
        subject = replace(site.grounds.subject(recipe, Artifact.gather(folder)), recipe=Recipe((), turned))
        verdict = examine(subject, site.grounds.bench, "certify", QUICK)
        assert site.goal.judge(verdict).outcome is Outcome.NOT_MET
    finally:
        file.write_bytes(before)


def shuffle_labels(split: Path) -> None:
    samples = open_samples(split)
    rng = np.random.default_rng(0)
    mixed = [Chunk(tuple(map(np.array, c.inputs)), rng.permutation(c.targets)) for c in samples.chunks]  # type: ignore[arg-type]
    save_samples(Samples(tuple(mixed)), split)
