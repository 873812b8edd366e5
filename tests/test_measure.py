"""Measuring for real: child processes, arms and the bench, on a small ONNX model and a backend with faults."""

from __future__ import annotations

import os
import signal
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from accelerando.adoption import adopt
from accelerando.errors import DataError, Reason, RefusalError
from accelerando.machine import Machine
from accelerando.measure.arm import Arm, Subject, mixed_batches, open_samples, save_samples, timed_batches
from accelerando.measure.bench import Bench, examine
from accelerando.measure.child import Child
from accelerando.measure.rounds import Effort
from accelerando.memory import held_bytes, kept_within
from accelerando.plugins import find
from accelerando.recipe import Recipe
from accelerando.workload import Chunk, Model, Samples

QUICK = Effort(least=8, most=16, block_seconds=0.03)


# --- child ------------------------------------------------------------------------------------------------------


def test_a_child_calls_what_it_is_given_also_a_closure() -> None:
    offset = 5
    with Child("a child") as child:
        assert child.call(lambda x: x + offset, 2) == 7
        assert child.call(os.getpid) != os.getpid()


def test_a_child_that_raises_says_what_and_lives_on() -> None:
    def broken() -> None:
        raise ZeroDivisionError("by hand")

    with Child("a child") as child:
        with pytest.raises(RefusalError, match="ZeroDivisionError: by hand") as caught:
            child.call(broken)
        assert caught.value.reason is Reason.CRASHED
        assert child.call(lambda: 1) == 1


def test_our_own_errors_pass_through_with_all_they_carry() -> None:
    def refuse() -> None:
        error = RefusalError(Reason.NOTHING_TO_DO, "as it is")
        error.step = 3
        raise error

    def misuse() -> None:
        raise DataError("no good")

    with Child("a child") as child:
        with pytest.raises(RefusalError, match="as it is") as caught:
            child.call(refuse)
        assert (caught.value.reason, caught.value.step) == (Reason.NOTHING_TO_DO, 3)
        with pytest.raises(DataError, match="no good"):
            child.call(misuse)


def test_a_child_that_dies_hangs_or_hoards_costs_the_call() -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def hoard() -> None:
        blocks = [np.ones(2**22) for _ in range(64)]
        time.sleep(60 + len(blocks))

    with Child("a child") as child, pytest.raises(RefusalError, match="SIGSEGV") as caught:
        child.call(die)
    assert caught.value.reason is Reason.CRASHED
    with Child("a child") as child, pytest.raises(RefusalError, match="longer than") as caught:
        child.call(time.sleep, 60, timeout=0.3)
    assert caught.value.reason is Reason.TIMED_OUT
    assert not child.alive
    with Child("a child", memory_limit=300 * 2**20) as child, pytest.raises(RefusalError, match="limit") as caught:
        child.call(hoard)
    assert caught.value.reason is Reason.OUT_OF_MEMORY


def test_within_a_limit_memory_is_refused_and_the_child_lives() -> None:
    """Torch's and Python's own; afterwards it may be had again."""

    def ask(limit: int, count: int) -> str:
        import torch

        with kept_within(limit):
            try:
                return f"{len(torch.ones(count))} were had"
            except RuntimeError as error:
                first = str(error)
            with pytest.raises(MemoryError):
                bytearray(4 * count)
        return f"{first}; then {len(torch.ones(count))}"

    with Child("a child") as child:
        child.call(ask, None, 1)  # torch's own
        limit = child.call(held_bytes) + 400 * 2**20
        assert child.call(ask, limit, 2**22) == f"{2**22} were had"
        refused, _, later = child.call(ask, limit, 2**27).partition("; then ")
        assert "allocate memory" in refused
        assert later == str(2**27)


def test_pages_of_a_file_are_not_held(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.ones(2**25))

    def read() -> float:
        rows = np.load(tmp_path / "rows.npy", mmap_mode="r")
        total = float(rows.sum())
        time.sleep(0.3)  # long enough to be seen by the parent
        return total

    with Child("a child", memory_limit=200 * 2**20) as child:
        assert child.call(read) == 2**25


