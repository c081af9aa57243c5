"""`tasks list` and `tasks show`: on a terminal, in a pipe, as JSON."""

import json
import re
from datetime import timedelta

import pytest

from app.terminal.views import error_text, short, time_text
from tests.terminal.conftest import Run
from tests.terminal.stand_in import ID, StandIn, failure, page, problem, task, without_styles

# In a pipe


def test_in_a_pipe_each_task_is_a_line_of_columns(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.answers(page(failure(), task(about=None)))
    assert run("list") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split("\t") == [
        ID,
        "failed",
        "send_email",
        "ada@example.com",
        "1",
        "2026-11-28T14:00:00Z",
        "PermanentError: 550 no such mailbox",
    ]
    assert second.split("\t")[3] == ""


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_variable_that_asks_for_colours_changes_nothing_in_a_pipe(
    stand_in: StandIn,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
) -> None:
    """CI systems set them, and a program may read the output there."""
    monkeypatch.setenv(variable, "1")
    stand_in.answers(page(task()), problem(403, "Enough."))
    assert run("list") == 0
    assert capsys.readouterr().out.split("\t")[:2] == [ID, "succeeded"]
    run("watch")
    assert "Waiting" not in capsys.readouterr().err


def test_json_is_an_object_of_the_api_in_each_line(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = [failure(), task()]
    stand_in.answers(page(*tasks))
    assert run("list", "--json") == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == tasks


def test_options_become_the_filters_of_the_api(stand_in: StandIn, run: Run) -> None:
    stand_in.answers(page(task()))
    options = {
        "--status": "queued,retrying",
        "--kind": "send_email",
        "--about": "ada@example.com",
        "--batch-id": "b-1",
        "--request-id": "r-1",
        "--error": "PermanentError 550",
        "--since": "2026-11-28T00:00:00+01:00",
        "--until": "2026-11-29T00:00:00Z",
    }
    assert run("list", *(word for option in options.items() for word in option)) == 0
    assert dict(stand_in.requests[0].url.params) == {
        **{name[2:].replace("-", "_"): value for name, value in options.items()},
        "limit": "51",
    }


# Pages


def test_all_reads_page_after_page(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.answers(page(task(id="3"), task(id="2"), has_more=True), page(task(id="1")))
    assert run("list", "--all") == 0
    assert [line[0] for line in capsys.readouterr().out.splitlines()] == ["3", "2", "1"]
    assert stand_in.asked == ["GET /tasks?limit=100", "GET /tasks?after=2&limit=100"]


def test_a_limit_ends_the_list_and_a_note_tells_of_more(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.answers(page(task(), task(), task(), has_more=True))
    assert run("list", "--limit", "2") == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2
    assert said.err == "More tasks match. --limit and --all set how many are listed.\n"
    assert stand_in.asked == ["GET /tasks?limit=3"]


def test_a_limit_above_a_page_reads_several(stand_in: StandIn, run: Run) -> None:
    stand_in.answers(page(*[task()] * 100, has_more=True), page(*[task()] * 20))
    assert run("list", "--limit", "120") == 0
    assert stand_in.asked == ["GET /tasks?limit=100", f"GET /tasks?after={ID}&limit=21"]


def test_the_exit_code_is_1_if_no_task_matches(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.answers(page())
    assert run("list", "--status", "failed") == 1
    assert capsys.readouterr() == ("", "No task matches.\n")


# On a terminal


def test_a_terminal_gets_a_table_with_colours_and_no_line_beyond_its_width(
    stand_in: StandIn, run: Run, on_a_terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.answers(page(failure("no such mailbox " * 20)))
    assert run("list") == 0
    said = capsys.readouterr().out
    assert "\x1b[31mfailed" in said
    header, row, error = without_styles(said).splitlines()
    assert header.split() == ["ID", "STATUS", "AGE", "KIND", "ABOUT"]
    assert row.index("ada@") == header.index("ABOUT")
    assert error.startswith("  attempt 1: PermanentError 550: no such")
    assert len(error) == 100
    assert error.endswith("…")


def test_a_narrow_terminal_gets_the_kind_and_the_recipient_in_a_line_of_their_own(
    stand_in: StandIn,
    run: Run,
    on_a_terminal: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    stand_in.answers(page(failure(about="ada.lovelace@mail.example.com")))
    assert run("list") == 0
    header, row, about, error = without_styles(capsys.readouterr().out).splitlines()
    assert header.split() == ["ID", "STATUS", "AGE"]
    assert row.split()[:2] == [ID, "failed"]
    assert about == "  send_email ada.lovelace@mail.example.com"
    assert error.startswith("  attempt 1: PermanentError: 550 no such")


def test_no_color_is_respected(
    stand_in: StandIn,
    run: Run,
    on_a_terminal: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stand_in.answers(page(task()))
    assert run("list") == 0
    assert "\x1b[32m" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0s"), (0.4, "0s"), (59, "59s"), (60, "1m"), (7199, "1h"), (86_400 * 30, "30d")],
)
def test_an_age_is_shown_in_its_largest_unit(seconds: float, text: str) -> None:
    assert short(timedelta(seconds=seconds)) == text


# One task


ATTEMPT = {
    "attempt": 1,
    "started_at": "2026-11-28T14:00:00Z",
    "seconds": 0.25,
    "worker": "w-1",
    "error": {"type": "Later", "detail": "full", "smtp_code": 451},
}


def test_a_task_is_shown_with_its_fields_and_its_attempts(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.answers(task(attempts=2, history=[ATTEMPT], progress=0.5, batch_id="b-1"))
    assert run("show", ID) == 0
    assert stand_in.asked == [f"GET /tasks/{ID}"]
    assert capsys.readouterr().out.splitlines() == [
        "send_email for ada@example.com: succeeded",
        f"  id        {ID}",
        "  attempts  2, until 2026-12-02 14:00:00 UTC",
        "  progress  50%",
        "  batch     b-1",
        "  request   r-1",
        "  worker    mail-1:4711:5f2a",
        '  result    {"reply": "250 OK"}',
        "",
        "  2026-11-28 14:00:00 UTC  accepted",
        "  2026-11-28 14:00:00 UTC  attempt 1 failed after 0.25 s: Later 451: full (worker w-1)",
        "  2026-11-28 14:00:01 UTC  attempt 2 succeeded",
    ]


@pytest.mark.parametrize(
    ("changes", "last"),
    [
        ({"status": "queued", "started_at": None}, "accepted"),
        (
            {"status": "queued"},
            "given back: its worker stopped, so this attempt does not count",
        ),
        ({"status": "running", "max_attempts": 8}, "attempt 1 runs on mail-1:4711:5f2a"),
        (
            {"status": "retrying", "next_attempt_at": "2126-11-28T14:00:00Z"},
            r"next attempt, in \d+d",
        ),
        ({"status": "retrying", "next_attempt_at": "2026-01-28T14:00:00Z"}, "next attempt"),
        ({"status": "failed"}, "failed"),
        ({"status": "cancelled"}, "cancelled"),
    ],
)
def test_the_last_line_tells_how_the_task_is_now(
    stand_in: StandIn,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    last: str,
) -> None:
    stand_in.answers(task(**changes, history=[]))
    assert run("show", ID) == 0
    assert re.fullmatch(rf".* UTC  {last}", capsys.readouterr().out.splitlines()[-1])


def shown_events(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines after the empty line, which are the timeline."""
    lines = capsys.readouterr().out.splitlines()
    return lines[lines.index("") + 1 :]


def test_a_crash_and_a_retry_on_request_are_events(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    died = {"type": "WorkerDied", "detail": "the process died"}
    crash = ATTEMPT | {"seconds": None, "error": died}
    history = [crash, ATTEMPT | {"attempt": 2}, ATTEMPT]
    stand_in.answers(task(attempts=1, history=history))
    assert run("show", ID) == 0
    assert shown_events(capsys) == [
        "  2026-11-28 14:00:00 UTC  accepted",
        "  2026-11-28 14:00:00 UTC  attempt 1 crashed: WorkerDied: the process died (worker w-1)",
        "  2026-11-28 14:00:00 UTC  attempt 2 failed after 0.25 s: Later 451: full (worker w-1)",
        "                           retried on request: the attempts are counted from 1 again",
        "  2026-11-28 14:00:00 UTC  attempt 1 failed after 0.25 s: Later 451: full (worker w-1)",
        "                           retried on request: the attempts are counted from 1 again",
        "  2026-11-28 14:00:01 UTC  attempt 1 succeeded",
    ]


@pytest.mark.parametrize(
    ("first", "missing"),
    [
        (1, []),
        (2, ["attempt 1 is not kept: a task keeps its newest 20 failed attempts"]),
        (381, ["attempts 1 to 380 are not kept: a task keeps its newest 20 failed attempts"]),
    ],
)
def test_attempts_that_the_task_does_not_keep_are_told(
    stand_in: StandIn,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    first: int,
    missing: list[str],
) -> None:
    history = [ATTEMPT | {"attempt": first}, ATTEMPT | {"attempt": first + 1}]
    stand_in.answers(task(status="failed", attempts=first + 1, history=history))
    assert run("show", ID) == 0
    _, *between, _, _, _ = shown_events(capsys)
    assert [line.strip() for line in between] == missing


RETRIED = "retried on request: the attempts are counted from 1 again"


@pytest.mark.parametrize(
    ("changes", "events"),
    [
        ({"status": "queued", "attempts": 0, "started_at": None}, [f"14:00:01 UTC  {RETRIED}"]),
        ({"status": "cancelled", "attempts": 0, "started_at": None}, [RETRIED, "cancelled"]),
        ({"status": "running", "attempts": 1}, [RETRIED, "attempt 1 runs on mail-1:4711:5f2a"]),
        ({"status": "running", "attempts": 2}, ["attempt 2 runs on mail-1:4711:5f2a"]),
        ({"status": "queued", "attempts": 1}, ["given back: its worker stopped"]),
        ({"status": "failed", "attempts": 1}, ["14:00:01 UTC  failed"]),
    ],
)
def test_the_events_after_the_last_failure_follow_from_the_fields_of_the_task(
    stand_in: StandIn,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    events: list[str],
) -> None:
    stand_in.answers(task(**changes, history=[ATTEMPT]))
    assert run("show", ID) == 0
    shown = shown_events(capsys)[2:]
    assert len(shown) == len(events)
    for line, text in zip(shown, events, strict=True):
        assert text in line


def test_the_json_of_a_task_is_that_of_the_api(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.answers(task(history=[ATTEMPT]))
    assert run("show", ID, "--json") == 0
    assert json.loads(capsys.readouterr().out) == task(history=[ATTEMPT])


def test_the_exit_code_is_1_if_there_is_no_such_task(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.answers(problem(404, "There is no such task."))
    assert run("show", "../x?") == 1
    assert stand_in.asked == ["GET /tasks/..%2Fx%3F"]
    assert capsys.readouterr() == ("", "The service answered 404: There is no such task.\n")


BEFORE_THE_YEAR_1 = "0001-01-01T00:00:00+05:00"  # in UTC


def test_strange_fields_are_shown_as_they_are(
    stand_in: StandIn, run: Run, on_a_terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A service of another version may send them."""
    strange = {
        "status": ["new"],
        "created_at": "yesterday",
        "error": "broken",
        "progress": "half",
        "history": [
            {"attempt": None, "seconds": "long", "error": None},
            {"attempt": 1, "seconds": 10**400, "error": None, "started_at": BEFORE_THE_YEAR_1},
            "?",
        ],
    }
    stand_in.answers({**strange}, page(strange, {"created_at": BEFORE_THE_YEAR_1}))
    assert run("show", ID) == 0
    assert run("list") == 0
    said = capsys.readouterr().out
    assert "yesterday" in said
    assert "broken" in said
    assert f"{BEFORE_THE_YEAR_1}  attempt 1 failed: " in without_styles(said)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ({"type": "Timeout", "detail": "900 s"}, "Timeout: 900 s"),
        (
            {"type": "TemporaryError", "detail": "later", "smtp_code": 451},
            "TemporaryError 451: later",
        ),
        (None, ""),
    ],
)
def test_an_error_is_one_line(error: object, text: str) -> None:
    assert error_text(error) == text


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        ("2026-11-28T15:00:00+01:00", "2026-11-28 14:00:00 UTC"),
        ("2026-11-28T14:00:00", "2026-11-28 14:00:00 UTC"),
        ("soon", "soon"),
    ],
)
def test_times_are_shown_in_utc(moment: str, text: str) -> None:
    assert time_text(moment) == text
