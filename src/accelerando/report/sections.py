"""The sections of the page, each an element; a section that has nothing to say is None."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from accelerando.goal import Check, Outcome
from accelerando.interval import Interval
from accelerando.report import advice, plots, words
from accelerando.report.elements import Child, data, el, fine, table
from accelerando.report.plane import picture
from accelerando.report.story import Story
from accelerando.trial import Refused

TONE = {Outcome.MET: "met", Outcome.NOT_MET: "missed", Outcome.UNSURE: "unsure"}
DETAIL = 1500  # characters of a refusal's detail


def section(identity: str, title: str, lead: str, *children: Child) -> Element:
    return el(
        "section", el("h2", title, id=f"{identity}-title"), el("p", lead, class_="lead"), *children,
        id=identity, aria_labelledby=f"{identity}-title",
    )  # fmt: skip


def plot(identity: str, figure: plots.Figure, description: str) -> Element:
    """A place for a plot, and its data; the description is what a screen reader says."""
    height = int(figure["height"])
    return el(
        "figure",
        el("div", class_="plot", id=f"{identity}-plot", role="img", aria_label=description, style=f"height:{height}px"),
        data(f"{identity}-data", figure),
        data_plot=identity,
    )


def bullets(items: list[str] | tuple[str, ...], title: str) -> Element | None:
    return el("div", el("h3", title), el("ul", *(el("li", fine(i)) for i in items))) if items else None


def hero(story: Story) -> Element:
    """The verdict: what a reader in a hurry takes away."""
    outcome, evidence = story.bundle.verdict.outcome, story.best.evidence
    speed = evidence.speedup
    found = story.bundle.best > 0
    big = fine(words.faster(speed)).capitalize() if found else "The original stays"
    doubts = evidence.doubts()
    under = (
        f"{words.recipe(story.best.recipe)}. The true figure lies between {words.times(speed.low)} and "
        f"{words.times(speed.high)}, with {speed.confidence:.0%} confidence."
        if found
        else "Nothing was proven to be better."
    )
    return el(
        "header",
        el("p", "accelerando", class_="brand"),
        el("p", el("span", outcome.value.upper(), class_="badge"), " ", el("code", story.bundle.goal.text)),
        el("h1", big),
        el("p", fine(under), class_="under"),
        el("p", f"In doubt: {'; '.join(doubts)}.", class_="doubt") if doubts else None,
        cards(story),
        class_=f"hero {TONE[outcome]}",
    )


def cards(story: Story) -> Element:
    """Before and after, in four figures."""
    evidence, metric = story.best.evidence, story.metric
    memory, disk = evidence.original_peak_bytes, evidence.original_disk_bytes
    figures = [
        (
            "time per call (p50)",
            words.seconds(evidence.latency().mid),
            f"was {words.seconds(evidence.original_latency().mid)}",
        ),
        (metric, words.quality(metric, evidence.quality.mid), f"drop {words.drop(metric, evidence.drop)}"),
        ("memory while running", words.size(evidence.peak_bytes), f"was {words.size(memory)}"),
        ("size on disk", words.size(evidence.disk_bytes), f"was {words.size(disk)}"),
    ]
    return el(
        "dl",
        *(
            el("div", el("dt", name), el("dd", fine(value)), el("dd", fine(was), class_="was"))
            for name, value, was in figures
        ),
        class_="cards",
    )


def verdict(story: Story) -> Element:
    """Every bound with its interval; doubts; the nearest misses and what would help."""
    evidence = story.best.evidence
    of = "that the search never saw" if story.best.certified else "of the search itself (not certified)"
    lead = (
        f"A bound is met only when the whole interval is on its good side. Judged on {len(evidence.scores)} samples "
        f"{of}, and on {len(evidence.rounds)} rounds of a duel with the original, batch {evidence.batch}."
    )
    rows: list[list[Child]] = [
        [fine(str(c.bound)), fine(measured(story, c)), el("span", c.outcome.value, class_=TONE[c.outcome])]
        for c in story.bundle.verdict.checks
    ]
    return section(
        "verdict", "The verdict", lead,
        table(["asked for", "measured, with its interval", "verdict"], rows, "Every bound of the goal"),
        bullets(advice.nearest(story), "The nearest"),
        bullets(advice.helps(story), "What would help"),
        bullets(evidence.doubts(), "Doubts"),
        bullets([str(n) for n in story.bundle.workload.get("notes", ())], "Notes"),
    )  # fmt: skip


def measured(story: Story, check: Check) -> str:
    return words.between(check.interval, lambda v: words.quantity(check.bound, v, story.metric))


def plane(story: Story) -> Element:
    lead = (
        f"Every recipe that was measured ({len(story.seen)}). Further right is faster, further up is better; the "
        "crosses are the intervals. Triangles at the lower edge lost more quality than the plot shows."
    )
    return section(
        "plane", "Speed and quality", lead,
        plot("plane", picture(story), f"{story.headline}; the table of the ladder holds the same figures"),
    )  # fmt: skip


def ladder(story: Story) -> Element:
    metric = story.metric
    rows: list[list[Child]] = []
    for number, rung in enumerate(story.bundle.ladder.rungs):
        evidence = rung.evidence
        name = story.name(rung.recipe)
        marks = " the best" if number == story.bundle.best else "" if rung.certified or not number else " not certified"
        rows.append([
            str(number), el("span", name, el("em", marks) if marks else None), interval(evidence.speedup, words.times),
            interval(evidence.latency(), words.seconds), interval(evidence.latency(0.99), words.seconds),
            fine(words.quality(metric, evidence.quality.mid)),
            interval(evidence.drop, lambda v: words.difference(metric, v)),
            words.size(evidence.peak_bytes), words.size(evidence.disk_bytes),
        ])  # fmt: skip
    unit = "points" if metric in words.SHARES else "its unit"
    head = ["rung", "recipe", "speedup", "p50", "p99", metric, f"drop, {unit}", "memory", "size"]
    lead = "Verified versions worth keeping, each clearly faster than the one before. All of them are in the bundle."
    return section(
        "ladder", "The ladder", lead,
        table(head, rows, "The rungs of the ladder", frozenset({2, 3, 4, 5, 6, 7, 8})),
    )  # fmt: skip


def interval(value: Interval, say: object) -> Element:
    """A figure, and its bounds below it in small."""
    text = fine(words.between(value, say))
    mid, _, bounds = text.partition(" (")
    return el("span", mid, el("small", bounds.rstrip(")")) if bounds else None)


def way(story: Story) -> Element | None:
    legs = story.way
    if not legs:
        return None
    apart = [leg.added for leg in legs if leg.together]
    note = f"Not measured apart, so shown as one step: {'; '.join(apart)}." if apart else None
    rows: list[list[Child]] = [
        [leg.added, interval(leg.seen.evidence.speedup, words.times),
         fine(words.times(leg.gain)) + ("" if leg.clear else " (not clear)"),
         fine(words.drop(story.metric, leg.seen.evidence.drop)), fine(leg.brought(story.metric)) or "not clear"]
        for leg in legs
    ]  # fmt: skip
    return section(
        "way", "What each step brought",
        "From the original to the best, over simpler versions of the best that were measured themselves.",
        plot("way", plots.way(story), "Speedup after each step; the table below holds the same figures"),
        table(["step", "speedup after it", "by this step", "drop after it", "quality by this step"], rows,
              "The way to the best", frozenset({1, 2, 4})),
        el("p", note, class_="note") if note else None,
    )  # fmt: skip


def latency(story: Story) -> Element:
    rows: list[list[Child]] = []
    arms = [(str(i), story.name(r.recipe), r.evidence) for i, r in enumerate(story.bundle.ladder.rungs)]
    for number, name, evidence in arms:
        quantiles = [interval(evidence.latency(q), words.seconds) for q in (0.5, 0.95, 0.99)]
        rows.append(
            [number, name, *quantiles, words.seconds(float(evidence.seconds.max())), str(len(evidence.seconds))]
        )
    return section(
        "latency", "How long a call takes",
        "The share of calls that are answered within a time. Further left is faster; steeper is steadier.",
        plot("latency", plots.latency(story), "Distributions of seconds per call; the table below holds the quantiles"),
        table(["rung", "recipe", "p50", "p95", "p99", "longest", "calls"], rows, "Quantiles of the time per call",
              frozenset({2, 3, 4, 5, 6})),
    )  # fmt: skip


def tried(story: Story) -> Element | None:
    if not story.trials:
        return None
    rows: list[list[Child]] = [
        [t.name, str(t.tried), str(t.verified), interval(t.best.speedup, words.times) if t.best else "none",
         words.duration(t.seconds)]
        for t in story.tallies
    ]  # fmt: skip
    return section(
        "tried", "What was tried", story.effort,
        plot("learning", plots.learning(story), "The best speedup over the time of the search"),
        table(["with", "tried", "verified", "fastest", "time"], rows, "By backend and technique",
              frozenset({1, 2, 3, 4})),
    )  # fmt: skip


def refusals(story: Story) -> Element | None:
    """Everything that was turned away, by reason; long details fold away."""
    if not story.groups:
        return None
    groups = []
    for group in story.groups:
        items = []
        for trial in group.trials:
            assert isinstance(trial.outcome, Refused)
            detail = words.clean(trial.outcome.detail)
            detail = detail if len(detail) <= DETAIL else detail[:DETAIL] + " ..."
            items.append(el("li", el("strong", words.recipe(trial.recipe)), el("pre", detail) if detail else None))
        count = words.count(len(group.trials), "recipe")
        groups.append(
            el(
                "details",
                el("summary", el("span", group.reason.happened), el("span", count, class_="count")),
                el("p", el("b", "What to do: "), group.reason.remedy),
                el("ul", *items),
            )
        )
    return section(
        "refusals", "What was turned away, and why", "Each with its reason and what to do about it.", *groups
    )


def circumstances(story: Story) -> Element:
    """The machine, and how to get these figures again."""
    bundle, machine = story.bundle, story.bundle.machine
    workload, run = bundle.workload, bundle.run
    caches = ", ".join(f"{name} {size / 1024:.0f} KiB" for name, size in machine.caches)
    splits = ", ".join(
        f"{workload[k]} to {k}" for k in ("calibrate", "select", "certify") if workload.get(k) is not None
    )
    facts = {
        "processor": machine.cpu,
        "cores": str(machine.cores),
        "instructions": " ".join(machine.isa) or "none found",
        "caches": caches,
        "memory": f"{machine.memory_bytes / 2**30:.0f} GiB",
        "accelerators": ", ".join(machine.accelerators) or "none",
        "system": f"{machine.system}, Python {machine.python}",
        "versions": ", ".join(f"{name} {version}" for name, version in machine.versions),
        "model": f"{workload.get('form', '')}; {'; '.join(map(str, bundle.signature.inputs))}",
        "samples": splits,
        "digest of model and data": str(workload.get("digest", "")),
        "recipe's key": story.best.recipe.key,
        "seed": str(run["seed"]) if run.get("seed") is not None else "",
        "started": str(run.get("started", "")),
        "bundle": str(bundle.path),
    }
    command = str(run.get("command") or "")
    again = [el("h3", "The same again"), el("pre", command, class_="command")] if command else []
    pairs = [e for name, value in facts.items() if value for e in (el("dt", name), el("dd", words.clean(value)))]
    return section(
        "machine", "Where, and how to get it again",
        "The figures hold for this machine and these versions. On another, measure again: accelerando bench.",
        el("dl", *pairs, class_="facts"), *again,
    )  # fmt: skip
