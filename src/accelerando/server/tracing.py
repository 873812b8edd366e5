"""OpenTelemetry spans, one for each request, where `opentelemetry-sdk` is installed and tracing was asked for.

    tracing = OFF                                     # or over(provider), or to_collector("http://127.0.0.1:4318")
    with tracing.request("digits", "http", headers) as trace:
        ...
        trace.answered(answer.why, rows)

The caller's trace goes on (W3C Trace Context: `traceparent`, `tracestate`), and its choice to sample is honoured.
Nothing of OpenTelemetry is imported here until a provider is asked for; `OFF` costs less than a microsecond.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Protocol

from accelerando.errors import DeadlineError, MissingExtraError, OverloadedError, UsageError
from accelerando.machine import installed_version
from accelerando.serve.tickets import Explanation

Headers = Iterable[tuple[Any, Any]]  # of ASGI, pairs of bytes; of gRPC, pairs of texts
CONTEXT = ("traceparent", "tracestate")


class Trace(Protocol):
    """One request, while it is under way; a context manager."""

    def answered(self, why: Explanation, rows: int, late: bool = False) -> None:
        """Tell how the answer came about; `rows` are the request's own."""

    def __enter__(self) -> Trace: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Tracing(Protocol):
    """Makes traces."""

    def request(self, model: str, protocol: str, headers: Headers = ()) -> Trace:
        """The trace of a request; `protocol` http or grpc, `headers` as the caller sent them."""

    def close(self) -> None:
        """Send what has not been sent."""


class _Nothing:
    """Tracing that is off, and every trace of it: one object, which does nothing."""

    def request(self, model: str, protocol: str, headers: Headers = ()) -> Trace:
        return self

    def answered(self, why: Explanation, rows: int, late: bool = False) -> None:
        return

    def close(self) -> None:
        return

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


OFF: Tracing = _Nothing()


def over(provider: Any) -> Tracing:
    """Spans by a `TracerProvider` that the caller has set up; `close` leaves it open.

    Raises:
        MissingExtraError: OpenTelemetry is not installed.
    """
    _need("opentelemetry.trace")
    return _Spans(provider, owned=False)


def to_collector(endpoint: str) -> Tracing:
    """Spans sent to a collector in batches, by OTLP over HTTP; `OTEL_*` variables say the rest.

    Args:
        endpoint: `http://host:4318`; `/v1/traces` is added.

    Raises:
        UsageError: the endpoint is no address of HTTP.
        MissingExtraError: the SDK or the exporter is not installed.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise UsageError(f"traces go to a collector such as http://127.0.0.1:4318, but {endpoint!r} was given")
    _need("opentelemetry.sdk.trace")
    _need("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create(
        {"service.name": "accelerando", "service.version": installed_version("accelerando") or "unknown"}
    )
    provider = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))  # bounded, drops what it can't send
    return _Spans(provider, owned=True)


def _need(module: str) -> None:
    try:
        found = find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise MissingExtraError(f"traces need {module}, which is not installed: pip install 'accelerando[traces]'")


class _Spans:
    """Makes spans; the imports of OpenTelemetry are kept here."""

    def __init__(self, provider: Any, *, owned: bool) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._owned = provider, owned
        self._tracer = provider.get_tracer("accelerando", installed_version("accelerando"))
        self._context = TraceContextTextMapPropagator()
        self._kind = SpanKind.SERVER

    def request(self, model: str, protocol: str, headers: Headers = ()) -> Trace:
        names = ((_text(key).lower(), value) for key, value in headers)
        carrier = {name: _text(value) for name, value in names if name in CONTEXT}
        span = self._tracer.start_span(
            f"infer {model}",
            context=self._context.extract(carrier),  # an empty or a broken one begins a trace of its own
            kind=self._kind,
            attributes={"accelerando.model": model, "network.protocol.name": protocol},
        )
        return _Spanned(span)

    def close(self) -> None:
        if self._owned:
            self._provider.shutdown()


@dataclass
class _Spanned:
    """A request's span; it ends with the request, whichever way that goes."""

    span: Any
    outcome: str = ""

    def answered(self, why: Explanation, rows: int, late: bool = False) -> None:
        self.outcome = "late" if late else "in_time"
        self.span.set_attributes(
            {
                "accelerando.rung": why.rung,
                "accelerando.recipe": why.recipe,
                "accelerando.quality": why.quality.mid,
                "accelerando.queued_seconds": why.queued,
                "accelerando.computed_seconds": why.computed,
                "accelerando.rows": rows,
                "accelerando.batch_rows": why.rows,
                "accelerando.reason": why.reason,
                "accelerando.version": why.version,
            }
        )

    def __enter__(self) -> _Spanned:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.outcome = outcome_of(error)
            self.span.set_attribute("error.type", type(error).__name__)
            if self.outcome in ("refused", "expired", "failed"):
                self._fail(str(error)[:500])
        self.span.set_attribute("accelerando.outcome", self.outcome or "not answered")
        self.span.end()

    def _fail(self, words: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        self.span.set_status(Status(StatusCode.ERROR, words))


def outcome_of(error: BaseException) -> str:
    """What became of a request that ended in an error: the metrics' words, or `invalid`, its caller's mistake."""
    if isinstance(error, OverloadedError):
        return "refused"
    if isinstance(error, DeadlineError):
        return "expired"
    if isinstance(error, (asyncio.CancelledError, CancelledError)):
        return "cancelled"
    return "invalid" if isinstance(error, UsageError) else "failed"


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)
