"""The trainer: a net that was cut learns again, whatever its outputs are, and survives what goes wrong."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from taught import BRIEF, Case, Clock, case_of, trained
from torch import nn

from accelerando.errors import Reason, RefusalError
from accelerando.metric import METRICS, Metric
from accelerando.train import checkpoint, practice, schedule, trainer
from accelerando.train.course import Course
from accelerando.train.fake_quantize import FakeInt8
from accelerando.train.loss import aim_of
from accelerando.train.rows import Rows, shifted
from accelerando.train.teacher import Teacher
from accelerando.train.trainer import teach
from accelerando.train.watch import Best, Watch
from accelerando.train.weights import Average, Zeros, weights_of
from accelerando.workload import Chunk, Form, Model, Samples


@pytest.fixture(scope="session")
def digits_net() -> tuple[nn.Module, np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32), y.astype(np.int64)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    return trained(net, x[:1200], y[:1200], nn.functional.cross_entropy), x, y


@pytest.fixture
def digits(digits_net: tuple[nn.Module, np.ndarray, np.ndarray], tmp_path: Path) -> Case:
    net, x, y = digits_net
    return case_of(net, (x[1200:], y[1200:]), (x[:1200], y[:1200]), tmp_path)


# --- healing ----------------------------------------------------------------------------------------------------


def test_a_net_that_was_cut_is_healed(digits: Case) -> None:
    poor = digits.cut()
    before = digits.value(poor)
    taught = digits.taught(poor, replace(BRIEF, seconds=15, learning_rate=0.0))
    after = digits.value(taught.module)
    assert before < 0.6
    assert after > 0.85
    assert not taught.module.training
    assert not any(p.requires_grad or p.grad is not None for p in taught.module.parameters())
    summary, curve = taught.log
    assert "by range test" in summary
    assert "cross-entropy" in summary
    points = [tuple(map(float, point.split(":"))) for point in curve.removeprefix("distil: curve ").split()]
    assert points[0] == (0.0, pytest.approx(before, abs=1e-4))
    assert max(value for _, value in points) == pytest.approx(after, abs=1e-4)
    assert [seconds for seconds, _ in points] == sorted(seconds for seconds, _ in points)


def test_the_module_that_was_given_stays_as_it_was(digits: Case) -> None:
    poor = digits.cut()
    before, threads, rng = weights_of(poor), torch.get_num_threads(), torch.random.get_rng_state()
    digits.taught(poor)
    assert all(torch.equal(t, before[name]) for name, t in weights_of(poor).items())
    assert not any(p.requires_grad for p in poor.parameters())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), rng)


def test_inputs_without_labels_are_enough(digits_net: tuple[nn.Module, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    net, x, y = digits_net
    case = case_of(net, (x[1200:], y[1200:]), x[:1200], tmp_path)
    taught = case.taught(case.cut())
    assert case.value(taught.module) > 0.85
    assert "no labels" in taught.log[0]
    alike = case_of(net, x[1200:], x[:1200], tmp_path / "alike")
    assert alike.lessons.metric.name == "agreement"
    assert alike.value(alike.taught(alike.cut()).module) > 0.85


def test_labels_count_more_where_the_teacher_is_wrong(
    digits_net: tuple[nn.Module, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    _, x, y = digits_net
    torch.manual_seed(1)
    ignorant = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    case = case_of(ignorant, (x[1200:], y[1200:]), (x[:1200], y[:1200]), tmp_path)
    assert case.value(case.taught(case.cut(64), replace(BRIEF, labels=0.9)).module) > 0.85
    alone = replace(case.lessons, folder=tmp_path / "alone")
    assert (
        case.value(teach(case.cut(64), case.model.signature, alone, replace(BRIEF, labels=0.0), Clock()).module) < 0.5
    )


def test_regression(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1500, 8)).astype(np.float32)
    y = (2 * np.sin(x[:, :1]) + x[:, 1:2] * x[:, 2:3] + 1).astype(np.float32)
    net = trained(
        nn.Sequential(nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 1)), x[:1000], y[:1000], nn.functional.mse_loss
    )
    case = case_of(net, (x[1000:], y[1000:]), (x[:1000], y[:1000]), tmp_path)
    assert case.lessons.metric.name == "mae"
    before = case.value(case.cut(32))
    taught = case.taught(case.cut(32))
    assert case.value(taught.module) < 0.7 * before
    assert "absolute differences" in taught.log[0]


class Pair(nn.Module):
    """A classifier that answers with a dict: states first, then logits, then the best class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, width), nn.Linear(width, 10)
        self.states = nn.Linear(width, 6)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.body(x).relu()
        logits = self.head(hidden)
        return {"states": self.states(hidden), "logits": logits, "best": logits.argmax(1)}


