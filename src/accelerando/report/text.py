"""The report for a terminal, by rich: made for 80 columns, and plain ASCII lines when it is piped.

Everything that others wrote (names, details, library messages) is shown through `words.clean` and as `Text`, so
that neither a control code nor rich's own markup in it is obeyed.
"""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from accelerando.bundle import Bundle
from accelerando.goal import Outcome
from accelerando.report import advice, words
from accelerando.report.healing import MOST_SHAPES, SPLIT
from accelerando.report.plain_text import LINES, WIDTH, plain
from accelerando.report.story import Story
from accelerando.trial import Refused

MOST_CUT = 200  # characters about a cut
EXAMPLES = 2  # of the recipes turned away for one reason
STYLE = {Outcome.MET: "bold green", Outcome.NOT_MET: "bold red", Outcome.UNSURE: "bold yellow"}


def render(bundle: Bundle, width: int = WIDTH) -> str:
    """The whole report as plain text: no colours, no control codes, and only what standard output can encode."""
    return plain(report(bundle), width)


def show(bundle: Bundle, console: Console | None = None) -> None:
    """Print the whole report; on a terminal with colours, at its width."""
    (console or Console()).print(report(bundle))


def report(bundle: Bundle) -> Group:
    """The whole report as one renderable."""
    story = Story(bundle)
    return Group(
        verdict(bundle),
        *_section("The ladder", _ladder(story)),
        *(_section("What was cut, and healed", _healings(story)) if story.healings else ()),
        *_section("What was tried", _tried(story)),
        *(_section("Shapes that were measured", _shapes(story)) if story.shapes else ()),
        *(_section("What was turned away, and why", _refusals(story)) if story.groups else ()),
        *_section("Where and how", _circumstances(story)),
    )


def verdict(bundle: Bundle) -> RenderableType:
    """The headline, every bound with its interval, doubts, and where it is not met what would help."""
    story = Story(bundle)
    outcome = bundle.verdict.outcome
    head = Text.assemble((outcome.value.upper(), STYLE[outcome]), ": ", words.clean(story.headline))
    evidence = story.best.evidence
    of = "that the search never saw" if story.best.certified else "of the search itself (not certified)"
    basis = Text(
        f"The best: {story.name(story.best.recipe)}. Judged on {len(evidence.scores)} samples {of}, and on "
        f"{len(evidence.rounds)} rounds against the original, batch {evidence.batch}; intervals are 95 %.",
        style="dim",
    )
    rows: list[RenderableType] = [head, Text(), _checks(story), Text(), basis]
    lists = {
        "Nearest": advice.nearest(story),
        "What would help": advice.helps(story),
        "Doubts": evidence.doubts(),
        "Notes": [words.clean(str(n)) for n in bundle.workload.get("notes", ())],
    }
    for title, items in lists.items():
        if items:
            rows += [Text(), Text(title, style="bold"), _bullets(list(items))]
    return Group(*rows)


def ladder(bundle: Bundle) -> RenderableType:
    """The ladder as a table."""
    return _ladder(Story(bundle))


def refusals(bundle: Bundle) -> RenderableType:
    """What was turned away, by reason, with an example and the remedy."""
    return _refusals(Story(bundle))


def _section(title: str, body: RenderableType) -> tuple[RenderableType, ...]:
    return Text(), Text(title, style="bold underline"), Text(), body


def _bullets(items: list[str]) -> Table:
    grid = Table.grid(padding=(0, 1))
    for item in items:
        grid.add_row("-", Text(words.clean(item)))
    return Padding(grid, (0, 0, 0, 1))  # type: ignore[return-value]


def _checks(story: Story) -> Table:
    table = Table(box=LINES, padding=(0, 1), show_edge=False, header_style="dim")
    for name in ("asked for", "measured", "verdict"):
        table.add_column(name)
    if not story.bundle.verdict.checks:
        table.add_row(Text(words.clean(story.bundle.goal.text)), "", "")
    for check in story.bundle.verdict.checks:
        bound = check.bound
        measured = words.between(check.interval, lambda v, b=bound: words.quantity(b, v, story.metric))
        style = STYLE[check.outcome].removeprefix("bold ")
        table.add_row(str(bound), measured, Text(check.outcome.value, style=style))
    return table


