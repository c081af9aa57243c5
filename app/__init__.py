"""Afterward as a service: notifications by mail, uploads, and the tutorials' background tasks.

It is built on the library `afterward`. The packages and modules of one line import only from the
lines below it:

    __main__                 the commands: serve, worker, catcher, migrate, tasks
    main, server, terminal   main makes the app and starts what it needs; server runs uvicorn;
                             terminal is a client of the API, for the command `tasks`
    hardening                protection against hostile clients, attached by main and __main__
    board                    the dashboard: HTML pages for people
    api                      the HTTP API: routes, schemas, errors, the event stream
    tasks, observability     the background work, one function for each kind; log lines, metrics,
                             traces
    settings                 every setting
    mail, uploads, shutdown  SMTP and the mail catcher; the stores of files; the stop at a signal
    listening, queue_url     open sockets, and the database of the tasks
"""

import signal
import sys

if sys.argv[0] == "-m":  # until `python -m app` has imported this package
    # While Python imports the modules, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _import_structlog_without_rich() -> None:
    """Import structlog as if rich was not installed, which saves 65 ms of each start.

    structlog imports rich for its tracebacks, which this service does not use. Only the command
    `tasks` needs rich, and imports it later.
    """
    if "rich" not in sys.modules:
        sys.modules["rich"] = None  # type: ignore[assignment]  # makes `import rich` fail
        import structlog  # noqa: F401

        del sys.modules["rich"]


_import_structlog_without_rich()