def test_every_float_output_of_a_structure_is_learned(
    digits_net: tuple[nn.Module, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    _, x, y = digits_net
    torch.manual_seed(0)
    pair = Pair(96)
    trained_pair = trained(pair, x[:1200], y[:1200], lambda out, t: nn.functional.cross_entropy(out["logits"], t))
    case = case_of(trained_pair, (x[1200:], y[1200:]), (x[:1200], y[:1200]), tmp_path)
    small = Pair(24).eval().requires_grad_(False)
    taught = case.taught(small)
    assert case.value(taught.module) > 0.85
    rows = torch.from_numpy(x[1200:])
    with torch.no_grad():
        wanted, before, after = (m(rows)["states"] for m in (trained_pair, small, taught.module))
    assert (after - wanted).square().mean() < 0.3 * (before - wanted).square().mean()


def test_zeros_in_bulk_stay_zeros(digits: Case) -> None:
    poor = digits.cut(64)
    with torch.no_grad():
        poor[0].weight.mul_(torch.rand_like(poor[0].weight) > 0.8)
    zeros = poor[0].weight == 0
    healed = digits.taught(poor).module
    assert bool((healed[0].weight[zeros] == 0).all())
    assert float((healed[0].weight == 0).float().mean()) < 0.85
    assert not torch.equal(healed[0].weight, poor[0].weight)
    assert digits.value(healed) > digits.value(poor)


def test_a_weight_of_nothing_but_zeros_may_grow() -> None:
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    zeros = Zeros(layer)
    with torch.no_grad():
        layer.weight.fill_(1)
        zeros.restore()
    assert bool((layer.weight == 1).all())


def test_the_owners_loss_and_augmentation_are_used(digits: Case) -> None:
    asked: list[int] = []

    def loss(answer: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        asked.append(len(targets))
        return nn.functional.cross_entropy(answer, targets)

    def dimmer(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0] * torch.empty(len(inputs[0]), 1).uniform_(0.8, 1),)

    taught = digits.taught(digits.cut(), loss=loss, augment=dimmer)
    assert asked
    assert "own loss" in taught.log[0]
    assert digits.value(taught.module) > 0.85


# --- what goes wrong --------------------------------------------------------------------------------------------


def test_a_loss_that_is_nan_is_refused_by_name(digits: Case) -> None:
    with pytest.raises(RefusalError) as refusal:
        digits.taught(digits.cut(), loss=lambda answer, targets: answer.sum() * math.nan)
    assert refusal.value.reason is Reason.DIVERGED
    assert "not finite" in refusal.value.detail


def test_a_loss_that_becomes_nan_once_is_survived(digits: Case) -> None:
    calls = []

    def loss(answer: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        found = nn.functional.cross_entropy(answer, targets)
        return found * math.nan if len(calls) == 100 else found

    taught = digits.taught(digits.cut(), loss=loss)
    assert "lowered, for the loss" in taught.log[0]
    assert digits.value(taught.module) > digits.value(digits.cut())


def test_a_learning_rate_that_is_far_too_great_is_survived_or_refused(digits: Case) -> None:
    poor = digits.cut()
    course = replace(BRIEF, learning_rate=1e6, optimizer="sgd")
    try:
        healed = digits.taught(poor, course).module
    except RefusalError as refusal:
        assert refusal.reason is Reason.DIVERGED  # noqa: PT017  either is right
    else:
        assert digits.value(healed) >= digits.value(poor)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"loss": lambda answer, targets: answer}, "must give a scalar"),
        ({"loss": lambda answer: answer.sum()}, "loss= failed"),
        ({"augment": lambda inputs: (inputs[0][:1],)}, "augment= was given"),
        ({"augment": lambda x, y: x}, "augment= failed"),
    ],
)
def test_what_the_owner_gave_is_refused_by_name(digits: Case, other: dict[str, Any], words: str) -> None:
    with pytest.raises(RefusalError, match=words) as refusal:
        digits.taught(digits.cut(), **other)
    assert refusal.value.reason is Reason.UNSUPPORTED


