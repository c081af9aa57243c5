"""The server: uvicorn on sockets that are opened first, with a log line when it is ready."""

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import socket
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
import uvicorn

from app.listening import CannotListen, bind, url
from app.settings import Settings

log = structlog.get_logger(__name__)


def serve(app: Any, settings: Settings, protocol: type[asyncio.Protocol] | str = "auto") -> None:
    """Serve until SIGTERM or SIGINT.

    `protocol` is the class of a connection, uvicorn's own by default. The sockets are opened before
    the app starts, so a port that is taken is reported at once. Raises CannotListen then.
    """
    sockets = _open_sockets(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol,
        ws="none",
        # Every client can send X-Forwarded-For, so it is not trusted. The service does not need it:
        # behind a proxy there are API keys, and each client has its own rate limit.
        proxy_headers=False,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_grace_seconds)),
    )
    with contextlib.ExitStack() as stack:  # closes the sockets even if the app does not start
        for opened in sockets:
            stack.enter_context(opened)
        Server(config, settings).run(sockets)


class Server(uvicorn.Server):
    """uvicorn's server, which also logs the addresses of the pages when it is ready."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self._settings = settings

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at a signal. After Ctrl-C, a second Ctrl-C ends the process at once, like a kill."""
        super().handle_exit(sig, frame)
        if sig == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the app, then accept connections."""
        await super().startup(sockets)
        assert sockets
        self._log_started_message(sockets)  # uvicorn leaves it out for sockets it did not open
        port: int = sockets[0].getsockname()[1]
        at = url(self._settings.host, port, self._settings.root_path)
        inbox = {"inbox": f"{at}/inbox"} if self._settings.catcher else {}
        log.info("ready", at=f"{at}/", docs=f"{at}/docs", **inbox)


def _open_sockets(settings: Settings) -> list[socket.socket]:
    """Open the sockets. If the service itself holds the port already, CannotListen says so."""
    try:
        return bind(settings.host, settings.port)
    except CannotListen as error:
        cause = error.__cause__
        if not (isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE):
            raise  # the address is wrong
        owner = _owner_of_the_queue(settings.queue_url)
        if owner is None or (error.processes and owner not in error.processes):
            raise
        at = url(settings.host, settings.port, settings.root_path)
        raise CannotListen(
            f"the service already runs here, as process {owner} at {at}/. "
            f"Stop it with: kill {owner}",
            error.processes,
        ) from error


def _owner_of_the_queue(queue_url: str) -> int | None:
    """Return the id of the running process that has locked the SQLite file of this queue."""
    if not queue_url.startswith("sqlite:///"):
        return None
    lock_file = Path(os.path.realpath(queue_url.removeprefix("sqlite:///")) + ".lock")
    with contextlib.suppress(OSError, ValueError), lock_file.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(lock.read())
    return None
