"""Where the objects meet: create_app(settings) and its lifespan. Tests use the same."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import structlog
from fastapi import FastAPI
from fastapi.routing import APIRoute

from afterward.engines import open_engine
from afterward.errors import CannotStart
from afterward.queue import Queue
from afterward.retry import RetryPolicy
from afterward.task_log import TaskLog
from afterward.worker import Worker
from app.api import errors
from app.api.dependencies import State
from app.api.event_stream import EventStream
from app.api.health_checks import Health
from app.api.middleware import BodyLimit, Envelope, check_soundness
from app.api.routes import (
    batches,
    documentation,
    health,
    inbox,
    notifications,
    tasks,
    tutorial,
    uploads,
)
from app.api.turns import Turns
from app.hardening.api_keys import BadKeys, Keys
from app.hardening.gate import Gate, Rate
from app.hardening.openapi import document_keys
from app.hardening.origins import Origins
from app.listening import authority
from app.mail.catcher import Catcher
from app.mail.recipients import Recipients
from app.mail.smtp import Mailer
from app.observability.access_log import AccessLog
from app.observability.logs import configure_logging
from app.observability.metrics import Metrics
from app.settings import BadSettings, Settings, load_settings
from app.shutdown import Stop
from app.tasks import registry
from app.tasks.clean_up import clean_up_regularly
from app.tasks.log_file import LogFile
from app.tasks.pending_uploads import PendingUploads
from app.tasks.tools import Tools
from app.uploads.multipart import largest_form
from app.uploads.pictures import Pictures
from app.uploads.store import CannotOpenStore, Store, open_store

log = structlog.get_logger(__name__)


def create_app(settings: Settings | None = None) -> FastAPI:
    """Make the app. Without settings they are read from the environment."""
    settings = settings or load_settings()
    configure_logging(settings.log_level, settings.log_format)
    app = FastAPI(
        title="Afterward",
        summary="Answers at once and does the work afterwards, and keeps every promise.",
        version="0.1.0",
        lifespan=lambda _: _run_for_the_api(settings),
        openapi_url=None,  # app.api.routes.documentation has it, and the pages
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # /metrics has our own
    )
    parts = (notifications, batches, uploads, tasks, tutorial, health, inbox, documentation)
    # Not include_router: it matches each request twice, and nothing is to be added to a route.
    app.router.routes[:] = [route for part in parts for route in part.router.routes]
    _check_root_path(settings.root_path, app)
    errors.install(app)
    upload_limit = largest_form(settings.max_upload_bytes)
    keys = _keys(settings)
    document_keys(app, needed=keys is not None)
    limit = BodyLimit(settings.max_body_bytes, {"/upload": upload_limit, "/upload/": upload_limit})
    gate = Gate(keys, _rate(settings), settings.cors_origins)
    app.add_middleware(
        Envelope, checks=(check_soundness, gate, limit), root_path=settings.root_path or ""
    )
    if settings.cors_origins:
        app.add_middleware(Origins, origins=settings.cors_origins)
    if settings.access_log:
        app.add_middleware(AccessLog)
    return app


def _check_root_path(root_path: str | None, app: FastAPI) -> None:
    """Refuse a prefix that looks like a path of the service: the two could not be told apart."""
    first = (root_path or "/").split("/")[1]
    paths = [route.path for route in app.routes if isinstance(route, APIRoute)]
    if first and any(path.split("/")[1] == first for path in paths):
        raise BadSettings(f"ROOT_PATH: must not begin with /{first}, a path of the service itself")


def _keys(settings: Settings) -> Keys | None:
    if settings.is_open:
        return None
    text, file = settings.api_keys, settings.api_keys_file
    try:
        return Keys(text.get_secret_value() if text else None, file)
    except BadKeys as error:
        raise BadSettings(str(error)) from None


def _rate(settings: Settings) -> Rate | None:
    return Rate(settings.rate_limit) if settings.rate_limit else None


@contextlib.asynccontextmanager
async def _run_for_the_api(settings: Settings) -> AsyncIterator[State]:
    """Run, and tell of what other processes do as if it was done here."""
    async with run(settings) as state:
        if settings.is_open and not settings.on_loopback:
            log.warning("open to whoever reaches it: there are no API_KEYS", host=settings.host)
        state["queue"].engine.subscribe(state["metrics"].record, state["event_stream"].publish)
        yield state


@contextlib.asynccontextmanager
async def run(settings: Settings) -> AsyncIterator[State]:
    """Start everything, from the floor up; at the end, stop it in the opposite order."""
    async with contextlib.AsyncExitStack() as stack:
        pictures = Pictures()
        stack.callback(pictures.close)
        log_file = LogFile(settings.log_file)
        stack.callback(log_file.close)
        store = _open_store(settings)
        # Before the catcher: a second process on one queue is told of the first, not of its ports.
        engine = open_engine(settings.queue_url)
        await engine.start()
        stack.push_async_callback(engine.stop)
        catcher = await _start_catcher(settings, stack)
        mailer = _mailer(settings)
        stack.push_async_callback(mailer.close)

        policy = RetryPolicy(
            settings.retry_attempts, settings.retry_base_seconds, settings.retry_max_seconds
        )
        queue = Queue(engine, registry(settings), policy, max_backlog=settings.max_backlog)
        metrics = Metrics(smtp_connections=lambda: mailer.open_connections)
        event_stream = EventStream()
        for listener in (TaskLog().write, metrics.record, event_stream.publish, engine.publish):
            queue.events.subscribe(listener)

        recipients = Recipients(settings.allowed_recipients)
        tools = Tools(mailer, settings.mail_from, recipients, store, pictures, engine)
        worker = (
            await _start_worker(settings, queue, tools) if settings.worker_concurrency else None
        )

        async def stop_working() -> None:
            event_stream.close()
            if worker is not None:
                log.info("stopping", grace_seconds=settings.shutdown_grace_seconds)
                await worker.stop(settings.shutdown_grace_seconds)

        stop = Stop(stop_working)
        stack.push_async_callback(stop.finish)
        stack.enter_context(stop.begun_by_signals())
        pending_uploads = PendingUploads(queue)
        cleaning = asyncio.create_task(
            clean_up_regularly(queue, store, pending_uploads, settings.retention_days)
        )
        stack.callback(cleaning.cancel)
        log.info("started", **_where(settings))
        yield State(
            settings=settings,
            queue=queue,
            uploads=store,
            pending_uploads=pending_uploads,
            log_file=log_file,
            mailer=mailer,
            recipients=recipients,
            metrics=metrics,
            event_stream=event_stream,
            catcher=catcher,
            health=Health(engine, store, mailer),
            turns=Turns(
                lambda: worker is not None and worker.is_busy, tasks=settings.worker_concurrency
            ),
        )


def _where(settings: Settings) -> dict[str, str]:
    """Say where the mail goes and where the data lives, without any password."""
    smtp = authority(settings.smtp_host, settings.smtp_port)
    return {
        "mail_goes_to": (
            f"the embedded catcher at {smtp}"
            if settings.catcher
            else f"{smtp} ({_SECURITY[settings.smtp_security]})"
        ),
        "queue": _place(settings.queue_url),
        "uploads": _place(settings.upload_url),
    }


_SECURITY = {"none": "not encrypted", "starttls": "starttls", "tls": "tls"}


def _place(address: str) -> str:
    """Shorten an address of data to the path of a file, or to a server without the login."""
    for scheme in ("sqlite:///", "file:"):
        if address.startswith(scheme):
            return str(Path(address.removeprefix(scheme)).absolute())
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


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


def _open_store(settings: Settings) -> Store:
    try:
        return open_store(settings.upload_url)
    except CannotOpenStore as error:
        raise CannotStart(str(error)) from error


def _mailer(settings: Settings) -> Mailer:
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


async def _start_worker(settings: Settings, queue: Queue[Tools], tools: Tools) -> Worker[Tools]:
    worker = Worker(
        queue,
        tools,
        concurrency=settings.worker_concurrency,
        lease=settings.lease_seconds,
        task_timeout=settings.task_timeout_seconds,
    )
    await worker.start()
    return worker


app = create_app()
