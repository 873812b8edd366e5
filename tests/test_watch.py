"""The quality watch: intervals that may be looked at all the time, promises, quarantine; and drift."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.bundle import Bundle
from accelerando.interval import Floats
from accelerando.ladder import Ladder
from accelerando.metric import METRICS
from accelerando.parity import Parity
from accelerando.recipe import Artifact, Recipe, Runner
from accelerando.serve.anytime import ConfidenceSequence, least_mean
from accelerando.serve.drift import FIRST, REFERENCE, WINDOW, Drift, distance, least_distance
from accelerando.serve.likeness import Likeness
from accelerando.serve.watch import Watch
from accelerando.signature import Array, Port, Signature
from accelerando.testing.bundles import write_bundle
from benchmarks import watching

# --- the anytime interval ---------------------------------------------------------------------------------------

STREAMS = {
    "rare misses": lambda rng, n: (rng.random(n) < 0.97).astype(float),
    "a coin": lambda rng, n: (rng.random(n) < 0.5).astype(float),
    "close to 1": lambda rng, n: rng.beta(40, 1, n),
    "few levels": lambda rng, n: rng.integers(0, 5, n) / 4,
}
MEANS = {"rare misses": 0.97, "a coin": 0.5, "close to 1": 40 / 41, "few levels": 0.5}
LOOKS = [5, 10, 20, 40, 70, 100, 150, 200, 300, 400]


def misses(bounds: Callable[[Floats], tuple[float, float]], streams: int, name: str, seed: int = 0) -> float:
    """The share of streams in which an interval, looked at again and again, ever leaves out the mean."""
    rng, missed = np.random.default_rng(seed), 0
    for _ in range(streams):
        values = STREAMS[name](rng, LOOKS[-1])
        missed += any(not low <= MEANS[name] <= high for low, high in (bounds(values[:n]) for n in LOOKS))
    return missed / streams


def anytime(values: Floats) -> tuple[float, float]:
    """Whether the two ends leave out the mean is all that is asked, so the two capitals do."""
    sequence = ConfidenceSequence()
    for value in values:
        sequence.observe(float(value))
    found = sequence.interval()
    return found.low, found.high


def of_a_fixed_number(values: Floats) -> tuple[float, float]:
    """The normal interval, right at any one time fixed beforehand (Agresti & Coull's for zeros and ones)."""
    z, n = NormalDist().inv_cdf(0.975), len(values) + 4
    middle = (values.sum() + 2) / n
    spread = max(float(values.std()), math.sqrt(middle * (1 - middle)) if np.isin(values, (0, 1)).all() else 0.0)
    return middle - z * spread / math.sqrt(n), middle + z * spread / math.sqrt(n)


def capitals(name: str, streams: int, seed: int = 0) -> tuple[float, float]:
    """The shares of streams in which the mean ever lies above the interval's upper end, and below its lower end."""
    rng, above, below, mean = np.random.default_rng(seed), 0, 0, MEANS[name]
    for _ in range(streams):
        ours, turned = ConfidenceSequence(), ConfidenceSequence()
        hit_above = hit_below = False
        for i, value in enumerate(STREAMS[name](rng, LOOKS[-1]), 1):
            ours.observe(float(value))
            turned.observe(1 - float(value))
            if i % 10 == 0:
                hit_above |= ours.below(mean)
                hit_below |= turned.below(1 - mean)
        above, below = above + hit_above, below + hit_below
    return above / streams, below / streams


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMS)
def test_the_interval_holds_the_mean_at_all_times(name: str) -> None:
    above, below = capitals(name, 500)
    assert above + below <= 0.05


def test_the_interval_holds_the_mean_at_all_times_in_short() -> None:
    assert misses(anytime, 30, "rare misses") <= 0.05
    above, below = capitals("a coin", 100)
    assert above + below <= 0.05


def test_sabotage_an_interval_of_a_fixed_number_fails_the_same_test() -> None:
    assert misses(of_a_fixed_number, 800, "a coin") > 0.1
    assert misses(of_a_fixed_number, 800, "few levels") > 0.1


