"""`tasks retry` and `tasks cancel`: one task, and all tasks of a filter."""

import io
import json
import sys
from collections.abc import Callable

import httpx2
import pytest

from tests.terminal.conftest import Run
from tests.terminal.stand_in import (
    ID,
    StandIn,
    event,
    failure,
    page,
    problem,
    stream,
    task,
    without_styles,
)

RETRY = task(kind="retry_tasks", status="queued", about=None, result=None)


def progress(part: float) -> dict[str, object]:
    """Return the task of the action while it runs."""
    return RETRY | {"status": "running", "progress": part}


def done(**result: int) -> dict[str, object]:
    """Return the task of the action after its end."""
    return RETRY | {"status": "succeeded", "progress": 1.0, "result": result}


TypeAt = Callable[[str], None]


class Keyboard(io.StringIO):
    """Standard input of a terminal, with the typed text."""

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        return True


@pytest.fixture
def type_at(monkeypatch: pytest.MonkeyPatch) -> TypeAt:
    """A person at a terminal, who types an answer to the question."""

    def type_at(text: str) -> None:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdin", Keyboard(text))

    return type_at


# One task


@pytest.mark.parametrize(
    ("action", "line"),
    [("retry", f"Queued again: send_email {ID}\n"), ("cancel", f"Cancelled: send_email {ID}\n")],
)
def test_one_task_is_retried_or_cancelled_without_a_question(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str], action: str, line: str
) -> None:
    stand_in.answers(task())
    assert run(action, ID) == 0
    assert stand_in.asked == [f"POST /tasks/{ID}/{action}"]
    assert capsys.readouterr() == (line, "")


