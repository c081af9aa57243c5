"""Retry or cancel all tasks that match a filter: count, ask, start, and show the progress."""

import sys
from collections.abc import Mapping
from datetime import timedelta

from rich.progress import BarColumn, MofNCompleteColumn, Progress

from app.terminal.client import Client, as_object, instant, integer
from app.terminal.following import follow
from app.terminal.output import NOT_SUCCEEDED, NOTHING_MATCHED, Json, Output, Trouble
from app.terminal.views import error_text, field, part

_DONE = {"retry": "retried", "cancel": "cancelled"}


def act_on_tasks(
    client: Client, output: Output, action: str, filters: Mapping[str, str], *, confirmed: bool
) -> int:
    """Retry or cancel the tasks that match, after a question. Return the exit code.

    The service fixes the set of tasks when it accepts the request, and carries the action out in a
    task of its own. This command waits for the end of that task.
    """
    if confirmed:
        number = _count(client, action, filters)
    else:
        filters, number = _confirm(client, action, filters)
    task = client.act_on_tasks(action, filters)
    return _report(output, action, _wait(client, output, task, number), number)


def _count(client: Client, action: str, filters: Mapping[str, str]) -> int:
    if number := client.count(action, filters):
        return number
    raise _no_match(action)


def _no_match(action: str) -> Trouble:
    return Trouble(f"No task matches that can be {_DONE[action]}.", NOTHING_MATCHED)


def _confirm(
    client: Client, action: str, filters: Mapping[str, str]
) -> tuple[Mapping[str, str], int]:
    """Ask whether to change the tasks that match. Return their filter, and the confirmed number.

    More tasks may match when the answer comes. So `until` leaves out the tasks that are created
    after the question, and a second question follows if older tasks match in addition: for example,
    tasks that ran at the first question, and have failed since.
    """
    filters = _without_new_tasks(client, action, filters)
    asked, number = 0, _count(client, action, filters)
    while number > asked:
        more = f"More tasks match now. {action.capitalize()}" if asked else action.capitalize()
        _ask(f"{more} {_tasks(number)}?")
        asked, number = number, _count(client, action, filters)
    return filters, asked


def _without_new_tasks(
    client: Client, action: str, filters: Mapping[str, str]
) -> Mapping[str, str]:
    """Return the filters with an `until` that leaves out the tasks that are created from now on.

    It is the time of the newest task, because the clock of the service may differ from ours. Tasks
    of the same millisecond have no order, so all of them are included. An `until` of the person
    stays as it is.
    """
    newest = next(client.tasks(filters, 1), None)
    if newest is None:
        raise _no_match(action)
    until = instant(newest, "created_at", later=timedelta(milliseconds=1))
    return {"until": until.isoformat(), **filters}


def _tasks(number: int) -> str:
    return "1 task" if number == 1 else f"{number:,} tasks"


def _ask(question: str) -> None:
    """Ask for a yes. The question goes to standard error, because standard output is for results.

    Raises Trouble for any other answer, or if there is no terminal to ask at.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise Trouble(f"{question} There is no terminal to answer at: add --yes.")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Trouble("Nothing was changed.", NOTHING_MATCHED)


def _wait(client: Client, output: Output, task: Json, number: int) -> Json:
    """Show the progress of the action's task until it has ended, and return the task."""
    task_id = str(task.get("id"))
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        console=output.notes,
        transient=True,
        disable=not output.notes_on_terminal,
    )
    with bar:
        shown = bar.add_task("", total=number)
        try:
            for event in follow(client, task_id, output.note):
                if event.name != "gap":
                    task = event.data
                    bar.update(shown, completed=round(number * (part(task.get("progress")) or 0)))
        except (KeyboardInterrupt, Trouble):
            output.note(
                f"The service has accepted task {task_id}, and goes on. To see it: "
                f".venv/bin/python -m app tasks watch {task_id} --url {client.url}"
            )
            raise
    return task


def _report(output: Output, action: str, task: Json, number: int) -> int:
    """Print the result of an action on `number` tasks, and return the exit code."""
    if output.as_json:
        output.json(task)
    if task.get("status") != "succeeded":
        status, error = field(task, "status"), error_text(task.get("error"))
        raise Trouble(f"Task {field(task, 'id')} is {status}: {error}", NOT_SUCCEEDED)
    result = as_object(task.get("result"))
    done, matched = (integer(result, name) for name in ("done", "matched"))
    if not output.as_json:
        output.line(f"{_tasks(done)} {_DONE[action]}{_difference(done, matched, number)}")
    return 0


def _difference(done: int, matched: int, number: int) -> str:
    """Return how the changed tasks differ from the `number` that was counted before.

    `matched` is the number at the moment at which the service accepted the action.
    """
    skipped = max(matched, number) - done
    less = f", {skipped:,} skipped because they had changed" if skipped else ""
    more = matched - number
    return less + (f"; {more:,} of them matched only after the count" if more > 0 else "")
