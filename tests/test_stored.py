"""The stored rows: which are drawn, how they are asked, and what is kept of them."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from accelerando.adoption import adopt
from accelerando.errors import BundleError
from accelerando.measure.arm import Arm, Subject, save_samples
from accelerando.parity import Parity
from accelerando.plugins import find
from accelerando.recipe import Recipe
from accelerando.search.stored import MOST_BYTES, MOST_ROWS, rows_to_ask
from accelerando.workload import Chunk, Samples

KEYS = ("0" * 12, "1" * 12)


def workload(*chunks: Any, fixed: int | None = None) -> Any:
    return SimpleNamespace(certify=Samples(tuple(Chunk((c,), None) for c in chunks)), fixed_batch=fixed)


def counted(rows: int, *shape: int) -> Any:
    return np.arange(rows, dtype=np.float32).reshape(-1, *[1] * len(shape)) * np.ones(shape, np.float32)


# --- which ------------------------------------------------------------------------------------------------------


def test_rows_are_drawn_at_random_from_the_commonest_shape_and_again_the_same() -> None:
    load = workload(counted(30, 5), counted(4000, 4), counted(40, 6))
    (rows,), (again,) = rows_to_ask(load), rows_to_ask(load)
    assert rows.shape == (MOST_ROWS, 4)
    assert np.array_equal(rows, again)
    assert len(set(rows[:, 0])) == MOST_ROWS
    assert abs(rows[:8, 0].mean() - 2000) < 1200, "not the first of the data, which may be sorted"


def test_large_rows_are_fewer() -> None:
    row = np.zeros((1, MOST_BYTES // 40), np.float32)  # a tenth of what may be sent
    assert len(rows_to_ask(workload(np.broadcast_to(row, (50, row.shape[1]))))[0]) == 10
    assert len(rows_to_ask(workload(np.broadcast_to(row, (3, row.shape[1]))))[0]) == 3


@pytest.mark.parametrize(("there", "asked", "different"), [(21, 20, 20), (4, 4, 4), (3, 4, 3)])
def test_a_fixed_batch_is_kept_whole(there: int, asked: int, different: int) -> None:
    (rows,) = rows_to_ask(workload(counted(there, 2), fixed=4))
    assert (len(rows), len(set(rows[:, 0]))) == (asked, different)


# --- how --------------------------------------------------------------------------------------------------------


def test_an_arm_answers_as_many_rows_as_it_has_room_and_time_for(
    toys: None, onnx_model: Path, labelled: Any, tmp_path: Path
) -> None:
    load = adopt(str(onnx_model), labelled, metric="accuracy")
    save_samples(load.select, tmp_path / "data" / "select")
    recipe = Recipe((), find("backends", "toy_backend")())
    (tmp_path / "rung").mkdir()
    subject = Subject(recipe, recipe.backend.compile(load.model, tmp_path / "rung"), tmp_path / "rung")
    rows = tuple(x[:21] for x in load.select.chunks[0].inputs)
    with Arm(subject, load.model.signature, tmp_path / "data", "select", 1) as arm:
        whole = arm.answers(rows, 60, math.inf, 2**30)
        assert [len(x) for x in whole] == [21] * len(load.model.signature.outputs)
        of_eight = sum(x[:8].nbytes for x in whole)
        assert len(arm.answers(rows, 60, math.inf, 2 * of_eight)[0]) == 16
        few = arm.answers(rows, 60, 0.0)
        assert len(few[0]) == 8, "the first are asked in any case"
        assert np.array_equal(few[0], whole[0][:8])


# --- what is kept -----------------------------------------------------------------------------------------------


def test_of_most_rows_the_answers_alone_are_kept_and_come_back_from_the_disk() -> None:
    answers = {KEYS[0]: [counted(30, 3)], KEYS[1]: [counted(50, 3) + 1]}
    read = Parity.from_bytes(Parity.of([counted(50, 4)], KEYS[0], answers, 8).to_bytes())
    assert [len(x) for x in (read.inputs[0], read.original[0], read.rungs[KEYS[1]][0])] == [8, 8, 8]
    assert {key: len(found[0]) for key, found in read.further.items()} == dict.fromkeys(KEYS, 22)
    assert np.array_equal(read.further[KEYS[1]][0], answers[KEYS[1]][0][8:30])
    assert Parity.of([counted(8, 4)], KEYS[0], {KEYS[0]: [counted(8, 3)]}, 8).further == {}


@pytest.mark.parametrize(
    "further",
    [
        {KEYS[0]: counted(4, 3), KEYS[1]: counted(5, 3)},
        {KEYS[0]: counted(4, 2)},
        {KEYS[0]: counted(4, 3).astype(np.float64)},
        {"2" * 12: counted(4, 3)},
        {KEYS[0]: np.float32(1)},
    ],
    ids=["of another number", "of another shape", "of another type", "of no rung", "of no rows"],
)
def test_further_answers_that_do_not_fit_are_refused(further: Any) -> None:
    arrays = {"input_0": counted(8, 4), "original_0": counted(8, 3)}
    arrays |= {f"{key}_0": counted(8, 3) for key in KEYS}
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays, **{f"further_{key}_0": x for key, x in further.items()})
    with pytest.raises(BundleError, match="further answers"):
        Parity.from_bytes(stream.getvalue())
