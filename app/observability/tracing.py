"""Traces with OpenTelemetry: a span for each request, and one for each attempt of its tasks.

They are off unless the standard OTEL_* environment variables ask for them. Without them, nothing of
the SDK is imported.
"""

import asyncio
import functools
import os
import re
import threading
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fastapi.telemetry import TelemetryConfig
from opentelemetry.trace import format_span_id, format_trace_id, get_current_span
from structlog.typing import EventDict, WrappedLogger

from afterward.tracing import NO_TRACING, Tracing
from app.observability.paths import path_of_route
from app.settings import BadSettings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

FLUSH_SECONDS = 3.0  # the longest that a collector which does not answer can hold up the stop

_EXPORTER = "OTEL_TRACES_EXPORTER"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_HEADERS = ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS")
_HEADER = re.compile(r"[ \t]*|[ \t]*[!#$%&'*+.^_`|~0-9A-Za-z-]+[ \t]*=[ \t!#-+\--:<-\[\]-~]*")
_SAMPLER, _SAMPLER_ARGUMENT = "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"
_RATIO = "traceidratio"  # the sampler that takes an argument
_SAMPLERS = ("always_on", "always_off", _RATIO)
_NOT_TRACED = ("/livez", "/readyz", "/metrics")  # probes and scrapes come every few seconds


@dataclass(frozen=True, slots=True)
class Traces:
    """The traces of this process, whose spans `provider` makes and exports."""

    provider: "TracerProvider"

    async def flush(self) -> None:
        """Export the spans that have ended. Spans that take longer than FLUSH_SECONDS are lost."""
        # In a thread of its own, because the SDK's own timeout has no effect. As a daemon it does
        # not hold up the end of the process.
        thread = threading.Thread(target=self.provider.force_flush, name="flush-spans", daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, FLUSH_SECONDS)


def request_tracing(traces: Traces | None, root_path: str) -> TelemetryConfig:
    """Return the configuration of FastAPI, which makes a span of each request."""
    config: TelemetryConfig = {
        "tracing": False,
        "metrics": False,  # /metrics is our own
        "logs": False,
        "auto_configure": False,
    }
    if traces is None:
        return config

    def is_left_out(scope: MutableMapping[str, Any]) -> bool:
        return path_of_route(scope, root_path) in _NOT_TRACED

    return {
        **config,
        "tracing": True,
        "tracer_provider": traces.provider,
        "operation_spans": False,  # so the parent of an attempt is the span of its request
        "exclude": is_left_out,
    }


def task_tracing(traces: Traces | None) -> Tracing:
    """Return the hook for the queue, which makes a span of each attempt of a task."""
    if traces is None:
        return NO_TRACING
    from afterward.opentelemetry import OpenTelemetry

    return OpenTelemetry(traces.provider)


def add_trace_ids(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Add the ids of the current span to a log line: a processor of structlog."""
    span = get_current_span().get_span_context()
    if span.is_valid:
        event["trace_id"] = format_trace_id(span.trace_id)
        event["span_id"] = format_span_id(span.span_id)
    return event


# From the environment


@functools.cache  # the app, and a worker without the API, share the exporter of their process
def traces_by_environment() -> Traces | None:
    """Return the traces that the OTEL_* variables ask for, or None.

    They ask for traces with an endpoint, or with OTEL_TRACES_EXPORTER=otlp. OTEL_SDK_DISABLED=true
    and OTEL_TRACES_EXPORTER=none switch them off. The SDK reads the other variables: the headers,
    the sampler, the name of the service, and so on.

    Raises BadSettings if the packages are not installed, for an invalid exporter, endpoint,
    protocol, header or sampler, and for any other value that the SDK refuses. It does not refuse
    every invalid value: for OTEL_BSP_SCHEDULE_DELAY, for example, it logs the error, and uses its
    default.
    """
    wanted_by = _variable_that_asks()
    if wanted_by is None:
        return None
    _check_values()
    try:
        from app.observability.span_export import make_provider

        return Traces(make_provider())
    except ImportError as error:
        raise BadSettings(
            f"{wanted_by}: traces need the packages opentelemetry-sdk and "
            "opentelemetry-exporter-otlp-proto-http (the extra `otel`). Install them, or unset the "
            "variable"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise BadSettings(f"an OTEL_* variable has an invalid value: {error}") from error


def _variable_that_asks() -> str | None:
    """Return the name of the variable that switches traces on; None if they are off."""
    exporter = _value(_EXPORTER).strip().lower()
    if _value("OTEL_SDK_DISABLED").strip().lower() == "true" or exporter == "none":
        return None
    if exporter == "otlp":
        return _EXPORTER
    if exporter:
        raise BadSettings(f"{_EXPORTER}: must be otlp or none")
    return next((name for name in _ENDPOINTS if _value(name)), None)


def _check_values() -> None:
    """Raise BadSettings for an invalid value that the SDK would not refuse at the start.

    Instead of an invalid sampler or argument, the SDK would use its default, and sample every
    request. The other values it would find invalid only when it exports spans.
    """
    for name in _ENDPOINTS:
        if (url := _value(name)) and not _is_http_url(url):
            raise BadSettings(f"{name}: must be a URL such as http://collector.example.com:4318")
    for name in _PROTOCOLS:
        if _value(name) not in ("", "http/protobuf"):
            raise BadSettings(f"{name}: must be http/protobuf, the only protocol here")
    for name in _HEADERS:  # the SDK would log an invalid one, which may be a secret
        if not all(map(_HEADER.fullmatch, _value(name).split(","))):
            raise BadSettings(f"{name}: must be NAME=VALUE, several separated by commas")
    sampler = _value(_SAMPLER).lower()
    if sampler and sampler.removeprefix("parentbased_") not in _SAMPLERS:
        raise BadSettings(f"{_SAMPLER}: must be {', '.join(_SAMPLERS)}, or parentbased_ and a name")
    if sampler.endswith(_RATIO) and not _is_ratio(_value(_SAMPLER_ARGUMENT) or "1"):
        raise BadSettings(f"{_SAMPLER_ARGUMENT}: must be a number from 0 to 1")


def _is_http_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, for example
        return False


def _is_ratio(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def _value(name: str) -> str:
    """Return a variable; an empty one counts as unset."""
    return os.environ.get(name, "")