def test_the_interval_becomes_narrow_and_says_so() -> None:
    sequence = ConfidenceSequence()
    assert (sequence.interval().low, sequence.interval().high) == (0.0, 1.0)
    for value in STREAMS["rare misses"](np.random.default_rng(1), 2000):
        sequence.observe(float(value))
    found = sequence.interval()
    assert found.low < 0.97 < found.high
    assert found.high - found.low < 0.035
    assert found.confidence == 0.95
    assert sequence.below(found.high + 1e-6)
    assert not sequence.below(found.high - 1e-3)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=200), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_interval_holds_the_middle_of_what_was_seen_in_any_order(values: list[float], random: Any) -> None:
    first, second = ConfidenceSequence(), ConfidenceSequence()
    shuffled = random.sample(values, len(values))
    for one, other in zip(values, shuffled, strict=True):
        first.observe(one)
        second.observe(other)
    found, again = first.interval(), second.interval()
    assert found.low <= np.mean(values) + 1e-9
    assert found.high >= np.mean(values) - 1e-9
    assert np.allclose([found.low, found.high], [again.low, again.high])


def test_memory_does_not_grow_with_what_was_seen() -> None:
    sequence = ConfidenceSequence()
    for value in np.random.default_rng(0).random(5000):
        sequence.observe(float(value))
    assert len(sequence._up) <= 1025


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_value_outside_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        ConfidenceSequence().observe(value)


def test_least_mean_is_exact_for_zeros_and_ones_and_safe_for_others() -> None:
    for n, k in ((20, 20), (500, 480), (50, 3)):
        p = least_mean(np.r_[np.ones(k), np.zeros(n - k)], 0.025)
        so_many = math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))
        assert so_many == pytest.approx(0.025, rel=1e-6)
    assert least_mean(np.zeros(9), 0.025) == 0
    rng = np.random.default_rng(0)
    assert np.mean([least_mean(rng.beta(8, 2, 30), 0.05) > 0.8 for _ in range(400)]) <= 0.05
    with pytest.raises(ValueError, match="at least one value"):
        least_mean([], 0.05)


# --- a real small model, a compressed one, and one that went bad --------------------------------------------------

SIGNATURE = Signature(
    (Port("x", "float32", ("batch", 64)),), (Port("logits", "float32", ("batch", 10)),),
    ("x",), 1, {"x": {"leaf": 0}}, {"leaf": 0},
)  # fmt: skip
ORT, COMPRESSED = Recipe((), Onnxruntime(threads=1)), Recipe((), Onnxruntime(threads=1, spinning=False))
CERTIFIED = 2000
Weights = list[Array]


@cache
def digits() -> tuple[Array, Array]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32), labels


def samples(count: int, seed: int) -> tuple[Array, Array]:
    """Digits with noise on every pixel, so that there are as many as one likes; and what they are."""
    (images, labels), rng = digits(), np.random.default_rng(seed)
    chosen = rng.integers(len(images), size=count)
    return images[chosen] + 0.05 * rng.standard_normal((count, 64), np.float32), labels[chosen]


def inputs(count: int, seed: int) -> Array:
    return samples(count, seed)[0]


