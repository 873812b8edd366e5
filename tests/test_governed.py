"""`load(..., goal=...)`: a bundle that is called like the model, under a goal that may change."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from company import ladder_of
from forking import forked

import accelerando
from accelerando import GovernedModel, load
from accelerando.backends.eager import Eager
from accelerando.bundle import Bundle
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
from accelerando.recipe import Recipe
from accelerando.serve import reception
from accelerando.serve.aims import Aims
from accelerando.serve.company import Company, Terms, assemble
from accelerando.serve.governor import PRESETS
from accelerando.serve.sizes import Sizes
from accelerando.serve.tickets import Ticket
from accelerando.signature import Port
from accelerando.testing.bundles import SIGNATURE, write_bundle
from accelerando.testing.fakes import fake_recipe, fakes_known

pytestmark = pytest.mark.usefixtures("hasty")
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


@pytest.mark.parametrize(
    "deadline", [[1], timedelta(seconds=1), b"3ms", 1 + 2j, 10**400, "1e400s", math.nan, True, np.ones(2)]
)
def test_a_deadline_that_is_none_is_refused(model: GovernedModel, deadline: Any) -> None:
    with pytest.raises(UsageError, match="deadline must be a number or a text such as"):
        model(ROW, deadline=deadline)


def test_what_can_not_become_an_array_is_refused(model: GovernedModel) -> None:
    for rows in ([[1, 2], [3]], [[1, 2, 3, 4], [[1], 2, 3, 4]]):
        with pytest.raises(DataError, match="can't become an array"):
            model(rows)
        with pytest.raises(DataError, match="can't become an array"):
            model.submit([rows])
    with pytest.raises(DataError, match=r"holds -1e\+300, but the model takes x: float32 .* no more than 3.40282e\+38"):
        model(np.array([[0.0, math.inf, math.nan, -1e300]]))
    assert np.isposinf(model(np.array([[0.0, 0.0, 0.0, math.inf]]))).all()


def test_tensors_that_hold_no_values_of_their_own_are_resolved_or_refused(model: GovernedModel) -> None:
    torch = pytest.importorskip("torch")
    assert model(torch._neg_view(-torch.ones(2, 4))).tolist() == [[1.0] * 3] * 2
    for tensor in (
        torch.ones(2, 4, device="meta"),
        torch.ones(2, 4).to_sparse(),
        torch.ones(2, 4).to(torch.float8_e5m2),
    ):
        with pytest.raises(DataError, match="Tensor was given that can't become an array"):
            model(tensor)
    with pytest.raises(DataError, match="an input of complex64 was given"):
        model((torch.ones(2, 4) + 0j).conj())


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


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        *(({"priority": wrong}, "priority is a whole number") for wrong in ("high", 1.5, -1, 2**32, True, None)),
        *(({"seconds": wrong}, "seconds must be a number") for wrong in ("3ms", math.nan, [1], 10**400, 1 + 2j)),
        *(({"min_quality": wrong}, "min_quality must be a number") for wrong in ("x", math.nan, True)),
    ],
)
def test_wishes_that_can_not_be_are_refused_at_the_door(
    model: GovernedModel, wishes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        model.submit([ROW], **wishes)
    fine: list[dict[str, Any]] = [{}, {"priority": np.int64(2**32 - 1)}, {"seconds": math.inf}, {"seconds": 10}]
    assert all(model.submit([ROW], **wish).future.result(20) for wish in fine)


@pytest.mark.parametrize("leaves", [5, None, "x", {"x": ROW}])
def test_inputs_that_are_no_list_are_refused_at_the_door(model: GovernedModel, leaves: Any) -> None:
    with pytest.raises(DataError, match="must be a list of arrays, one for each of x: float32"):
        model.submit(leaves)


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


def test_after_an_update_it_tells_of_the_new_bundle(model: GovernedModel, tmp_path: Path) -> None:
    for _ in range(5):
        model(ROW)
    write_bundle(tmp_path / "newer", recipes=[fake_recipe(0), fake_recipe(1)])
    model.update(tmp_path / "newer")
    told = model.status()
    assert told.rows == told.answered == 5
    assert [rung.answered for rung in told.rungs] == [0, 0]
    assert told.standing in (0, 1)
    model(ROW)
    assert sum(rung.answered for rung in model.status().rungs) == 1


@pytest.mark.parametrize("closes", [False, True])
def test_nobody_waits_for_an_update_to_change_the_goal_or_to_turn_callers_away(
    model: GovernedModel, path: Path, monkeypatch: pytest.MonkeyPatch, closes: bool
) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def slow(*args: Any) -> Company:
        begun.set()
        assert goes_on.wait(60)
        return assemble(*args)

    monkeypatch.setattr("accelerando.serve.governed.assemble", slow)
    with ThreadPoolExecutor(2) as pool:
        try:
            update = pool.submit(model.update, path)
            assert begun.wait(60)
            setting = pool.submit(setattr, model, "goal", "speedup >= 4")
            setting.result(20)
            assert model.explain(ROW)[1].rung == 2
            if closes:
                closing = pool.submit(model.close)
                while model.ready:
                    time.sleep(0.001)
                with pytest.raises(ClosedError):
                    model(ROW)
        finally:
            goes_on.set()
        update.result(60)
    if closes:
        closing.result()
        return
    assert model.version == 2
    assert str(model.goal) == model.status().goal == "speedup >= 4"
    assert model.explain(ROW)[1].rung == 2


def test_where_nothing_of_the_new_bundle_can_be_loaded_the_old_goes_on(model: GovernedModel, tmp_path: Path) -> None:
    write_bundle(tmp_path / "damaged")
    for file in (tmp_path / "damaged" / "rungs").glob("*/*.json"):
        file.write_bytes(b"x" * file.stat().st_size)
    rungs = model._conductor.company.residents
    with pytest.raises(BundleError, match="no-rung"):
        model.update(tmp_path / "damaged")
    for _ in range(3000):
        if all(rung.state == "ready" for rung in rungs):
            break
        time.sleep(0.01)
    assert [rung.state for rung in rungs] == ["ready"] * 3
    assert model(ROW).shape == (1, 3)
    assert model.version == 1


@pytest.mark.slow
def test_under_a_cap_and_a_bound_on_quality_an_update_refuses_nobody(path: Path) -> None:
    """Both bundles have no room for all their rungs: those of the old one leave while it serves."""
    sizes = Sizes(Bundle.open(path).ladder.rungs)
    cap = sizes.together(range(3)).bytes + sizes.added(2)
    with load(path, goal="p99 <= 10s, drop <= 5%", memory=cap, audit=0) as model, ThreadPoolExecutor(1) as pool:
        update = pool.submit(lambda: list(map(model.update, [path] * 3)))
        while not update.done():
            assert model(ROW).shape == (1, 3)
        update.result()
        told = model.status()
    assert (told.version, told.refused, told.failed, told.late) == (4, 0, 0, 0)


def of_quality(path: Path, *drops: float) -> Bundle:
    """A bundle of which the first rung runs the original's own code, and rungs drop so much."""
    bundle = ladder_of(Bundle.open(path), drops)
    first, *rest = bundle.ladder.rungs
    own = replace(first, recipe=Recipe((), Eager()))
    return replace(bundle, ladder=replace(bundle.ladder, rungs=(own, *rest)))


