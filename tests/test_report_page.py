"""The page opens offline, runs nothing but its own two scripts, and escapes whatever others wrote."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from reported import ORIGINAL, PLAIN
from reported import bundle as a_bundle
from reported import refused as turn_away
from reported import verified as a_trial

from accelerando.errors import MissingExtraError, Reason
from accelerando.interval import Interval
from accelerando.machine import Machine
from accelerando.profile.ceilings import Ceiling, Ceilings
from accelerando.profile.layers import Layer, Look
from accelerando.profile.portrait import Profile
from accelerando.report import layers, page, plots
from accelerando.report.elements import el, raw, to_html
from accelerando.report.plane import picture
from accelerando.report.story import Story

LOADS = {"src", "srcset", "poster", "data", "action", "formaction", "background", "ping", "manifest"}


class Reader(HTMLParser):
    """What a browser would make of a page, as far as it matters here."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.policy = ""
        self.words: list[str] = []
        self._inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loads += [f"{tag} {k}={v}" for k, v in attrs if k in LOADS]
        self.loads += [f"{tag} href={given['href']}" for _ in [0] if not str(given.get("href", "#")).startswith("#")]
        self.loads += [tag] if tag in ("link", "iframe", "object", "embed", "base") else []
        self.handlers += [f"{tag} {k}" for k in given if k.startswith("on")]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        self._inside = tag if tag in ("script", "style") else None
        if tag == "script":
            self.scripts.append((given, ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            given, before = self.scripts[-1]
            self.scripts[-1] = given, before + data
        elif self._inside == "style":
            self.loads += re.findall(r"@import.*|url\([^)]*\)", data)
        else:
            self.words.append(data)

    @property
    def executed(self) -> list[str]:
        return [text for given, text in self.scripts if given.get("type") != "application/json"]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def rendered() -> str:
    return page.render(a_bundle(notes=("<b>a note</b>",)))


@pytest.fixture(scope="module")
def seen(rendered: str) -> Reader:
    return Reader(rendered)


def test_nothing_is_loaded_and_no_attribute_runs(seen: Reader) -> None:
    assert seen.loads == []
    assert seen.handlers == []


def test_the_reader_of_this_test_would_see_a_page_that_loads(rendered: str) -> None:
    """Sabotage: each of these must raise the alarm."""
    for bad in (
        "<img src='https://evil.test/x.png'>", "<link rel=stylesheet href=//evil.test/a.css>", "<a href=https://e.test>x</a>",
        "<style>body{background:url(https://evil.test)}</style>", "<iframe src=x></iframe>",
    ):  # fmt: skip
        assert Reader(rendered + bad).loads, bad
    assert Reader(rendered + "<p onclick=alert(1)>").handlers


def test_only_our_two_scripts_run_and_the_policy_forbids_every_network(seen: Reader) -> None:
    rules = dict(r.strip().split(" ", 1) for r in seen.policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "connect-src" not in rules
    assert "http" not in seen.policy
    assert "unsafe-eval" not in seen.policy
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in seen.executed]
    assert len(hashes) == 2
    assert rules["script-src"] == " ".join(f"'sha256-{h}'" for h in hashes)


def test_what_others_wrote_is_text(rendered: str, seen: Reader) -> None:
    assert "<script>alert(1)</script>" in seen.text  # as words
    assert "<b>a note</b>" in seen.text
    assert not any("alert(1)" in s for s in seen.executed)
    assert "\x1b" not in rendered
    data = [json.loads(text) for given, text in seen.scripts if given.get("type") == "application/json"]
    assert len(data) == 4  # the plane, the way, the latencies, the learning
    assert "<script" not in json.dumps(data)  # plotly reads a little HTML in texts


def test_the_page_says_the_same_as_the_bundle(seen: Reader) -> None:
    bundle = a_bundle()
    for said in ("MET", "faster", "int8 static (entropy), 1 thread", bundle.workload["digest"], bundle.machine.cpu):
        assert said in seen.text
    for group in Story(bundle).groups:
        assert group.reason.happened in seen.text
        assert group.reason.remedy in seen.text


def test_the_page_is_the_same_for_the_same_bundle(rendered: str) -> None:
    assert page.render(a_bundle(notes=("<b>a note</b>",))) == rendered


def test_every_plot_has_words_and_every_section_a_heading(rendered: str) -> None:
    plots_there = re.findall(r'class="plot"[^>]*', rendered)
    assert len(plots_there) == 4
    assert all('role="img"' in p and 'aria-label="' in p for p in plots_there)
    assert rendered.count("<h1>") == 1
    assert rendered.count("<section ") == rendered.count("</h2>")
    assert 'lang="en"' in rendered


def test_a_page_can_be_made_of_an_original_alone(tmp_path: Path) -> None:
    kept = (a_trial(ORIGINAL, 1.0), turn_away(PLAIN, Reason.EXPORT_FAILED, "a graph break"))
    written = page.write(a_bundle(kept=kept, climbed=(ORIGINAL,)), tmp_path / "r.html")
    text = Reader(written.read_bytes().decode()).text
    assert "The original stays" in text
    assert "What each step brought" not in text


def test_without_plotly_the_page_says_how_to_get_it_and_the_fragment_does_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'accelerando\[optimize\]'"):
        page.render(a_bundle())
    fragment = page.fragment(a_bundle("speedup >= 4, drop <= 5%"))
    assert fragment.partition("<tbody>")[2].count("<tr>") == 3
    assert not Reader(fragment).loads


# --- plots ------------------------------------------------------------------------------------------------------


def trace(figure: dict[str, Any], name: str) -> dict[str, Any]:
    return next(t for t in figure["data"] if t.get("name", "").startswith(name))


def test_the_plane_shows_every_measured_recipe_once_and_the_goals_region() -> None:
    bundle = a_bundle()
    figure = picture(Story(bundle))
    clouds = [trace(figure, n) for n in ("rungs", "the best", "verified", "turned away")]
    assert sum(len(c["x"]) for c in clouds) + len(trace(figure, "turned away unscored")["x"]) > len(bundle.ladder.rungs)
    region = trace(figure, "the goal")
    assert (min(region["x"]), min(region["y"])) == (4.0, pytest.approx(-100 * 0.05 * 0.9))
    assert trace(figure, "the best")["y"] == [pytest.approx(0, abs=1e-9)]


def test_a_point_that_lost_far_too_much_is_marked_at_the_edge_not_moved_in_silence() -> None:
    figure = picture(Story(a_bundle()))
    away = next(t for t in figure["data"] if t.get("name") == "turned away")
    assert away["marker"]["symbol"] == ["triangle-down"]
    assert "drop 50.0 points" in away["hovertext"][0]


def test_bounds_on_latency_are_drawn_through_the_originals_and_said_to_be_about() -> None:
    bundle = a_bundle("latency <= 2.5ms", original_seconds=0.01, noise=0.0)
    region = trace(picture(Story(bundle)), "the goal")
    assert region["name"] == "the goal (about)"
    assert min(region["x"]) == pytest.approx(4.0)


def test_the_waterfall_ends_at_the_best_and_its_bars_join() -> None:
    bars = plots.way(Story(a_bundle()))["data"][0]
    ends = [b + x for b, x in zip(bars["base"], bars["x"], strict=True)]
    assert bars["base"][1:] == pytest.approx(ends[:-1])
    assert ends[-1] == pytest.approx(a_bundle().ladder.rungs[-1].evidence.speedup.mid)


def test_distributions_rise_from_the_fastest_to_the_slowest_call() -> None:
    for curve in plots.latency(Story(a_bundle()))["data"]:
        assert curve["x"] == sorted(curve["x"])
        assert curve["y"] == sorted(curve["y"])
        assert curve["y"][-1] == 100.0


def test_our_own_scripts_can_not_be_ended_from_within() -> None:
    with pytest.raises(ValueError, match="must not hold its end"):
        raw("script", "x = '</script>'")
    assert to_html(el("p", "<", el("b", "&"), ">", title='"')) == '<p title="&quot;">&lt;<b>&amp;</b>&gt;</p>'


# --- the profile ------------------------------------------------------------------------------------------------


def a_profile() -> dict[str, Any]:
    """A profile as `Profile` writes it, of two layers that nobody measured."""

    def layer(name: str, seconds: float, flops: int) -> Layer:
        return Layer(
            name, "Linear", "linear", "float32", 1, 1, Interval.exactly(seconds), flops, 4000, 8000, 12000, 4000
        )

    rate = {"float32": 1e11, "int8": 4e11, "memory": 2e10, "cache": 1e11, "call": 1e6}
    roofs = Ceilings(tuple(Ceiling(what, 2, Interval.exactly(r), r, "made up") for what, r in rate.items()))
    whole = Interval.exactly(0.004)
    look = Look(
        (layer("<i>fc</i>", 0.003, 2_000_000), layer("view", 0.0005, 0)),
        whole,
        whole,
        Interval.exactly(0.9),
        2,
        8000,
        8000,
    )
    made = Profile("torch", "Net", 1, Machine.look(), look, roofs, None, 1.0)
    return json.loads(json.dumps(made.to_json(), allow_nan=False))


def test_the_profile_is_shown_with_its_roofline() -> None:
    seen = Reader(page.render(a_bundle(profile=a_profile())))
    assert "Where the original's time goes" in seen.text
    assert "<i>fc</i>" in seen.text
    figure = layers.roofline(a_profile(), [r for r in a_profile()["derived"]["rows"] if r["flops"]])
    roof = trace(figure, "float32, bytes from memory")
    assert max(roof["y"]) == 1e11
    assert roof["x"][1] == pytest.approx(5.0)  # the ridge: 1e11 operations over 2e10 bytes per second


@pytest.mark.parametrize("broken", [{}, {"schema": 99}, {"schema": 1}, {"schema": 1, "derived": {"rows": [{}]}}])
def test_a_profile_that_can_not_be_read_is_said_to_be(broken: dict[str, Any]) -> None:
    section = layers.section(broken)
    assert section is not None
    assert "can't be shown" in to_html(section)
    assert layers.section(None) is None
