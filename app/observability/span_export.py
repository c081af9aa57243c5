"""Sends spans to an OpenTelemetry collector, in a thread and in batches. Needs the extra `otel`."""

import time
from collections.abc import Sequence

import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

_WITH_ADDRESSES = ("url.path", "url.query")  # such as /send-notification/ada@example.com

log = structlog.get_logger(__name__)


def make_provider() -> TracerProvider:
    """Return a provider that exports spans as the OTEL_* variables say.

    Raises ValueError or RuntimeError if one of them is invalid.
    """
    # The SDK would flush at the exit of the process, and wait for a dead collector for long. The
    # lifespan of the service flushes instead.
    provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
    provider.add_span_processor(HideAddresses())
    # The queue is bounded (OTEL_BSP_MAX_QUEUE_SIZE). While the collector is away, spans are
    # dropped, and neither requests nor tasks wait.
    provider.add_span_processor(BatchSpanProcessor(ReportOutages(OTLPSpanExporter())))
    return provider


def _resource() -> Resource:
    """Return the description of this process. OTEL_SERVICE_NAME wins over the name `afterward`."""
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "afterward"}))
    return resource


class HideAddresses(SpanProcessor):
    """Hides the path and the query of a request, because they may contain a mail address.

    The span still has the path as the route defines it, such as `/send-notification/{email}`.
    """

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002
        """Replace the attributes of a span that begins."""
        for name in _WITH_ADDRESSES:
            if name in (span.attributes or {}):
                span.set_attribute(name, "REDACTED")


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
