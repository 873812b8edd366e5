"""The text that Prometheus scrapes: what it says, what may fall in it, and that its labels are bounded."""

from __future__ import annotations

import dataclasses

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from recently import busy
from shelf import FakeServed, FakeShelf, fake_status

from accelerando.serve.status import BUCKETS, Status
from accelerando.server.metrics import LONGEST, exposition
from accelerando.server.traffic import Traffic

ODD = 'a "quoted" \\ name\nwith \u00e9 and <script>' + "x" * 400
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Told(FakeServed):
    """A model that tells the status that it is given."""

    def __init__(self, status: Status) -> None:
        super().__init__()
        self.told = status

    def status(self) -> Status:
        return self.told


def shelf_of(*found: Status) -> FakeShelf:
    return FakeShelf({status.name: Told(status) for status in found}, out={"away": FakeServed()})


def scraped(shelf: FakeShelf, accept: str = "") -> Samples:
    kind, body = exposition(shelf, accept)
    parse = openmetrics.text_string_to_metric_families if "openmetrics" in kind else text_string_to_metric_families
    samples = [sample for family in parse(body.decode()) for sample in family.samples]
    read = {(s.name, tuple(sorted(s.labels.items()))): s.value for s in samples}
    assert len(read) == len(samples), "a series was told twice"
    return read


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0, text/plain;q=0.5"])
def test_the_figures_of_a_status_are_told_as_they_are(accept: str) -> None:
    found = scraped(shelf_of(busy()), accept)
    model = {"model": "digits"}
    assert of(found, "accelerando_requests_total", **model, outcome="in_time") == 197
    assert of(found, "accelerando_requests_total", **model, outcome="late") == 3
    assert of(found, "accelerando_requests_total", **model, outcome="refused") == 20
    assert of(found, "accelerando_rows_total", **model) == 200
    assert of(found, "accelerando_standing_rung", **model) == 1
    assert of(found, "accelerando_memory_cap_bytes", **model) == 10_000_000
    assert of(found, "accelerando_goal_latency_seconds", **model, figure="p99") == 0.02
    assert of(found, "accelerando_drifted_inputs", **model) == 1
    assert of(found, "accelerando_rung_state", **model, rung="1", state="ready") == 1
    assert of(found, "accelerando_rung_state", **model, rung="1", state="out") == 0
    assert of(found, "accelerando_rung_agreement_ratio", **model, rung="1", bound="low") == 0.97
    assert ("accelerando_rung_agreement_ratio", (("bound", "low"), ("model", "digits"), ("rung", "0"))) not in found
    assert of(found, "accelerando_models", state="ready") == 1
    assert of(found, "accelerando_models", state="unavailable") == 1
    assert of(found, "accelerando_ready") == 1
    assert any(name == "accelerando_build_info" for name, _ in found)
    assert any(name == "process_resident_memory_bytes" for name, _ in found)


def test_a_figure_that_does_not_exist_has_no_series() -> None:
    found = scraped(shelf_of(busy(effective_quality=float("nan"))))
    assert not [key for key in found if key[0] == "accelerando_effective_quality"]
    assert [key for key in scraped(shelf_of(busy())) if key[0] == "accelerando_effective_quality"]


def test_a_rung_that_failed_has_no_seconds() -> None:
    whole = busy()
    failed = dataclasses.replace(whole.rungs[0], state="failed", why="no such operator", seconds=0.0)
    found = scraped(shelf_of(dataclasses.replace(whole, rungs=(failed, *whole.rungs[1:]))))
    timed = [dict(labels)["rung"] for name, labels in found if name == "accelerando_rung_call_seconds"]
    assert timed == ["1"]
    assert of(found, "accelerando_rung_state", model="digits", rung="0", state="failed") == 1


