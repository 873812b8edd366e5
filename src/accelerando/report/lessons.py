"""The page's sections on shapes: what was cut out of each rung, how lessons healed it, and which were only measured."""

from __future__ import annotations

from typing import Any
from xml.etree.ElementTree import Element

from accelerando.report import sections, words
from accelerando.report.elements import Child, el, fine, table
from accelerando.report.fronts import tail_of
from accelerando.report.healing import MOST_SHAPES, SPLIT, Chapter, Healing, timed
from accelerando.report.plots import MOST_CURVES, Figure, said
from accelerando.report.story import Story

LEAD = (
    "A cut makes a model faster and worse; lessons by the original bring back what it knew. The curves are of rows "
    "that the lessons watched, before rounding to fewer bits; the table's figures are measured as everything is. "
    + SPLIT
)


def healed(story: Story) -> Element | None:
    """Each rung that was cut: which layers went, how the quality fell, and how it was healed."""
    if not story.healings:
        return None
    learned = [h for h in story.healings if h.curve]
    picture = sections.plot("healing", curves(story, learned), "Learning curves, lessons one after the other: quality "
                            "over seconds of training; the table below holds what each led to")  # fmt: skip
    return sections.section(
        "healing", "What was cut, and healed", LEAD, picture if learned else None,
        *(e for healing in story.healings for e in _told(story, healing)),
    )  # fmt: skip


def _told(story: Story, healing: Healing) -> list[Element]:
    metric, before = healing.evidence.metric, healing.began
    rows: list[list[Child]] = []
    for chapter in healing.chapters:
        if chapter.cuts:
            told = (el("small", fine(line)) for lines in chapter.said for line in lines)
            rows.append([
                el("span", fine(", ".join(words.front(chapter.cuts))), *told),
                _speed(chapter, healed=False), *_quality(metric, chapter.fell, before),
            ])  # fmt: skip
        before = chapter.fell if chapter.cuts and chapter.fell is not None else before
        if chapter.lessons:
            lessons = words.count(len(chapter.lessons), "lesson")
            what = f"healed by {lessons}, {words.duration(round(chapter.seconds))}"
            notes = (el("small", fine(s)) for lesson in chapter.lessons for s in lesson.said)
            rows.append([el("span", what, *notes), _speed(chapter, healed=True),
                         *_quality(metric, chapter.rose, before)])  # fmt: skip
        before = chapter.rose if chapter.lessons and chapter.rose is not None else before
    name = f"Rung {healing.label}: {story.name(healing.recipe)}"
    unit = "points" if metric in words.SHARES else "its unit"
    head = ["step", "speedup after it", f"{metric} after it", f"by this step, {unit}"]
    return [el("h3", name), table(head, rows, name, frozenset({1, 2, 3}))]


def _speed(chapter: Chapter, healed: bool) -> Child:
    trial = chapter.healed if healed else chapter.bare
    speed = timed(trial) if trial else None
    return sections.interval(speed, words.times) if speed else "not measured"


def _quality(metric: str, value: float | None, before: float) -> tuple[Child, Child]:
    if value is None:
        return "not measured", ""
    sign = "+" if value > before else ""
    return fine(words.quality(metric, value)), fine(f"{sign}{words.difference(metric, value - before)}")


def curves(story: Story, learned: list[Healing]) -> Figure:
    """Quality over seconds of training, a line for each rung, and the original's quality as one."""
    scale = 100.0 if story.metric in words.SHARES else 1.0
    shown = learned[-MOST_CURVES:]
    best = next((h for h in learned if h.recipe == story.best.recipe), None)
    if best is not None and best not in shown:
        shown = [best, *shown[1:]]
    end = max(seconds for healing in shown for seconds, _ in healing.curve)
    original = scale * (best or shown[0]).began
    data: list[dict[str, Any]] = [{
        "type": "scatter", "mode": "lines", "name": "the original", "hoverinfo": "skip", "x": [0, end],
        "y": [original, original], "line": {"color": "var(--text)", "width": 1.5, "dash": "dash"},
    }]  # fmt: skip
    for number, healing in enumerate(shown):
        mine = healing is best
        name = f"{healing.label}{', the best' if mine else ''}: {words.recipe(healing.recipe)}"
        data.append({
            "type": "scatter", "mode": "lines+markers", "name": said(name, 60),
            "x": [round(seconds, 1) for seconds, _ in healing.curve],
            "y": [round(scale * value, 4) for _, value in healing.curve],
            "line": {"color": "var(--good)" if mine else f"var(--rung{1 + number % 6})", "width": 3 if mine else 1.5},
            "marker": {"size": [9 if starts else 4 for starts in _begins(healing)], "line": {"width": 0}, "opacity": 1},
            "hovertemplate": f"{said(name)}<br>%{{y:.4~g}} after %{{x:.0f}} s<extra></extra>",
        })  # fmt: skip
    unit = ", %" if scale == 100 else ""
    layout = {
        "xaxis": {"title": {"text": "seconds of training; a large dot begins a lesson"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": f"{said(story.metric, 24)} on the watched rows{unit}"}},
        "legend": {"orientation": "v", "y": -0.2, "yanchor": "top"},
        "hovermode": "closest",
    }
    return {"data": data, "layout": layout, "height": 380 + 22 * len(data)}


def _begins(healing: Healing) -> list[bool]:
    """For each point of the curve, whether a lesson begins with it."""
    lessons = (lesson for chapter in healing.chapters for lesson in chapter.lessons)
    return [number == 0 for lesson in lessons for number in range(len(lesson.curve))]


def measured(story: Story) -> Element | None:
    """Shapes that were timed before they were healed; they did not fail, so they are no refusals."""
    if not story.shapes:
        return None
    rows: list[list[Child]] = []
    for shape in story.shapes[:MOST_SHAPES]:
        evidence = shape.trial.evidence
        fell = fine(words.quality(evidence.metric, evidence.quality.mid)) if evidence else "not scored"
        behind = f"with {words.recipe(tail_of(shape.trial.recipe))}"
        cut = el("span", fine(", ".join(words.front(shape.front))), el("small", fine(behind)))
        rows.append([cut, sections.interval(shape.speedup, words.times), fell, shape.became])
    rest = len(story.shapes) - MOST_SHAPES
    return sections.section(
        "shapes", "Shapes that were measured",
        "Speed hardly depends on the weights: a cut is timed first, and only what is fast enough is worth a lesson.",
        table(["cut", "speedup", "before healing", "became"], rows, "Shapes before healing",
              frozenset({1, 2})),
        el("p", f"and {rest} more; the journal holds them all.", class_="note") if rest > 0 else None,
    )  # fmt: skip