def test_the_json_of_one_task_is_the_answer_of_the_api(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.answers(task())
    assert run("retry", ID, "--json") == 0
    assert json.loads(capsys.readouterr().out) == task()


@pytest.mark.parametrize("status", [404, 409])
def test_a_task_that_does_not_exist_or_has_another_status_is_exit_code_1(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    stand_in.answers(problem(status, "The task has succeeded."))
    assert run("retry", ID) == 1
    assert capsys.readouterr().err == f"The service answered {status}: The task has succeeded.\n"


# All tasks of a filter


def test_many_tasks_are_counted_then_retried_and_their_number_is_printed(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.answers(
        {"matches": 312},
        RETRY,
        stream(event("task", progress(0.5)), event("end", done(matched=312, done=312, skipped=0))),
    )
    assert run("retry", "--status", "failed", "--kind", "send_email", "--yes") == 0
    assert stand_in.asked == [
        "POST /tasks/retry",
        "POST /tasks/retry",
        f"GET /tasks/{ID}/events",
    ]
    wanted = {"status": "failed", "kind": "send_email"}
    assert stand_in.body(0) == {"filter": wanted, "dry_run": True}
    assert stand_in.body(1) == {"filter": wanted}
    assert capsys.readouterr() == ("312 tasks retried\n", "")


def test_skipped_tasks_are_told(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    end = done(matched=1001, done=1000, skipped=1)
    stand_in.answers({"matches": 1001}, RETRY, stream(event("end", end)))
    assert run("cancel", "--status", "queued", "--yes") == 0
    line = "1,000 tasks cancelled, 1 skipped because they had changed\n"
    assert capsys.readouterr().out == line


def test_the_json_of_many_is_the_finished_task(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    end = done(matched=1, done=1, skipped=0)
    stand_in.answers({"matches": 1}, RETRY, stream(event("end", end)))
    assert run("retry", "--status", "failed", "--yes", "--json") == 0
    assert json.loads(capsys.readouterr().out) == end


def test_a_terminal_gets_a_progress_bar(
    stand_in: StandIn, run: Run, on_a_terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    end = done(matched=312, done=312, skipped=0)
    stand_in.answers(
        {"matches": 312}, RETRY, stream(event("task", progress(0.5)), event("end", end))
    )
    assert run("retry", "--status", "failed", "--yes") == 0
    said = capsys.readouterr()
    assert "312/312" in without_styles(said.err)
    assert without_styles(said.out) == "312 tasks retried\n"


def test_the_exit_code_is_1_if_no_task_matches(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.answers({"matches": 0})
    assert run("retry", "--status", "failed", "--yes") == 1
    assert capsys.readouterr().err == "No task matches that can be retried.\n"


def test_the_exit_code_is_1_if_the_action_fails(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    error = {"type": "ValueError", "detail": "a bug"}
    failed = RETRY | {"status": "failed", "error": error}
    stand_in.answers({"matches": 1}, RETRY, stream(event("end", failed)))
    assert run("retry", "--status", "failed", "--yes") == 1
    assert capsys.readouterr().err == f"Task {ID} is failed: ValueError: a bug\n"


@pytest.mark.parametrize("answer", [{}, {"matches": "many"}, {"matches": 10**400}])
def test_an_answer_without_a_number_is_exit_code_2(
    stand_in: StandIn, run: Run, answer: dict[str, object]
) -> None:
    stand_in.answers(answer)
    assert run("retry", "--status", "failed", "--yes") == 2


ACCEPTED = (
    f"The service has accepted task {ID}, and goes on. To see it: "
    f".venv/bin/python -m app tasks watch {ID} --url http://127.0.0.1:8000/mail\n"
)


@pytest.mark.parametrize(
    ("answer", "exit_code", "reason"),
    [
        (problem(429, "Too many requests."), 2, "The service answered 429: Too many requests.\n"),
        (httpx2.ReadTimeout("slow"), 2, "http://127.0.0.1:8000/mail did not answer in time.\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_action_that_is_accepted_but_cannot_be_followed_is_named(
    stand_in: StandIn,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    answer: httpx2.Response | BaseException,
    exit_code: int,
    reason: str,
) -> None:
    """Otherwise a person would repeat the command, and the service would act twice."""
    stand_in.answers({"matches": 1}, RETRY, answer)
    url = "http://127.0.0.1:8000/mail"
    assert run("retry", "--status", "failed", "--yes", "--url", url) == exit_code
    assert capsys.readouterr() == ("", f"{ACCEPTED}{reason}")


@pytest.mark.parametrize("progress", ["half", 10**400, -1, 1.5, float("nan")])
def test_a_progress_that_is_none_is_ignored(
    stand_in: StandIn, run: Run, on_a_terminal: None, progress: object
) -> None:
    running, end = RETRY | {"progress": progress}, done(matched=1, done=1, skipped=0)
    stand_in.answers({"matches": 1}, RETRY, stream(event("task", running), event("end", end)))
    assert run("retry", "--status", "failed", "--yes") == 0


# The question


@pytest.mark.parametrize("typed", ["y\n", "YES\n"])
def test_a_yes_starts_the_action(
    stand_in: StandIn,
    run: Run,
    type_at: TypeAt,
    capsys: pytest.CaptureFixture[str],
    typed: str,
) -> None:
    type_at(typed)
    end = done(matched=1, done=1, skipped=0)
    stand_in.answers(
        page(failure()), {"matches": 1}, {"matches": 1}, RETRY, stream(event("end", end))
    )
    assert run("retry", "--status", "failed") == 0
    said = capsys.readouterr()
    assert said.err.startswith("Retry 1 task? [y/N] ")
    assert said.out == "1 task retried\n"


@pytest.mark.parametrize("typed", ["\n", "n\n", "", "yesterday\n"])
def test_another_answer_changes_nothing(
    stand_in: StandIn,
    run: Run,
    type_at: TypeAt,
    capsys: pytest.CaptureFixture[str],
    typed: str,
) -> None:
    type_at(typed)
    stand_in.answers(page(task()), {"matches": 312})
    assert run("cancel", "--kind", "send_email") == 1
    assert capsys.readouterr().err == "Cancel 312 tasks? [y/N] Nothing was changed.\n"


def test_a_task_that_is_created_after_the_question_is_not_changed(
    stand_in: StandIn, run: Run, type_at: TypeAt
) -> None:
    """The limit comes from the newest task, and not from the clock of this machine."""
    type_at("y\n")
    end = done(matched=1, done=1, skipped=0)
    answers = {"matches": 1}, {"matches": 1}, RETRY, stream(event("end", end))
    stand_in.answers(page(failure(created_at="2026-11-28T14:00:00.123456Z")), *answers)
    assert run("retry", "--status", "failed") == 0
    wanted = {"status": "failed", "until": "2026-11-28T14:00:00.124456+00:00"}
    assert stand_in.asked[0] == "GET /tasks?status=failed&limit=1"
    assert stand_in.body(1) == stand_in.body(2) == {"filter": wanted, "dry_run": True}
    assert stand_in.body(3) == {"filter": wanted}


def test_an_earlier_until_of_the_person_stays(stand_in: StandIn, run: Run, type_at: TypeAt) -> None:
    type_at("n\n")
    stand_in.answers(page(failure()), {"matches": 1})
    assert run("retry", "--until", "2026-11-28T14:00:00Z") == 1
    assert stand_in.body(1)["filter"] == {"until": "2026-11-28T14:00:00Z"}


def test_more_tasks_after_the_answer_are_another_question(
    stand_in: StandIn, run: Run, type_at: TypeAt, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two tasks that were created before the first question have failed since."""
    type_at("y\ny\n")
    counts = {"matches": 312}, {"matches": 314}, {"matches": 313}
    end = done(matched=313, done=313, skipped=0)
    stand_in.answers(page(failure()), *counts, RETRY, stream(event("end", end)))
    assert run("retry", "--status", "failed") == 0
    said = capsys.readouterr()
    assert said.err.startswith(
        "Retry 312 tasks? [y/N] More tasks match now. Retry 314 tasks? [y/N] "
    )
    assert said.out == "313 tasks retried, 1 skipped because they had changed\n"


def test_a_no_to_the_second_question_changes_nothing(
    stand_in: StandIn, run: Run, type_at: TypeAt
) -> None:
    type_at("y\nn\n")
    stand_in.answers(page(failure()), {"matches": 312}, {"matches": 314})
    assert run("retry", "--status", "failed") == 1
    assert [request.method for request in stand_in.requests] == ["GET", "POST", "POST"]
    assert stand_in.body(2)["dry_run"]


def test_no_question_is_asked_if_no_task_matches(
    stand_in: StandIn, run: Run, type_at: TypeAt, capsys: pytest.CaptureFixture[str]
) -> None:
    type_at("y\n")
    stand_in.answers(page())
    assert run("retry", "--status", "failed") == 1
    assert capsys.readouterr().err == "No task matches that can be retried.\n"


@pytest.mark.parametrize("time", [None, "9999-12-31T23:59:59.9999Z"])
def test_a_newest_task_without_a_time_is_exit_code_2(
    stand_in: StandIn, run: Run, type_at: TypeAt, time: str | None
) -> None:
    type_at("y\n")
    stand_in.answers(page(failure(created_at=time)))
    assert run("retry", "--status", "failed") == 2


@pytest.mark.parametrize(
    ("matched", "changed", "line"),
    [
        (310, 310, "310 tasks retried, 2 skipped because they had changed\n"),
        (310, 309, "309 tasks retried, 3 skipped because they had changed\n"),
        (315, 315, "315 tasks retried; 3 of them matched only after the count\n"),
    ],
)
def test_the_result_tells_how_it_differs_from_the_number_that_was_counted(
    stand_in: StandIn,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    matched: int,
    changed: int,
    line: str,
) -> None:
    end = done(matched=matched, done=changed, skipped=matched - changed)
    stand_in.answers({"matches": 312}, RETRY, stream(event("end", end)))
    assert run("retry", "--status", "failed", "--yes") == 0
    assert capsys.readouterr().out == line


def test_without_a_terminal_only_yes_starts_the_action(
    stand_in: StandIn,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    stand_in.answers(page(failure()), {"matches": 312})
    assert run("retry", "--status", "failed") == 2
    line = "Retry 312 tasks? There is no terminal to answer at: add --yes.\n"
    assert capsys.readouterr().err == line
