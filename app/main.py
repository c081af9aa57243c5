"""Connects all objects: `create_app` makes the app, and `run` starts everything that it needs."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import structlog
from fastapi import FastAPI
from fastapi.routing import APIRoute

from afterward.engine import Engine
from afterward.errors import CannotStart
from afterward.queue import Queue
from afterward.retry import RetryPolicy
from afterward.task_log import TaskLog
from afterward.tracing import Tracing
from afterward.worker import Worker
from app import board as dashboard
from app.api import errors
from app.api.event_stream import EventStream
from app.api.health_checks import Health
from app.api.middleware import RequestEnvelope
from app.api.replay import Replay
from app.api.routes import (
    batches,
    bulk,
    documentation,
    health,
    inbox,
    notifications,
    tasks,
    tutorial,
    uploads,
)
from app.api.turns import Turns
from app.board.dependencies import Board, BoardState
from app.hardening import harden
from app.listening import authority
from app.mail.catcher import Catcher
from app.mail.recipients import Recipients
from app.mail.smtp import Mailer
from app.observability.access_log import AccessLog, silence_the_server
from app.observability.logs import configure_logging
from app.observability.metrics import Metrics
from app.observability.tracing import (
    Traces,
    add_trace_ids,
    request_tracing,
    task_tracing,
    traces_by_environment,
)
from app.queue_url import start_engine
from app.settings import BadSettings, Settings, load_settings
from app.shutdown import Stop
from app.tasks import registry
from app.tasks.clean_up import DAY, clean_up_regularly
from app.tasks.log_file import LogFile
from app.tasks.pending_uploads import PendingUploads
from app.tasks.tools import Tools
from app.tasks.workers import announced
from app.uploads.open_store import open_store
from app.uploads.pictures import Pictures
from app.uploads.store import CannotOpenStore, Store

ROUTERS = [
    module.router
    for module in (
        notifications,
        batches,
        uploads,
        tasks,
        bulk,
        tutorial,
        health,
        inbox,
        documentation,
    )
] + dashboard.ROUTERS

log = structlog.get_logger(__name__)


# The app


def create_app(settings: Settings | None = None, traces: Traces | None = None) -> FastAPI:
    """Make the app: the API, its hardening, and the access log.

    Without settings or traces, they are read from the environment.
    """
    settings = settings or load_settings()
    traces = traces or traces_by_environment()
    with_ids = [] if traces is None else [add_trace_ids]
    configure_logging(settings.log_level, settings.log_format, *with_ids)
    silence_the_server()
    app = create_api(settings, traces)
    harden(app, settings)
    if settings.access_log:
        # Outermost, so that it logs refused requests, too.
        app.add_middleware(AccessLog, root_path=settings.root_path or "")
    return app


def create_api(settings: Settings, traces: Traces | None = None) -> FastAPI:
    """Make the app without hardening and access log: the routes, the errors and the lifespan."""
    app = FastAPI(
        title="Afterward",
        summary="Answers at once, does the work afterwards, and keeps every promise.",
        version="0.1.0",
        lifespan=lambda _: _run_with_api(settings, traces),
        openapi_url=None,  # app.api.routes.documentation serves the document and its pages
        redirect_slashes=False,
        telemetry=request_tracing(traces, settings.root_path or ""),
    )
    # Instead of include_router, which would match each request twice.
    app.router.routes[:] = [route for router in ROUTERS for route in router.routes]
    _check_root_path(settings.root_path, app)
    errors.install(app)
    app.add_middleware(RequestEnvelope, root_path=settings.root_path or "")
    return app


def _check_root_path(root_path: str | None, app: FastAPI) -> None:
    """Refuse a prefix that begins like a path of the service, because a request could mean both."""
    first = (root_path or "/").split("/")[1]
    paths = [route.path for route in app.routes if isinstance(route, APIRoute)]
    if first and any(path.split("/")[1] == first for path in paths):
        raise BadSettings(f"ROOT_PATH: must not begin with /{first}, a path of the service itself")


# Its lifespan


@contextlib.asynccontextmanager
async def _run_with_api(settings: Settings, traces: Traces | None) -> AsyncIterator[BoardState]:
    """Run the service, and show the API the events of other processes, too."""
    async with run(settings, traces) as state:
        if settings.is_open and not settings.on_loopback:
            log.warning(
                "anyone who reaches the service can use it: set API_KEYS", host=settings.host
            )
        receivers = state["metrics"].record, state["event_stream"].publish, state["board"].record
        engine, replay = state["queue"].engine, state["replay"]
        engine.subscribe(*receivers)
        engine.subscribe_to_gaps(
            partial(replay.catch_up, state["event_stream"]), state["board"].catch_up
        )
        yield state


@contextlib.asynccontextmanager
async def run(settings: Settings, traces: Traces | None) -> AsyncIterator[BoardState]:
    """Start everything that the API and the worker need; at the end, stop it in reverse order."""
    async with contextlib.AsyncExitStack() as stack:
        if traces is not None:
            stack.push_async_callback(traces.flush)  # the last step, after the last span has ended

        # 1. Files
        pictures = stack.enter_context(contextlib.closing(Pictures()))
        log_file = stack.enter_context(contextlib.closing(LogFile(settings.log_file)))
        store = _open_store(settings)

        # 2. The database. It starts before the catcher, so that a second process on the same queue
        # fails with the reason, and not because the catcher's port is taken.
        engine = await start_engine(settings.queue_url)
        stack.push_async_callback(engine.stop)

        # 3. Mail
        catcher = await _start_catcher(settings, stack)
        mailer = _make_mailer(settings)
        stack.push_async_callback(mailer.close)
        recipients = Recipients(settings.allowed_recipients)

        # 4. The queue, and the subscribers to its events
        queue = _make_queue(settings, engine, task_tracing(traces))
        metrics = Metrics(queue.registry, lambda: mailer.open_connections, settings.max_backlog)
        event_stream = EventStream()
        health = Health(engine, store, mailer)
        board = Board.make(queue, health)
        receivers = (TaskLog().write, metrics.record, event_stream.publish, board.record)
        for receive in (*receivers, engine.publish):
            queue.events.subscribe(receive)

        # 5. The worker, if this process has one
        tools = Tools(mailer, settings.mail_from, recipients, store, pictures, engine, queue)
        worker = await _start_worker(settings, queue, tools)
        if worker is not None:
            concurrency = settings.worker_concurrency
            await stack.enter_async_context(announced(queue, worker, concurrency))

        # 6. The stop. A signal begins it at once. Otherwise the server would first wait for its
        # open requests, and event streams do not end by themselves.
        grace = settings.shutdown_grace_seconds
        stop = Stop(partial(_stop_working, event_stream, board, worker, grace))
        stack.push_async_callback(stop.finish)
        stack.enter_context(stop.begun_by_signals())

        # 7. The clean-up
        pending_uploads = PendingUploads(queue)
        cleaning = _start_clean_up(settings, queue, store, pending_uploads)
        stack.callback(cleaning.cancel)

        # 8. The state of the requests. They take turns with the tasks only while this process has a
        # worker that is busy: see app.api.turns.
        keep_days = min(settings.retention_days, settings.retention_failed_days)
        log.info("started", **_locations(settings))
        yield BoardState(
            settings=settings,
            queue=queue,
            uploads=store,
            pending_uploads=pending_uploads,
            log_file=log_file,
            mailer=mailer,
            recipients=recipients,
            metrics=metrics,
            event_stream=event_stream,
            replay=Replay(engine, queue.now, keep_days * DAY),
            catcher=catcher,
            health=health,
            board=board,
            turns=Turns(
                is_busy=lambda: worker is not None and worker.is_busy,
                tasks=settings.worker_concurrency,
            ),
        )


# Its parts


def _open_store(settings: Settings) -> Store:
    try:
        return open_store(settings.upload_url)
    except CannotOpenStore as error:
        raise CannotStart(str(error)) from error


async def _start_catcher(settings: Settings, stack: contextlib.AsyncExitStack) -> Catcher | None:
    if not settings.catcher:
        return None
    catcher = Catcher(settings.smtp_host, settings.smtp_port, settings.catcher_directory)
    try:
        await catcher.start()
    except OSError as error:
        raise CannotStart(f"the mail catcher cannot start: {error}") from error
    stack.push_async_callback(catcher.stop)
    return catcher


def _make_mailer(settings: Settings) -> Mailer:
    password = settings.smtp_password
    return Mailer(
        host=settings.smtp_host,
        port=settings.smtp_port,
        username=settings.smtp_username,
        password=password.get_secret_value() if password else None,
        security=settings.smtp_security,
        timeout=settings.smtp_timeout,
        data_timeout=settings.smtp_data_timeout,
        connections=settings.smtp_connections,
        local_hostname=settings.smtp_local_hostname,
    )


def _make_queue(settings: Settings, engine: Engine, tracing: Tracing) -> Queue[Tools]:
    policy = RetryPolicy(
        settings.retry_attempts, settings.retry_base_seconds, settings.retry_max_seconds
    )
    return Queue(
        engine,
        registry(settings),
        policy,
        max_backlog=settings.max_backlog,
        tracing=tracing,
    )


async def _start_worker(
    settings: Settings, queue: Queue[Tools], tools: Tools
) -> Worker[Tools] | None:
    if not settings.worker_concurrency:
        return None
    worker = Worker(
        queue,
        tools,
        concurrency=settings.worker_concurrency,
        lease=settings.lease_seconds,
        task_timeout=settings.task_timeout_seconds,
    )
    await worker.start()
    return worker


async def _stop_working(
    event_stream: EventStream, board: Board, worker: Worker[Tools] | None, grace: float
) -> None:
    """End the event streams and the worker. Its tasks get `grace` seconds to finish."""
    event_stream.close()
    board.ticks.close()
    if worker is not None:
        log.info("stopping", grace_seconds=grace)
        await worker.stop(grace)


def _start_clean_up(
    settings: Settings, queue: Queue[Tools], store: Store, pending_uploads: PendingUploads
) -> asyncio.Task[None]:
    return asyncio.create_task(
        clean_up_regularly(
            queue,
            store,
            pending_uploads,
            keep_seconds=settings.retention_days * DAY,
            keep_failed_seconds=settings.retention_failed_days * DAY,
        )
    )


# Its log line


def _locations(settings: Settings) -> dict[str, str]:
    """Return where mail goes and where data is stored, without any password."""
    smtp = authority(settings.smtp_host, settings.smtp_port)
    return {
        "mail_goes_to": (
            f"the embedded catcher at {smtp}"
            if settings.catcher
            else f"{smtp} ({_SECURITY[settings.smtp_security]})"
        ),
        "queue": _location(settings.queue_url),
        "uploads": _location(settings.upload_url),
    }


_SECURITY = {"none": "not encrypted", "starttls": "starttls", "tls": "tls"}


def _location(url: str) -> str:
    """Return the path of a file, or a server's URL without the login."""
    for scheme in ("sqlite:///", "file:"):
        if url.startswith(scheme):
            return str(Path(url.removeprefix(scheme)).absolute())
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


app = create_app()