def test_the_content_type_is_what_the_scraper_asked_for() -> None:
    shelf = shelf_of(busy())
    assert exposition(shelf, "")[0].startswith("text/plain; version=0.0.4")
    kind, body = exposition(shelf, "application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")
    for odd in ("application/openmetrics-text; version=newest", "*/*;;;=", "\u00e9", ",,,", "text/plain; version=x.y"):
        assert exposition(shelf, odd)[1]


def test_histograms_are_cumulative_and_end_with_the_count() -> None:
    found = scraped(shelf_of(busy()))
    ends = [*map(float, BUCKETS), float("inf")]
    buckets = {
        float(dict(labels)["le"]): value
        for (name, labels), value in found.items()
        if name == "accelerando_queued_seconds_bucket"
    }
    assert sorted(buckets) == ends
    values = [buckets[end] for end in ends]
    assert values == sorted(values)
    assert values[:2] == [0, 150]
    assert values[-1] == of(found, "accelerando_queued_seconds_count", model="digits") == 200
    assert of(found, "accelerando_queued_seconds_sum", model="digits") == 9.0


def test_counters_never_fall_from_scrape_to_scrape() -> None:
    before, after = scraped(shelf_of(busy(times=1))), scraped(shelf_of(busy(times=3)))
    counters = [
        key for key in before if key[0].endswith(("_total", "_bucket", "_count", "_sum")) and "accelerando" in key[0]
    ]
    assert len(counters) > 40
    assert all(after[key] >= before[key] for key in counters)
    assert any(after[key] > before[key] for key in counters)


def test_scrapes_are_the_same_while_nothing_happens_and_the_global_registry_stays_clean() -> None:
    from prometheus_client import REGISTRY

    shelf = shelf_of(busy())
    ours = [{k: v for k, v in scraped(shelf).items() if k[0].startswith("accelerando")} for _ in range(3)]
    assert ours[0] == ours[1] == ours[2]
    assert not [family for family in REGISTRY.collect() if family.name.startswith("accelerando")]


def test_what_others_wrote_is_bounded_and_can_not_break_the_text() -> None:
    status = busy(ODD)
    status = dataclasses.replace(
        status, rungs=tuple(dataclasses.replace(r, recipe=ODD + "\ud800") for r in status.rungs)
    )
    for accept in ("", "application/openmetrics-text; version=1.0.0"):
        found = scraped(shelf_of(status), accept)
        models = {dict(labels).get("model") for _, labels in found} - {None}
        assert models == {ODD[: LONGEST - 3] + "..."}
        assert all(len(value) <= LONGEST for _, labels in found for _, value in labels)


def test_labels_do_not_grow_with_traffic_reasons_or_goals() -> None:
    first = set(scraped(shelf_of(busy())))
    later = busy(times=9, goal="p99 <= 31ms", stands=busy().stands * 30, drift=("a", "b", "c"))
    assert set(scraped(shelf_of(later))) == first


def test_a_model_without_requests_or_cap_and_a_shelf_without_models_can_be_scraped() -> None:
    found = scraped(shelf_of(fake_status("new", goal="")))
    assert of(found, "accelerando_queued_seconds_count", model="new") == 0
    assert ("accelerando_memory_cap_bytes", (("model", "new"),)) not in found
    assert of(scraped(FakeShelf({}, ready=False)), "accelerando_ready") == 0


def test_lost_log_lines_are_told_where_logs_are_written() -> None:
    assert b"accelerando_log_lines_lost_total 3.0" in exposition(shelf_of(busy()), lost_log_lines=3)[1]
    assert b"log_lines" not in exposition(shelf_of(busy()))[1]


def test_answers_that_came_to_no_model_are_told_too() -> None:
    traffic = Traffic()
    traffic.gave("http", 200)
    traffic.gave("http", 400)
    traffic.gave("http", 400)
    traffic.gave("grpc", "NOT_FOUND")
    found = exposition(shelf_of(busy()), traffic=traffic)[1].decode()
    assert 'accelerando_answers_total{protocol="http",status="400"} 2.0' in found
    assert 'accelerando_answers_total{protocol="grpc",status="NOT_FOUND"} 1.0' in found