def rewritten(path: Path, *drops: float, **evidence: Any) -> Path:
    """A bundle's folder, its rungs with these drops and whatever else their evidence should say."""
    bundle = write_bundle(path)
    ladder = ladder_of(bundle, drops, **evidence).ladder
    best = len(ladder) - 1
    return Bundle.write(
        path, goal=bundle.goal, verdict=bundle.goal.judge(ladder.rungs[best].evidence), best=best, ladder=ladder,
        signature=bundle.signature, machine=bundle.machine, workload=bundle.workload, run=bundle.run,
        parity=bundle.parity,
    ).path  # fmt: skip


def assembled(bundle: Bundle, goal: str, memory: int | None = None, old: Company | None = None) -> Company:
    """The company of a bundle, as it is when it begins to serve."""
    terms = Terms(PRESETS["balanced"], memory, 64, 100, 0.0, False, None, "a name")
    return assemble(bundle, Goal.parse(goal), terms, threading.Lock(), 1 if old is None else 2, old)


@pytest.mark.parametrize("memory", [None, 75 * 10**6])
def test_it_begins_with_a_rung_that_keeps_the_goal(path: Path, memory: int | None) -> None:
    """The original can't run here, and the fastest is not good enough."""
    company = assembled(of_quality(path, 0.0, 0.0, 0.3), "p99 <= 10s, drop <= 5%", memory)
    try:
        assert [rung.state for rung in company.residents] == ["failed", "ready", "ready"]
        assert "original's own code" in company.residents[0].why
        assert max(s.quality for s in company.states() if s.ready) >= company.aims.quality
        assert company.needed() == {1, 2}
    finally:
        company.end()


