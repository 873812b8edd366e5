"""What the reports tell of shapes and lessons: names, the story of each rung, what was only measured, advice."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reported import (
    CASCADE,
    FLOAT,
    HALF,
    HEALED,
    NARROW,
    ORIGINAL,
    TAIL,
    TAUGHT,
    THIRD,
    WHOLE,
    RealOnnxruntime,
    healed_bundle,
    healed_trials,
)
from reported import bundle as a_bundle
from reported import refused as turn_away
from reported import trials as a_search
from reported import verified as a_trial

from accelerando.backends.cascade import Cascade
from accelerando.errors import Reason
from accelerando.goal import Outcome
from accelerando.plugins import stored_recipe
from accelerando.recipe import Recipe, Technique
from accelerando.report import advice, frame, lessons, page, text, words
from accelerando.report.fronts import chapters_of, front_of
from accelerando.report.healing import SPLIT, by_step
from accelerando.report.story import Story
from accelerando.report.way import parts
from accelerando.techniques.distil import Distil
from accelerando.techniques.drop_layers import DropLayers
from accelerando.techniques.early_exit import EarlyExit
from accelerando.techniques.grow import Grow
from accelerando.techniques.prune_channels import PruneChannels
from accelerando.techniques.sparsify import Sparsify

PARTS = [Recipe((*HEALED.steps, EarlyExit(0.7, part)), HEALED.backend) for part in ("front", "rest")]
EXIT = Recipe((), Cascade.of(*PARTS, "margin", 0.91))
fronts = st.lists(
    st.one_of(
        st.builds(DropLayers, share=st.sampled_from([0.25, 0.5])),
        st.builds(PruneChannels, share=st.sampled_from([0.25, 0.5])),
        st.builds(Distil, seconds=st.sampled_from([20, 60])),
    ),
    max_size=6,
).map(tuple)


# --- names ------------------------------------------------------------------------------------------------------


def test_cuts_and_lessons_of_a_kind_are_joined() -> None:
    assert words.recipe(NARROW) == (
        "ONNX Runtime, fewer layers (49 %, then 36 %), healed 10 min, int8 static, 1 thread"
    )
    assert words.front((PruneChannels(), Distil())) == ["fewer channels (50 %)", "healed 1 min"]  # at their defaults
    assert words.front((Grow(), Distil(8, quantized=True))) == ["grown", "healed 8 s (quantized)"]
    assert words.front((Sparsify(0.995),)) == ["sparse (99.5 %)"]


def test_a_cut_that_was_not_healed_yet_stands_last() -> None:
    assert words.front(THIRD) == ["fewer layers (49 %)", "healed 8 min", "then fewer layers (36 %)"]


def test_a_cascade_names_both_of_its_recipes() -> None:
    assert words.recipe(CASCADE) == (
        "cascade: ONNX Runtime, fewer layers (49 %), healed 2 min, int8 static, when sure (margin 0.83); "
        "else ONNX Runtime, int8 static"
    )


def test_an_early_exit_is_said_once() -> None:
    assert words.recipe(EXIT) == (
        "ONNX Runtime, fewer layers (49 %), healed 8 min, int8 static, "
        "early exit before the last 70 % when sure (margin 0.91)"
    )


@pytest.mark.parametrize("made", [NARROW, HEALED, CASCADE, EXIT])
def test_what_a_manifest_holds_is_said_and_taken_apart_alike(made: Recipe) -> None:
    read = stored_recipe(made.to_json(), [str(p) for p in (*made.steps, made.backend)])
    assert words.recipe(read) == words.recipe(made)
    assert parts(read) == parts(made)
    assert len(front_of(read)) == len(front_of(made))


@given(fronts)
def test_chapters_hold_every_step_in_order(front: tuple[Technique, ...]) -> None:
    chapters = list(chapters_of(front))
    assert tuple(step for cuts, taught in chapters for step in (*cuts, *taught)) == front
    assert all(cuts for cuts, _ in chapters[1:])  # a new one begins with a cut
    assert all(taught for _, taught in chapters[:-1])


@given(fronts)
def test_the_parts_of_a_front_are_those_of_all_its_beginnings(front: tuple[Technique, ...]) -> None:
    grown = [parts(Recipe((*front[:i], *TAIL), RealOnnxruntime())) for i in range(len(front) + 1)]
    assert all(a < b for a, b in itertools.pairwise(grown))


# --- the story of a rung ----------------------------------------------------------------------------------------


def test_each_shaped_rung_tells_what_was_cut_and_how_it_was_healed() -> None:
    told = {h.label: h.told() for h in Story(healed_bundle()).healings}
    assert list(told) == ["3, fast", "4", "5"]  # and the member of the cascade that is no rung itself
    assert told["4"] == [
        ("cut", "3 of 6 residual blocks left out: blocks.1, blocks.3, blocks.4"),
        ("fell", "from 90.0 % to 30.0 %, at 9.03x"),
        ("healed", "to 89.0 % by 2 lessons, 7 min 50 s"),
    ]
    assert told["5"][3:] == [
        ("cut", "1 of 3 residual blocks left out: blocks.2"),
        ("fell", "from 89.0 % to 50.0 %, at 13.0x"),
        ("healed", "to 88.0 % by 1 lesson, 1 min 59 s"),
    ]


def test_lessons_lie_one_after_the_other() -> None:
    story = Story(healed_bundle())
    curve = story.healings[-1].curve
    assert [seconds for seconds, _ in curve] == sorted(seconds for seconds, _ in curve)
    assert (curve[0], curve[-1]) == ((0.0, 0.312), (pytest.approx(118.5 + 351.0 + 119.2), 0.88))
    figure = lessons.curves(story, list(story.healings))
    assert [t["name"].split(",")[0] for t in figure["data"]] == ["the original", "3", "4: ONNX Runtime", "5"]
    assert figure["data"][0]["y"] == [pytest.approx(90.0)] * 2


def test_without_the_shapes_own_trial_the_lessons_first_look_tells_how_far_it_fell() -> None:
    kept = tuple(t for t in healed_trials() if t.recipe.steps[:-2] != HALF)
    healing = next(h for h in Story(healed_bundle(kept=kept)).healings if h.label == "4")
    assert ("fell", "from 90.0 % to 31.2 %") in healing.told()


def test_quality_that_rose_is_not_said_to_have_fallen() -> None:
    lucky = a_trial(Recipe((*HALF, *TAIL), RealOnnxruntime()), 9.0, -0.05)
    kept = tuple(lucky if t.recipe == lucky.recipe else t for t in healed_trials())
    told = next(h for h in Story(healed_bundle(kept=kept)).healings if h.label == "4").told()
    assert ("rose", "from 90.0 % to 95.0 %, at 9.03x") in told


def test_the_story_is_of_one_split_and_says_of_which() -> None:
    """What was certified is of other samples, on which the original answered otherwise."""
    bundle = healed_bundle()
    rungs = tuple(
        replace(rung, evidence=replace(rung.evidence, original_scores=np.zeros_like(rung.evidence.original_scores)))
        for rung in bundle.ladder.rungs
    )
    story = Story(replace(bundle, ladder=replace(bundle.ladder, rungs=rungs)))
    assert ("fell", "from 90.0 % to 30.0 %, at 9.03x") in next(h for h in story.healings if h.label == "4").told()
    assert lessons.curves(story, list(story.healings))["data"][0]["y"] == [pytest.approx(90.0)] * 2
    assert SPLIT in page.render(story.bundle)
    assert "select split" in text.render(story.bundle, 200)


def test_what_no_step_said_is_told_by_its_name() -> None:
    kept = tuple(replace(t, log=()) for t in healed_trials())
    told = next(h for h in Story(healed_bundle(kept=kept)).healings if h.label == "4").told()
    assert told[0] == ("cut", "fewer layers (49 %)")
    assert told[-1] == ("healed", "to 89.0 % by 2 lessons, 8 min")  # as planned


@settings(max_examples=12)
@given(st.lists(st.text(), max_size=6))
def test_no_log_breaks_a_story(log: list[str]) -> None:
    wild = ("distil: curve ", "distil: curve 1:x nan:2 3:nan 4:5", "drop_layers: ", *log)
    assert len(by_step(TAUGHT, wild)) == len(TAUGHT)
    kept = tuple(replace(t, log=wild) for t in healed_trials(n=40))
    assert Story(healed_bundle(kept=kept)).healings[-1].told()


def test_the_way_goes_over_cuts_and_lessons_and_says_what_quality_each_cost_or_brought() -> None:
    legs = Story(healed_bundle()).way
    assert [leg.added for leg in legs] == [
        "ONNX Runtime", "int8 static", "fewer layers (49 %)", "healed 2 min", "healed 6 min", "fewer layers (36 %)",
        "healed 2 min + 1 thread",
    ]  # fmt: skip
    brought = [leg.brought("accuracy") for leg in legs]
    assert brought[:4] == ["", "", "-60.0 points", "+53.0 points"]
    assert [leg.clear for leg in legs[2:5]] == [True, False, False]  # lessons claim no speed
    assert [leg.together for leg in legs] == [False] * 6 + [True]


def test_the_way_to_a_cascade_leads_over_its_better_recipe() -> None:
    legs = Story(healed_bundle(best=3)).way
    assert [leg.added for leg in legs] == [
        "ONNX Runtime", "int8 static", "asked first: ONNX Runtime, fewer layers (49 %), healed 2 min, int8 static",
    ]  # fmt: skip


def test_the_way_to_an_early_exit_leads_over_the_whole_model() -> None:
    """Not over its first half alone, which answers worse than all that comes before and after."""
    half = a_trial(Recipe((*HEALED.steps, EarlyExit(0.7)), HEALED.backend), 9.0)
    kept = (*healed_trials(), half, a_trial(EXIT, 8.0))
    legs = Story(a_bundle(kept=kept, climbed=(ORIGINAL, EXIT))).way
    assert [leg.added for leg in legs[-2:]] == [
        "healed 6 min", "early exit before the last 70 % when sure (margin 0.91)",
    ]  # fmt: skip
    assert legs[-2].seen.recipe == HEALED
    assert not legs[-1].together


# --- what was tried, and what was only measured -----------------------------------------------------------------


def test_shapes_that_were_only_measured_are_not_turned_away() -> None:
    story = Story(healed_bundle())
    assert [(", ".join(words.front(s.front)), s.became) for s in story.shapes] == [
        ("fewer layers (49 %), healed 8 min, then fewer layers (36 %)", "rung 5"),
        ("fewer layers (49 %)", "rung 4"),
        ("fewer channels (50 %)", "not healed"),
    ]
    away = [t.recipe for group in story.groups for t in group.trials]
    assert away == [Recipe((*HALF, Distil(120), *TAIL), RealOnnxruntime())]  # its lesson was too short
    assert (story.turned_away, story.only_measured) == (1, 3)
    crashed = turn_away(Recipe((DropLayers(), *TAIL), RealOnnxruntime()), Reason.CRASHED, "a fault")
    kept = (*healed_trials(), crashed)
    assert crashed in [t for g in Story(healed_bundle(kept=kept)).groups for t in g.trials]  # that is a failure


def test_the_seconds_of_lessons_count_once_and_for_what_heals() -> None:
    story = Story(healed_bundle())
    assert sum(story.taught) == pytest.approx(118.5 + 351.0 + 119.2)
    seconds = {t.name: t.seconds for t in story.tallies}
    assert seconds["healed"] == pytest.approx(588.7)
    assert seconds["fewer layers"] < 60
    again = (*healed_trials(), replace(a_trial(NARROW, 14.0), seconds=6.0, log=healed_trials()[8].log))
    assert sum(Story(healed_bundle(kept=again)).taught) == pytest.approx(588.7)  # measured again, not taught again
    assert "3 lessons, 9 min 49 s in all" in story.effort


def test_no_more_shapes_are_listed_than_one_wants_to_read() -> None:
    many = tuple(
        turn_away(Recipe((DropLayers(i / 20), *TAIL), RealOnnxruntime()), Reason.TOO_SLOW, "", speed=1.0 + i)
        for i in range(1, 15)
    )
    rendered = text.render(healed_bundle(kept=(*healed_trials(), *many)))
    listed = rendered.partition("Shapes that were measured")[2].partition("What was turned away")[0]
    assert listed.count("not healed") + listed.count("rung") == 10
    assert "and 7 more" in listed


# --- reports ----------------------------------------------------------------------------------------------------


def test_the_text_fits_80_columns_and_tells_the_story() -> None:
    rendered = text.render(healed_bundle())
    assert max(map(len, rendered.splitlines())) <= 80
    assert rendered.isascii()
    flat = " ".join(rendered.split())
    assert "cut 1 of 3 residual blocks left out: blocks.2 fell from 89.0 % to 50.0 %, at 13.0x" in flat
    assert "6 verified, 1 turned away, 3 shapes measured before healing" in flat
    plain = text.render(a_bundle())
    assert "healed" not in plain
    assert "Shapes" not in plain


def test_the_page_draws_the_lessons_and_lists_the_shapes() -> None:
    rendered = page.render(healed_bundle())
    for part in ('id="healing"', 'id="healing-plot"', 'id="shapes"', "blocks.1, blocks.3, blocks.4", "by 2 lessons"):
        assert part in rendered, part
    plain = page.render(a_bundle())
    assert 'id="healing"' not in plain
    assert 'id="shapes"' not in plain


def test_what_a_step_said_is_escaped_on_the_page() -> None:
    log = ("drop_layers: <script>alert(1)</script> \x1b[31m", "distil: <img src=x>", "distil: curve 0.0:0.1 5.0:0.9")
    kept = tuple(replace(t, log=log if t.log else ()) for t in healed_trials())
    rendered = page.render(healed_bundle(kept=kept))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in rendered
    assert "<img src=x>" not in rendered
    assert "\x1b" not in rendered


def test_rows_say_what_stands_before_and_behind_and_how_long_was_taught() -> None:
    rows = frame.rows(healed_bundle())
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    best = next(r for r in rows if r["best"])
    assert best["front"].startswith("drop_layers(share=0.491) > distil(seconds=120)")
    assert best["tail"] == "export_onnx > quantize_static > onnxruntime(threads=1)"
    assert (best["lessons"], best["lesson_seconds"], best["lesson_seconds_spent"]) == (3, 588.7, 119.2)
    assert [r["before_healing"] for r in rows].count(True) == 3
    assert (rows[0]["front"], rows[0]["lessons"], rows[0]["lesson_seconds"]) == ("", 0, 0)


# --- advice -----------------------------------------------------------------------------------------------------


def untaught(goal: str, reason: Reason = Reason.NO_TRAINING_DATA, **changed: Any) -> tuple[str, ...]:
    refusal = turn_away(Recipe((Distil(), *TAIL), RealOnnxruntime()), reason, "something")
    made = a_bundle(goal, kept=(*a_search(n=4000), refusal))
    return advice.helps(Story(replace(made, workload={**made.workload, **changed})))


def test_what_training_data_would_make_possible_is_said_with_the_bound() -> None:
    said = [line for line in untaught("speedup >= 20, drop <= 1%") if line.startswith("train=")]
    assert said == [
        "train=: speedup >= 20 is out of reach without training (6.03x is the most that keeps the quality); with "
        "train= the model could be cut and healed: rows like those of data=, with labels or without, some thousands "
        "are good"
    ]


def test_training_data_is_not_asked_for_in_vain() -> None:
    for said in (
        untaught("speedup >= 4, drop <= 5%"),  # it is met
        untaught("speedup >= 20, drop <= 1%", Reason.UNSUPPORTED),  # it is not what is missing
        untaught("speedup >= 20, drop <= 1%", form="onnx"),  # nothing can be cut
    ):
        assert not any(line.startswith("train=") for line in said)


def test_a_latency_that_is_out_of_reach_is_told_in_its_own_unit() -> None:
    said = next(line for line in untaught("latency <= 0.5ms, drop <= 1%") if line.startswith("train="))
    assert "(1.67 ms is the least that keeps the quality)" in said


def test_the_story_of_this_search_is_of_a_goal_that_is_met() -> None:
    bundle = healed_bundle()
    assert bundle.verdict.outcome is Outcome.MET
    assert {r.recipe for r in bundle.ladder.rungs} == {ORIGINAL, FLOAT, WHOLE, CASCADE, HEALED, NARROW}
