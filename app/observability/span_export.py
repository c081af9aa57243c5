"""Sends spans to an OpenTelemetry collector, in a thread and in batches. Needs the extra `otel`."""

import time
from collections.abc import Sequence

import structlog
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

# Such as /send-notification/ada@example.com.
_WITH_ADDRESSES = ("url.full", "url.path", "url.query")

log = structlog.get_logger(__name__)


def make_provider() -> TracerProvider:
    """Return a provider that exports spans as the OTEL_* variables say.

    Raises ValueError or RuntimeError if one of them is invalid.
    """
    # The SDK would flush at the exit of the process, and wait for a dead collector for long. The
    # lifespan of the service flushes instead.
    provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
    # The queue is bounded (OTEL_BSP_MAX_QUEUE_SIZE). While the collector is away, spans are
    # dropped, and neither requests nor tasks wait.
    exporter = HideAddresses(ReportOutages(OTLPSpanExporter()))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _resource() -> Resource:
    """Return the description of this process. OTEL_SERVICE_NAME wins over the name `afterward`."""
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "afterward"}))
    return resource


class HideAddresses(SpanExporter):
    """Hides the path and the query of requests, because they may contain a mail address.

    It does so at the export, so it does not matter at what time an attribute is set. The span still
    has the path as the route defines it, such as `/send-notification/{email}`.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Export a batch by the other exporter, without the addresses."""
        return self._exporter.export([_without_addresses(span) for span in spans])

    def shutdown(self) -> None:
        """Shut the other exporter down."""
        self._exporter.shutdown()


def _without_addresses(span: ReadableSpan) -> ReadableSpan:
    """Return the span itself if it has no address, or else a copy: a span that ended is fixed."""
    attributes = span.attributes or {}
    hidden = {name: "REDACTED" for name in _WITH_ADDRESSES if name in attributes}
    if not hidden:
        return span
    return ReadableSpan(
        name=span.name,
        context=span.get_span_context(),
        parent=span.parent,
        resource=span.resource,
        attributes={**attributes, **hidden},
        events=span.events,
        links=span.links,
        kind=span.kind,
        status=span.status,
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


class ReportOutages(SpanExporter):
    """Exports spans by another exporter, and logs the beginning and the end of an outage.

    Without it, each batch that fails would be several log lines.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._failing_since: float | None = None
        self._lost = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Export a batch. If that fails, the batch is lost."""
        result = self._exporter.export(spans)
        if result is SpanExportResult.FAILURE:
            self._note_failure(len(spans))
        elif self._failing_since is not None:
            self._note_success(self._failing_since)
        return result

    def _note_failure(self, spans: int) -> None:
        self._lost += spans
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            log.warning(
                "traces cannot be exported",
                effect="spans are lost; requests and tasks are not affected",
                remedy="check the collector and the OTEL_EXPORTER_OTLP_* variables; with "
                "LOG_LEVEL=DEBUG each failed batch is logged with its reason",
            )

    def _note_success(self, failing_since: float) -> None:
        log.warning(
            "traces are exported again",
            lost_spans=self._lost,
            away_for=round(time.monotonic() - failing_since, 1),
        )
        self._failing_since, self._lost = None, 0

    def shutdown(self) -> None:
        """Shut the other exporter down."""
        self._exporter.shutdown()