def _ladder(story: Story) -> Table:
    metric = story.metric
    unit = "points" if metric in words.SHARES else "its unit"
    table = Table(box=LINES, padding=(0, 1), show_edge=False, header_style="dim", pad_edge=False)
    table.add_column("")
    table.add_column("recipe", ratio=1)
    table.add_column("speedup\np50", no_wrap=True)
    table.add_column(f"{words.shorten(metric, 16)}\ndrop, {unit}", no_wrap=True)
    table.add_column("memory\nsize", justify="right", no_wrap=True)
    for number, rung in enumerate(story.bundle.ladder.rungs):
        evidence, best = rung.evidence, number == story.bundle.best
        drop = words.drop(metric, evidence.drop).replace(" points", "")
        name = Text(story.name(rung.recipe))
        if not rung.certified and number:
            name.append(" (not certified)", style="yellow")
        table.add_row(
            f"{number}{'*' if best else ''}",
            name,
            f"{words.between(evidence.speedup, words.times)}\n{words.seconds(evidence.latency().mid)}",
            f"{words.quality(metric, evidence.quality.mid)}\n{drop}",
            f"{words.size(evidence.peak_bytes)}\n{words.size(evidence.disk_bytes)}",
            style="bold" if best else "",
        )
    return table


def _tried(story: Story) -> RenderableType:
    line = story.effort
    if story.bundle.run.get("finished") is False:
        line += " It was not through with its plan, and can be resumed."
    table = Table(box=LINES, padding=(0, 1), show_edge=False, header_style="dim", pad_edge=False)
    table.add_column("with")
    for name in ("tried", "verified", "fastest", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for tally in story.tallies:
        best = words.times(tally.best.speedup.mid) if tally.best else "-"
        table.add_row(Text(tally.name), str(tally.tried), str(tally.verified), best, words.duration(tally.seconds))
    return Group(Text(line), Text(), table)


def _healings(story: Story) -> Group:
    """A few lines for each rung that was cut: what went, how far the quality fell, and how far it was healed."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for number, healing in enumerate(story.healings):
        if number:
            grid.add_row("", "")
        best = "*" if healing.recipe == story.best.recipe else ""
        lines = Table.grid(padding=(0, 1))
        lines.add_column(style="dim", no_wrap=True)
        lines.add_column()
        for what, line in healing.told():
            lines.add_row(what, Text(words.shorten(line, MOST_CUT)))
        grid.add_row(f"{healing.label}{best}", Group(Text(story.name(healing.recipe), style="bold"), lines))
    return Group(grid, Text(SPLIT, style="dim"))


def _shapes(story: Story) -> RenderableType:
    """Shapes before they were healed: how fast they are, and what their quality fell to."""
    table = Table(box=LINES, padding=(0, 1), show_edge=False, header_style="dim", pad_edge=False)
    table.add_column("cut", ratio=1)
    table.add_column("speedup", justify="right", no_wrap=True)
    table.add_column("before healing", justify="right", no_wrap=True)
    table.add_column("became", no_wrap=True)
    for shape in story.shapes[:MOST_SHAPES]:
        fell = shape.trial.evidence
        table.add_row(
            Text(", ".join(words.front(shape.front))),
            words.times(shape.speedup.mid),
            words.quality(fell.metric, fell.quality.mid) if fell else "not scored",
            shape.became,
        )
    rest = len(story.shapes) - MOST_SHAPES
    return Group(table, Text(f"and {rest} more", style="dim")) if rest > 0 else table


def _refusals(story: Story) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column()
    for group in story.groups:
        body = Text(group.reason.happened, style="bold")
        for trial in group.trials[:EXAMPLES]:
            assert isinstance(trial.outcome, Refused)
            detail = words.shorten(trial.outcome.detail, 220)
            body.append(f"\n{words.recipe(trial.recipe)}" + (f": {detail}" if detail else ""), style="not bold")
        if len(group.trials) > EXAMPLES:
            body.append(f"\nand {len(group.trials) - EXAMPLES} more", style="not bold")
        body.append(f"\n=> {group.reason.remedy}", style="not bold cyan")
        grid.add_row(str(len(group.trials)), body)
        grid.add_row("", "")
    return grid


def _circumstances(story: Story) -> Table:
    bundle = story.bundle
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    versions = ", ".join(f"{name} {version}" for name, version in bundle.machine.versions)
    rows = {
        "goal": bundle.goal.text,
        "machine": str(bundle.machine),
        "versions": versions,
        "bundle": str(bundle.path),
        "started": str(bundle.run.get("started", "")),
        "again": str(bundle.run.get("command") or ""),
    }
    for name, value in rows.items():
        if value:
            grid.add_row(name, Text(words.clean(value)))
    return grid
