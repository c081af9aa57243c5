"""`tasks watch`: the event stream, its reconnects, its gaps, and its end."""

import json

import httpx2
import pytest

from tests.terminal.conftest import Run
from tests.terminal.stand_in import (
    ID,
    StandIn,
    event,
    failure,
    problem,
    stream,
    task,
    undecodable,
    without_styles,
)

RUNNING = task(status="running", progress=0.4, finished_at=None)
# The answer that ends `watch` in a test; without an id it would go on for ever.
ENOUGH = problem(403, "Enough.")


# One task


@pytest.mark.parametrize(
    ("last", "exit_code"), [(task(), 0), (failure(), 1), (task(status="cancelled"), 1)]
)
def test_a_task_is_followed_to_its_end_and_the_exit_code_tells_how_it_ended(
    stand_in: StandIn,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    last: dict[str, object],
    exit_code: int,
) -> None:
    stand_in.answers(stream(b"retry: 3000\n", event("task", RUNNING), event("end", last)))
    assert run("watch", ID) == exit_code
    assert stand_in.asked == [f"GET /tasks/{ID}/events"]
    first, second = capsys.readouterr().out.splitlines()
    assert first.split("\t")[:2] == [ID, "running"]
    assert first.split("\t")[5] == RUNNING["updated_at"]
    assert second.split("\t")[1] == last["status"]


def test_json_is_a_task_in_each_line(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.answers(stream(event("task", RUNNING), event("end", task())))
    assert run("watch", ID, "--json") == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [RUNNING, task()]


def test_a_terminal_gets_a_line_with_the_time_and_the_progress(
    stand_in: StandIn, run: Run, on_a_terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.answers(stream(event("task", RUNNING), event("end", failure("full"))))
    assert run("watch", ID) == 1
    said = capsys.readouterr().out
    assert "\x1b[34mrunning" in said
    assert without_styles(said).splitlines() == [
        f"14:00:01Z {ID} running   40% send_email ada@example.com",
        f"14:00:01Z {ID} failed    send_email ada@example.com PermanentError 550: full",
    ]


def test_a_task_that_does_not_exist_is_exit_code_1(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.answers(problem(404, "There is no such task."))
    assert run("watch", ID) == 1
    assert capsys.readouterr().err == "The service answered 404: There is no such task.\n"


# Reconnects


@pytest.mark.parametrize("breaks", [False, True])
def test_a_lost_stream_goes_on_after_the_last_event(
    stand_in: StandIn,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    breaks: bool,
) -> None:
    """The service restarts meanwhile, and says how long to wait."""
    pauses: list[float] = []
    monkeypatch.setattr("app.terminal.following.time.sleep", pauses.append)
    stand_in.answers(
        stream(b"retry: 250\n", event("task", RUNNING, id="1.5-a"), breaks=breaks),
        httpx2.ConnectError("refused"),
        problem(503, "The service is stopping."),
        stream(event("end", task())),
    )
    assert run("watch", ID) == 0
    assert pauses == [0.25] * 3
    sent = [request.headers.get("last-event-id") for request in stand_in.requests]
    assert sent == [None, "1.5-a", "1.5-a", "1.5-a"]
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2
    lost, back = said.err.splitlines()
    assert lost.endswith("Connecting again ...")
    assert back == "Connected again."


@pytest.mark.parametrize(("retry", "pause"), [("9" * 400, 60), ("-5", 0)])
def test_a_strange_pause_is_brought_into_bounds(
    stand_in: StandIn, run: Run, monkeypatch: pytest.MonkeyPatch, retry: str, pause: float
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("app.terminal.following.time.sleep", pauses.append)
    stand_in.answers(stream(f"retry: {retry}\n\n".encode()), stream(event("end", task())))
    assert run("watch", ID) == 0
    assert pauses == [pause]


def test_a_change_that_comes_again_after_a_reconnect_is_printed_once(
    stand_in: StandIn,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("app.terminal.following.MOST_REMEMBERED", 2)
    first, second, third = (event("task", task(id=f"{n}"), id=f"{n}") for n in (1, 2, 3))
    stand_in.answers(stream(first, second), stream(first, second, third), ENOUGH)
    run("watch")
    assert [line[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2", "3"]


def test_a_task_whose_end_was_read_before_is_not_waited_for(stand_in: StandIn, run: Run) -> None:
    """The service answers 204 to a client that has read the end."""
    stand_in.answers(stream(event("task", task())), httpx2.Response(204))
    assert run("watch", ID) == 0


def test_a_refused_reconnect_ends_the_command(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.answers(stream(event("task", RUNNING)), problem(404, "There is no such task."))
    assert run("watch", ID) == 1
    assert "404" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (httpx2.ConnectError("refused"), "Nothing answers at http://127.0.0.1:8000."),
        (problem(503, "The database is away."), "The service answered 503: The database is away."),
        (httpx2.Response(200, text="Hello"), "http://127.0.0.1:8000 does not answer like this"),
        (stream(b"event: task\ndata: [1]\n\n"), "The service has sent an event that is not a JSON"),
        (stream(b"event: task\ndata: {\n\n"), "The service has sent an event that is not a JSON"),
        (stream(b"event: task\ndata: " + b"[" * 100_000 + b"\n\n"), "The service has sent an"),
        (undecodable(200, "text/event-stream"), "Cannot reach http://127.0.0.1:8000: "),
        (undecodable(403, "application/problem+json"), "Cannot reach http://127.0.0.1:8000: "),
        (stream(b"data: " + b"x" * 2_000_000), "http://127.0.0.1:8000 does not answer like this"),
    ],
)
def test_an_error_at_the_first_connection_ends_the_command(
    stand_in: StandIn,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    answer: httpx2.Response | Exception,
    line: str,
) -> None:
    stand_in.answers(answer)
    assert run("watch") == 2
    assert capsys.readouterr().err.startswith(line)


# All tasks


def test_a_gap_is_told_and_other_kinds_of_events_are_left_out(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.answers(
        stream(
            event("gap", {"detail": "Read the tasks again."}),
            b": heartbeat\n\n",
            event("news", {"a": 1}),
            event("task", task()),
        ),
        ENOUGH,
    )
    assert run("watch") == 2
    assert stand_in.asked[0] == "GET /events"
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1
    assert said.err.startswith("Some changes are missing here. Read the tasks again.\n")


def test_a_person_who_waits_for_the_first_change_is_told(
    stand_in: StandIn, run: Run, on_a_terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.answers(ENOUGH)
    run("watch")
    said = without_styles(capsys.readouterr().err)
    assert said.startswith("Waiting for changes. Ctrl-C ends the command.\n")


@pytest.mark.parametrize(
    ("options", "number"),
    [
        (["--status", "failed"], 1),
        (["--status", "failed,succeeded"], 2),
        (["--error", "PermanentError 550"], 1),
        (["--kind", "send_email", "--about", "ada@example.com"], 2),
        (["--about", "grace@example.com"], 0),
        (["--batch-id", "b-1"], 0),
        (["--batch-id", "None"], 0),
    ],
)
def test_filters_select_changes(
    stand_in: StandIn,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    number: int,
) -> None:
    stand_in.answers(stream(event("task", task(), "1"), event("task", failure(), "2")), ENOUGH)
    run("watch", *options)
    assert len(capsys.readouterr().out.splitlines()) == number


def test_a_long_about_selects_the_part_of_it_that_the_service_stores(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = task(about="a" * 255)
    stand_in.answers(stream(event("task", stored)), ENOUGH)
    run("watch", "--about", "a" * 300)
    assert len(capsys.readouterr().out.splitlines()) == 1
