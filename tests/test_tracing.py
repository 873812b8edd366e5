"""A span for each request, and nothing at all where tracing is off."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import StatusCode
from shelf import WHY

from accelerando.errors import DataError, DeadlineError, MissingExtraError, OverloadedError, RowsError, UsageError
from accelerando.server import tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans() -> Iterator[tuple[tracing.Tracing, InMemorySpanExporter]]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield tracing.over(provider), exporter
    provider.shutdown()


def test_a_span_tells_how_the_answer_came_about(spans: tuple[tracing.Tracing, InMemorySpanExporter]) -> None:
    tracer, exporter = spans
    with tracer.request(
        "digits", "http", [(b"TraceParent", PARENT.encode()), (b"tracestate", b"a=b"), (b"x", b"\xff")]
    ) as trace:
        trace.answered(WHY, rows=3)
    (span,) = exporter.get_finished_spans()
    told = dict(span.attributes or {})
    assert span.name == "infer digits"
    assert told["accelerando.outcome"] == "in_time"
    assert (told["accelerando.rung"], told["accelerando.rows"], told["accelerando.batch_rows"]) == (1, 3, WHY.rows)
    assert (told["accelerando.queued_seconds"], told["accelerando.computed_seconds"]) == (WHY.queued, WHY.computed)
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x}" == f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
    assert span.status.is_unset


@pytest.mark.parametrize("headers", [[], [("traceparent", "nonsense")], [(b"traceparent", b"00-" + b"f" * 400)]])
def test_a_request_without_a_good_parent_begins_a_trace(
    headers: list[tuple[Any, Any]], spans: tuple[tracing.Tracing, InMemorySpanExporter]
) -> None:
    tracer, exporter = spans
    with tracer.request("digits", "grpc", headers) as trace:
        trace.answered(WHY, rows=1, late=True)
    (span,) = exporter.get_finished_spans()
    assert span.parent is None
    assert dict(span.attributes or {})["accelerando.outcome"] == "late"


@pytest.mark.parametrize(
    ("error", "outcome", "bad"),
    [
        (OverloadedError("full"), "refused", True), (DeadlineError("past"), "expired", True),
        (RowsError("nan"), "failed", True), (ValueError("odd"), "failed", True),
        (CancelledError(), "cancelled", False), (DataError("shape"), "invalid", False),
    ],
)  # fmt: skip
def test_a_span_ends_with_its_request_whichever_way_that_goes(
    error: Exception, outcome: str, bad: bool, spans: tuple[tracing.Tracing, InMemorySpanExporter]
) -> None:
    tracer, exporter = spans
    with pytest.raises(type(error)), tracer.request("digits", "http"):
        raise error
    (span,) = exporter.get_finished_spans()
    assert dict(span.attributes or {})["accelerando.outcome"] == outcome
    assert dict(span.attributes or {})["error.type"] == type(error).__name__
    assert (span.status.status_code is StatusCode.ERROR) == bad
    assert (span.status.description or None) == (str(error) if bad else None)


def test_a_caller_that_does_not_sample_is_obeyed() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=ParentBased(ALWAYS_ON), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with tracing.over(provider).request("digits", "http", [("traceparent", PARENT[:-2] + "00")]) as trace:
        trace.answered(WHY, rows=1)
    assert exporter.get_finished_spans() == ()
    provider.shutdown()


def test_off_does_nothing_and_imports_nothing() -> None:
    code = (
        "import sys; from accelerando.server import tracing\n"
        "with tracing.OFF.request('m', 'http', [(b'traceparent', b'x')]) as t: t.answered(None, 1)\n"
        "tracing.OFF.close(); assert not [m for m in sys.modules if m.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'accelerando\[traces\]'"):
        tracing.to_collector("http://127.0.0.1:4318")
    with pytest.raises(UsageError, match=r"127\.0\.0\.1:4318"):
        tracing.to_collector("localhost:4318")