def test_it_begins_with_the_fastest_rungs_and_the_best(path: Path, tmp_path: Path) -> None:
    recipes = [fake_recipe(level, strengths) for strengths in ((), (1,)) for level in range(3)]
    bundle = of_quality(write_bundle(tmp_path / "six", recipes=recipes).path, 0.0, 0.0, 0.01, 0.02, 0.1, 0.3)
    company = assembled(bundle, "p99 <= 10s, drop <= 10%")
    try:
        assert [company.residents[n].state for n in (5, 3, 1)] == ["ready"] * 3
    finally:
        company.end()


@pytest.mark.parametrize(("memory", "fits"), [(40 * 10**6, True), (33 * 10**6, False)])
def test_who_takes_over_keeps_the_goal_within_the_same_cap_or_does_not(path: Path, memory: int, fits: bool) -> None:
    """Two rungs share a library of 26 MB; the better, of 4 MB more, keeps the goal, and the fastest adds nothing."""
    bundle, goal = of_quality(path, 0.0, 0.0, 0.3), "p99 <= 10s, drop <= 5%"
    rungs = [replace(r, evidence=replace(r.evidence, peak_bytes=peak * 10**6 + r.artifact.bytes))
             for r, peak in zip(bundle.ladder, (99, 30, 26), strict=True)]  # fmt: skip
    bundle = replace(bundle, ladder=replace(bundle.ladder, rungs=tuple(rungs)))
    old = new = assembled(bundle, goal, memory)
    if fits:
        new = assembled(bundle, goal, memory, old)
        old.end()
        new.residents.fill()
    else:
        with pytest.raises(UsageError, match="leaves too little of it"):
            assembled(bundle, goal, memory, old)
    assert [rung.state for rung in new.residents] == ["failed", "ready", "ready"]
    assert new.serves()
    new.end()


def test_a_goal_that_no_rung_keeps_is_refused_before_anybody_is_served(path: Path) -> None:
    """Else every request would be, for as long as it is served, as if the load were to blame."""
    best = (
        r"'p99 <= 10s, drop <= 1%' asks for a mean accuracy of 0\.891, but no rung .* better than 0\.774; ask for less"
    )
    with pytest.raises(GoalError, match=best):
        assembled(of_quality(path, 0.0, 0.1, 0.3), "p99 <= 10s, drop <= 1%")
    assert not [t for t in threading.enumerate() if t.name == "accelerando-loader"]


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        ("quality <= 0.5", "points the wrong way"),
        ("drop <= 5", "did you mean 'drop <= 5%'"),
        ("p99 <= 10s, quality >= 0.99", "promises better than"),
    ],
)
def test_a_goal_that_can_not_be_kept_is_told_at_once(path: Path, goal: str, said: str) -> None:
    with pytest.raises(GoalError, match=said):
        load(path, goal=goal)
    with load(path, goal="p99 <= 10s") as model:
        with pytest.raises(GoalError, match=said):
            model.goal = goal
        assert str(model.goal) == str(model.status().goal) == "p99 <= 10s"


def test_a_bundle_does_not_take_over_that_keeps_less_than_is_asked_for(path: Path, tmp_path: Path) -> None:
    worse = rewritten(tmp_path / "worse", 0.0, 0.0, 0.0, quality=0.8)
    judged = rewritten(tmp_path / "judged", 0.0, 0.0, 0.0, metric="mae", higher_is_better=False)
    with load(path, goal="p99 <= 10s, quality >= 0.89") as model:
        with pytest.raises(GoalError, match=r"no rung of .*worse that can run here promises better than"):
            model.update(worse)
        with pytest.raises(UsageError, match="judged by mae, but accuracy"):
            model.update(judged)
        assert model.version == 1
        assert np.isfinite(model(ROW)).all()


