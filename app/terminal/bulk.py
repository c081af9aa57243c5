"""Retry or cancel all tasks that match a filter: count, ask, start, and show the progress."""

import sys
from collections.abc import Mapping

from rich.progress import BarColumn, MofNCompleteColumn, Progress

from app.terminal.client import Client, as_object, integer
from app.terminal.following import follow
from app.terminal.output import NOT_SUCCEEDED, NOTHING_MATCHED, Json, Output, Trouble
from app.terminal.views import error_text, field

_DONE = {"retry": "retried", "cancel": "cancelled"}


def act_on_tasks(
    client: Client, output: Output, action: str, filters: Mapping[str, str], *, confirmed: bool
) -> int:
    """Retry or cancel the tasks that match, after a question. Return the exit code.

    The service fixes the set of tasks when it accepts the request, and carries the action out in a
    task of its own. This command waits for the end of that task.
    """
    number = client.count(action, filters)
    if not number:
        raise Trouble(f"No task matches that can be {_DONE[action]}.", NOTHING_MATCHED)
    if not confirmed:
        _ask(f"{action.capitalize()} {_tasks(number)}?")
    task = client.act_on_tasks(action, filters)
    return _report(output, action, _wait(client, output, task, number))


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
        disable=not output.notes.is_terminal,
    )
    with bar:
        shown = bar.add_task("", total=number)
        try:
            for event in follow(client, task_id, output.note):
                if event.name != "gap":
                    task = event.data
                    bar.update(shown, completed=round(number * (task.get("progress") or 0)))
        except KeyboardInterrupt:
            output.note(f"The service goes on. To see it: python -m app tasks watch {task_id}")
            raise
    return task


def _report(output: Output, action: str, task: Json) -> int:
    """Print the result of an action, and return the exit code."""
    if output.as_json:
        output.json(task)
    if task.get("status") != "succeeded":
        status, error = field(task, "status"), error_text(task.get("error"))
        raise Trouble(f"Task {field(task, 'id')} is {status}: {error}", NOT_SUCCEEDED)
    result = as_object(task.get("result"))
    done, skipped = (integer(result, name) for name in ("done", "skipped"))
    if not output.as_json:
        more = f", {skipped} skipped because they had changed" if skipped else ""
        output.line(f"{_tasks(done)} {_DONE[action]}{more}")
    return 0
