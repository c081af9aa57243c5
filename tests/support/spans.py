"""Spans that tests can read: those of this process, and those that other processes export."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import DEFAULT_ON, Sampler
from opentelemetry.trace import SpanContext

Attributes = Mapping[str, Any]


class Spans:
    """A provider of spans, which keeps the spans that have ended.

    `through` is an exporter around the one that keeps them.
    """

    def __init__(
        self,
        sampler: Sampler = DEFAULT_ON,
        *,
        through: Callable[[SpanExporter], SpanExporter] = lambda kept: kept,
    ) -> None:
        self.provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        self._exporter = InMemorySpanExporter()
        self.provider.add_span_processor(SimpleSpanProcessor(through(self._exporter)))

    @contextmanager
    def request(self) -> Iterator[SpanContext]:
        """Stand for a request, whose span is the current one."""
        with self.provider.get_tracer("test").start_as_current_span("request") as span:
            yield span.get_span_context()

    def named(self, name: str) -> list[ReadableSpan]:
        """Return the spans with this name, in the order of their ends."""
        return [span for span in self.all if span.name == name]

    @property
    def all(self) -> Sequence[ReadableSpan]:
        """All spans, in the order of their ends."""
        return self._exporter.get_finished_spans()


def id_of(span: ReadableSpan) -> SpanContext:
    """Return the ids of a span and of its trace."""
    context = span.get_span_context()
    assert context is not None
    return context


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    """Return the attributes of a span."""
    return dict(span.attributes or {})


@dataclass(frozen=True)
class Exported:
    """A span that a collector has received. Ids are hexadecimal; no parent is the empty string."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    links: list[str]  # the ids of spans
    attributes: dict[str, str]


@dataclass
class Collector:
    """An OpenTelemetry collector on loopback, which answers each request with `status`."""

    status: int = 200
    spans: list[Exported] = field(default_factory=list)
    url: str = ""

    def __enter__(self) -> Self:
        """Start the server."""
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if collector.status == 200:
                    assert self.path == "/v1/traces"
                    collector.spans.extend(_decoded(body))
                self.send_response(collector.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Log nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def named(self, name: str) -> list[Exported]:
        """Return the spans with this name, in the order of their arrival."""
        return [span for span in self.spans if span.name == name]


def _decoded(body: bytes) -> Iterator[Exported]:
    for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        resource = {each.key: each.value.string_value for each in of_resource.resource.attributes}
        for scope in of_resource.scope_spans:
            for span in scope.spans:
                yield Exported(
                    service=resource["service.name"],
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    links=[link.span_id.hex() for link in span.links],
                    attributes={each.key: str(each.value) for each in span.attributes},
                )
