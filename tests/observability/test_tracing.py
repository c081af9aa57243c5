"""The service with OpenTelemetry: its spans, its log lines, and the OTEL_* variables."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from structlog.testing import capture_logs

from app.main import create_app
from app.observability.span_export import HideAddresses, ReportOutages
from app.observability.tracing import FLUSH_SECONDS, Traces, traces_by_environment
from app.settings import BadSettings
from tests.support.service import (
    PATIENCE,
    Process,
    Service,
    environment,
    free_port,
    settings_in,
    until,
    wait_for,
)
from tests.support.smtp_server import SmtpServer
from tests.support.spans import Collector, Spans, attributes_of, id_of
from tests.support.workers import WORKER

pytestmark = pytest.mark.usefixtures("logging_as_before")

SEND = "/send-notification/ada@example.com?q=grace@example.com"
REQUEST = "POST /send-notification/{email}"
ATTEMPT = "process send_email"


@pytest.fixture
def spans() -> Spans:
    """The spans of a service in this process, as they are exported."""
    return Spans(through=HideAddresses)


@pytest.fixture
def client(tmp_path: Path, spans: Spans) -> Iterator[TestClient]:
    """A client of a service with tracing."""
    app = create_app(settings_in(tmp_path), Traces(spans.provider))
    with TestClient(app) as client:
        yield client


# Spans


def test_the_attempt_of_a_task_is_a_child_of_the_request(client: TestClient, spans: Spans) -> None:
    wait_for(client, client.post(SEND).json()["id"])
    until(lambda: spans.named(ATTEMPT), within=PATIENCE)
    (request,), (attempt,) = spans.named(REQUEST), spans.named(ATTEMPT)
    assert attempt.parent is not None
    assert attempt.parent.span_id == id_of(request).span_id
    assert attributes_of(request)["http.response.status_code"] == 202


def test_no_span_has_an_address(client: TestClient, spans: Spans) -> None:
    for path in (SEND, "/send-email/?email=ada@example.com"):
        wait_for(client, client.post(path).json()["id"])
    client.get("/tasks?about=ada@example.com")
    client.get("/nowhere/ada@example.com")
    client.post("/send-notification/not-an-address", json={"subject": "ada@example.com"})
    until(lambda: len(spans.named(ATTEMPT)) == 2, within=PATIENCE)
    exported = "".join(span.to_json() for span in spans.all)
    assert '"url.path": "REDACTED"' in exported
    assert "@example.com" not in exported


def test_an_address_that_is_set_after_the_start_of_a_span_is_hidden_too(spans: Spans) -> None:
    with spans.provider.get_tracer("test").start_as_current_span("request") as span:
        span.set_attribute("url.path", "/send-notification/ada@example.com")
        span.set_attribute("url.full", "http://localhost/send-notification/ada@example.com")
        span.set_attribute("http.route", "/send-notification/{email}")
    (exported,) = spans.all
    assert attributes_of(exported) == {
        "url.path": "REDACTED",
        "url.full": "REDACTED",
        "http.route": "/send-notification/{email}",
    }
    assert id_of(exported) == span.get_span_context()


def test_a_request_continues_the_trace_of_its_client(client: TestClient, spans: Spans) -> None:
    trace_id, span_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    client.post(SEND, headers={"traceparent": f"00-{trace_id}-{span_id}-01"})
    (request,) = spans.named(REQUEST)
    assert request.parent is not None
    assert id_of(request).trace_id == int(trace_id, 16)
    assert request.parent.span_id == int(span_id, 16)


@pytest.mark.parametrize("root_path", [None, "/afterward"])
def test_probes_and_scrapes_are_not_traced(
    spans: Spans, tmp_path: Path, root_path: str | None
) -> None:
    settings = settings_in(tmp_path, root_path=root_path)
    with TestClient(create_app(settings, Traces(spans.provider))) as client:
        for path in ("/livez", "/readyz", "/metrics"):
            assert client.get((root_path or "") + path).is_success
        assert not spans.all
        client.get((root_path or "") + "/tasks")
    assert [span.name for span in spans.all] == ["GET /tasks"]


def test_log_lines_have_the_ids_of_the_trace(
    tmp_path: Path, spans: Spans, capsys: pytest.CaptureFixture[str]
) -> None:
    with TestClient(create_app(settings_in(tmp_path), Traces(spans.provider))) as client:
        task_id = client.post(SEND).json()["id"]
        wait_for(client, task_id)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    (succeeded,) = [line for line in lines if line["event"] == "task succeeded"]
    (request,) = [line for line in lines if line.get("path", "").startswith("/send")]
    (started,) = [line for line in lines if line["event"] == "started"]
    (attempt,) = spans.named(ATTEMPT)
    assert int(succeeded["span_id"], 16) == id_of(attempt).span_id
    assert len(succeeded["trace_id"]) == 32
    assert succeeded["trace_id"] == request["trace_id"]
    assert request["span_id"] != succeeded["span_id"]
    assert "trace_id" not in started


def test_the_response_and_the_task_do_not_show_the_trace(client: TestClient) -> None:
    task = wait_for(client, client.post(SEND).json()["id"])
    assert "trace_context" not in task


# In other processes


@pytest.mark.thorough
def test_an_attempt_after_a_restart_has_a_link_to_the_request(tmp_path: Path) -> None:
    """The first process finds no SMTP server. Each process exports its spans before it ends."""
    with Collector() as collector:
        settings: dict[str, Any] = {"otel_exporter_otlp_endpoint": collector.url}
        with Service(tmp_path, **settings, catcher=False) as service:
            task = service.post(SEND).json()
            service.wait_for(task["id"], "retrying")
            assert service.stop() == 0
        ((request,), (first,)) = collector.named(REQUEST), collector.named(ATTEMPT)
        assert (first.trace_id, first.parent_id) == (request.trace_id, request.span_id)
        with Service(tmp_path, **settings) as service:
            service.wait_for(task["id"])
            assert service.stop() == 0
        second = collector.named(ATTEMPT)[-1]
    assert second.trace_id != request.trace_id
    assert (second.parent_id, second.links) == ("", [request.span_id])
    assert {span.service for span in collector.spans} == {"afterward"}


@pytest.mark.thorough
def test_a_worker_process_continues_the_trace_of_the_api(
    tmp_path: Path, database_url: str, smtp_server: SmtpServer
) -> None:
    with Collector() as collector:
        settings: dict[str, Any] = {
            "queue_url": database_url,
            "smtp_port": smtp_server.port,
            "catcher": False,
            "otel_exporter_otlp_endpoint": collector.url,
        }
        api = Service(tmp_path / "api", **settings, worker_concurrency=0)
        worker = Process(
            tmp_path / "worker", command=WORKER, **settings, otel_service_name="mail-worker"
        )
        with api, worker:
            api.wait_for(api.post(SEND).json()["id"])
            assert (worker.stop(), api.stop()) == (0, 0)
        (request,), (attempt,) = collector.named(REQUEST), collector.named(ATTEMPT)
    assert (attempt.trace_id, attempt.parent_id) == (request.trace_id, request.span_id)
    assert (request.service, attempt.service) == ("afterward", "mail-worker")
    assert request.trace_id in worker.log


@pytest.mark.thorough
@pytest.mark.parametrize("collector_hangs", [False, True])
def test_a_dead_collector_is_one_log_line_and_does_not_hold_up_the_stop(
    tmp_path: Path, *, collector_hangs: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # it never answers
        port = listener.getsockname()[1] if collector_hangs else free_port()
        settings: dict[str, Any] = {
            "otel_exporter_otlp_endpoint": f"http://127.0.0.1:{port}",
            "otel_exporter_otlp_timeout": 1,
            "otel_bsp_schedule_delay": 50,
            "otel_bsp_max_queue_size": 8,
            "otel_bsp_max_export_batch_size": 4,
        }
        with Service(tmp_path, **settings) as service:
            for _ in range(30):
                service.wait_for(service.post(SEND).json()["id"])
            until(lambda: "traces cannot be exported" in service.log, within=PATIENCE)
            began = time.monotonic()
            assert service.stop() == 0
            assert time.monotonic() - began < FLUSH_SECONDS + 4
    lines = [line for line in service.log.splitlines() if "expor" in line or "Queue full" in line]
    assert len(lines) == 1
    assert json.loads(lines[0])["level"] == "warning"


# The exporter


class Scripted(SpanExporter):
    """An exporter whose batches end as the test says."""

    def __init__(self, *results: SpanExportResult) -> None:
        self._results = [*results]
        self.is_shut_down = False

    def export(self, _: Sequence[ReadableSpan]) -> SpanExportResult:
        """End as the test says."""
        return self._results.pop(0)

    def shutdown(self) -> None:
        """Remember the shutdown."""
        self.is_shut_down = True


def test_the_beginning_and_the_end_of_an_outage_are_logged(spans: Spans) -> None:
    for _ in range(3):
        with spans.request():
            pass
    fails, works = SpanExportResult.FAILURE, SpanExportResult.SUCCESS
    inner = Scripted(works, fails, fails, works, works, fails)
    exporter = HideAddresses(ReportOutages(inner))
    with capture_logs() as lines:
        results = [exporter.export(spans.all) for _ in range(6)]
    exporter.shutdown()
    assert results == [works, fails, fails, works, works, fails]
    assert [line["event"] for line in lines] == [
        "traces cannot be exported",
        "traces are exported again",
        "traces cannot be exported",
    ]
    assert lines[1]["lost_spans"] == 6
    assert inner.is_shut_down


# The OTEL_* variables


ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}


@pytest.fixture
def without_variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove the OTEL_* variables of this machine, and let the test read the variables anew."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    traces_by_environment.cache_clear()
    yield
    traces_by_environment.cache_clear()


def set_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_SERVICE_NAME": "mail"},
        ENDPOINT | {"OTEL_SDK_DISABLED": "true"},
        ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "TRUE"},
    ],
)
@pytest.mark.usefixtures("without_variables")
def test_traces_are_off_unless_the_variables_ask_for_them(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    set_variables(monkeypatch, variables)
    assert traces_by_environment() is None


@pytest.mark.parametrize(
    "variables",
    [
        ENDPOINT,
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://collector.example.com/v1/traces"},
        {"OTEL_TRACES_EXPORTER": "otlp"},
        ENDPOINT | {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer a.b-c/d=, x-tenant=1"},
        ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_SDK_DISABLED": "false"},
    ],
)
@pytest.mark.usefixtures("without_variables")
def test_traces_are_on_if_the_variables_ask_for_them(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    set_variables(monkeypatch, variables)
    traces = traces_by_environment()
    assert traces is not None
    assert traces is traces_by_environment()  # one exporter for the whole process
    assert traces.provider.resource.attributes["service.name"] == "afterward"
    traces.provider.shutdown()


@pytest.mark.parametrize(
    ("sampler", "argument", "description"),
    [
        ("", "", "ParentBased{root:AlwaysOnSampler"),
        ("Always_Off", "1%", "AlwaysOffSampler"),
        ("traceidratio", "", "TraceIdRatioBased{1.0}"),
        ("parentbased_traceidratio", "0.01", "ParentBased{root:TraceIdRatioBased{0.01}"),
    ],
)
@pytest.mark.usefixtures("without_variables")
def test_the_sampler_is_the_one_of_the_variables(
    monkeypatch: pytest.MonkeyPatch, sampler: str, argument: str, description: str
) -> None:
    variables = {"OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": argument}
    set_variables(monkeypatch, ENDPOINT | variables)
    traces = traces_by_environment()
    assert traces is not None
    assert traces.provider.sampler.get_description().startswith(description)
    traces.provider.shutdown()


SECRET = "do-not-repeat-me"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_TRACES_EXPORTER", "otlp,console"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", f"{SECRET}:4318"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", f"grpc://{SECRET}:4317"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{SECRET}:port"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"https:///{SECRET}"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_HEADERS", SECRET),
        ("OTEL_EXPORTER_OTLP_HEADERS", f"authorization: {SECRET}"),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", f'a=b,authorization="{SECRET}"'),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
        ("OTEL_TRACES_SAMPLER", SECRET),
        ("OTEL_TRACES_SAMPLER", "parentbased_"),
        *[("OTEL_TRACES_SAMPLER_ARG", bad) for bad in ("1%", "-0.1", "1.1", "nan", SECRET)],
    ],
)
@pytest.mark.usefixtures("without_variables")
def test_a_bad_value_stops_the_start_with_one_line_that_does_not_repeat_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    sampler = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio"}
    set_variables(monkeypatch, ENDPOINT | sampler | {name: value})
    with pytest.raises(BadSettings) as end:
        traces_by_environment()
    assert end.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    named = "an OTEL_* variable" if "BSP" in name else name
    assert line.startswith(f"bad settings: {named}")
    assert SECRET not in line


@pytest.mark.thorough
@pytest.mark.parametrize("command", ["serve", "worker"])
def test_an_unknown_propagator_stops_the_start_also_without_tracing(
    tmp_path: Path, command: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "app", command],
        cwd=tmp_path,
        env=environment(otel_propagators="b3x"),
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("bad settings: OTEL_PROPAGATORS: Propagator b3x not found.")


@pytest.mark.parametrize(
    "variable", ["OTEL_TRACES_EXPORTER=otlp", "OTEL_EXPORTER_OTLP_ENDPOINT=http://c"]
)
@pytest.mark.usefixtures("without_variables")
def test_without_the_packages_the_start_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str
) -> None:
    name, value = variable.split("=")
    monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "app.observability.span_export")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(BadSettings) as end:
        traces_by_environment()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bad settings: {name}: traces need the packages opentelemetry-sdk")


@pytest.mark.thorough
def test_without_the_variables_nothing_of_the_sdk_is_imported(tmp_path: Path) -> None:
    program = "import sys, app.main; print([name for name in sys.modules if name in %r])"
    unwanted = "opentelemetry.sdk", "opentelemetry.exporter", "afterward.opentelemetry"
    ended = subprocess.run(
        [sys.executable, "-c", program % (unwanted,)],
        cwd=tmp_path,
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    assert ended.stdout == "[]\n"
