"""What a real Chromium makes of the dashboard."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import chromium
import pytest
from chromium import Chromium, Page
from dashboard_server import HOSTILE, App, Moving, served

PICK = "(box => { box.value = '%s'; box.dispatchEvent(new Event('change')); })(document.getElementById('model'))"
LIVE = "document.getElementById('link').dataset.state === 'live'"
in_chromium = pytest.mark.skipif(chromium.PROGRAM is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


def shown(browser: Chromium, address: str, **given: Any) -> Page:
    page = browser.open(address, **given)
    page.until(LIVE)
    return page


@in_chromium
@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_page_shows_the_ladder_and_complains_of_nothing(browser: Chromium, width: int, dark: bool) -> None:
    app = App("quarantined", pace=0.1)
    app.shelf.reasons["quarantined"] = "it could not be loaded anew: a file is missing"
    with served(app) as address:
        page = shown(browser, address, width=width, dark=dark)
        assert page.text("#alarm") == "it could not be loaded anew: a file is missing"
        assert page.value("document.querySelectorAll('#ladder > li').length") == 6
        assert page.value("document.querySelectorAll('#ladder > li[aria-current]').length") == 1
        assert page.text("#ladder > li[aria-current] .here") == "stands here"
        assert page.text("#ladder > li:first-child b") == "Rung 5"  # the fastest on top
        bad = page.text("[data-state=quarantined]")
        assert "quarantined" in bad
        assert "371 agreed" in bad
        assert "a row" in bad
        assert "a row" not in page.text("[data-state=failed]")  # it was never timed
        assert "pixel 31" in page.text("#drift")
        assert "in time" in page.text("#headline")
        assert page.value("document.querySelectorAll('#charts canvas').length") == 6
        assert all("now" in t for t in page.value("[...document.querySelectorAll('figure')].map(f => f.ariaLabel)"))
        assert page.value("document.documentElement.scrollWidth") <= width  # nothing sticks out
        assert page.value("getComputedStyle(document.body).backgroundColor") == (
            "rgb(15, 18, 22)" if dark else "rgb(246, 247, 249)"
        )
        assert page.complaints == []
        assert {url.startswith(address) for url in page.asked} == {True}


@in_chromium
@pytest.mark.slow
def test_it_moves_while_it_is_looked_at(browser: Chromium) -> None:
    app = App("usual", pace=0.1)
    with served(app) as address:
        page = shown(browser, address)
        before = page.text("#foot"), page.text("#ladder > li:last-child .f3")
        moving = app.shelf.find("usual")
        assert isinstance(moving, Moving)
        moving.now = dataclasses.replace(
            moving.now, rungs=tuple(dataclasses.replace(r, state="out", answered=5) for r in moving.now.rungs[:1])
            + moving.now.rungs[1:],
        )  # fmt: skip
        page.until("document.querySelector('#ladder > li:last-child').dataset.state === 'out'")
        assert page.text("#ladder > li:last-child .f3") != before[1]
    page.until("document.getElementById('link').dataset.state === 'lost'")  # the server went away
    assert "not live" in page.text("#link-words")


@in_chromium
@pytest.mark.slow
def test_the_goal_is_set_by_the_slider_and_by_words_and_a_refusal_is_shown(browser: Chromium) -> None:
    app = App("usual", pace=0.1)
    with served(app) as address:
        page = shown(browser, address)
        assert page.value("document.getElementById('goal').value") == "p99 <= 20ms, drop <= 1%"
        assert page.value("document.getElementById('goal-set').disabled")
        page.value("document.getElementById('slider').focus()")
        for kind in ("keyDown", "keyUp"):
            page.call("Input.dispatchKeyEvent", type=kind, key="Home", code="Home", windowsVirtualKeyCode=36)
        asked = page.until("(v => v.startsWith('p99 <= 1.4ms') && v)(document.getElementById('goal').value)")
        assert asked == "p99 <= 1.4ms, drop <= 1%"
        assert page.value("document.getElementById('slider').ariaValueText").endswith("ms")
        page.click("#goal-set")
        page.until("document.getElementById('goal-answer').textContent.includes('In force')")
        assert app.shelf.goals == {"usual": asked}
        page.until("document.querySelector('#sights code').textContent === 'p99 <= 1.4ms'")
        page.type("#goal", "p99 <= 5 parsecs")
        page.click("#goal-set")
        page.until("document.getElementById('goal-answer').classList.contains('bad')")
        assert "^" in page.text("#goal-answer")  # the caret under what is wrong
        assert page.value("document.getElementById('goal').getAttribute('aria-invalid')") == "true"
        page.click("#goal-undo")
        assert page.value("document.getElementById('goal').value") == asked
        assert app.shelf.goals == {"usual": asked}


@in_chromium
@pytest.mark.slow
def test_what_others_wrote_is_text(browser: Chromium) -> None:
    with served(App("hostile", pace=0.1)) as address:
        page = shown(browser, address)
        assert page.value("document.body.dataset.owned || ''") == ""
        assert HOSTILE in page.text("[data-state=quarantined] .why")
        assert HOSTILE in page.text("#drift")
        assert HOSTILE in page.text("#stands")
        assert page.value("document.getElementById('model').value") == HOSTILE
        assert page.value("document.querySelectorAll('main script, main img').length") == 0
        page.type("#goal", "p99 <= 9ms")
        page.click("#goal-set")
        page.until("!document.getElementById('goal-answer').hidden")
        assert page.text("#goal-answer") == "In force from the next batch on."
        assert page.complaints == []


@in_chromium
@pytest.mark.slow
def test_a_token_is_asked_for_and_kept_in_the_tab_only(browser: Chromium) -> None:
    with served(App("quiet", token="sesame", pace=0.1)) as address:
        page = browser.open(address)
        page.until("!document.getElementById('token-form').hidden")
        for word in ("wrong", "sesame"):
            page.until("!document.getElementById('token-form').hidden")
            page.type("#token", word)
            page.value("document.getElementById('token-form').requestSubmit()")
        page.until(LIVE)
        assert page.text("#headline") == "No requests"
        assert page.value("sessionStorage.getItem('accelerando-token')") == "sesame"
        assert page.value("localStorage.length") == 0
        assert page.value("document.cookie") == ""


@in_chromium
@pytest.mark.slow
def test_one_of_several_models_is_picked(browser: Chromium) -> None:
    with served(App("several", pace=0.1)) as address:
        page = shown(browser, address)
        names = page.value("[...document.getElementById('model').options].map(o => o.value)")
        assert names == ["one", "quiet", "spare", "usual"]
        assert page.value("document.querySelectorAll('#ladder > li').length") == 1
        page.value(PICK % "usual")
        page.until("document.querySelectorAll('#ladder > li').length === 5")
        page.value(PICK % "spare")
        page.until("document.getElementById('headline').textContent === 'Not loaded'")
        assert page.value("document.getElementById('loaded').hidden")


CONTRAST = """
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const rgb = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255]; };
  const behind = (node) => {
    const layers = [];
    for (let n = node; n; n = n.parentElement) layers.unshift(rgb(getComputedStyle(n).backgroundColor));
    return layers.reduce((below, [r, g, b, a]) => [r, g, b].map((c, i) => a * c + (1 - a) * below[i]), [255, 255, 255]);
  };
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const weights = [0.2126, 0.7152, 0.0722];
  const light = (c) => c.slice(0, 3).reduce((sum, v, i) => sum + weights[i] * linear(v / 255), 0);
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !node.checkVisibility()) continue;
    if (node.closest('button:disabled, noscript, .skip')) continue;
    const [a, b] = [light(rgb(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${walk.currentNode.textContent.trim().slice(0, 40)}`);
  }
  return found;
})()
"""


@in_chromium
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read_and_used_without_a_mouse(browser: Chromium, dark: bool) -> None:
    with served(App("quarantined", pace=0.1)) as address:
        page = shown(browser, address, dark=dark)
        assert page.value(CONTRAST) == []  # 4.5 to 1, as WCAG 2 asks of text
        page.value("document.querySelector('h2').style.color = 'rgb(128, 128, 128)'")
        assert page.value(CONTRAST) != []  # sabotage: it would see a pale one
        named = "n => n.labels?.length || n.textContent.trim()"
        assert page.value(f"[...document.querySelectorAll('input, textarea, select, button')].every({named})")
        assert page.value("document.querySelectorAll('section:not([aria-labelledby])').length") == 0
        assert page.value("document.querySelectorAll('h1').length") == 1
        assert (
            page.value('document.querySelectorAll(\'[tabindex]:not([tabindex="0"]):not([tabindex="-1"])\').length') == 0
        )