def test_a_goal_that_came_while_a_bundle_was_loaded_is_held_against_it_too(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new bundle keeps the goal under which its loading began, but not the one that is asked for by then."""
    worse = rewritten(tmp_path / "worse", 0.0, 0.0, 0.0, quality=0.8)
    with load(path, goal="p99 <= 10s") as model:

        def slowly(*given: Any) -> Company:
            company = assemble(*given)
            model.goal = "p99 <= 10s, quality >= 0.89"
            return company

        monkeypatch.setattr("accelerando.serve.governed.assemble", slowly)
        with pytest.raises(GoalError, match=r"no rung of .*worse that can run here promises better than"):
            model.update(worse)
        assert (model.version, str(model.goal)) == (1, "p99 <= 10s, quality >= 0.89")
        assert np.isfinite(model(ROW)).all()
        assert all(r.state != "loading" for r in model.status().rungs)


def test_a_quality_that_can_not_be_had_is_a_mistake(path: Path) -> None:
    company = assembled(of_quality(path, 0.0, 0.02, 0.1), "p99 <= 10s")

    def ask(rung: int) -> Ticket:
        return reception.of_bound(company, [ROW], 1.0, min_quality=company.residents.promise(rung))

    assert ask(1).floor == company.residents.promise(1)
    with pytest.raises(DataError, match=f"promises better than {company.residents.promise(1):.4g}; ask for less"):
        ask(0)  # it can't run here
    company.residents.turn_away(1, "quarantined", "it disagrees")
    with pytest.raises(DataError, match=f"promises better than {company.residents.promise(2):.4g}; ask for less"):
        ask(1)
    company.residents.turn_away(2, "failed", "it does not answer")
    assert ask(2).rows == 1  # that nothing answers at all is told by the conductor
    company.end()


def test_a_quality_that_the_goal_rules_out_is_a_mistake(path: Path) -> None:
    company = assembled(of_quality(path, 0.0, 0.02, 0.1), "speedup >= 4")
    with pytest.raises(DataError, match="that the goal allows"):
        reception.of_bound(company, [ROW], 1.0, min_quality=company.residents.promise(1))
    company.end()


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


@pytest.mark.parametrize("how", ["close", "collected"])
def test_closing_in_a_callback_answers_what_was_accepted_and_gives_all_back(
    path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr("accelerando.serve.governed.AT_ONCE", 0.0)  # the executor is to answer
    held, before = [load(path, goal="p99 <= 60s", audit=0)], set(threading.enumerate())
    with held[0]._cores:  # as if something computed
        tickets = [held[0].submit([ROW * i]) for i in range(5)]
        residents, closing = held[0]._conductor.company.residents, threading.Event()

        def close(_: object) -> None:
            if how == "close":
                held[0].close()
            held.clear()
            gc.collect()
            closing.set()

        tickets[0].future.add_done_callback(close)
    for i, ticket in enumerate(tickets):
        assert ticket.future.result(20).leaves[0][0, 0] == 2.5 * i
    assert closing.wait(20)
    for thread in set(threading.enumerate()) | before:
        if thread.name.startswith("accelerando"):
            thread.join(20)
            assert not thread.is_alive(), thread
    assert all(rung.runner is None for rung in residents)


def test_a_call_that_would_wait_for_itself_is_refused(model: GovernedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerando.serve.governed.AT_ONCE", 0.0)  # the executor is to answer
    said: list[Any] = []

    def call(_: object) -> None:
        try:
            said.append(model(ROW))
        except UsageError as error:
            said.append(model.submit([ROW]))
            said.append(str(error))

    with model._cores:
        model.submit([ROW]).future.add_done_callback(call)
    while len(said) < 2:
        time.sleep(0.001)
    assert "use `submit` there" in said[1]
    assert said[0].future.result(20)


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
    with model._changing:  # as an `update` holds it
        child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            model.goal = "p99 <= 20s"
            os.write(writing, b"good" if model(ROW)[0, 0] == 2.5 else b"bad")
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        assert stream.read() == b"good"
    os.waitpid(child, 0)
    assert model(ROW).shape == (1, 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("asks", [[], ["asks"]])
def test_a_forked_child_that_ends_as_programs_do_ends_nothing_of_its_parents(path: Path, asks: list[str]) -> None:
    assert forked(path, *asks) == "0 True"


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
        *(({"audit": wrong}, "from 0 to 1") for wrong in ("x", None, True, math.nan)),
        *(({"most_rows": wrong}, "most_rows must be a whole number") for wrong in ("a", 1.5, None, True)),
        *(({"waiting_rows": wrong}, "waiting_rows must be a whole number") for wrong in (None, 2.5)),
        *(({"memory": wrong}, "memory must be a number") for wrong in ([1], "1e9999999GB", 10**400, math.nan)),
        ({"isolated": "no"}, "isolated must be True or False"),
        ({"foo": 1}, r"load\(\) takes no foo; .* it takes goal, memory, .*, rung"),
    ],
)
def test_terms_that_can_not_be(path: Path, terms: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(path, goal="p99 <= 10s", **terms)


@pytest.mark.parametrize("goal", [{}, {"goal": "p99 <= 10s"}])
def test_what_is_no_path_is_refused(model: GovernedModel, goal: dict[str, Any]) -> None:
    nowhere: Any = None
    with pytest.raises(UsageError, match="by the path of its folder, a text or a Path, but None was given"):
        load(nowhere, **goal)
    with pytest.raises(UsageError, match="but None was given"):
        model.update(nowhere)


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
