"""The pictures of the governor's page: what they are drawn from, and how."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from accelerando.serve.policies import Entrant
from accelerando.serve.simulation import Outcome, Terms, simulate
from accelerando.serve.traces import Trace, gamma
from benchmarks.courses import SHOWN, draw_course, draw_plane, follow
from benchmarks.drawing import Axis, Panel
from benchmarks.governor import RUNGS, WIDE

PATIENCE = 0.3
MOST_BYTES = 150_000
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def busy() -> Trace:
    return gamma(16.7, 4.0, 20.0, seed=5)


@pytest.mark.parametrize("entrant", [entrant for _, entrant in SHOWN], ids=lambda entrant: entrant.name)
def test_a_course_tells_of_each_request_what_the_simulator_counts(entrant: Entrant, busy: Trace) -> None:
    course = follow(RUNGS, busy, PATIENCE, entrant)
    outcome = course.outcome
    assert len(course.answered) + len(course.missed) == len(busy) == outcome.requests
    assert sum(seconds > PATIENCE for _, seconds in course.answered) == outcome.late
    assert len(course.missed) == outcome.refused + outcome.expired
    came = [*course.missed, *(came for came, _ in course.answered)]
    np.testing.assert_allclose(sorted(came), busy.arrivals, atol=1e-4)
    quality = [RUNGS[rung].quality for (_, rung), (_, s) in zip(course.stood, course.answered, strict=True) if s <= 0.3]
    assert np.mean(quality) == pytest.approx(outcome.quality)


def test_a_course_is_the_policys_own() -> None:
    """Three requests at once, worked out by hand: the third would be late on this rung, and is refused."""
    rungs = (replace(RUNGS[0], tail=1.0),)
    course = follow(rungs, Trace.of(np.array([0.0, 0.0, 0.0])), PATIENCE, SHOWN[1][1])
    assert [seconds for _, seconds in course.answered] == pytest.approx([0.12, 0.24])
    assert course.stood == ((0.0, 0), (0.12, 0))
    assert course.missed == (0.0,)


def test_a_picture_is_small_and_the_same_twice_and_needs_nothing_else(tmp_path: Path, busy: Trace) -> None:
    once, twice = tmp_path / "once.svg", tmp_path / "twice.svg"
    for path in (once, twice):
        draw_course(path, RUNGS, busy, PATIENCE)
    assert once.read_bytes() == twice.read_bytes()
    text = once.read_text(encoding="utf-8")
    assert len(text) < MOST_BYTES
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"(href|src|url\(|@import|<script)", text)
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    dots = [len(re.findall("M", p.get("d", ""))) for p in root.iter(f"{SVG}path") if "dots" in p.get("class", "")]
    assert dots == [len(follow(RUNGS, busy, PATIENCE, entrant).answered) for _, entrant in SHOWN]


def test_every_policy_has_its_place_and_its_name_in_the_plane(tmp_path: Path, busy: Trace) -> None:
    found = {o.policy: o for o in simulate(WIDE, busy, Terms(PATIENCE)).outcomes}
    draw_plane(tmp_path / "plane.svg", WIDE, {"a case": found})
    root = ElementTree.fromstring((tmp_path / "plane.svg").read_text(encoding="utf-8"))
    assert len([p for p in root.iter(f"{SVG}path") if "dots" in p.get("class", "")]) == len(found)
    names = {text.text for text in root.iter(f"{SVG}text")}
    assert {"4.3 ms", "120 ms", "slack only", "rate every 10 s", "steady", "balanced", "responsive"} <= names


def test_where_none_was_missed_there_is_a_place_on_the_axis_too(tmp_path: Path) -> None:
    calm = Trace.of(np.arange(10.0))
    found: dict[str, Outcome] = {o.policy: o for o in simulate(RUNGS, calm, Terms(PATIENCE)).outcomes}
    assert found["governor, balanced"].misses == 0
    draw_plane(tmp_path / "plane.svg", RUNGS, {"calm": found})
    assert "none missed" in (tmp_path / "plane.svg").read_text(encoding="utf-8")


def test_values_lie_where_the_axes_say() -> None:
    panel = Panel(Axis(1.0, 100.0, 0.0, 200.0, log=True), Axis(0.0, 10.0, 50.0, 0.0))
    assert panel.line([(1.0, 0.0), (10.0, 5.0), (100.0, 10.0)], "ours").get("d") == "M0,50L100,25L200,0"
    assert panel.steps([(1.0, 0.0), (10.0, 5.0)], "ours").get("d") == "M0,50H100V25H200"