def test_a_child_ends_with_its_parent() -> None:
    def parent() -> int:
        return Child("a grandchild").pid

    with Child("a parent") as child:
        grandchild = child.call(parent)
    for _ in range(100):
        if not Path(f"/proc/{grandchild}").exists() or "Z" in Path(f"/proc/{grandchild}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    pytest.fail("the grandchild lives on")


# --- samples ----------------------------------------------------------------------------------------------------


def test_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    chunks = tuple(
        Chunk((rng.standard_normal((n, k)).astype(np.float32), rng.integers(0, 9, (n, 2))), rng.integers(0, 3, n))
        for n, k in ((5, 3), (7, 4))
    )
    save_samples(Samples(chunks), tmp_path / "rows")
    back = open_samples(tmp_path / "rows")
    for ours, theirs in zip(chunks, back.chunks, strict=True):
        assert theirs.targets is not None
        np.testing.assert_array_equal(theirs.targets, ours.targets)
        for a, b in zip(ours.inputs, theirs.inputs, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


def test_timed_batches_have_the_size_that_is_asked_for_also_with_few_rows() -> None:
    rows = Samples((Chunk((np.zeros((3, 2), np.float32),), None), Chunk((np.zeros((50, 4), np.float32),), None)))
    batches = timed_batches(rows, 8)
    assert all(len(b[0]) == 8 for b in batches)
    assert {b[0].shape[1] for b in batches} == {2, 4}


def test_a_mix_brings_every_row_once_before_any_comes_again() -> None:
    rows = Samples((Chunk((np.arange(50, dtype=np.float32)[:, None],), None),))
    turns = [np.concatenate([b[0][:, 0] for b in islice(mixed_batches(rows, 5, seed), 20)]) for seed in (0, 1)]
    for turn in turns:
        assert sorted(turn[:50]) == sorted(turn[50:]) == list(range(50))
    assert not np.array_equal(*turns)
    few = next(mixed_batches(Samples((Chunk((np.zeros((3, 2), np.float32),), None),)), 8))
    assert few[0].shape == (8, 2)


# --- the bench --------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(toys: None, onnx_model: Path, labelled: tuple[np.ndarray, np.ndarray], tmp_path: Path):
    workload = adopt(str(onnx_model), labelled, metric="accuracy")
    for split in ("select", "certify"):
        save_samples(getattr(workload, split), tmp_path / "data" / split)
    original = subject(workload.model, tmp_path)
    made = Bench(original, workload.model.signature, workload.metric, tmp_path / "data", Machine.look(), 1)
    made.model, made.tmp = workload.model, tmp_path
    yield made
    made.close()


def subject(model: Model, folder: Path, **knobs: object) -> Subject:
    recipe = Recipe((), find("backends", "toy_backend")(**knobs))
    into = folder / recipe.key
    into.mkdir()
    return Subject(recipe, recipe.backend.compile(model, into), into)


def test_evidence_is_whole(bench) -> None:
    evidence = examine(subject(bench.model, bench.tmp, slower=4.0), bench, "select", QUICK)
    assert evidence.speedup.high < 0.75
    assert evidence.drop.mid == 0
    assert len(evidence.scores) == len(open_samples(bench.data / "select"))
    assert evidence.disk_bytes == bench.original.artifact.bytes
    assert 0 < evidence.peak_bytes < 2**30
    assert evidence.load_seconds > 0


def test_a_planted_loss_is_seen(bench) -> None:
    evidence = examine(subject(bench.model, bench.tmp, wrong=0.2), bench, "select", QUICK)
    assert evidence.drop.low > 0.05


@pytest.mark.parametrize(
    ("fault", "reason", "words"),
    [
        ("segfault", Reason.CRASHED, "SIGSEGV"),
        ("nan", Reason.NOT_FINITE, "logits"),
        ("shape", Reason.WRONG_OUTPUT, "original gives"),
        ("raise", Reason.CRASHED, "a toy broke"),
        ("partial", Reason.CRASHED, "model.onnx"),
    ],
)
def test_a_faulty_candidate_is_refused_by_name(bench, fault: str, reason: Reason, words: str) -> None:
    with pytest.raises(RefusalError, match=words) as caught:
        examine(subject(bench.model, bench.tmp, fault=fault), bench, "select", QUICK)
    assert caught.value.reason is reason


@pytest.mark.slow
def test_a_candidate_that_hangs_or_hoards_is_ended(bench) -> None:
    bench.patience = 3.0
    with pytest.raises(RefusalError) as caught:
        examine(subject(bench.model, bench.tmp, fault="hang"), bench, "select", QUICK)
    assert caught.value.reason is Reason.TIMED_OUT
    bench.patience = 60.0
    bench.memory_limit = 1 * 2**30
    with pytest.raises(RefusalError) as caught:
        examine(subject(bench.model, bench.tmp, fault="memory"), bench, "select", QUICK)
    assert caught.value.reason is Reason.OUT_OF_MEMORY


def test_the_gates_end_it_early_and_say_what_was_seen(bench) -> None:
    with pytest.raises(RefusalError) as caught:
        examine(
            subject(bench.model, bench.tmp, slower=1.01), bench, "select", QUICK,
            after_screen=lambda rounds: RefusalError(Reason.TOO_SLOW, "by order"),
        )  # fmt: skip
    assert caught.value.speedup is not None
    assert caught.value.evidence is None


def test_memory_is_the_arms_own(bench) -> None:
    """What this process holds besides does not count."""
    hoard = np.ones(2**26)  # 512 MB
    with Arm(bench.original, bench.signature, bench.data, "select", 1) as arm:
        arm.block(0.05, 10)
        assert 2**20 < arm.peak_bytes() < hoard.nbytes
