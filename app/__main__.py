"""The commands: `python -m app [serve | worker | catcher | migrate]`."""

import signal

if __name__ == "__main__":
    # Ctrl-C may come while Python reads the modules: it ends the process then without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import asyncio
import gc
import sys

import structlog

from afterward.engines import make_tables
from afterward.errors import CannotStart
from app.listening import authority
from app.mail.catcher import Catcher
from app.observability.logs import configure_logging
from app.settings import BadSettings, Settings, load_settings

log = structlog.get_logger(__name__)


def main() -> None:
    """Run one of the commands. Exit code 2: bad settings or arguments; 1 or 3: it cannot start."""
    parser = argparse.ArgumentParser(prog="python -m app", description="Afterward")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("serve", help="the API with a worker inside (the default)")
    commands.add_parser("worker", help="a worker alone, without the API")
    commands.add_parser("catcher", help="the SMTP catcher alone, for development")
    commands.add_parser("migrate", help="make or upgrade the tables on PostgreSQL")
    command = parser.parse_args().command
    settings = load_settings()
    try:
        if command in (None, "serve"):
            serve(settings)
        else:
            configure_logging(settings.log_level, settings.log_format)
            run = {"worker": work, "catcher": catch, "migrate": migrate}[command]
            asyncio.run(run(settings))
    except (CannotStart, OSError) as error:
        sys.exit(f"cannot start: {error}")


def serve(settings: Settings) -> None:
    """Run the API until SIGTERM or SIGINT."""
    from app import server
    from app.hardening.deadlines import protocol_with_deadlines
    from app.main import app

    # Once the server has stopped, uvicorn raises the signal again: by then it has been obeyed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    _spare_the_garbage_collector()
    # The commit thread needs Python's lock for microseconds: let it not wait five milliseconds.
    sys.setswitchinterval(0.0005)
    server.serve(app, settings, protocol_with_deadlines(settings))


def _spare_the_garbage_collector() -> None:
    """Leave what lives as long as the process out of every collection, and collect less often.

    The app's routes and schemas are some hundred thousand objects, and sixty requests in flight
    keep each other's garbage alive: looking at all that over and over took a tenth of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


async def work(settings: Settings) -> None:
    """Run a worker alone until SIGTERM or SIGINT; where there is a catcher, the API has it."""
    from app.main import run

    if not settings.worker_concurrency:
        raise BadSettings("WORKER_CONCURRENCY: must be 1 or more for a worker alone")
    ended = _ended()
    async with run(settings.model_copy(update={"catcher": False})):
        await ended.wait()


async def migrate(settings: Settings) -> None:
    """Make or upgrade the tables of QUEUE_URL; SQLite's are made at its start."""
    await make_tables(settings.queue_url)


async def catch(settings: Settings) -> None:
    """Run the catcher alone until SIGTERM or SIGINT."""
    ended = _ended()
    catcher = Catcher(settings.smtp_host, settings.smtp_port, settings.catcher_directory)
    await catcher.start()
    smtp = authority(settings.smtp_host, settings.smtp_port)
    log.info("ready", at=smtp, mail_is_kept_in=str(settings.catcher_directory.absolute()))
    await ended.wait()
    await catcher.stop()


def _ended() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(ended.set))
    return ended


if __name__ == "__main__":
    main()
