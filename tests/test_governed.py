"""`load(..., goal=...)`: a bundle that is called like the model, under a goal that may change."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import accelerando
from accelerando import GovernedModel, load
from accelerando.errors import (
    BundleError,
    ClosedError,
    DataError,
    DeadlineError,
    GoalError,
    OverloadedError,
    UsageError,
)
from accelerando.goal import Goal
from accelerando.serve.aims import Aims
from accelerando.signature import Port
from accelerando.testing.bundles import SIGNATURE, write_bundle
from accelerando.testing.fakes import fakes_known

ROW = np.array([[1, 2, 3, 4]], np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    with fakes_known():
        write_bundle(tmp_path / "bundle")
        yield tmp_path / "bundle"


@pytest.fixture
def model(path: Path) -> Iterator[GovernedModel]:
    with load(path, goal="p99 <= 10s") as governed:
        yield governed


def test_it_is_called_like_the_model(model: GovernedModel) -> None:
    np.testing.assert_allclose(model(ROW), np.full((1, 3), 2.5))
    np.testing.assert_allclose(model(x=ROW.tolist()), np.full((1, 3), 2.5))
    assert model(np.ones((100, 4), np.float32)).shape == (100, 3)


def test_tensors_in_tensors_out(model: GovernedModel) -> None:
    torch = pytest.importorskip("torch")
    for tensor in (torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(2, 4, requires_grad=True)):
        answer = model(tensor)
        assert isinstance(answer, torch.Tensor)
        assert answer.tolist() == [[1.0] * 3] * 2


def test_it_explains_its_answers(model: GovernedModel) -> None:
    answer, why = model.explain(ROW)
    assert answer.shape == (1, 3)
    assert why.recipe == str(model.bundle.ladder[why.rung].recipe)
    assert why.quality == model.bundle.ladder[why.rung].quality
    assert why.rows == 1
    assert why.reason
    assert why.queued >= 0
    assert why.computed > 0


def test_it_is_awaited(path: Path) -> None:
    async def many() -> list[Any]:
        async with load(path, goal="p99 <= 10s") as model:
            return await asyncio.gather(*(model.infer(ROW * i) for i in range(50)))

    for i, answer in enumerate(asyncio.run(many())):
        np.testing.assert_allclose(answer, np.full((1, 3), 2.5 * i), rtol=1e-6)


@pytest.mark.parametrize("deadline", ["20s", 20, "20000ms", None])
def test_a_deadline_of_its_own(model: GovernedModel, deadline: Any) -> None:
    assert model(ROW, deadline=deadline).shape == (1, 3)


def test_a_deadline_that_can_not_be_kept_is_refused(model: GovernedModel) -> None:
    with pytest.raises(OverloadedError, match="even the fastest rung"):
        model(ROW, deadline=1e-9)
    with pytest.raises(DeadlineError, match="has passed"):
        model(ROW, deadline=-1)
    with pytest.raises(UsageError, match="deadline must be a number"):
        model(ROW, deadline="soon")


def test_bad_rows_are_refused_before_they_are_queued(model: GovernedModel) -> None:
    with pytest.raises(DataError, match=r"the model takes x: float32"):
        model(np.ones((1, 5), np.float32))
    with pytest.raises(DataError, match="no rows"):
        model(np.ones((0, 4), np.float32))
    with pytest.raises(DataError, match="2 inputs were given"):
        model.submit([ROW, ROW])


def test_the_goal_changes_from_the_next_batch_on(model: GovernedModel) -> None:
    assert model.explain(ROW)[1].rung in (0, 1, 2)
    model.goal = "speedup >= 4"
    assert model.goal == Goal.parse("speedup >= 4")
    assert model.explain(ROW)[1].rung == 2
    assert model.status().goal == "speedup >= 4"
    with pytest.raises(GoalError, match="quikness"):
        model.goal = "quikness >= 4"
    assert model.goal == Goal.parse("speedup >= 4")


def test_update_drops_nothing_and_counts_its_version(model: GovernedModel, tmp_path: Path) -> None:
    write_bundle(tmp_path / "newer", recipes=None)
    tickets = [model.submit([ROW]) for _ in range(20)]
    model.update(tmp_path / "newer")
    tickets += [model.submit([ROW]) for _ in range(20)]
    assert all(t.future.result(10).leaves[0].shape == (1, 3) for t in tickets)
    assert tickets[-1].future.result().why.version == 2
    assert model.version == model.status().version == 2


def test_a_server_asks_from_its_event_loop(path: Path) -> None:
    async def many() -> list[Any]:
        soon = asyncio.get_running_loop().call_soon
        with load(path, goal="p99 <= 10s") as model:
            tickets = [model.submit_soon([ROW * i], soon) for i in range(20)]
            model.update(path)
            tickets += [model.submit_soon([ROW * i], soon) for i in range(20, 40)]
            return await asyncio.gather(*(asyncio.wrap_future(ticket.future) for ticket in tickets))

    for i, answer in enumerate(asyncio.run(many())):
        np.testing.assert_allclose(answer.leaves[0], np.full((1, 3), 2.5 * i), rtol=1e-6)


def test_update_refuses_what_is_called_otherwise(model: GovernedModel, tmp_path: Path) -> None:
    other = replace(SIGNATURE, inputs=(Port("x", "float32", ("batch", 5)),))
    write_bundle(tmp_path / "other", signature=other, inputs=[np.ones((2, 5), np.float32)])
    with pytest.raises(UsageError, match="called otherwise"):
        model.update(tmp_path / "other")
    with pytest.raises(BundleError):
        model.update(tmp_path / "nowhere")
    assert model(ROW).shape == (1, 3)
    assert model.version == 1


def test_closed_is_closed(path: Path) -> None:
    model = load(path, goal="p99 <= 10s")
    ticket = model.submit([ROW])
    model.close()
    model.close()
    assert ticket.future.done()
    with pytest.raises(ClosedError, match="load it again"):
        model(ROW)
    assert "closed" in repr(model)


def test_it_tells_where_it_stands(model: GovernedModel) -> None:
    for _ in range(5):
        model(ROW)
    told = model.status()
    assert told.answered == 5
    assert told.rows == sum(r.answered for r in told.rungs) == 5
    assert told.attainment == 1.0
    assert 0 < told.effective_quality <= 1
    assert sum(told.queued.counts) == 5
    assert told.stands[-1].rung == told.standing
    assert f"> {told.standing} ready" in repr(model)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_answers_by_itself(model: GovernedModel) -> None:
    assert model(ROW).shape == (1, 3)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, b"good" if model(ROW)[0, 0] == 2.5 else b"bad")
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        assert stream.read() == b"good"
    os.waitpid(child, 0)
    assert model(ROW).shape == (1, 3)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"governor": "nervous"}, "steady, balanced, responsive"),
        ({"audit": 2.0}, "from 0 to 1"),
        ({"most_rows": 0}, "at least 1"),
        ({"memory": "lots"}, "memory must be a number"),
        ({"memory": "1KB"}, "allow more"),
        ({"rung": 0}, "not both"),
        ({"isolated": True, "model": object()}, "can't be run in another"),
    ],
)
def test_terms_that_can_not_be(path: Path, terms: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(path, goal="p99 <= 10s", **terms)


def test_without_a_goal_or_terms_it_is_one_rung(path: Path) -> None:
    assert isinstance(load(path), accelerando.FastModel)
    with load(path, memory="10GB") as governed:
        assert isinstance(governed, GovernedModel)
        assert governed.goal == governed.bundle.goal


class TestAims:
    """What a goal asks of the governor, on a ladder whose rungs are said to be 1, 3 and 5 times faster."""

    @pytest.fixture
    def aims(self, tmp_path: Path) -> Any:
        from company import ladder_of

        ladder = ladder_of(write_bundle(tmp_path / "b"), (0.0, 0.02, 0.1)).ladder
        return lambda goal: Aims.of(Goal.parse(goal), ladder)

    def test_the_shortest_latency_is_the_patience(self, aims: Any) -> None:
        assert aims("p99 <= 5ms, latency <= 3ms").patience == pytest.approx(0.003)
        assert aims("speedup >= 2").patience == math.inf

    def test_a_speedup_rules_out_slower_rungs(self, aims: Any) -> None:
        assert aims("speedup >= 2").rungs == {1, 2}
        assert aims("speedup >= 4").rungs == {2}
        assert aims("speedup >= 400").rungs == {2}

    def test_a_drop_is_a_bound_on_the_mean(self, aims: Any) -> None:
        assert aims("p99 <= 5ms, drop <= 1%").quality == pytest.approx(0.99 * aims("drop <= 0").quality)
        assert aims("p99 <= 5ms").quality == -math.inf
        assert aims("p99 <= 5ms, quality >= 0.8").quality == pytest.approx(0.8)

    def test_with_quality_alone_the_fastest_that_keeps_it_is_wanted(self, aims: Any) -> None:
        assert aims("drop <= 10%").rungs == {1, 2}
        assert aims("throughput >= 100/s").least_rate == 100