class Untrainable(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).detach()


def test_a_module_without_gradients_is_refused_by_name(digits: Case) -> None:
    with pytest.raises(RefusalError, match="can't be trained") as refusal:
        digits.taught(Untrainable(digits.cut()))
    assert refusal.value.reason is Reason.UNSUPPORTED


class Hungry(nn.Module):
    """Stands for a module whose step needs memory in proportion to its rows, of which there is little."""

    def __init__(self, inner: nn.Module, most: int) -> None:
        super().__init__()
        self.inner, self.most = inner, most
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and len(x) > self.most:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried")
        return self.inner(x)


def test_the_batch_is_halved_until_it_fits_into_memory(digits: Case) -> None:
    taught = digits.taught(Hungry(digits.cut(), 10))
    assert ", batch 8," in taught.log[0]
    assert digits.value(taught.module) > 0.8
    with pytest.raises(RefusalError) as refusal:
        digits.taught(Hungry(digits.cut(), 0), folder=digits.lessons.folder.with_name("b"))
    assert refusal.value.reason is Reason.OUT_OF_MEMORY
    assert "1 row does not fit" in refusal.value.detail


def test_batch_norm_is_not_taught_by_single_rows(digits: Case) -> None:
    normed = nn.Sequential(nn.BatchNorm1d(64), digits.cut())
    assert ", batch 4," in digits.taught(Hungry(normed, 5)).log[0]
    with pytest.raises(RefusalError, match="4 rows does not fit"):
        digits.taught(Hungry(normed, 3), folder=digits.lessons.folder.with_name("b"))


def test_looking_takes_fewer_rows_where_memory_is_short(digits: Case) -> None:
    lessons, most = digits.lessons, [10]

    class Greedy(Hungry):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > most[0]:
                raise RuntimeError("could not create a primitive")  # oneDNN's words
            return self.inner(x)

    watch = Watch(lessons.watch, lessons.metric, digits.model.signature, None, 1)
    assert watch.look(Greedy(digits.cut(), 0)) == digits.value(digits.cut())
    assert watch.batch == 8
    most[0] = 0
    with pytest.raises(RefusalError, match="1 row") as refusal:
        watch.fit_into_time(Greedy(digits.cut(), 0))
    assert refusal.value.reason is Reason.OUT_OF_MEMORY


