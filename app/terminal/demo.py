"""`make demo`: sends 200 mails and a file through a running service, and shows how they end.

The service is the one at URL, or else the local one at PORT. AFTERWARD_API_KEY has its API key.
"""

import os
import sys
import time
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from app.terminal.client import Client, objects
from app.terminal.commands import open_client, run_quietly
from app.terminal.output import Json, Output, Trouble, printable
from app.terminal.views import field, write_timeline

FILE = Path(__file__).parents[2] / "README.md"
PATIENCE = 120.0  # seconds after which the demo leaves the mails that still wait to the service
LOOK_EVERY = 0.25  # seconds between two looks at the batch

# The embedded catcher refuses mails to these addresses on purpose. Another SMTP server takes them.
DEFERRED, REFUSED = 60, 4
DEFERRED_ADDRESS, REFUSED_ADDRESS = "defer+451@example.com", "refuse+550@example.com"
RECIPIENTS = [
    *(f"reader-{number}@example.com" for number in range(200 - DEFERRED - REFUSED)),
    *[DEFERRED_ADDRESS] * DEFERRED,
    *[REFUSED_ADDRESS] * REFUSED,
]

_BOLD, _FAINT, _INDENT = "bold", "dim", "   "


def main() -> int:
    """Run the demo, and return its exit code."""
    return run_quietly(run)


def run() -> int:
    """Send mails, a file and an invalid request, and say where to look at them."""
    output = Output()
    with open_client(os.environ.get("URL"), None) as client:
        output.line(f"This demo uses the service at {client.url}")
        batch = _send_mails(client, output)
        counts = _wait_for_mails(client, output, batch)
        _show_one_that_was_deferred(client, output, batch)
        _upload_a_file(client, output)
        _send_to_an_invalid_address(client, output)
        _say_where_to_look(client, output, counts)
    return 0


# The mails


def _send_mails(client: Client, output: Output) -> Json:
    _say(output, f"1. {len(RECIPIENTS)} mails in one request")
    _say_more(output, f"The catcher of `make run` defers {DEFERRED} and refuses {REFUSED} of them.")
    began = time.monotonic()
    batch = client.post(
        "/send-notifications",
        {"recipients": RECIPIENTS, "subject": "Hello from the demo", "message": "It is done."},
    )
    took = (time.monotonic() - began) * 1000
    _say_more(output, f"202 after {took:.0f} ms: all {field(batch, 'total')} tasks are on disk.")
    return batch


def _wait_for_mails(client: Client, output: Output, batch: Json) -> Json:
    """Show the progress of the batch until each mail has arrived or failed. Return the counts."""
    deadline = time.monotonic() + PATIENCE
    bar = Progress(
        TextColumn(_INDENT + "mails"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        console=output.console,
        disable=not output.is_terminal,
    )
    with bar:
        shown = bar.add_task("", total=len(RECIPIENTS))
        while True:
            counts = client.get(f"/batches/{batch.get('id')}")
            ended = sum(_number(counts, name) for name in ("succeeded", "failed", "cancelled"))
            bar.update(shown, completed=ended, description=_describe(counts))
            if ended >= _number(counts, "total") or time.monotonic() > deadline:
                break
            time.sleep(LOOK_EVERY)
    _say_more(output, f"The end: {_describe(counts)}.")
    return counts


def _number(counts: Json, name: str) -> int:
    value = counts.get(name)
    return value if isinstance(value, int) else 0


def _describe(counts: Json) -> str:
    """Return the numbers of mails in each status, such as `138 succeeded, 58 retrying`."""
    names = ("succeeded", "queued", "running", "retrying", "failed", "cancelled")
    return ", ".join(f"{number} {name}" for name in names if (number := _number(counts, name)))


def _show_one_that_was_deferred(client: Client, output: Output, batch: Json) -> None:
    """Show the attempts of the first mail that did not arrive at once, if there is any."""
    tasks = objects(batch, "tasks")
    deferred = next(task for task in tasks if task.get("email") == DEFERRED_ADDRESS)
    task = client.task(str(deferred.get("id")))
    if task.get("history"):
        _say_more(output, "One of the mails that the service tried again:")
        write_timeline(output, task, indent=2 * len(_INDENT))


# The file, and the invalid request


def _upload_a_file(client: Client, output: Output) -> None:
    _say(output, "2. A file")
    task = client.post("/upload", files={"file": (FILE.name, FILE.read_bytes())})
    _say_more(output, f"202: its bytes are on disk. The task {field(task, 'kind')} publishes them.")
    ended = _read_when_ended(client, str(task.get("id")))
    _say_more(output, f"The end: {field(ended, 'status')}.")


def _read_when_ended(client: Client, task_id: str) -> Json:
    """Return a task as it is after its end, or after ten seconds."""
    deadline = time.monotonic() + 10
    while not (task := client.task(task_id)).get("finished_at") and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY)
    return task


def _send_to_an_invalid_address(client: Client, output: Output) -> None:
    _say(output, "3. An invalid address")
    try:
        client.post("/send-notification/nobody")
    except Trouble as refusal:
        _say_more(output, f"{refusal}. No task is queued.")


# The output


def _say(output: Output, text: str) -> None:
    output.line("")
    output.line((text, _BOLD))


def _say_more(output: Output, text: str) -> None:
    output.line(_INDENT, printable(text))


def _say_where_to_look(client: Client, output: Output, counts: Json) -> None:
    given = os.environ.get("URL") or os.environ.get("PORT")
    url = f" --url {client.url}" if given else ""
    caught = client.exists("/inbox")
    _say(output, "Look at the result")
    for name, place in (
        ("tasks", f"{client.url}/"),
        ("mail", f"{client.url}/inbox" if caught else "http://localhost:8025 with Docker"),
        ("failures", f".venv/bin/python -m app tasks list --status failed{url}"),
    ):
        if name != "failures" or _number(counts, "failed"):
            output.line((f"{_INDENT}{name:<9}", _FAINT), place)


if __name__ == "__main__":
    sys.exit(main())
