"""Metrics agree with scikit-learn and torchmetrics on random data, and refuse what does not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics.functional as tm
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from accelerando.errors import DataError
from accelerando.metric import METRICS, guess, named, of_function
from accelerando.signature import Fields

SEEDS = st.integers(0, 10_000)
quick = settings(max_examples=25, deadline=None)


def value(name: str, outputs: Any, targets: np.ndarray) -> float:
    metric = named(name)
    return float(metric.value(metric.scores(outputs, targets).mean(axis=0)))


def classification(seed: int, n: int = 60, classes: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets = rng.integers(classes, size=n)
    logits = rng.normal(size=(n, classes)).astype(np.float32)
    logits[np.arange(n), targets] += 1.0
    return logits, targets


def regression(seed: int, shape: tuple[int, ...] = (50, 3)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets = rng.normal(size=shape)
    return targets + 0.5 * rng.normal(size=shape), targets


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(a) for a in arrays]


@quick
@given(SEEDS, st.integers(6, 12))
def test_classification_agrees_with_scikit_learn(seed: int, classes: int) -> None:
    logits, targets = classification(seed, classes=classes)
    predicted = logits.argmax(1)
    assert value("accuracy", logits, targets) == pytest.approx(sk.accuracy_score(targets, predicted))
    assert value("f1", logits, targets) == pytest.approx(sk.f1_score(targets, predicted, average="macro"))
    labels = np.union1d(targets, predicted)
    iou = sk.jaccard_score(targets, predicted, average="macro", labels=labels)
    assert value("mean-iou", logits, targets) == pytest.approx(iou)
    top5 = sk.top_k_accuracy_score(targets, logits, k=5, labels=np.arange(classes))
    assert value("top-5", logits, targets) == pytest.approx(top5)
    chances = np.exp(logits.astype(np.float64))
    loss = sk.log_loss(targets, chances / chances.sum(1, keepdims=True), labels=np.arange(classes))
    assert value("cross-entropy", logits, targets) == pytest.approx(loss, rel=1e-6)


@quick
@given(SEEDS)
def test_classification_agrees_with_torchmetrics(seed: int) -> None:
    logits, targets = classification(seed)
    t_logits, t_targets = tensors(logits, targets)
    ours = value("top-5", logits, targets)
    theirs = tm.accuracy(t_logits, t_targets, task="multiclass", num_classes=7, top_k=5, average="micro")
    assert ours == pytest.approx(float(theirs), rel=1e-6)


@quick
@given(SEEDS)
def test_segmentation_agrees_with_torchmetrics(seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets = rng.integers(4, size=(5, 6, 6))
    logits = rng.normal(size=(5, 4, 6, 6))
    predicted, true = tensors(logits.argmax(1), targets)
    theirs = tm.jaccard_index(predicted, true, task="multiclass", num_classes=4, average="macro")
    assert value("mean-iou", logits, targets) == pytest.approx(float(theirs), rel=1e-6)
    assert value("accuracy", logits, targets) == pytest.approx((logits.argmax(1) == targets).mean())


@quick
@given(SEEDS, st.sampled_from([(50,), (50, 1), (50, 3), (20, 2, 4)]))
def test_regression_agrees_with_scikit_learn(seed: int, shape: tuple[int, ...]) -> None:
    outputs, targets = regression(seed, shape)
    flat = [a.reshape(len(a), -1) for a in (targets, outputs)]
    assert value("mae", outputs, targets) == pytest.approx(sk.mean_absolute_error(*flat))
    assert value("mse", outputs, targets) == pytest.approx(sk.mean_squared_error(*flat))
    rmse = float(np.sqrt(sk.mean_squared_error(*flat)))
    assert value("rmse", outputs, targets) == pytest.approx(rmse)
    pooled = [a.ravel() for a in flat] if len(shape) > 2 else flat
    assert value("r2", outputs, targets) == pytest.approx(sk.r2_score(*pooled))


@quick
@given(SEEDS)
def test_language_models_agree_with_torchmetrics(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(4, 9, 11)).astype(np.float32)
    targets = rng.integers(11, size=(4, 9))
    targets[0, :3] = -100
    theirs = tm.text.perplexity(*tensors(logits, targets), ignore_index=-100)
    assert value("perplexity", logits, targets) == pytest.approx(float(theirs), rel=1e-5)
    judged = targets >= 0
    assert value("accuracy", logits, targets) == pytest.approx((logits.argmax(-1) == targets)[judged].mean())
    f1 = sk.f1_score(targets[judged], logits.argmax(-1)[judged], average="macro")
    assert value("f1", logits, targets) == pytest.approx(f1)


@quick
@given(SEEDS)
def test_images_and_cosine_agree_with_torchmetrics(seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets = rng.integers(256, size=(4, 3, 8, 8)).astype(np.uint8)
    outputs = (targets + rng.normal(size=targets.shape)).astype(np.float32)
    theirs = tm.image.peak_signal_noise_ratio(
        *tensors(outputs, targets.astype(np.float32)), data_range=255.0, dim=(1, 2, 3)
    )
    assert value("psnr", outputs, targets) == pytest.approx(float(theirs), rel=1e-4)
    a, b = regression(seed, (6, 10))
    assert value("cosine", a, b) == pytest.approx(float(tm.cosine_similarity(*tensors(a, b), reduction="mean")))


@quick
@given(SEEDS, st.sampled_from([n for n in METRICS if n != "accuracy-at-half"]), st.integers(1, 49))
def test_scoring_in_two_batches_gives_the_same(seed: int, name: str, cut: int) -> None:
    by_class = name in ("accuracy", "top-5", "f1", "mean-iou", "cross-entropy", "perplexity")
    outputs, targets = classification(seed, 50) if by_class else regression(seed)
    metric = METRICS[name]
    parts = [metric.scores(outputs[s], targets[s]) for s in (slice(cut), slice(cut, None))]
    np.testing.assert_allclose(np.concatenate(parts), metric.scores(outputs, targets))


def test_values_work_on_many_resamples_at_once() -> None:
    for name in METRICS:
        outputs, targets = regression(1, (9, 7)) if name in ("mae", "r2", "psnr") else classification(1)
        if name == "accuracy-at-half":
            outputs, targets = outputs[:, 0], (targets > 3).astype(np.int64)
        elif METRICS[name].of_original or name in ("mse", "rmse"):
            targets = outputs + 0.1
        scores = METRICS[name].scores(outputs, targets)
        many = METRICS[name].value(np.stack([scores[:5].mean(0), scores.mean(0)])[:, None])
        assert many.shape == (2, 1)
        assert many[1, 0] == pytest.approx(float(METRICS[name].value(scores.mean(0))))


def test_one_logit_is_binary() -> None:
    logits, targets = np.array([[-2.0], [0.3], [1.0], [-0.1]], dtype=np.float32), np.array([0, 1, 0, 0])
    for outputs in (logits, logits[:, 0]):
        assert value("accuracy", outputs, targets) == 0.75
        assert value("f1", outputs, targets) == pytest.approx(sk.f1_score(targets, [0, 1, 1, 0], average="macro"))
        chances = 1 / (1 + np.exp(-logits[:, 0].astype(np.float64)))
        assert value("cross-entropy", outputs, targets) == pytest.approx(sk.log_loss(targets, chances), rel=1e-6)
    assert value("accuracy-at-0.5", np.array([[0.2], [0.9], [0.6], [0.4]]), targets) == 0.75


def test_predicted_classes_are_taken_as_they_are() -> None:
    predicted, targets = np.array([0, 2, 1, 40]), np.array([0, 2, 2, 1])
    assert value("accuracy", predicted, targets) == 0.5
    assert value("f1", predicted, targets) == pytest.approx(sk.f1_score(targets, predicted, average="macro"))


def test_agreement_and_exact_answers() -> None:
    logits, _ = classification(0)
    other = logits.copy()
    other[:6] = -other[:6]
    assert value("agreement", other, logits) == pytest.approx((other.argmax(1) == logits.argmax(1)).mean())
    words = np.random.default_rng(0).normal(size=(3, 5, 8))  # (n, positions, classes)
    assert value("agreement", words[..., ::-1], words) == (7 - words.argmax(-1) == words.argmax(-1)).mean()
    assert value("agreement", np.array([[1.0], [2.1]]), np.array([[1.001], [2.0]])) == 0.5
    assert value("r2", np.ones((5, 1)), np.ones((5, 1))) == 1
    assert value("psnr", np.ones((5, 4)), np.ones((5, 4))) == pytest.approx(120)
    assert value("cosine", np.zeros((5, 4)), np.zeros((5, 4))) == 1


def test_named_metrics_look_at_the_logits() -> None:
    logits, targets = classification(0)
    for answer in (Fields(loss=np.zeros(60), logits=logits), (logits, targets), torch.from_numpy(logits)):
        assert value("accuracy", answer, targets) == value("accuracy", logits, targets)


def test_names_are_forgiving_and_unknown_ones_are_listed() -> None:
    assert named(" Top5 ") is METRICS["top-5"]
    assert named("mean_iou") is named("mIoU") is METRICS["mean-iou"]
    with pytest.raises(DataError, match=r"no metric 'acuracy'.*accuracy, .*or give a function"):
        named("acuracy")


BAD = {
    "accuracy": (np.zeros((4, 3)), np.zeros((4, 2), dtype=np.int64), "targets must be whole numbers"),
    "f1": (np.zeros((4, 3)), np.array([0, 1, 2, 3]), "hold class 3, but the outputs have 3"),
    "top-5": (np.zeros((4, 5)), np.zeros(4, dtype=np.int64), "more than 5 classes"),
    "mean-iou": (np.zeros((4, 3)), np.zeros(4), "whole numbers"),
    "mae": (np.zeros((4, 3)), np.zeros((4, 2)), "equally many numbers"),
    "mse": (np.zeros((3, 4)), np.zeros((4, 3)), "equally many numbers per sample"),
    "r2": (np.zeros((4, 1)), np.zeros(5), "equally many"),
    "cross-entropy": (np.zeros((4, 3)), np.array([0, 1, 2, 3]), "hold class 3, but there are 3"),
    "perplexity": (np.zeros((4, 3)), np.zeros(4), "outputs must be logits"),
    "cosine": (np.zeros((4, 3)), np.zeros((4, 4)), "equally many"),
    "agreement": (np.zeros((4, 3)), np.zeros((4, 4)), "one shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_with_the_shapes(name: str) -> None:
    outputs, targets, must = BAD[name]
    with pytest.raises(DataError, match=must) as caught:
        METRICS[name].scores(outputs, targets)
    assert str(outputs.shape) in str(caught.value)
    assert str(targets.shape) in str(caught.value)


def test_functions_of_the_user() -> None:
    def off_by(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return np.abs(outputs - targets)

    off_by.higher_is_better = False
    metric = of_function(off_by)
    assert (metric.name, metric.higher_is_better) == ("off_by", False)
    scores = metric.scores(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
    assert scores.tolist() == [[0], [2]]
    assert metric.value(scores.mean(0)) == 1
    as_tensor = of_function(lambda o, t: torch.from_numpy(np.asarray(o == t)))
    assert as_tensor.scores(np.array([1, 2]), np.array([1, 3])).tolist() == [[1], [0]]


def test_a_function_named_like_a_metric_keeps_its_own_value() -> None:
    def f1(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return np.ones(len(targets))

    assert of_function(f1).name not in METRICS


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda o, t: 0.5, r"one score per sample, \(3,\), but gave \(\)"),
        (lambda o, t: np.ones(2), r"one score per sample, \(3,\), but gave \(2, 1\)"),
        (lambda o, t: np.array([1, np.nan, 1]), "NaN or infinity for 1 samples"),
        (lambda o, t: o.nothing, "failed on the model's outputs"),
    ],
)
def test_functions_that_do_not_fit(function: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        of_function(function).scores(np.zeros(3), np.zeros(3))


def test_guess() -> None:
    ints, floats = np.array([0, 1, 1, 0]), np.zeros(4)
    cases = [
        (np.zeros((4, 3)), ints, "accuracy"),
        (np.zeros((4, 3)), ints[:, None], "accuracy"),
        (ints, ints, "accuracy"),
        (np.array([[-1.0], [2.0], [0.5], [0.1]]), ints, "accuracy"),
        (np.full((4, 1), 0.4), ints, "accuracy-at-half"),
        (np.zeros((4, 3, 8, 8)), np.zeros((4, 8, 8), dtype=np.int64), "mean-iou"),
        (np.zeros((4, 5, 9)), np.zeros((4, 5), dtype=np.int64), "perplexity"),
        (np.zeros((4, 1)), floats, "mae"),
        (np.zeros((4, 3)), None, "agreement"),
        (np.zeros((4, 3, 8, 8)), None, "cosine"),
    ]
    for outputs, targets, name in cases:
        assert guess(outputs, targets).name == name


def test_guess_refuses_what_is_not_obvious() -> None:
    with pytest.raises(DataError, match=r"no metric is obvious for outputs float64\(4, 1\) and targets int64\(4,\)"):
        guess(np.zeros((4, 1)), np.array([3, 7, 1, 0]))
    with pytest.raises(DataError, match=r"one-hot: give class numbers, targets.argmax\(1\)"):
        guess(np.zeros((3, 3)), np.eye(3))
    with pytest.raises(DataError, match="holds no array"):
        guess({}, None)
