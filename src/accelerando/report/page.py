"""The report as one HTML page that needs nothing else: it opens offline, and its policy forbids it every network.

Plots are plotly's, whose script is part of the page: that makes it 5 MB, and gives it tips, zoom and print by a
library that others keep.  Scripts run only by the hash of their text, so that a text that came from elsewhere could
not run even if it were not escaped; and everything is escaped, for the page is a tree until it is written.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from xml.etree.ElementTree import Element

from accelerando.bundle import Bundle
from accelerando.errors import MissingExtraError
from accelerando.report import layers, lessons, sections, words
from accelerando.report.elements import el, fine, raw, table, to_html
from accelerando.report.story import Story

HERE = Path(__file__).parent


def render(bundle: Bundle) -> str:
    """The whole page.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    story = Story(bundle)
    title = f"accelerando: {bundle.verdict.outcome.value}: {fine(words.faster(story.best.evidence.speedup))}"
    return document(title, *_body(story))


def document(title: str, *body: Element) -> str:
    """A page with our style and the script that draws the plots.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    scripts = [_plotly(), (HERE / "page.js").read_text("utf-8")]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy(scripts)),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        raw("style", (HERE / "page.css").read_text("utf-8")),
    )
    whole = el("html", head, el("body", *body, *(raw("script", s) for s in scripts)), lang="en")
    return "<!doctype html>\n" + to_html(whole)


def write(bundle: Bundle, path: str | Path) -> Path:
    """Write the page to a file; returns its path.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    path = Path(path)
    path.write_bytes(render(bundle).encode("utf-8"))  # bytes: the scripts' hashes hold for these line ends only
    return path


def fragment(bundle: Bundle) -> str:
    """The verdict and the ladder as a small table, for notebooks; it needs nothing but the base install."""
    story = Story(bundle)
    metric = story.metric
    rows = [
        [
            f"{number}{' (best)' if number == bundle.best else ''}",
            story.name(rung.recipe),
            fine(words.between(rung.evidence.speedup, words.times)),
            words.seconds(rung.evidence.latency().mid),
            fine(f"{words.quality(metric, rung.evidence.quality.mid)}, drop {words.drop(metric, rung.evidence.drop)}"),
            words.size(rung.evidence.disk_bytes),
        ]
        for number, rung in enumerate(bundle.ladder.rungs)
    ]
    line = el("p", el("strong", bundle.verdict.outcome.value.upper()), ": ", fine(story.headline))
    grid = table(["rung", "recipe", "speedup", "p50", metric, "size"], rows, bundle.goal.text)  # type: ignore[arg-type]
    return to_html(el("div", line, grid))


def policy(scripts: list[str]) -> str:
    """The page's content security policy: no network of any kind, and only these scripts."""
    digests = [base64.b64encode(hashlib.sha256(s.encode("utf-8")).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'; "
        f"script-src {allowed}"
    )


def _body(story: Story) -> list[Element]:
    parts = [
        sections.verdict(story),
        sections.plane(story),
        sections.way(story),
        sections.ladder(story),
        lessons.healed(story),
        sections.latency(story),
        sections.tried(story),
        lessons.measured(story),
        sections.refusals(story),
        layers.section(story.bundle.profile),
        sections.circumstances(story),
    ]
    kept = [p for p in parts if p is not None]
    links = [el("a", p.findtext("h2") or "", href=f"#{p.get('id')}") for p in kept]
    without = el("noscript", el("p", "The plots need JavaScript; the tables hold the same figures.", class_="note"))
    made = (
        f"Made by accelerando {story.bundle.run.get('accelerando', '')}. This page measures nothing and loads nothing."
    )
    return [
        sections.hero(story),
        el("nav", *links, aria_label="Sections"),
        el("main", without, *kept),
        el("footer", el("p", made)),
    ]


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError("the page needs plotly: pip install 'accelerando[optimize]'") from error
    return str(get_plotlyjs())