def test_want_of_memory_is_never_blamed_on_the_owner(digits: Case) -> None:
    def loss(answer: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if len(targets) > 10:
            raise MemoryError
        return nn.functional.cross_entropy(answer, targets)

    assert ", batch 8," in digits.taught(digits.cut(), loss=loss).log[0]
    with pytest.raises(RefusalError) as refusal:
        digits.taught(digits.cut(), metric=of_accuracy("hungry", True, _hunger), folder=digits.lessons.folder / "b")
    assert refusal.value.reason is Reason.OUT_OF_MEMORY


def _hunger(value: Any) -> Any:
    raise MemoryError


def test_ctrl_c_passes_through(digits: Case) -> None:
    with pytest.raises(KeyboardInterrupt):
        digits.taught(digits.cut(), say=_interrupt)


def _interrupt(text: str) -> None:
    raise KeyboardInterrupt


# --- resuming ---------------------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


def killed_after(looks: int, folder: Path) -> Callable[[str], None]:
    """A `say` that ends the lesson once so many checkpoints were written."""

    def say(text: str) -> None:
        path = folder / "progress.json"
        if path.exists() and len(json.loads(path.read_text())["curve"]) > looks:
            raise KilledError

    return say


def test_a_lesson_that_was_cut_off_goes_on(digits: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "SAY_SECONDS", 0.0)
    folder, poor = digits.lessons.folder, digits.cut()
    with pytest.raises(KilledError):
        digits.taught(poor, say=killed_after(2, folder))
    before = json.loads((folder / "progress.json").read_text())
    assert not before["done"]
    taught = digits.taught(poor)
    after = json.loads((folder / "progress.json").read_text())
    assert after["done"]
    assert after["curve"][: len(before["curve"])] == before["curve"]
    assert len(after["curve"]) > len(before["curve"])
    assert after["steps"] > before["steps"] > 0
    assert digits.value(taught.module) > 0.85
    assert len(list(folder.iterdir())) == 2  # the progress and one file of weights


@pytest.mark.slow
def test_between_looks_an_epoch_is_lost_at_most(digits: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after every checkpoint, it ends when it would have, and looks as often."""
    monkeypatch.setattr(trainer, "SAY_SECONDS", 0.0)
    path, poor, course = digits.lessons.folder / "progress.json", digits.cut(), replace(BRIEF, seconds=40)
    kept: list[dict[str, Any]] = [{"seconds": 0.0, "rows": 0, "curve": []}]

    def say(text: str) -> None:
        if path.exists() and (now := json.loads(path.read_text()))["seconds"] > kept[-1]["seconds"]:
            kept.append(now)
            raise KilledError

    def ended() -> bool:
        try:
            digits.taught(poor, course, say=say)
        except KilledError:
            return False
        return True

    while not ended():
        pass
    after = json.loads(path.read_text())
    assert sum(len(a["curve"]) == len(b["curve"]) for a, b in itertools.pairwise(kept)) >= 6  # between looks
    for a, b in itertools.pairwise(kept):
        assert b["seconds"] - a["seconds"] < trainer.SAVE_SECONDS + 1.5  # with what resuming takes
        assert b["rows"] > a["rows"]
    assert after["seconds"] == pytest.approx(40, abs=2)
    looks = [seconds for seconds, _ in after["curve"]]
    assert len(looks) >= trainer.LOOKS - 1
    assert all(b - a < 40 / trainer.LOOKS + 2 for a, b in itertools.pairwise(looks))
    assert len(list(path.parent.iterdir())) == 2


def test_a_finished_lesson_is_not_learned_again(digits: Case) -> None:
    poor = digits.cut()
    once = digits.taught(poor)
    said: list[str] = []
    again = digits.taught(poor, say=said.append, loss=lambda answer, targets: pytest.fail("it was learned again"))
    assert not said
    assert again.log == once.log
    assert all(torch.equal(t, weights_of(once.module)[name]) for name, t in weights_of(again.module).items())


@pytest.mark.parametrize("damage", ["{", "[]", '{"key": 1}', "weights"])
def test_what_was_learned_for_another_shape_or_is_damaged_is_learned_anew(digits: Case, damage: str) -> None:
    folder = digits.lessons.folder
    digits.taught(digits.cut(16))
    if damage == "weights":
        next(folder.glob("weights-*")).write_bytes(b"no weights")
    else:
        (folder / "progress.json").write_text(damage)
    brief = replace(BRIEF, seconds=2)
    assert digits.taught(digits.cut(16), brief).module[0].out_features == 16
    assert digits.taught(digits.cut(20), brief).module[0].out_features == 20


def test_a_full_disk_is_refused_by_name(digits: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise checkpoint.BundleError("no-room", f"there is no room for {path}")

    monkeypatch.setattr(checkpoint, "write_file", full)
    with pytest.raises(RefusalError) as refusal:
        digits.taught(digits.cut())
    assert refusal.value.reason is Reason.NO_ROOM


# --- early stopping, and its sabotage ---------------------------------------------------------------------------


def of_accuracy(name: str, higher: bool, change: Callable[[Any], Any]) -> Metric:
    honest = METRICS["accuracy"]
    return Metric(name, higher, False, honest.statistics, lambda means: change(honest.value(means)))


def test_sabotage_a_judge_that_is_reversed_keeps_a_worse_model(digits: Case) -> None:
    poor = digits.cut()
    honest = digits.value(digits.taught(poor).module)
    reversed_ = replace(digits.lessons, metric=replace(METRICS["accuracy"], higher_is_better=False, name="reversed"))
    worse = teach(poor, digits.model.signature, reversed_, BRIEF, Clock())
    assert digits.value(worse.module) <= digits.value(poor) < honest


def test_sabotage_a_learner_that_forgets_is_seen_by_the_judge(digits: Case) -> None:
    """Teaching nonsense must not replace the weights that it began with."""
    good = digits.model.content
    nonsense = digits.taught(good, loss=lambda answer, targets: answer.square().sum(), metric=METRICS["accuracy"])
    assert digits.value(nonsense.module) >= digits.value(good) - 0.005
    blind = of_accuracy("always better", True, _Counts())
    fooled = digits.taught(
        good, replace(BRIEF, labels=1.0), loss=lambda answer, targets: answer.square().sum(), metric=blind
    )
    assert digits.value(fooled.module) < digits.value(good) - 0.2


class _Counts:
    """Says at every look that it got better, whatever it saw."""

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self, value: Any) -> float:
        self.looks += 1
        return float(self.looks)


def test_the_best_is_the_latest_of_equals_and_never_nan(digits: Case) -> None:
    watch = Watch(digits.lessons.watch, METRICS["accuracy"], digits.model.signature, None, 1)
    best = Best(watch, 0.5, {"it": 0})
    assert best.offer(0.5, {"it": 1})
    assert not best.offer(math.nan, {"it": 2})
    assert not best.offer(0.4, {"it": 3})
    assert (best.weights, best.value, best.idle) == ({"it": 1}, 0.5, 3)
    assert best.offer(0.6, {"it": 4})
    assert best.idle == 0
    assert Best(watch, math.nan, {}).offer(0.1, {"it": 5})


# --- the teacher's answers --------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.rows = inner, 0

    def forward(self, x: torch.Tensor) -> Any:
        self.rows += len(x)
        return self.inner(x)


def test_the_teacher_is_asked_once_about_each_row(digits: Case) -> None:
    asked = Counting(digits.model.content).eval()
    teacher = Teacher(asked, digits.model.signature, digits.lessons.train, digits.lessons.folder / "t")
    rows = Rows(digits.lessons.train, 50, seed=1)
    for _ in range(60):
        batch = rows.draw()
        assert torch.equal(teacher.answers(batch)[0], digits.model.content(*batch.inputs))
    assert asked.rows == len(digits.lessons.train)
    teacher.keep()
    again = Teacher(asked, digits.model.signature, digits.lessons.train, digits.lessons.folder / "t")
    batch = rows.draw()
    assert torch.equal(again.answers(batch)[0], digits.model.content(*batch.inputs))
    assert asked.rows == len(digits.lessons.train)


def test_another_teacher_and_other_rows_have_answers_of_their_own(digits: Case) -> None:
    def key(module: nn.Module, samples: Samples) -> str:
        return Teacher(module, digits.model.signature, samples, digits.lessons.folder).key

    train = digits.lessons.train
    other = copy.deepcopy(digits.model.content)
    with torch.no_grad():
        other[0].bias[0] += 1
    changed = Samples((Chunk((train.chunks[0].inputs[0] + 1,), train.chunks[0].targets),))
    keys = [key(digits.model.content, train), key(other, train), key(digits.model.content, changed)]
    assert len(set(keys)) == 3
    assert key(copy.deepcopy(digits.model.content), train) == keys[0]


def test_answers_that_do_not_fit_are_rounded_or_asked_again(digits: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    train, asked = digits.lessons.train, Counting(digits.model.content).eval()
    for room, rounded, again in ((len(train) * 10 * 2, True, 0), (100, False, 50)):
        monkeypatch.setattr("accelerando.train.teacher.MOST_BYTES", room)
        teacher = Teacher(asked, digits.model.signature, train, digits.lessons.folder / str(room))
        batch = Rows(train, 50, seed=1).pick(0, np.arange(50))
        first, before = teacher.answers(batch)[0], asked.rows
        second = teacher.answers(batch)[0]
        assert asked.rows - before == again
        assert torch.equal(first, second) != rounded
        assert torch.allclose(first, second, rtol=1e-2, atol=1e-2)


# --- the parts --------------------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), batch=st.integers(2, 16), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_an_epoch_has_every_row_once(sizes: list[int], batch: int, seed: int) -> None:
    chunks = tuple(Chunk((np.arange(n, dtype=np.int64)[:, None].repeat(i + 1, 1),), None) for i, n in enumerate(sizes))
    rows = Rows(Samples(chunks), batch, seed)
    seen: list[tuple[int, int]] = []
    while len(set(seen)) < sum(sizes):
        drawn = rows.draw()
        assert 2 <= len(drawn) <= batch or (len(drawn) == 1 and sizes[drawn.chunk] > 1)
        assert drawn.inputs[0].shape == (len(drawn), drawn.chunk + 1)
        seen += {(drawn.chunk, int(x)) for x in drawn.inputs[0][:, 0]}
    assert len(seen) == sum(sizes)


def test_a_chunk_of_one_row_can_pass_a_batch_norm() -> None:
    rows = Rows(Samples((Chunk((np.ones((1, 3), np.float32),), None),)), 8, 0)
    drawn = rows.draw().inputs[0]
    assert len(drawn) > 1  # what a batch norm asks for
    assert torch.isfinite(nn.BatchNorm1d(3)(drawn)).all()


def test_images_are_shifted_by_a_tenth_at_most_and_nothing_else_is() -> None:
    torch.manual_seed(0)
    image = torch.zeros(64, 1, 20, 20)
    image[:, :, 10, 7] = 1
    (moved,) = shifted((image,))
    places = moved.nonzero()[:, 2:]
    assert moved.shape == image.shape
    assert len(places) == 64
    assert int((places - torch.tensor([10, 7])).abs().max()) == 2
    still = (torch.rand(4, 16), torch.rand(4, 1, 8, 8), torch.rand(4, 12, 20, 20), torch.rand(4, 3, 20))
    assert all(torch.equal(a, b) for a, b in zip(shifted(still), still, strict=True))


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_schedule_goes_up_then_down_to_nothing(a: float, b: float) -> None:
    low, high = sorted((a, b))
    heights = schedule.height(low, 1000), schedule.height(high, 1000)
    assert all(0 <= h <= 1 for h in heights)
    if low >= schedule.WARM_UP:
        assert heights[0] >= heights[1]
    assert schedule.height(1.0, 1000) == 0
    assert schedule.height(0.5, 0) < schedule.height(0.5, 10) < schedule.height(0.5, 1000)


@pytest.mark.parametrize("steep", [1.0, 30.0])
def test_the_range_test_finds_a_rate_that_converges(steep: float) -> None:
    """On a parabola of that curvature, with noise; its gradient step diverges beyond 2 / steep."""
    at, rng = [5.0], np.random.default_rng(0)

    def step(rate: float) -> float:
        loss = steep * at[0] ** 2 / 2
        at[0] -= rate * (steep * at[0] + rng.normal())
        return loss if loss < 1e6 else math.nan

    rate = schedule.range_test(step, "sgd", 80)
    assert 0.05 / steep < rate < 2 / steep


def test_an_average_is_the_mean_until_it_forgets() -> None:
    layer = nn.Linear(1, 1, bias=False)
    average = Average(layer, horizon=4)
    seen = []
    for value in (1.0, 3.0, 8.0):
        with torch.no_grad():
            layer.weight.fill_(value)
        average.update()
        seen.append(float(average.weights["weight"]))
    assert seen == pytest.approx([1, 2, 4])


def test_simulated_int8_is_taken_off_again() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    x = torch.randn(5, 2, 8, 8)
    plain = net(x).detach()
    fake = FakeInt8(net)
    fake.on()
    rounded = net(x).detach()
    assert 0 < float((rounded - plain).abs().max()) < 0.1
    net(x).sum().backward()
    assert all(bool(p.grad.any()) for p in net.parameters())
    fake.off()
    assert torch.equal(net(x), plain)
    assert "forward" not in vars(net[0])
    with pytest.raises(RefusalError, match="no Linear or Conv"):
        FakeInt8(nn.ReLU())


def _aim(shape: tuple[int, ...], metric: str, targets: Any, **course: Any) -> Any:
    torch.manual_seed(0)
    signature = Model(Form.TORCH, None, _signature(shape)).signature
    outputs = torch.randn(shape)
    wanted = None if targets is None else torch.as_tensor(targets)
    return aim_of(signature, [0], METRICS[metric], None, Course(**course), [outputs], wanted), outputs, wanted


def _signature(shape: tuple[int, ...]) -> Any:
    from accelerando.signature import Port, Signature

    port = Port("output", "float32", ("batch", *shape[1:]))
    return Signature((port,), (port,), ("x",), 1, {"x": {"leaf": 0}}, {"leaf": 0})


@pytest.mark.parametrize(
    ("shape", "metric", "targets", "meaning", "axis", "hard"),
    [
        ((6, 10), "accuracy", np.arange(6), "classes", 1, "cross-entropy"),
        ((6, 10), "agreement", None, "classes", 1, "no labels"),
        ((6, 7, 10), "perplexity", np.zeros((6, 7), int), "classes", 2, "cross-entropy"),
        ((6, 10, 4, 4), "mean-iou", np.zeros((6, 4, 4), int), "classes", 1, "cross-entropy"),
        ((6, 1), "accuracy", np.array([0, 1, 0, 1, 1, 0]), "binary", 1, "binary cross-entropy"),
        ((6,), "accuracy", np.array([0, 1, 0, 1, 1, 0]), "binary", 1, "binary cross-entropy"),
        ((6, 3), "mae", np.ones((6, 3), np.float32), "numbers", 1, "absolute differences"),
        ((6, 3), "r2", np.ones((6, 3), np.float32), "numbers", 1, "squared differences"),
        ((6, 3), "cosine", np.ones((6, 3), np.float32), "numbers", 1, "labels not used"),
        ((6, 3), "mse", np.ones((6, 5), np.float32), "numbers", 1, "no loss fits the labels, so they are not used"),
    ],
)
def test_the_loss_is_guessed(
    shape: tuple[int, ...], metric: str, targets: Any, meaning: str, axis: int, hard: str
) -> None:
    aim, outputs, wanted = _aim(shape, metric, targets)
    assert (aim.meaning, aim.axis, aim.hard_name) == (meaning, axis, hard)
    mine = torch.randn(shape, requires_grad=True)
    loss = aim(mine, [mine], [outputs], wanted)
    loss.backward()
    assert loss.dim() == 0
    assert bool(mine.grad.any())


def test_the_teachers_part_is_nothing_for_the_same_answer() -> None:
    for shape, metric in (((6, 10), "agreement"), ((6, 5, 10), "agreement"), ((6, 3), "cosine")):
        aim, outputs, _ = _aim(shape, metric, None)
        assert float(aim(outputs, [outputs], [outputs], None)) == pytest.approx(0, abs=1e-6)
        assert float(aim(outputs, [outputs + torch.randn(shape)], [outputs], None)) > 0.1


def test_probabilities_are_taken_as_such() -> None:
    chances = torch.softmax(torch.randn(6, 10), 1)
    aim = aim_of(_signature((6, 10)), [0], METRICS["accuracy"], None, Course(), [chances], torch.arange(6))
    assert aim.chances
    assert torch.allclose(torch.softmax(aim.logits(chances), 1), chances, atol=1e-5)


def test_nothing_can_be_learned_from_whole_numbers() -> None:
    with pytest.raises(RefusalError, match="none of its outputs is a float"):
        aim_of(_signature((6, 10)), [], METRICS["accuracy"], None, Course(), [], None)


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("seconds", 0),
        ("labels", 1.5),
        ("temperature", 0),
        ("learning_rate", -1),
        ("optimizer", "adam"),
        ("labels", math.nan),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("smoothing", 1.0),
    ],
)
def test_settings_out_of_range_are_refused(knob: str, value: Any) -> None:
    with pytest.raises(ValueError, match=knob):
        Course(**{knob: value})


def test_weights_are_drawn_to_zero_as_much_as_is_asked(digits: Case) -> None:
    def size(name: str, **course: Any) -> float:
        folder = digits.lessons.folder / name
        healed = digits.taught(digits.cut(), replace(BRIEF, seconds=3, **course), folder=folder).module
        return float(healed[0].weight.square().sum())

    usual, same, none, strong = (
        size("usual"), size("same", weight_decay=0.01), size("none", weight_decay=0.0), size("strong", weight_decay=5.0)
    )  # fmt: skip
    assert usual == same
    assert strong < 0.8 * usual < none


def test_labels_are_smoothed_as_much_as_is_asked() -> None:
    """By hand: the label's share of the cross-entropy, and the rest's, as PyTorch defines it."""
    for metric, course, share in (
        ("accuracy", {}, 0.05), ("cross-entropy", {}, 0.0), ("accuracy", {"smoothing": 0.0}, 0.0),
        ("accuracy", {"smoothing": 0.3}, 0.3), ("perplexity", {"smoothing": 0.3}, 0.3),
    ):  # fmt: skip
        aim, outputs, wanted = _aim((6, 10), metric, np.arange(6), labels=1.0, **course)
        chances = torch.log_softmax(outputs, 1)
        right = -chances[torch.arange(6), wanted].mean()
        expected = (1 - share) * right - share * chances.mean()
        assert float(aim(outputs, [outputs], [], wanted)) == pytest.approx(float(expected), rel=1e-5)


def test_a_step_is_clipped_where_its_gradient_is_unusual(digits: Case) -> None:
    student = digits.cut().requires_grad_(True)
    teacher = Teacher(digits.model.content, digits.model.signature, digits.lessons.train, digits.lessons.folder)
    steps = practice.Practice(student, digits.model.signature, digits.lessons, teacher, BRIEF, Clock())
    lengths = []
    for size in (1.0, 1.0, 100.0):
        for parameter in student.parameters():
            parameter.grad = torch.full_like(parameter, size)
        assert steps._clip()
        lengths.append(float(torch.nn.utils.get_total_norm([p.grad for p in student.parameters()])))
    assert lengths[2] == pytest.approx(practice.CLIP * lengths[0], rel=1e-3)
