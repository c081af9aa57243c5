"""The commands list, show and watch, and retry and cancel for one task.

Each command returns its exit code.
"""

from collections.abc import Mapping

from afterward.filter import storable_about
from afterward.history import group_of
from app.terminal.client import Client
from app.terminal.following import Event, follow
from app.terminal.output import NOT_SUCCEEDED, NOTHING_MATCHED, Json, Output, Trouble
from app.terminal.views import (
    field,
    write_change,
    write_details,
    write_header,
    write_task,
)

_DONE = {"retry": "Queued again", "cancel": "Cancelled"}


def list_tasks(
    client: Client, output: Output, filters: Mapping[str, str], limit: int | None
) -> int:
    """Print the newest tasks that match, at most `limit` of them."""
    number = 0
    for task in client.tasks(filters, None if limit is None else limit + 1):
        if number == limit:
            output.note("More tasks match. --limit and --all set how many are listed.")
            break
        if number == 0:
            write_header(output)
        write_task(output, task)
        number += 1
    if not number:
        raise Trouble("No task matches.", NOTHING_MATCHED)
    return 0


def show_task(client: Client, output: Output, task_id: str) -> int:
    """Print a task, with the history of its attempts."""
    task = client.task(task_id)
    if output.as_json:
        output.json(task)
    else:
        write_details(output, task)
    return 0


def act_on_task(client: Client, output: Output, action: str, task_id: str) -> int:
    """Retry or cancel one task."""
    task = client.act_on_task(action, task_id)
    if output.as_json:
        output.json(task)
    else:
        output.line(f"{_DONE[action]}: {field(task, 'kind')} {field(task, 'id')}")
    return 0


def watch_tasks(client: Client, output: Output, filters: Mapping[str, str]) -> int:
    """Print each change of the tasks that match, until Ctrl-C."""
    if output.notes_on_terminal:
        output.note("Waiting for changes. Ctrl-C ends the command.")
    for event in follow(client, None, output.note):
        if event.name == "gap":
            output.note(_gap(event))
        elif _matches(event.data, filters):
            write_change(output, event.data)
    return 0


def watch_task(client: Client, output: Output, task_id: str) -> int:
    """Print each change of a task until it ends. The exit code is 1 unless it has succeeded."""
    status = ""
    for event in follow(client, task_id, output.note):
        if event.name == "gap":
            output.note(_gap(event))
        else:
            write_change(output, event.data)
            status = field(event.data, "status")
    return 0 if status == "succeeded" else NOT_SUCCEEDED


def _gap(event: Event) -> str:
    return f"Some changes are missing here. {event.data.get('detail')}"


def _matches(task: Json, filters: Mapping[str, str]) -> bool:
    """Return whether a task matches the filters, as the list of the service applies them."""
    return all(_value(task, name) in _wanted(name, text) for name, text in filters.items())


def _wanted(name: str, text: str) -> list[str | None]:
    """Return the values of a field that a filter selects."""
    if name == "about":
        return [storable_about(text)]  # the service stores only the beginning of a long text
    return [*text.split(",")] if name == "status" else [text]


def _value(task: Json, name: str) -> object:
    """Return the value that a filter compares. Only failed tasks are in a group of errors."""
    if name != "error":
        return task.get(name)
    error = task.get("error")
    if task.get("status") != "failed" or not isinstance(error, dict):
        return None
    return group_of(error)