@cache
def weights() -> Weights:
    """Of a small network that was trained for half a second: two layers, each with its bias as a last row."""
    from sklearn.neural_network import MLPClassifier

    x, y = samples(3000, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged
        found = MLPClassifier((48,), max_iter=15, random_state=0, learning_rate_init=0.005).fit(x, y)
    return [np.vstack([w, b]).astype(np.float32) for w, b in zip(found.coefs_, found.intercepts_, strict=True)]


def rounded(of: Weights, steps: float) -> Weights:
    return [np.round(w * steps) / np.float32(steps) for w in of]


def noisy(of: Weights, share: float) -> Weights:
    rng = np.random.default_rng(7)
    return [(w + share * w.std() * rng.standard_normal(w.shape)).astype(np.float32) for w in of]


def save(of: Weights, path: Path) -> Path:
    nodes = [
        helper.make_node("Gemm", ["x", "w0", "b0"], ["h"]), helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w1", "b1"], ["logits"]),
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", k]) for n, k in (("x", 64), ("logits", 10))]
    tensors = [numpy_helper.from_array(w[:-1], f"w{i}") for i, w in enumerate(of)]
    tensors += [numpy_helper.from_array(w[-1], f"b{i}") for i, w in enumerate(of)]
    graph = helper.make_graph(nodes, "mlp", ends[:1], ends[1:], tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def runner(of: Weights, folder: Path) -> Runner:
    """The rung as it is loaded, with these weights."""
    save(of, folder / "model.onnx")
    return Onnxruntime(threads=1).load(Artifact.gather(folder), folder, SIGNATURE)


def with_evidence(bundle: Bundle, scores: Sequence[Floats], metric: str = "accuracy") -> Bundle:
    """The bundle, its rungs judged so; the first is the original's."""
    rungs = tuple(
        replace(rung, evidence=replace(rung.evidence, scores=s, original_scores=scores[0], metric=metric))
        for rung, s in zip(bundle.ladder.rungs, scores, strict=True)
    )
    workload = {**bundle.workload, "metric": metric}
    return replace(bundle, ladder=Ladder(rungs), workload=workload)


class Case:
    """A bundle of a model and its compressed form."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.original, self._bad = folder, weights(), dict[float, Runner]()
        self.small = rounded(self.original, 6)
        self.best, self.fast = runner(self.original, folder / "best"), runner(self.small, folder / "fast")
        x = inputs(8, 1)
        answers = {ORT.key: tuple(self.best([x])), COMPRESSED.key: tuple(self.fast([x]))}
        bundle = write_bundle(
            folder / "bundle", recipes=[ORT, COMPRESSED], content=folder / "best" / "model.onnx", signature=SIGNATURE,
            inputs=[x], parity=Parity((x,), answers[ORT.key], answers),
        )  # fmt: skip
        x, labels = samples(CERTIFIED, 2)
        scores = [METRICS["accuracy"].scores(run([x])[0], labels) for run in (self.best, self.fast)]
        self.bundle = with_evidence(bundle, scores)

    def accuracy(self, run: Runner) -> float:
        x, labels = samples(10_000, 4)
        return float((run([x])[0].argmax(1) == labels).mean())

    def bad(self, points: float) -> Runner:
        """The compressed model after its weights were perturbed until it lost so much."""
        if points in self._bad:
            return self._bad[points]
        before = self.accuracy(self.fast)
        for share in np.arange(0.02, 2, 0.02):
            run = runner(noisy(self.small, float(share)), self.folder / "bad")
            if before - self.accuracy(run) >= points:
                return self._bad.setdefault(points, run)
        raise AssertionError("no noise lost that much")

    def life(self, run: Runner, audits: int, seed: int, **of: Any) -> tuple[Watch, int | None, str]:
        """One rung's life of so many audited requests; at which it was quarantined, and why."""
        watch = Watch(self.bundle, share=1.0, seed=seed, **of)
        for number, row in enumerate(inputs(audits, 100 + seed), 1):
            x = row[None]
            assert watch.wants(1)
            watch.add([x], run([x]), 1)
            verdict = watch.audit(self.best)
            assert verdict is not None
            if verdict.quarantine:
                return watch, number, verdict.why
        return watch, None, ""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"))


def test_a_rung_that_lost_five_points_is_quarantined_within_1000_audited_requests(case: Case) -> None:
    bad = case.bad(0.05)
    assert case.accuracy(case.fast) - case.accuracy(bad) < 0.08
    for seed in range(5):
        watch, at, why = case.life(bad, 1000, seed)
        assert at is not None
        assert "load it again" in why
        assert not watch.wants(1)
        assert watch.pending == 0


def test_a_rung_as_certified_lives_on(case: Case) -> None:
    for seed in range(5):
        watch, at, _ = case.life(case.fast, 1000, seed)
        assert at is None
        found, promise = watch.agreement(1), watch.promised(1)
        assert found is not None
        assert promise is not None
        assert "2000 samples" in promise.grounds
        assert found.mid > promise.least
        assert watch.audited == 1000


@pytest.mark.slow
def test_false_alarms_stay_below_five_percent_in_the_worst_case() -> None:
    """Whenever both are wrong they disagree, so the promise is as high as it may be; certificates are drawn too."""
    rng, alarms, lives, truth = np.random.default_rng(0), 0, 600, 0.96
    for _ in range(lives):
        promise = least_mean((rng.random(500) < truth).astype(float), 0.025)
        sequence = ConfidenceSequence()
        for number, value in enumerate(rng.random(1000) < truth, 1):
            sequence.observe(float(value))
            if number % 10 == 0 and sequence.below(promise):
                alarms += 1
                break
    assert alarms / lives <= 0.05


def test_sabotage_a_watch_that_believes_the_middle_alarms_too_often() -> None:
    """What the certificate promises must be the low end of it: its middle is too high half of the time."""
    rng, alarms, truth = np.random.default_rng(0), 0, 0.96
    for _ in range(100):
        promise = float((rng.random(500) < truth).mean())
        values = (rng.random(1000) < truth).astype(float)
        alarms += any(values[:n].mean() < promise for n in range(50, 1001, 10))
    assert alarms / 100 > 0.5


def test_what_the_labels_promise_is_never_above_the_real_agreement(case: Case) -> None:
    x = inputs(50_000, 9)
    real = float((case.best([x])[0].argmax(1) == case.fast([x])[0].argmax(1)).mean())
    promise = Watch(case.bundle).promised(1)
    assert promise is not None
    assert 0.95 < promise.least < real


def test_a_bad_reference_is_blamed_and_not_the_rung(case: Case) -> None:
    bad = runner(noisy(case.original, 0.5), case.folder / "bad best")
    watch = Watch(case.bundle, share=1.0)
    for row in inputs(1000, 5):
        watch.add([row[None]], case.fast([row[None]]), 1)
        verdict = watch.audit(bad)
        assert verdict is not None
        if verdict.quarantine:
            break
    assert verdict.quarantine
    assert verdict.rung == 0
    assert "stored rows" in verdict.why
    assert watch.agreement(1) is None
    assert watch.wants(1)


def test_a_changed_weight_shows_in_the_stored_rows_at_once(case: Case) -> None:
    watch = Watch(case.bundle)
    assert watch.recheck(1, case.fast) is None
    verdict = watch.recheck(1, case.bad(0.01))
    assert verdict is not None
    assert verdict.quarantine
    assert "differs by up to" in verdict.why


def test_a_weight_that_changes_while_it_runs_is_seen_however_weak_the_certificate(case: Case) -> None:
    weak = with_evidence(case.bundle, [np.array([[1.0], [0.0]])] * 2)
    watch, now = Watch(weak, share=1.0), case.fast

    def run(rung: int, leaves: Sequence[Array]) -> Sequence[Array]:
        return (case.best, now)[rung](leaves)

    for number, row in enumerate(inputs(200, 6)):
        if number == 60:
            now = case.bad(0.05)
        watch.add([row[None]], now([row[None]]), 1)
        verdict = watch.audit(case.best, run=run)
        assert verdict is not None
        if verdict.quarantine:
            break
    assert number == 100
    assert "stored rows" in verdict.why


def test_a_released_rung_starts_anew(case: Case) -> None:
    watch, at, _ = case.life(case.bad(0.2), 1000, 0)
    assert at is not None
    assert not watch.wants(1)
    watch.released(1)
    assert watch.wants(1)
    assert watch.agreement(1) is None


def test_another_reference_is_counted_apart(case: Case) -> None:
    watch, _, _ = case.life(case.fast, 20, 0)
    watch.add([inputs(1, 0)], case.fast([inputs(1, 0)]), 1)
    watch.refer_to(1)
    assert watch.pending == 0, "a rung is not compared with itself"
    assert not watch.wants(1)
    watch.add([inputs(1, 0)], case.best([inputs(1, 0)]), 0)
    assert watch.audit(case.fast) is not None
    assert watch.agreement(0) is not None
    assert watch.agreement(1) is None
    watch.add([inputs(1, 0)], case.fast([inputs(1, 0)]), 1)
    watch.audit(case.best, best=0)
    assert watch.agreement(1) is not None


def test_about_the_share_is_wanted_and_the_draw_is_repeatable(case: Case) -> None:
    draws = [[watch.wants(1) for _ in range(20_000)] for watch in (Watch(case.bundle, seed=s) for s in (0, 0, 1))]
    assert draws[0] == draws[1] != draws[2]
    assert 150 < sum(draws[0]) < 250
    assert not any(Watch(case.bundle, share=1.0).wants(0) for _ in range(10)), "the reference itself"
    with pytest.raises(ValueError, match="share"):
        Watch(case.bundle, share=1.5)


def test_what_waits_is_bounded_copied_and_cut_to_a_few_rows(case: Case) -> None:
    watch = Watch(case.bundle, most=3, rows=4)
    x = inputs(64, 0)
    answers = case.fast([x])
    watch.add([x], answers, 1)
    x[:], answers[0][:] = 0, 0
    seen: list[Array] = []

    def best(leaves: Sequence[Array]) -> list[Array]:
        seen.extend(leaves)
        return case.best(leaves)

    assert watch.audit(best) is not None
    assert seen[0].shape == (4, 64)
    assert seen[0].any(), "it was copied"
    found = watch.agreement(1)
    assert found is not None
    assert found.mid > 0.7
    for _ in range(5):
        watch.add([x], answers, 1)
    assert (watch.pending, watch.missed) == (3, 2)
    tight = Watch(case.bundle, most_bytes=100)
    tight.add([x], answers, 1)
    assert (tight.pending, tight.missed) == (0, 1)
    assert tight.audit(best) is None


def test_what_the_best_rung_raises_is_passed_on_once(case: Case) -> None:
    watch = Watch(case.bundle, share=1.0)
    watch.add([inputs(1, 0)], case.fast([inputs(1, 0)]), 1)

    def fails(leaves: Sequence[Array]) -> list[Array]:
        raise RuntimeError("poison")

    with pytest.raises(RuntimeError, match="poison"):
        watch.audit(fails)
    assert watch.audit(case.best) is None


# --- how alike, by the metric -------------------------------------------------------------------------------------


def port_bundle(folder: Path, shape: tuple[Any, ...], dtype: str, answers: Sequence[Array], metric: str) -> Bundle:
    """A bundle whose two rungs stored these answers; its scores are those of the metric against `answers[0]`."""
    signature = replace(SIGNATURE, outputs=(Port("logits", dtype, shape),))
    x = inputs(len(answers[0]), 1)
    content = save(weights(), folder / "m" / "model.onnx")
    parity = Parity((x,), (answers[0],), {ORT.key: (answers[0],), COMPRESSED.key: (answers[1],)})
    bundle = write_bundle(
        folder / "b", recipes=[ORT, COMPRESSED], content=content, signature=SIGNATURE, inputs=[x], parity=parity
    )
    return replace(bundle, signature=signature, workload={**bundle.workload, "metric": metric})


@pytest.mark.parametrize("metric", ["mae", "rmse", "r2", "cosine", "agreement", "f1", "cross-entropy", "mean-iou"])
def test_the_triangle_holds_for_every_metric_on_real_scores(tmp_path: Path, metric: str) -> None:
    """Each sample's likeness is at least what the two scores promise of it."""
    rng = np.random.default_rng(0)
    one_class = metric in ("f1", "cross-entropy", "agreement")
    shape: tuple[int, ...] = (400, 5) if one_class else (400, 3, 6) if metric == "mean-iou" else (400, 4)
    truth = rng.standard_normal(shape).astype(np.float32)
    ours = (truth + 0.3 * rng.standard_normal(shape)).astype(np.float32)
    theirs = (truth + 0.2 * rng.standard_normal(shape)).astype(np.float32)
    targets: Array = truth
    if metric in ("f1", "cross-entropy"):
        targets, ours, theirs = truth.argmax(1), 5 * ours, 5 * theirs
    elif metric == "mean-iou":
        targets = truth.argmax(-1)
    bundle = port_bundle(tmp_path, ("batch", *shape[1:]), "float32", [theirs, ours], metric)
    scores = [METRICS[metric].scores(answer, targets) for answer in (theirs, ours)]
    likeness = Likeness(with_evidence(bundle, scores, metric), bundle.parity)
    promised, found = likeness._by_scores(1, 0), likeness([ours], [theirs])
    assert promised is not None
    assert 0 < promised.mean() < 1
    assert (promised <= found + 1e-6).all()
    assert likeness([theirs], [theirs]) == pytest.approx(np.ones(400))


def test_metrics_that_promise_nothing_are_held_to_the_stored_rows(tmp_path: Path) -> None:
    answers = [np.random.default_rng(s).standard_normal((8, 5)).astype(np.float32) for s in (0, 1)]
    bundle = port_bundle(tmp_path, ("batch", 5), "float32", [answers[0], answers[0]], "own metric")
    promise = Watch(bundle).promised(1)
    assert promise is not None
    assert promise.grounds == "8 stored answers"
    assert promise.least == pytest.approx(0.025 ** (1 / 8)), "of 8 rows no more can be said, though all are the same"
    blind = Watch(replace(bundle, parity_file=None), share=1.0)
    assert blind.promised(1) is None
    for _ in range(200):
        blind.add([inputs(1, 0)], [answers[0][:1]], 1)
        verdict = blind.audit(lambda leaves: [-answers[0][:1]])
        assert verdict is not None
        assert not verdict.quarantine, "nothing is promised, so nothing is broken"
    found = blind.agreement(1)
    assert found is not None
    assert found.high < 0.1


def test_many_stored_rows_count_beside_the_scores(tmp_path: Path) -> None:
    logits = 3 * np.random.default_rng(0).standard_normal((300, 5)).astype(np.float32)
    bundle = port_bundle(tmp_path, ("batch", 5), "float32", [logits, logits], "accuracy")
    wrong = (np.arange(500) % 3 > 0).astype(float)[:, None]
    promise = Watch(with_evidence(bundle, [wrong, wrong])).promised(1)
    assert promise is not None
    assert promise.grounds == "300 stored answers"
    assert promise.least > 0.98


def test_answers_whose_rows_are_not_stored_count_like_those_whose_are(tmp_path: Path) -> None:
    """The original is right on three quarters only, so that its scores promise little."""
    logits = 3 * np.random.default_rng(0).standard_normal((808, 5)).astype(np.float32)
    other = np.where(np.arange(808)[:, None] % 100 == 99, -logits, logits)
    bundle = port_bundle(tmp_path, ("batch", 5), "float32", [logits[:8], other[:8]], "accuracy")
    three_quarters = (np.arange(500) % 4 > 0).astype(float)[:, None]
    bundle = with_evidence(bundle, [three_quarters, three_quarters])
    few, parity = Watch(bundle).promised(1), bundle.parity
    assert parity is not None
    many = replace(parity, further={ORT.key: (logits[8:],), COMPRESSED.key: (other[8:],)})
    promise = Likeness(bundle, many).promised(1, 0, 0.025)
    assert few is not None
    assert promise is not None
    assert few.least < 0.75
    assert promise.grounds == "808 stored answers"
    assert 0.975 < promise.least < 0.99


@pytest.mark.parametrize("why", ["positions that are not judged", "other samples", "another split"])
def test_scores_that_can_not_tell_promise_nothing(tmp_path: Path, why: str) -> None:
    logits = np.random.default_rng(0).standard_normal((8, 3, 6)).astype(np.float32)
    bundle = port_bundle(tmp_path, ("batch", 3, 6), "float32", [logits, logits], "accuracy")
    all_right = np.full((200, 2), 3.0)
    judged = with_evidence(bundle, [all_right, all_right])
    promise = Watch(judged).promised(1)
    assert promise is not None
    assert promise.grounds == "200 samples of the certify split"
    first, second = judged.ladder.rungs
    if why == "positions that are not judged":
        judged = with_evidence(bundle, [all_right - 1, all_right - 1])
    elif why == "other samples":
        other = replace(second.evidence, original_scores=all_right * (np.arange(200) % 2)[:, None])
        judged = replace(judged, ladder=Ladder((first, replace(second, evidence=other))))
    else:
        selected = replace(second.evidence, split="select")
        judged = replace(judged, ladder=Ladder((first, replace(second, evidence=selected))))
    promise = Watch(judged).promised(1)
    assert promise is not None
    assert promise.grounds == "8 stored answers"


def test_the_page_tells_the_promises_as_they_are() -> None:
    page = (Path(__file__).parents[1] / "docs" / "why" / "quality-watch.md").read_text("utf-8")
    for right, count in watching.SETTINGS:
        assert f"| {right * 100:.0f} % | {count} | {watching.promise_of_scores(right, count) * 100:.1f} % |" in page
    for count in watching.STORED:
        assert f"| {count} | {watching.promise_of_answers(count) * 100:.1f} % |" in page


def test_stored_answers_show_what_the_scores_of_a_modest_model_can_not() -> None:
    lost = watching.AGREES - 0.05
    assert lost > watching.promise_of_scores(0.75, 5000), "so that it would live for ever"
    lives = [watching.life(watching.promise_of_answers(1024), lost, seed) for seed in range(5)]
    assert max(lives) <= 1000
    assert watching.life(watching.promise_of_answers(1024), watching.AGREES, 0) == math.inf


def test_answers_that_are_not_finite_or_of_another_shape_are_nothing_alike(case: Case) -> None:
    likeness = Likeness(case.bundle, None)
    good = np.eye(3, 5, dtype=np.float32)
    broken = good.copy()
    broken[1, 2] = np.nan
    assert likeness([broken], [good]).tolist() == [1, 0, 1]
    assert likeness([good[:, :4]], [good]).tolist() == [0, 0, 0]


# --- drift --------------------------------------------------------------------------------------------------------

IMAGE = [Port("x", "float32", ("batch", 3, 16, 16))]
TABLE = [Port("x", "float32", ("batch", 20))]
WORDS = [Port("ids", "int64", ("batch", "length"))]
Draw = Callable[[np.random.Generator], list[Array]]


def image(rng: np.random.Generator) -> list[Array]:
    channels = np.array([0.4, 0.5, 0.6], np.float32)[:, None, None]
    return [(rng.random((2, 3, 16, 16), np.float32) * 0.3 + channels + 0.1 * rng.standard_normal()).astype(np.float32)]


def table(rng: np.random.Generator) -> list[Array]:
    return [rng.standard_normal((1, 20)).astype(np.float32)]


def words(rng: np.random.Generator) -> list[Array]:
    return [np.minimum(rng.zipf(1.4, (1, int(rng.integers(5, 40)))), 2000).astype(np.int64)]


def shifted(rng: np.random.Generator) -> list[Array]:
    [x] = table(rng)
    x[:, 17] += 4.1
    return [x]


def told(
    ports: Sequence[Port], usual: Draw, later: Draw, windows: int = 2, seed: int = 0, **of: Any
) -> tuple[str, ...]:
    """What is found after the first rows were usual, and as many windows as given were not."""
    drift, rng = Drift(ports, **of), np.random.default_rng(seed)
    for i in range(FIRST + REFERENCE + windows * WINDOW):
        drift.observe((usual if i < FIRST + REFERENCE else later)(rng))
        drift.look()
    assert drift.windows == windows
    return drift.findings


@pytest.mark.parametrize(("ports", "draw"), [(IMAGE, image), (TABLE, table), (WORDS, words)])
def test_the_same_distribution_is_no_drift(ports: Sequence[Port], draw: Draw) -> None:
    stored = None if ports is WORDS else [np.concatenate([draw(np.random.default_rng(s))[0] for s in range(8)])]
    for seed in range(3):
        assert told(ports, draw, draw, 3, seed, stored=stored) == ()


@pytest.mark.parametrize(
    ("ports", "usual", "later", "expected"),
    [
        (TABLE, table, shifted, r"input 'x': feature 17 is 4\.\d reference standard deviations above"),
        (IMAGE, image, lambda rng: [image(rng)[0][:, ::-1]], r"the mean at 0 of axis 1 is 2\.\d reference .* above"),
        (IMAGE, image, lambda rng: [image(rng)[0] * 1.5], "the spread within a row"),
        (TABLE, table, lambda rng: [table(rng)[0] * 3], "outside the range seen at first"),
        (TABLE, table, lambda rng: [table(rng)[0] * np.float32(np.nan)], "that are not finite is 1 on average"),
        (WORDS, words, lambda rng: [words(rng)[0] + 3000], "values never seen at first"),
        (WORDS, words, lambda rng: [np.tile(words(rng)[0], 4)], "the length of length"),
    ],
)
def test_a_drift_is_told_in_words(ports: Sequence[Port], usual: Draw, later: Draw, expected: str) -> None:
    import re

    found = told(ports, usual, later)
    assert any(re.search(expected, text) for text in found), found
    assert len(found) <= 4, "the greatest changes only"


def test_what_was_never_right_is_told_by_the_stored_rows() -> None:
    stored = [np.concatenate([image(np.random.default_rng(s))[0] for s in range(4)])]
    pixels: Draw = lambda rng: [image(rng)[0] * 255]  # noqa: E731
    found = told(IMAGE, pixels, pixels, 1, stored=stored)
    assert any(text.startswith("unlike the rows stored in the bundle: input 'x': the mean of a row") for text in found)


def test_drift_that_is_over_is_told_no_more() -> None:
    drift, rng = Drift(TABLE), np.random.default_rng(0)
    for draw in [table] * (FIRST + REFERENCE) + [shifted] * WINDOW:
        drift.observe(draw(rng))
        drift.look()
    assert drift.findings
    for _ in range(WINDOW):
        drift.observe(table(rng))
        drift.look()
    assert drift.findings == ()


def test_rows_that_nobody_looks_at_do_not_pile_up() -> None:
    drift, rng = Drift(TABLE), np.random.default_rng(0)
    for _ in range(10 * FIRST):
        drift.observe(table(rng))
    assert len(drift._rows) == FIRST


@pytest.mark.slow
def test_false_alarms_of_drift_over_many_windows() -> None:
    ports, alarms, lives = [Port("x", "float32", ("batch", 6))], 0, 40
    for seed in range(lives):
        rng = np.random.default_rng(seed)
        drift = Drift(ports, [rng.standard_normal((8, 6)).astype(np.float32)])
        alarm = False
        for row in rng.standard_normal((FIRST + REFERENCE + 12 * WINDOW, 1, 6)).astype(np.float32):
            drift.observe([row])
            alarm |= bool(drift.look())
        alarms += alarm
    assert alarms / lives <= 0.05


def test_the_bound_on_the_distance_holds_and_sabotage_half_of_it_does_not() -> None:
    rng = np.random.default_rng(0)
    far = np.array([distance(rng.standard_normal(384), rng.standard_normal(256)) for _ in range(2000)])
    assert (far >= least_distance(384, 256, 0.05)).mean() <= 0.05
    assert (far >= least_distance(384, 256, 0.05) / 2).mean() > 0.05


@example([7, 7, 7, 7, 7], "float32").via("more short axes than values are kept")
@given(st.lists(st.integers(1, 40), max_size=4), st.sampled_from(["float32", "int64", "uint8", "bool", "float16"]))
@settings(max_examples=12, deadline=None)
def test_rows_of_any_shape_and_type_are_taken(shape: list[int], dtype: str) -> None:
    drift, rng = Drift([Port("x", dtype, ("batch", *shape))]), np.random.default_rng(0)
    rows = rng.integers(0, 2, (3, *shape)).astype(dtype)
    for _ in range(FIRST + REFERENCE + WINDOW):
        drift.observe([rows])
        drift.look()
    assert drift.windows == 1
    assert drift.findings == ()
