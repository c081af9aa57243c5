"""The options of `python -m app tasks`, and its exit codes.

0: done. 1: no task matched, its status does not allow the action, you said no, or the watched task
or the action on many tasks has not succeeded. 2: wrong options, or the service did not answer or
refused the request. 130: Ctrl-C. 141: the reader of the output has closed it, for example `head`.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import httpx2

from afterward.task import Status
from app import listening
from app.settings import load_settings
from app.terminal.bulk import act_on_tasks
from app.terminal.client import Client
from app.terminal.output import (
    INTERRUPTED,
    PIPE_CLOSED,
    TROUBLE,
    Output,
    Trouble,
    discard,
    prepare_streams,
    printable,
    say,
)
from app.terminal.tasks import act_on_task, list_tasks, show_task, watch_task, watch_tasks

DEFAULT_LIMIT = 50

# The filters of GET /tasks, with the help of their options.
_FILTERS = {
    "status": "one status, or several separated by commas: failed, or queued,retrying",
    "kind": "the kind, such as send_email",
    "about": "the recipient of a mail, or the id of an upload; matched exactly",
    "batch_id": "the batch",
    "request_id": "the X-Request-ID of the request that queued the task",
    "error": "the type of the error, and its SMTP code if it has one: 'PermanentError 550'",
    "since": "created at this time or later: 2026-01-31T12:00:00Z",
    "until": "created before this time",
}
_TIMES = ("since", "until")


# The options


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments after `tasks`."""
    parser = argparse.ArgumentParser(
        prog="python -m app tasks",
        description="The tasks of a running service.",
        epilog="Exit codes: 0 done; 1 nothing was to be done, or the task has not succeeded; "
        "2 wrong options, or an error.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    service, filters = _service_options(), _filter_options(_FILTERS)

    listing = commands.add_parser(
        "list", help="list tasks, newest first", parents=[filters, service]
    )
    pages = listing.add_mutually_exclusive_group()
    pages.add_argument(
        "--limit",
        metavar="N",
        type=_positive,
        default=DEFAULT_LIMIT,
        help="at most so many (default: 50)",
    )
    pages.add_argument("--all", action="store_true", help="all that match")

    one = commands.add_parser("show", help="show a task and its attempts", parents=[service])
    one.add_argument("id", **_ID)

    for action, text in (
        ("retry", "queue failed and cancelled tasks again"),
        ("cancel", "cancel tasks that wait"),
    ):
        acting = commands.add_parser(
            action, help=f"{text}: one, or all that match", parents=[filters, service]
        )
        acting.add_argument("id", nargs="?", **_ID)
        acting.add_argument("--yes", action="store_true", help="do not ask")

    changes = [name for name in _FILTERS if name not in _TIMES]
    watching = commands.add_parser(
        "watch",
        help="follow one task to its end, or the changes of all that match",
        parents=[_filter_options(changes), service],
    )
    watching.add_argument("id", nargs="?", **_ID)
    return parser


def _service_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    group = options.add_argument_group("the service")
    group.add_argument("--url", help="its address (default: HOST and PORT of the settings)")
    group.add_argument("--key", help="the API key (default: the variable AFTERWARD_API_KEY)")
    group.add_argument("--json", action="store_true", help="one JSON object a line, as in the API")
    return options


def _filter_options(names: Iterable[str]) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    group = options.add_argument_group("filters")
    for name in names:
        group.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="TIME" if name in _TIMES else "TEXT",
            type=_statuses if name == "status" else _not_empty,
            help=_FILTERS[name],
        )
    return options


def _positive(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError("must be a whole number above 0")
    return int(text)


def _not_empty(text: str) -> str:
    """Refuse an empty text, which an unset variable of a shell script becomes.

    As a filter it would select nothing, or everything, and not what its author meant.
    """
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _task_id(text: str) -> str:
    """Refuse the names that are no part of a path: `/tasks/.` would be the list of tasks."""
    if text in ("", ".", ".."):
        raise argparse.ArgumentTypeError("must be the id of a task")
    return text


def _statuses(text: str) -> str:
    if not set(text.split(",")) <= set(Status):
        raise argparse.ArgumentTypeError(
            f"must be one or more of {', '.join(Status)}, separated by commas"
        )
    return text


_ID: dict[str, Any] = {"metavar": "ID", "type": _task_id, "help": "the id of a task"}


# The service


def local_url() -> str:
    """Return the address of the service that runs with the settings of this directory."""
    settings = load_settings()
    if not settings.port:
        raise Trouble("PORT=0 lets the system choose a port: give the address with --url.")
    return listening.url(settings.host, settings.port, settings.root_path)


def open_client(
    url: str | None, key: str | None, transport: httpx2.BaseTransport | None = None
) -> Client:
    """Return a client of the service at `url`, or else of the local service."""
    return Client(url or local_url(), key or os.environ.get("AFTERWARD_API_KEY") or None, transport)


# The commands


def main(arguments: Sequence[str], transport: httpx2.BaseTransport | None = None) -> int:
    """Run `python -m app tasks` with the arguments after `tasks`, and return the exit code."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    filters = {
        name: value for name in _FILTERS if (value := getattr(options, name, None)) is not None
    }
    acts = options.command in ("retry", "cancel")
    if getattr(options, "id", None) is not None and filters:
        parser.error("give an ID or filters, and not both")
    if acts and options.id is None and not filters:
        parser.error(f"{options.command}: give an ID, or a filter such as --status failed")

    def run() -> int:
        with open_client(options.url, options.key, transport) as client:
            return _run(client, options, filters)

    return run_quietly(run)


def _run(client: Client, options: argparse.Namespace, filters: dict[str, str]) -> int:
    output, command = Output(as_json=options.json), options.command
    task_id: str | None = getattr(options, "id", None)
    if command == "list":
        return list_tasks(client, output, filters, None if options.all else options.limit)
    if task_id is not None:
        return _run_on_task(client, output, command, task_id)
    if command == "watch":
        return watch_tasks(client, output, filters)
    return act_on_tasks(client, output, command, filters, confirmed=options.yes)


def _run_on_task(client: Client, output: Output, command: str, task_id: str) -> int:
    match command:
        case "show":
            return show_task(client, output, task_id)
        case "watch":
            return watch_task(client, output, task_id)
        case _:
            return act_on_task(client, output, command, task_id)


def run_quietly(run: Callable[[], int]) -> int:
    """Call `run`, and return its exit code. An error becomes one line on standard error."""
    prepare_streams()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return run()
    except Trouble as error:
        say(printable(error))
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        discard(sys.stdout)
        return PIPE_CLOSED
    except OSError as error:  # the disk is full, for example
        say(f"The command cannot go on: {error}")
        discard(sys.stdout)
        return TROUBLE
