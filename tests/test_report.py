"""The reports' words, the story that they tell, the terminal and the rows; nothing is measured, nothing invented."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reported import BEST, ENTROPY, INT8, ORIGINAL, PLAIN, Onnxruntime, QuantizeStatic, X
from reported import bundle as a_bundle
from reported import refused as turn_away
from reported import trials as a_search
from reported import verified as a_trial
from rich.console import Console

from accelerando.bundle import Bundle
from accelerando.errors import MissingExtraError, Reason
from accelerando.goal import Outcome
from accelerando.interval import Interval
from accelerando.plugins import stored_recipe
from accelerando.recipe import Recipe
from accelerando.report import advice, frame, text, words
from accelerando.report.story import Story
from accelerando.report.way import parts
from accelerando.testing.bundles import write_bundle
from accelerando.testing.fakes import FakeBackend, FakeTechnique, fake_evidence, fakes_known
from accelerando.trial import Trial

# --- words ------------------------------------------------------------------------------------------------------


def test_a_recipe_is_said_as_a_person_would() -> None:
    assert words.recipe(ORIGINAL) == "PyTorch eager"
    assert words.recipe(BEST) == "ONNX Runtime, int8 static (entropy), 1 thread"
    odd = Recipe((QuantizeStatic(per_channel=False, keep=3),), Onnxruntime(threads=2, arena=False, optimization="none"))
    said = "ONNX Runtime, int8 static (per tensor, keep 3), 2 threads, no arena, optimization none"
    assert words.recipe(odd) == said


def test_a_plugin_that_nobody_named_is_said_by_its_name() -> None:
    assert (
        words.recipe(Recipe((FakeTechnique(3),), FakeBackend(2)))
        == "fake backend, fake technique (strength 3), level 2"
    )


def test_a_recipe_from_a_manifest_is_said_as_the_one_that_was_made() -> None:
    with fakes_known():
        made = Recipe((FakeTechnique(3),), FakeBackend(2))
        read = stored_recipe(made.to_json(), [str(p) for p in (*made.steps, made.backend)])
        assert read.key == made.key
        assert words.recipe(read) == words.recipe(made)
        assert parts(read) == parts(made)
    assert words.recipe(read) == words.recipe(made)  # where the technique is not installed, too


def test_figures_keep_three_digits_and_name_a_unit_once() -> None:
    assert words.between(Interval(0.0029, 0.0031, 0.0034), words.seconds) == "3.10 ms (2.90 to 3.40)"
    assert words.between(Interval(4.9, 5.123, 5.3), words.times) == "5.12x (4.90 to 5.30)"
    assert words.between(Interval.exactly(950_000), words.size) == "950 kB"
    assert words.drop("accuracy", Interval(-0.002, 0.001, 0.004)) == "0.1 points (-0.2 to 0.4)"
    assert words.drop("mae", Interval(-0.002, 0.001, 0.004)) == "0.00100 (-0.00200 to 0.00400)"
    assert words.points(-0.00001) == "0.0"  # never -0.0
    assert (words.figure(9.9996), words.figure(0.0), words.figure(999.7)) == ("10.0", "0", "1000")
    assert [words.seconds(s) for s in (0.0, 3e-8, 9.9996e-3, 2)] == ["0 s", "30.0 ns", "10.0 ms", "2.00 s"]


@given(st.text())
def test_no_control_code_survives(wild: str) -> None:
    cleaned = words.clean("\x1b[2J\x1b]0;title\x07" + wild)
    assert not {c for c in cleaned if ord(c) < 32} - {"\n"}
    assert "\x1b" not in cleaned
    assert len(words.shorten(wild, 20)) <= 20


# --- the story --------------------------------------------------------------------------------------------------


def test_the_way_goes_over_measured_variants_and_says_what_was_not_apart() -> None:
    legs = Story(a_bundle()).way
    assert [leg.added for leg in legs] == ["ONNX Runtime", "int8 static", "int8 static: entropy + 1 thread"]
    assert [leg.together for leg in legs] == [False, False, True]
    whole = Story(a_bundle(kept=(*a_search(), a_trial(ENTROPY, 5.05)))).way
    assert [leg.added for leg in whole] == ["ONNX Runtime", "int8 static", "int8 static: entropy", "1 thread"]
    assert not any(leg.together for leg in whole)
    assert not whole[2].clear  # 5.0 and 5.05 within their intervals: no gain is claimed


@given(st.sets(st.sampled_from([PLAIN, INT8, ENTROPY, Recipe((X, QuantizeStatic(keep=2)), Onnxruntime(threads=1))])))
def test_the_way_is_never_invented(measured: set[Recipe]) -> None:
    kept = (a_trial(ORIGINAL, 1.0), *(a_trial(r, 2.0 + i) for i, r in enumerate(measured)), a_trial(BEST, 9.0))
    story = Story(a_bundle(kept=kept, climbed=(ORIGINAL, BEST)))
    made = [leg.seen.recipe for leg in story.way]
    assert made[-1] == BEST
    assert all(a in measured for a in made[:-1])
    assert all(parts(a) < parts(b) for a, b in itertools.pairwise(made))
    assert all(leg.seen in story.seen for leg in story.way)


def test_a_recipe_that_was_measured_again_counts_once_and_its_last_word_stands() -> None:
    again = turn_away(INT8, Reason.TOO_SLOW, "not on the second look", speed=5.0)
    story = Story(a_bundle(kept=(*a_search(), again)))
    assert len(story.history) == len(story.trials) + 1
    assert next(t for t in story.trials if t.recipe == INT8) is again
    assert next(g for g in story.groups if g.reason is Reason.TOO_SLOW).trials[-1] is not None


# --- advice -----------------------------------------------------------------------------------------------------


def test_a_met_goal_needs_no_advice() -> None:
    story = Story(a_bundle())
    assert story.bundle.verdict.outcome is Outcome.MET
    assert advice.nearest(story) == advice.helps(story) == ()


def test_what_was_missed_is_named_with_the_bound_that_would_be_met() -> None:
    bundle = a_bundle("speedup >= 9, drop <= 5%", run={"finished": False, "why_stopped": "interrupted"})
    nearest = advice.nearest(Story(bundle))
    assert nearest[0].startswith("ONNX Runtime, int8 static (entropy), 1 thread: speedup 6")
    assert "so it would meet speedup >= 5.8" in nearest[0]
    helps = "\n".join(advice.helps(Story(bundle)))
    assert "a larger budget" in helps
    assert "interrupted" in helps


def test_too_few_samples_are_said_with_how_many_would_do() -> None:
    story = Story(a_bundle("speedup >= 4, drop <= 0.5%", n=100))
    assert story.bundle.verdict.outcome is Outcome.UNSURE
    said = "\n".join(advice.helps(story))
    assert "more test samples: the drop is known to +-" in said
    assert "with 100 samples" in said


@given(st.floats(0.1, 10), st.floats(0.01, 5), st.floats(0.01, 5))
def test_as_many_samples_as_are_advised_put_the_edge_on_the_bound(mid: float, half: float, margin: float) -> None:
    factor = advice.more_needed(Interval(mid - half, mid, mid + half), mid + margin, least=False)
    assert mid + half / factor**0.5 == pytest.approx(mid + margin)
    assert advice.more_needed(Interval(mid - half, mid, mid + half), mid - margin, least=False) == float("inf")


# --- the terminal -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", ["speedup >= 4, drop <= 5%", "speedup >= 9, drop <= 0.1%", "p99 <= 5ms, size <= 1MB"])
def test_the_text_fits_80_columns_and_is_plain(goal: str) -> None:
    rendered = text.render(a_bundle(goal, notes=("a note that is long " * 12,)))
    assert max(map(len, rendered.splitlines())) <= 80
    assert "\x1b" not in rendered
    assert rendered.isascii()


def test_the_text_says_the_verdict_the_ladder_and_every_reason_with_its_remedy() -> None:
    bundle = a_bundle(notes=("the model was in training mode",))
    flat = " ".join(text.render(bundle).split())
    assert flat.startswith("MET: 6")
    assert "accuracy 90.0 %, drop 0.0 points" in flat
    assert "the model was in training mode" in flat
    for group in Story(bundle).groups:
        assert group.reason.happened in flat
        assert group.reason.remedy in flat
    assert "[bold]markup[/bold]" in flat  # rich's own markup in a detail is text, not obeyed
    assert "7 recipes in 12 s of 1 min: 4 verified, 3 turned away" in flat


def test_what_is_not_certified_says_so() -> None:
    assert "not certified" in text.render(a_bundle(certified=False))
    assert "not certified" not in text.render(a_bundle())


def test_a_search_that_found_nothing_says_that_the_original_stays() -> None:
    kept = (a_trial(ORIGINAL, 1.0), turn_away(PLAIN, Reason.EXPORT_FAILED, "a graph break"))
    rendered = text.render(a_bundle(kept=kept, climbed=(ORIGINAL,)))
    assert rendered.startswith("NOT MET: nothing was proven to be better than the original (PyTorch eager)")
    assert "a graph break" in rendered
    assert "1 recipe " not in rendered
    assert "Nearest" not in rendered  # the original is no candidate


def test_a_metric_where_lower_is_better_is_told_in_its_own_unit() -> None:
    flat = " ".join(text.render(a_bundle("speedup >= 4", kept=_lower(), climbed=(ORIGINAL, PLAIN))).split())
    assert "mae 0.5" in flat
    assert "drop 0.00" in flat
    assert "points" not in flat


def _lower() -> tuple[Trial, ...]:
    given: dict[str, Any] = {"metric": "mae", "quality": 0.5, "n": 400}
    return a_trial(ORIGINAL, 1.0, **given), a_trial(PLAIN, 5.0, 0.004, **given)


def test_a_stream_that_knows_ascii_only_gets_ascii_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Narrow:
        encoding = "ascii"

    bundle = a_bundle(notes=("精度",))
    monkeypatch.setattr(sys, "stdout", Narrow())
    assert text.render(bundle).isascii()


def test_the_parts_can_be_shown_alone_and_in_colour() -> None:
    console = Console(record=True, width=80, force_terminal=True, color_system="truecolor", file=io.StringIO())
    bundle = a_bundle()
    console.print(text.verdict(bundle), text.ladder(bundle), text.refusals(bundle))
    shown = console.export_text(styles=True)
    assert "\x1b[1;32mMET" in shown
    assert "\x1b[31mred" not in shown  # the detail's own colour


# --- rows -------------------------------------------------------------------------------------------------------


def test_rows_are_flat_json_with_one_set_of_keys() -> None:
    bundle = a_bundle()
    rows = frame.rows(bundle)
    assert len(rows) == len(bundle.trials)
    assert {tuple(r) for r in rows} == {tuple(rows[0])}
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    best = next(r for r in rows if r["best"])
    assert (best["rung"], best["recipe"], best["certified"]) == (2, words.recipe(BEST), True)
    assert best["speedup_low"] <= best["speedup"] <= best["speedup_high"]
    slow = next(r for r in rows if r["reason"] == "TOO_SLOW")
    assert (slow["speedup"], slow["quality"], slow["outcome"]) == (2.1, None, "refused")


def test_the_frame_is_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = a_bundle()
    table = frame.to_frame(bundle)
    assert list(table["key"]) == [t.recipe.key for t in bundle.trials]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'accelerando\[optimize\]'"):
        frame.to_frame(bundle)


# --- real bundles, and what reports must not touch --------------------------------------------------------------


def test_a_bundle_from_disk_is_told_like_the_one_that_was_written(tmp_path: Path) -> None:
    with fakes_known():
        write_bundle(tmp_path / "b")
        opened = Bundle.open(tmp_path / "b")
        story = Story(opened)
        assert [leg.added for leg in story.way] == ["fake backend + fake technique (strength 3) + level 2"]
        assert "fake backend, fake technique" in text.render(opened).replace("\n", " ")
        assert [r["rung"] for r in frame.rows(opened)] == [0, 1, 2]


def test_reports_import_nothing_heavy() -> None:
    code = (
        "import sys; from accelerando.report import text, page, frame, progress; "
        "print([m for m in ('torch', 'plotly', 'pandas', 'onnx', 'openvino', 'onnxruntime') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.strip() == "[]"


def test_a_judge_that_never_says_no_is_seen_in_the_text() -> None:
    """Sabotage: a verdict that was forged does not agree with the intervals beside it, which are the evidence's own."""
    honest = a_bundle("speedup >= 9, drop <= 5%")
    forged = dataclasses.replace(honest, verdict=dataclasses.replace(honest.verdict, outcome=Outcome.MET))
    assert "NOT MET" in text.render(honest)
    assert "not met" in text.render(forged)
    assert fake_evidence(6.0).speedup.high < 9
