"""The commands: `python -m app [serve | worker | catcher | migrate | tasks]`."""

import argparse
import asyncio
import gc
import signal
import sys

import structlog

from afterward.errors import CannotStart
from app.listening import authority
from app.mail.catcher import Catcher
from app.observability.logs import configure_logging
from app.queue_url import make_tables
from app.settings import BadSettings, Settings, load_settings

log = structlog.get_logger(__name__)


def main() -> None:
    """Run a command.

    Exit codes: 2 for bad settings or arguments, 1 or 3 if the command cannot start.
    """
    if sys.argv[1:2] == ["tasks"]:
        from app.terminal import commands as tasks

        sys.exit(tasks.main(sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="python -m app", description="Afterward")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("serve", help="run the API with a worker inside (the default)")
    commands.add_parser("worker", help="run a worker without the API")
    commands.add_parser("catcher", help="run the SMTP catcher alone, for development")
    commands.add_parser("migrate", help="create or upgrade the tables on PostgreSQL")
    commands.add_parser("tasks", help="list, show, retry, cancel or watch the tasks of a service")
    command = parser.parse_args().command
    settings = load_settings()
    try:
        if command in (None, "serve"):
            serve(settings)
        else:
            configure_logging(settings.log_level, settings.log_format)
            run = {"worker": run_worker, "catcher": run_catcher, "migrate": migrate}[command]
            asyncio.run(run(settings))
    except (CannotStart, OSError) as error:
        sys.exit(f"cannot start: {error}")


def serve(settings: Settings) -> None:
    """Run the API until SIGTERM or SIGINT."""
    _load_propagators()
    from app import server
    from app.hardening.deadlines import protocol_with_deadlines
    from app.main import app

    # When the server has stopped, uvicorn raises the signal again. The process then just ends.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    _tune_garbage_collection()
    # The commit thread needs the interpreter lock only for microseconds. By default it would wait
    # for the lock up to five milliseconds.
    sys.setswitchinterval(0.0005)
    server.serve(app, settings, protocol_with_deadlines(settings))


def _load_propagators() -> None:
    """Load what OTEL_PROPAGATORS names. FastAPI does it when it is imported, also without tracing.

    Raises BadSettings for an unknown name, which would be a traceback there.
    """
    try:
        import opentelemetry.propagate  # noqa: F401
    except ValueError as error:
        raise BadSettings(f"OTEL_PROPAGATORS: {error}") from error


def _tune_garbage_collection() -> None:
    """Exclude the objects of the app from garbage collection, and collect less often.

    The routes and schemas are some hundred thousand objects that live as long as the process. Sixty
    requests in flight also keep each other's garbage alive. Checking all of these objects again and
    again took a tenth of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


async def run_worker(settings: Settings) -> None:
    """Run a worker alone until SIGTERM or SIGINT. It starts no catcher, because the API does."""
    _load_propagators()
    from app.main import run
    from app.observability.tracing import traces_by_environment

    if not settings.worker_concurrency:
        raise BadSettings("WORKER_CONCURRENCY: must be at least 1 for a worker without the API")
    stopped = _stop_event()
    settings = settings.model_copy(update={"catcher": False})
    async with run(settings, traces_by_environment()):
        await stopped.wait()


async def migrate(settings: Settings) -> None:
    """Create or upgrade the tables of QUEUE_URL. With SQLite, every start does this, too."""
    await make_tables(settings.queue_url)


async def run_catcher(settings: Settings) -> None:
    """Run the catcher alone until SIGTERM or SIGINT."""
    stopped = _stop_event()
    catcher = Catcher(settings.smtp_host, settings.smtp_port, settings.catcher_directory)
    await catcher.start()
    smtp = authority(settings.smtp_host, settings.smtp_port)
    log.info("ready", at=smtp, mail_is_kept_in=str(settings.catcher_directory.absolute()))
    await stopped.wait()
    await catcher.stop()


def _stop_event() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stopped.set))
    return stopped


if __name__ == "__main__":
    main()
