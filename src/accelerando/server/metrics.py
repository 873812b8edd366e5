"""What a server tells Prometheus: every figure is read from the models' `Status` at the moment of the scrape.

Nothing is counted here, so nothing can be counted twice; the registry is made for one scrape, so no other library's
figures get in and none of ours gets out.  Labels are bounded: a model's name, a rung's number, and words of fixed
lists; a recipe's name is the label of one `_info` series for each rung.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from accelerando.goal import QUANTILES
from accelerando.interval import Interval
from accelerando.machine import installed_version
from accelerando.serve.status import BUCKETS, Histogram, RungStatus, Status
from accelerando.server.goal_watch import read
from accelerando.server.recent import statuses
from accelerando.server.repository import Repository
from accelerando.server.traffic import Traffic

STATES = ("ready", "loading", "out", "quarantined", "failed")
ENTRIES = ("READY", "LOADING", "UNAVAILABLE")
LONGEST = 200  # characters of a label that others wrote
Figure = Callable[[Status], float | None]

# name, what it is, how it is read; None: there is no such figure just now.
GAUGES: tuple[tuple[str, str, Figure], ...] = (
    ("queue_rows", "Rows that wait.", lambda s: s.queue_rows),
    ("arriving_rows_per_second", "Rows that arrive, averaged over about half a second.", lambda s: s.rate),
    ("standing_rung", "Number of the rung that is stood on; 0 is the original.", lambda s: s.standing),
    ("slowdown_ratio", "How many times slower than its cost a call takes just now.", lambda s: s.slowdown),
    ("utilization_ratio", "Share of the last seconds in which the executor worked.", lambda s: s.utilisation),
    ("attainment_ratio", "Share of all requests that were answered in time.", lambda s: s.attainment),
    (
        "effective_quality",
        "Mean over all rows of the certified quality, 0 for those not answered in time.",
        lambda s: None if math.isnan(s.effective_quality) else s.effective_quality,
    ),
    ("memory_bytes", "Memory that the loaded rungs hold.", lambda s: s.memory_bytes),
    ("memory_cap_bytes", "Memory that they may hold; absent where there is no cap.", lambda s: s.memory_cap),
    ("drifted_inputs", "How many drifts of the inputs are reported.", lambda s: len(s.drift)),
)
COUNTERS: tuple[tuple[str, str, Figure], ...] = (
    ("rows", "Rows that were answered.", lambda s: s.rows),
    ("switches", "Times that the governor changed its rung.", lambda s: s.switches),
    ("process_losses", "Times that the process that computed a batch was lost and replaced.", lambda s: s.losses),
    ("audited", "Requests that were answered again by the best rung, to compare.", lambda s: s.audited),
)
RUNG_GAUGES: tuple[tuple[str, str, Callable[[RungStatus], float | None]], ...] = (
    ("call_seconds", "What a call of one row takes here; absent for a rung that failed.", lambda r: r.seconds or None),
    ("memory_bytes", "Memory that the rung adds while it is loaded.", lambda r: r.bytes),
)
RUNG_INTERVALS: tuple[tuple[str, str, Callable[[RungStatus], Interval | None]], ...] = (
    ("quality", "Certified quality, in the metric's own unit.", lambda r: r.quality),
    ("drop", "Certified loss against the original, in the metric's own unit.", lambda r: r.drop),
    ("speedup_ratio", "Certified times faster than the original.", lambda r: r.speedup),
    ("agreement_ratio", "How often its answers agreed with the best rung's, where watched.", lambda r: r.agreement),
)
# Each request is in one of these, so that they add up.
OUTCOMES: tuple[tuple[str, Callable[[Status], int]], ...] = (
    ("in_time", lambda s: max(0, s.answered - s.late)),
    ("late", lambda s: s.late),
    ("refused", lambda s: s.refused),
    ("expired", lambda s: s.expired),
    ("failed", lambda s: s.failed),
    ("cancelled", lambda s: s.cancelled),
)


def exposition(
    shelf: Repository, accept: str = "", *, lost_log_lines: int | None = None, traffic: Traffic | None = None
) -> tuple[str, bytes]:
    """The text of a scrape, and its content type.

    Args:
        accept: the scraper's Accept header: OpenMetrics where it asks for it, else Prometheus' plain text.
        lost_log_lines: `Journal.lost`, where logs are written.
        traffic: the answers that were given, where they are counted.
    """
    registry = CollectorRegistry()
    registry.register(_Reading(shelf, lost_log_lines, traffic))
    ProcessCollector(registry=registry)
    try:
        encode, kind = choose_encoder(accept)
    except TypeError:  # a version that is not a number; the library compares it with one
        encode, kind = choose_encoder("")
    return kind, encode(registry)


class _Reading(Collector):
    """The models of a shelf at one moment, as metric families."""

    def __init__(self, shelf: Repository, lost_log_lines: int | None, traffic: Traffic | None) -> None:
        self.shelf, self.lost, self.traffic = shelf, lost_log_lines, traffic

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily(
            "accelerando_build",
            "The version that serves.",
            {"version": installed_version("accelerando") or "unknown", "python": platform.python_version()},
        )
        yield GaugeMetricFamily(
            "accelerando_ready", "Whether every model that should be loaded is.", float(self.shelf.ready)
        )
        yield self._entries()
        if self.lost is not None:
            yield CounterMetricFamily("accelerando_log_lines_lost", "Lines of the log not written.", self.lost)
        if self.traffic is not None:
            yield _answers(self.traffic)
        found = statuses(self.shelf)
        yield from _models(found)
        yield from _rungs(found)

    def _entries(self) -> Metric:
        family = GaugeMetricFamily("accelerando_models", "Models and versions by state.", labels=["state"])
        states = [entry.state for entry in self.shelf.index()]
        for state in ENTRIES:
            family.add_metric([state.lower()], states.count(state))
        return family


def _answers(traffic: Traffic) -> Metric:
    words = "Answers by protocol and status, those among them to what never came to a model."
    family = CounterMetricFamily("accelerando_answers", words, labels=["protocol", "status"])
    for labels, count in sorted(traffic.answers.items()):
        family.add_metric(labels, count)
    return family


def _models(found: Sequence[Status]) -> Iterator[Metric]:
    info = InfoMetricFamily("accelerando_model", "Which bundle of a model answers.", labels=["model"])
    requests = CounterMetricFamily(
        "accelerando_requests", "Requests that came to an end, each in one outcome.", labels=["model", "outcome"]
    )
    for status in found:
        info.add_metric([clean(status.name)], {"version": str(status.version), "metric": clean(status.metric)})
        for outcome, count in OUTCOMES:
            requests.add_metric([clean(status.name), outcome], count(status))
    yield info
    yield requests
    for name, words, read_counter in COUNTERS:
        yield _each(CounterMetricFamily(f"accelerando_{name}", words, labels=["model"]), found, read_counter)
    for name, words, read_gauge in GAUGES:
        yield _each(GaugeMetricFamily(f"accelerando_{name}", words, labels=["model"]), found, read_gauge)
    yield _latencies("queued", "Seconds that requests waited.", [(s.name, s.queued) for s in found])
    yield _latencies("computed", "Seconds that the batches of requests took.", [(s.name, s.computed) for s in found])
    yield from _goals(found)


def _each(
    family: CounterMetricFamily | GaugeMetricFamily, found: Iterable[Status], figure: Figure
) -> CounterMetricFamily | GaugeMetricFamily:
    for status in found:
        value = figure(status)
        if value is not None:
            family.add_metric([clean(status.name)], value)
    return family


def _latencies(what: str, words: str, found: Iterable[tuple[str, Histogram]]) -> Metric:
    family = HistogramMetricFamily(f"accelerando_{what}_seconds", words, labels=["model"])
    ends = [*map(str, BUCKETS), "+Inf"]
    for name, histogram in found:
        family.add_metric([clean(name)], list(zip(ends, accumulate(histogram.counts), strict=True)), histogram.total)
    return family


def _goals(found: Iterable[Status]) -> Iterator[Metric]:
    """What is asked for, so that a graph can draw it beside what is reached."""
    seconds = GaugeMetricFamily(
        "accelerando_goal_latency_seconds", "What the goal allows at p50, p95 or p99.", labels=["model", "figure"]
    )
    rate = GaugeMetricFamily(
        "accelerando_goal_rows_per_second", "Rows per second that the goal asks for.", labels=["model"]
    )
    for status in found:
        goal = read(status.goal)
        for bound in goal.bounds if goal else ():
            if bound.quantity in QUANTILES:
                seconds.add_metric([clean(status.name), f"p{round(QUANTILES[bound.quantity] * 100)}"], bound.value)
            elif bound.quantity == "throughput":
                rate.add_metric([clean(status.name)], bound.value)
    yield seconds
    yield rate


def _rungs(found: Sequence[Status]) -> Iterator[Metric]:
    each = [([clean(status.name), str(rung.number)], rung) for status in found for rung in status.rungs]
    labels = ["model", "rung"]
    info = InfoMetricFamily("accelerando_rung", "How a rung was made.", labels=labels)
    state = GaugeMetricFamily("accelerando_rung_state", "1 for the state that a rung is in.", labels=[*labels, "state"])
    rows = CounterMetricFamily("accelerando_rung_rows", "Rows that a rung has answered.", labels=labels)
    for names, rung in each:
        info.add_metric(names, {"recipe": clean(rung.recipe)})
        rows.add_metric(names, rung.answered)
        for one in STATES:
            state.add_metric([*names, one], float(rung.state == one))
    yield info
    yield state
    yield rows
    for name, words, figure in RUNG_GAUGES:
        gauge = GaugeMetricFamily(f"accelerando_rung_{name}", words, labels=labels)
        for names, rung in each:
            measured = figure(rung)
            if measured is not None:
                gauge.add_metric(names, measured)
        yield gauge
    for name, words, interval in RUNG_INTERVALS:
        gauge = GaugeMetricFamily(f"accelerando_rung_{name}", words, labels=[*labels, "bound"])
        for names, rung in each:
            value = interval(rung)
            for bound in ("low", "mid", "high") if value else ():
                gauge.add_metric([*names, bound], getattr(value, bound))
        yield gauge


def clean(text: str) -> str:
    """A label of what others wrote: bounded, and whole in UTF-8."""
    text = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    return text.encode("utf-8", "replace").decode("utf-8")
