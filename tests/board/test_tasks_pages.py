"""The pages of tasks: the search, one task, the failures, and actions on many tasks."""

import json
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

import pytest
from fastapi.testclient import TestClient
from pydantic import TypeAdapter

from afterward.bulk import Action
from afterward.errors import QueueUnavailable
from afterward.filter import TaskFilter
from afterward.retry import MAX_CRASHES, Bounds
from afterward.task import Outcome, Status, Task, new_id
from app.board import tasks as tasks_page
from app.board.json_values import MOST_SHOWN
from app.main import create_app
from tests.support.gate import bearing
from tests.support.pages import BROWSER, Form, Page, browse, submit
from tests.support.service import settings_in, wait_for
from tests.support.smtp_server import SmtpServer

USER_UNKNOWN = {
    "type": "PermanentError",
    "detail": "550 5.1.1 User unknown",
    "smtp_code": 550,
}
HOSTILE = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "\u202egpj.exe",
    "\u2066a\u2069",
    "x" * 900,
    "\x1b[31mred",
    "=?utf-8?q?Bcc=3A?=",
    "';DROP TABLE tasks;--",
    "%00",
    "\udfff",
    "a\r\nb",
]


BOTH_ENGINES = pytest.mark.parametrize(
    "queue_url",
    ["sqlite", "postgresql"],
    indirect=True,
)


@pytest.fixture
def queue_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database: SQLite, unless the test has BOTH_ENGINES."""
    if getattr(request, "param", "sqlite") == "postgresql":
        return str(request.getfixturevalue("database_url"))
    return f"sqlite:///{tmp_path}/queue.db"


@pytest.fixture
def client(tmp_path: Path, queue_url: str) -> Iterator[TestClient]:
    """A service without a worker: the tests are its worker."""
    settings = settings_in(tmp_path, queue_url=queue_url, worker_concurrency=0)
    with TestClient(create_app(settings)) as client:
        yield client


def queue_mails(client: TestClient, number: int = 1) -> list[str]:
    """Queue some mails, and return the ids of their tasks, newest first."""
    paths = [f"/send-notification/user{n}@example.com" for n in range(number)]
    return [client.post(path).json()["id"] for path in paths][::-1]


def claim(client: TestClient) -> list[Task]:
    """Begin every task that is due."""
    return list(
        run(
            client,
            "claim",
            "worker-1",
            kinds=["send_email", "save_data"],
            limit=1000,
            now=time.time(),
            lease=30,
        ).running
    )


def settle(client: TestClient, task: Task, status: Status, **outcome: Any) -> None:
    error = outcome.pop("error", None)
    outcome["error"] = None if error is None else json.dumps(error)
    run(client, "settle", task, Outcome(status, **outcome), time.time())


def fail_all(client: TestClient, **error: Any) -> None:
    for task in claim(client):
        settle(client, task, Status.FAILED, error=USER_UNKNOWN | error)


def run(client: TestClient, operation: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of the service's engine, in its event loop."""
    assert client.portal is not None
    method = getattr(client.app_state["queue"].engine, operation)
    return client.portal.call(lambda: method(*args, **kwargs))


def ids(page: Page) -> list[str]:
    """Return the ids of the tasks in a table, in its order."""
    found = [address for address in page.targets.values() if address.startswith("/board/tasks/")]
    return [address.removeprefix("/board/tasks/") for address in found if "?" not in address]


# The search


def test_the_newest_tasks_come_first_page_by_page(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks_page, "LISTED", 2)
    queued = queue_mails(client, 5)
    first = browse(client, "/board/tasks")
    second = browse(client, first.targets["Older"])
    third = browse(client, second.targets["Older"])
    assert [ids(first), ids(second), ids(third)] == [queued[:2], queued[2:4], queued[4:]]
    assert "Newest" not in first.targets
    assert "Older" not in third.targets
    queue_mails(client)
    assert ids(browse(client, first.targets["Older"])) == queued[2:4], "the link is stable"
    assert ids(browse(client, third.targets["Newest"]))[1] == queued[0]


def test_an_empty_list_says_how_to_send_a_mail(client: TestClient) -> None:
    page = browse(client, "/board/tasks")
    assert page.status == 200
    assert "There are no tasks yet. This command sends a mail: curl" in page.text


def test_a_search_for_the_id_of_a_task_leads_to_its_page(client: TestClient) -> None:
    (task_id,) = queue_mails(client)
    answer = client.get(f"/board/tasks?about=+{task_id}+", headers=BROWSER, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/board/tasks/{task_id}")
    unknown = browse(client, f"/board/tasks?about={'0' * 8}{task_id[8:]}")
    assert "No task matches this search." in unknown.text


def test_a_search_for_the_task_of_another_client_finds_nothing(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, api_keys="ada: key-a, bob: key-b", worker_concurrency=0)
    with TestClient(create_app(settings)) as client:
        path = "/send-notification/ada@example.com"
        task_id = client.post(path, headers=bearing("key-a")).json()["id"]
        page = browse(client, f"/board/tasks?about={task_id}", **bearing("key-b"))
        assert "No task matches this search." in page.text


def test_a_search_without_results_says_so(client: TestClient) -> None:
    queue_mails(client)
    page = browse(client, "/board/tasks?about=nobody@example.com")
    assert "No task matches this search." in page.text
    assert page.targets["Show all tasks"] == "/board/tasks"


def test_a_search_is_live_unless_its_status_is_an_error(client: TestClient) -> None:
    """The script would load the page again, and say that it cannot be loaded."""
    newest, _ = queue_mails(client, 2)
    live = ("", "?kind=nothing", f"?after={newest}")
    for query in (*live, "?period=bad", "?after=x", f"?after={new_id(0)}"):
        page = browse(client, f"/board/tasks{query}")
        assert (page.status == 200) == (query in live)
        assert ("data-live" in page.find("main").attributes) == (query in live)


def test_a_page_beyond_the_end_says_so(client: TestClient) -> None:
    queue_mails(client)
    page = browse(client, f"/board/tasks?status=queued&after={new_id(0)}")
    assert page.status == 404
    assert "There are no older tasks." in page.text
    assert page.targets["Go to the newest"] == "/board/tasks?status=queued"


@BOTH_ENGINES
def test_the_conditions_are_those_of_the_api(client: TestClient) -> None:
    saved = client.post("/save-data/?user_id=ada", json={}).json()["id"]
    failed, other = queue_mails(client, 2)
    fail_all(client)
    cancelled, queued = queue_mails(client, 2)
    client.post(f"/tasks/{cancelled}/cancel")
    request_id = client.get(f"/tasks/{queued}").json()["request_id"]
    hour_ago = time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time() - 3600))
    for query, found in {
        "": [cancelled, queued, failed, other, saved],
        "status=queued": [queued],
        "status=queued&status=cancelled": [cancelled, queued],
        "status=queued,cancelled": [cancelled, queued],
        "kind=save_data": [saved],
        "about=user1@example.com": [cancelled, failed],
        "about=+user1@example.com+": [cancelled, failed],
        "error=PermanentError+550&kind=send_email": [failed, other],
        f"request_id={request_id}": [queued],
        "batch_id=none": [],
        "period=1h": [cancelled, queued, failed, other, saved],
        f"since={hour_ago}": [cancelled, queued, failed, other, saved],
        f"since={hour_ago}:00Z": [cancelled, queued, failed, other, saved],
        f"until={hour_ago}": [],
        "about=&kind=&period=&since=&status=": [cancelled, queued, failed, other, saved],
        "colour=green": [cancelled, queued, failed, other, saved],
    }.items():
        page = browse(client, f"/board/tasks?{query}")
        assert (page.status, ids(page)) == (200, found), query


def test_the_conditions_stay_in_the_form_and_in_the_links(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks_page, "LISTED", 1)
    queue_mails(client, 2)
    query = "status=queued&about=&kind=send_email&period=24h"
    page = browse(client, f"/board/tasks?{query}")
    fields = page.form("/board/tasks").fields
    assert {("status", "queued"), ("period", "24h")} <= set(fields)
    older = parse_qs(urlsplit(page.targets["Older"]).query)
    assert older | {"after": []} == {
        "status": ["queued"],
        "kind": ["send_email"],
        "period": ["24h"],
        "after": [],
    }


def test_an_unreadable_condition_has_its_message_at_the_field(client: TestClient) -> None:
    queue_mails(client)
    for field in ("about", "kind", "period", "since", "until", "error", "batch_id", "request_id"):
        typed = "\0" + "x" * 1001
        page = browse(client, f"/board/tasks?{urlencode({field: typed})}")
        assert page.status == 422
        assert page.text_of("span", id=f"{field}-problem")
        assert ids(page) == []
        (invalid,) = (e.attributes for e in page.elements if "aria-invalid" in e.attributes)
        assert invalid["aria-describedby"] == f"{field}-problem"
        assert (field, typed) in page.form("/board/tasks").fields
    assert (
        "Must be one or more of queued, running" in browse(client, "/board/tasks?status=done").text
    )


def test_an_unreadable_page_has_a_message(client: TestClient) -> None:
    page = browse(client, "/board/tasks?after=3")
    assert page.status == 422
    assert "This is no page of a list." in page.text


def test_a_row_has_the_duration_or_the_next_attempt_and_the_error(client: TestClient) -> None:
    queue_mails(client, 3)
    first, second, third = claim(client)
    settle(client, first, Status.SUCCEEDED, result="null")
    later = time.time() + 605
    settle(client, second, Status.RETRYING, due_at=later, error=USER_UNKNOWN)
    settle(client, third, Status.FAILED, error=USER_UNKNOWN | {"detail": "a\nb" + "c" * 400})
    text = browse(client, "/board/tasks").text
    assert re.search(r"succeeded send_email \S+ user0@example.com \S+( ago)? 1 0\.\d{3} s", text)
    assert "retrying due in 10 min send_email" in text
    assert "1 PermanentError: 550 5.1.1 User unknown" in text
    assert "PermanentError: a b" + "c" * 200 in text
    assert "c" * 300 not in text


def test_a_row_has_no_duration_of_a_crashed_attempt(client: TestClient) -> None:
    """Its `finished_at` is the time at which another worker found it."""
    (task_id,) = queue_mails(client)
    for turn in range(2 * MAX_CRASHES):  # a worker starts the task, and the next takes it over
        now = time.time() + 100 * turn
        run(client, "claim", f"worker-{turn}", kinds=["send_email"], limit=1, now=now, lease=30)
    page = browse(client, "/board/tasks")
    assert page.find("tr", id=f"task-{task_id}").words.startswith("failed")
    assert page.find("td", data_label="Took").text == ""


# One task


@BOTH_ENGINES
def test_the_page_of_a_task_tells_its_life(client: TestClient) -> None:
    (task_id,) = queue_mails(client)
    (task,) = claim(client)
    settle(client, task, Status.RETRYING, due_at=time.time() + 605, error=USER_UNKNOWN)
    page = browse(client, f"/board/tasks/{task_id}")
    assert page.status == 200
    for text in (
        "Accepted",
        "Attempt 1 failed",
        "worker worker-1",
        "PermanentError SMTP 550 550 5.1.1 User unknown",
        "Attempt 2 is next in 10 min",
        "It will be tried again in 10 min",
        "Gives up in 3 d",
    ):
        assert text in page.text, text
    assert page.targets[f"/tasks/{task_id}"] == f"/tasks/{task_id}"
    request_id = client.get(f"/tasks/{task_id}").json()["request_id"]
    assert page.targets[request_id] == f"/board/tasks?request_id={request_id}"
    assert page.targets["user0@example.com"] == "/board/tasks?about=user0%40example.com"


def test_the_timeline_has_exact_times_without_hovering(client: TestClient) -> None:
    (task_id,) = queue_mails(client)
    (task,) = claim(client)
    settle(client, task, Status.RETRYING, due_at=time.time() + 605, error=USER_UNKNOWN)
    (timeline,) = browse(client, f"/board/tasks/{task_id}").all("ol", class_="timeline")
    times = re.findall(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) UTC", timeline.words)
    assert len(times) == len(timeline.children) == 4
    assert times == sorted(times)
    assert times[0] == time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(task.created_at))


def test_a_waiting_task_is_cancelled_and_then_retried(client: TestClient) -> None:
    (task_id,) = queue_mails(client)
    here = f"/board/tasks/{task_id}"
    page = browse(client, here)
    assert [form.action for form in page.forms] == [f"{here}/cancel"]
    response = submit(client, page.form(f"{here}/cancel"))
    assert (response.status_code, response.headers["location"]) == (303, here)
    page = browse(client, here)
    assert [form.action for form in page.forms] == [f"{here}/retry"]
    response = submit(client, page.form(f"{here}/retry"))
    assert (response.status_code, response.headers["location"]) == (303, here)
    assert client.get(f"/tasks/{task_id}").json()["status"] == "queued"


@BOTH_ENGINES
def test_a_retrying_task_can_be_run_now(client: TestClient) -> None:
    (task_id,) = queue_mails(client)
    (task,) = claim(client)
    settle(client, task, Status.RETRYING, due_at=time.time() + 605, error=USER_UNKNOWN)
    here = f"/board/tasks/{task_id}"
    form = browse(client, here).form(f"{here}/run-now")
    assert submit(client, form).status_code == 303
    page = browse(client, here)
    assert "It is due, and waits for a worker." in page.text
    assert [form.action for form in page.forms] == [f"{here}/cancel"]


def test_an_action_that_came_too_late_is_a_message_on_the_page(client: TestClient) -> None:
    """A second click on the button of an old page gets it, too."""
    (task_id,) = queue_mails(client)
    (task,) = claim(client)
    settle(client, task, Status.SUCCEEDED, result="null")
    for action in ("retry", "cancel", "run-now"):
        page = Page.of(submit(client, Form(f"/board/tasks/{task_id}/{action}")))
        assert page.status == 409
        assert "This is the task as it is now." in page.text
        assert "Succeeded" in page.text
        assert "data-live" not in page.find("main").attributes, "the address has no page for GET"


def test_the_arguments_are_shown_and_long_ones_are_folded(client: TestClient) -> None:
    message = "A long text. " * 2000
    body = {"subject": "Hello", "message": message}
    task_id = client.post("/send-notification/ada@example.com", json=body).json()["id"]
    page = browse(client, f"/board/tasks/{task_id}")
    assert "recipient ada@example.com" in page.text
    assert "subject Hello" in page.text
    assert "26,000 characters" in page.text
    assert f"These are the first {MOST_SHOWN:,} characters." in page.text
    assert len(page.all("details")) == 1


def test_arguments_can_be_hidden(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, worker_concurrency=0, hide_arguments=True)
    with TestClient(create_app(settings)) as client:
        body = {"subject": "Secret subject", "message": "Secret message"}
        task_id = client.post("/send-notification/ada@example.com", json=body).json()["id"]
        pages = [browse(client, f"/board/tasks/{task_id}")]
        form = Form(f"/board/tasks/{task_id}/cancel")
        assert submit(client, form).status_code == 303
        pages.append(Page.of(submit(client, form)))
    assert [page.status for page in pages] == [200, 409]
    for page in pages:
        assert "HIDE_ARGUMENTS is set" in page.text
        assert "Secret" not in page.html


def test_a_mail_leads_to_the_inbox(tmp_path: Path) -> None:
    with TestClient(create_app(settings_in(tmp_path))) as client:
        (task_id,) = queue_mails(client)
        message_id = wait_for(client, task_id)["result"]["message_id"]
        page = browse(client, f"/board/tasks/{task_id}")
        found = client.get(page.targets["Read it in the inbox"], headers=BROWSER)
    assert found.status_code == 200
    assert str(found.url.path).startswith("/inbox/")
    assert "user0@example.com" in found.text
    assert f"message_id {message_id}" in page.text


def test_an_upload_leads_to_its_tasks(client: TestClient) -> None:
    queued = client.post("/upload", files={"file": ("a.txt", b"Hello")}).json()
    page = browse(client, f"/board/tasks/{queued['id']}")
    assert page.targets[queued["upload"]["id"]] == f"/board/tasks?about={queued['upload']['id']}"


def test_a_batch_leads_to_its_tasks(client: TestClient) -> None:
    queued = client.post("/send-notifications", json={"recipients": ["a@example.com"] * 3}).json()
    page = browse(client, f"/board/tasks/{queued['tasks'][0]['id']}")
    assert len(ids(browse(client, page.targets[queued["id"]]))) == 3


def test_the_progress_of_a_running_task_is_a_bar(client: TestClient) -> None:
    (task_id,) = queue_mails(client)
    (task,) = claim(client)
    run(client, "report", task, 0.4, time.time())
    page = browse(client, f"/board/tasks/{task_id}")
    assert page.find("progress").attributes["value"] == "0.4"
    assert "Progress: 40 %" in page.text


def test_a_task_that_does_not_exist_has_a_page_that_says_so(client: TestClient) -> None:
    for task_id in (new_id(0), "none", "..%2f", "x" * 300):
        page = browse(client, f"/board/tasks/{task_id}")
        assert page.status == 404, task_id
        if "%2f" not in task_id:
            assert "finished tasks are kept for the retention time only" in page.text
    assert browse(client, "/board/tasks/a%00").status == 422


def test_tasks_of_other_clients_do_not_exist(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, worker_concurrency=0, api_keys="ada: key-a,eve: key-e")
    with TestClient(create_app(settings)) as client:
        path = "/send-notification/ada@example.com"
        task_id = client.post(path, headers=bearing("key-a")).json()["id"]
        eve, ada = BROWSER | bearing("key-e"), BROWSER | bearing("key-a")
        assert task_id in client.get("/board/tasks", headers=ada).text
        assert task_id not in client.get("/board/tasks", headers=eve).text
        assert client.get(f"/board/tasks/{task_id}", headers=ada).status_code == 200
        assert client.get(f"/board/tasks/{task_id}", headers=eve).status_code == 404
        for action in ("retry", "cancel", "run-now"):
            form = Form(f"/board/tasks/{task_id}/{action}")
            assert submit(client, form, bearing("key-e")).status_code == 404
        page = Page.of(client.get("/board/tasks/cancel?kind=send_email", headers=eve))
        assert page.form("/board/tasks/cancel").buttons == []


# Failures


@BOTH_ENGINES
def test_failures_are_grouped_by_kind_and_error(client: TestClient) -> None:
    queue_mails(client, 3)
    fail_all(client)
    (newest,) = queue_mails(client)
    fail_all(client, type="KeyError", detail="\n 'x'\nsecond line", smtp_code=None)
    page = browse(client, "/board/failures")
    assert page.text.index("PermanentError 550") < page.text.index("KeyError")
    assert "550 5.1.1 User unknown" in page.text
    assert "'x' 1" in page.text
    assert "second line" not in page.text
    assert page.targets["Retry these 3"].endswith(
        "?status=failed&kind=send_email&error=PermanentError+550"
    )
    assert f"/board/tasks/{newest}" in page.targets.values()
    assert len(ids(browse(client, page.targets["PermanentError 550"]))) == 3


def test_no_failures_are_good_news(client: TestClient) -> None:
    assert "No task has failed." in browse(client, "/board/failures").text


def test_a_group_whose_newest_task_is_gone_is_shown(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retention may remove the task after the groups were counted."""
    queue_mails(client)
    fail_all(client)
    engine, groups = client.app_state["queue"].engine, run(client, "count_failures", "")
    run(
        client,
        "purge",
        finished_before=0,
        failed_before=time.time() + 9,
        answered_before=0,
        limit=9,
    )

    async def counted_before(_: str) -> Any:
        return groups

    monkeypatch.setattr(engine, "count_failures", counted_before)
    page = browse(client, "/board/failures")
    assert page.status == 200
    assert "Retry these 1" in page.targets


# Actions on many tasks


def carry_out(client: TestClient, task_id: str) -> set[str]:
    """Do the first slice of a bulk action, and return the ids of the tasks that it has changed."""
    (action,) = run(
        client,
        "claim",
        "worker-2",
        kinds=["retry_tasks", "cancel_tasks"],
        limit=1,
        now=time.time(),
        lease=30,
    ).running
    assert action.id == task_id
    arguments = json.loads(action.arguments)["kwargs"]
    kind, matched = Action(action.kind.removesuffix("_tasks")), arguments["matched"]
    wanted = TypeAdapter(TaskFilter).validate_python(arguments["wanted"])
    piece = run(
        client,
        "change_slice",
        action,
        wanted.acted_on(kind, arguments["accepted_at"]),
        limit=9,
        most=matched,
        bounds_of=lambda _: Bounds(8),
        now=time.time(),
    )
    return {task.id for task in piece.changed}


def confirm(client: TestClient, action: str, query: str) -> tuple[Page, Form]:
    page = browse(client, f"/board/tasks/{action}?{query}")
    return page, page.form(f"/board/tasks/{action}")


@BOTH_ENGINES
def test_the_number_on_the_button_is_the_number_that_is_retried(
    tmp_path: Path, queue_url: str, smtp_server: SmtpServer
) -> None:
    smtp_server.always["rcpt"] = "550 5.1.1 User unknown"
    port = smtp_server.port
    settings = settings_in(tmp_path, queue_url=queue_url, catcher=False, smtp_port=port)
    with TestClient(create_app(settings)) as client:
        for task_id in queue_mails(client, 5):
            wait_for(client, task_id, "failed")
        smtp_server.always.clear()
        failures = browse(client, "/board/failures")
        page = browse(client, failures.targets["Retry these 5"])
        form = page.form("/board/tasks/retry")
        assert form.buttons == ["Retry these 5"]
        response = submit(client, form)
        assert response.status_code == 303
        task_id = response.headers["location"].removeprefix("/board/tasks/")
        result = wait_for(client, task_id)["result"]
        assert result == {"matched": 5, "done": 5, "skipped": 0}
        text = browse(client, response.headers["location"]).text
        assert "retry_tasks" in text
        assert "matched 5 done 5 skipped 0" in text
        for task_id in ids(browse(client, "/board/tasks?kind=send_email")):
            wait_for(client, task_id)


def test_the_buttons_of_a_search_have_the_numbers_of_all_its_pages(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks_page, "LISTED", 1)
    queue_mails(client, 2)
    fail_all(client)
    queue_mails(client, 3)
    assert "Retry these" not in browse(client, "/board/tasks").text
    page = browse(client, "/board/tasks?kind=send_email")
    assert page.targets["Retry these 2"] == "/board/tasks/retry?kind=send_email"
    assert page.targets["Cancel these 3"] == "/board/tasks/cancel?kind=send_email"
    for action, number in (("retry", 2), ("cancel", 3)):
        _, form = confirm(client, action, "kind=send_email")
        assert form.buttons == [f"{action.title()} these {number}"]


def test_a_period_is_fixed_when_it_is_confirmed(client: TestClient) -> None:
    """Otherwise the button would mean other tasks a moment later."""
    (counted,) = queue_mails(client)
    _, form = confirm(client, "cancel", "period=1h")
    queue_mails(client)
    fields = dict(form.fields)
    assert "period" not in fields
    assert fields["since"]
    task_id = submit(client, form).headers["location"].removeprefix("/board/tasks/")
    assert carry_out(client, task_id) == {counted}


@BOTH_ENGINES
def test_a_form_that_is_sent_twice_is_one_action(client: TestClient) -> None:
    """Also if more tasks match before the browser sends it again."""
    queue_mails(client, 2)
    _, form = confirm(client, "cancel", "kind=send_email")
    first = submit(client, form)
    queue_mails(client)
    second = submit(client, form)
    assert first.status_code == second.status_code == 303
    assert first.headers["location"] == second.headers["location"]
    assert len(ids(browse(client, "/board/tasks?kind=cancel_tasks"))) == 1


def test_a_form_with_other_fields_is_another_action(client: TestClient) -> None:
    queue_mails(client, 2)
    _, form = confirm(client, "cancel", "kind=send_email")
    first = submit(client, form)
    other = submit(client, form, about="user0@example.com")
    assert first.headers["location"] != other.headers["location"]
    _, again = confirm(client, "cancel", "kind=send_email")
    assert submit(client, again).headers["location"] != first.headers["location"]


@BOTH_ENGINES
def test_tasks_that_fail_after_the_count_are_not_retried(client: TestClient) -> None:
    """In an outage, tasks fail all the time. The confirmation is not refused because of them."""
    (counted,) = queue_mails(client)
    fail_all(client)
    queue_mails(client)
    (running,) = claim(client)
    _, form = confirm(client, "retry", "kind=send_email")
    assert form.buttons == ["Retry these 1"]
    settle(client, running, Status.FAILED, error=USER_UNKNOWN)
    task_id = submit(client, form).headers["location"].removeprefix("/board/tasks/")
    assert carry_out(client, task_id) == {counted}


@BOTH_ENGINES
def test_tasks_that_are_tried_again_after_the_count_are_not_cancelled(client: TestClient) -> None:
    queue_mails(client, 2)
    counted, running = sorted(claim(client), key=lambda task: task.id)
    retry = {"error": USER_UNKNOWN, "due_at": time.time() + 60}
    settle(client, counted, Status.RETRYING, **retry)
    _, form = confirm(client, "cancel", "kind=send_email")
    assert form.buttons == ["Cancel these 1"]
    settle(client, running, Status.RETRYING, **retry)
    task_id = submit(client, form).headers["location"].removeprefix("/board/tasks/")
    assert carry_out(client, task_id) == {counted.id}


def test_nothing_to_do_has_no_button(client: TestClient) -> None:
    queue_mails(client)
    page, form = confirm(client, "retry", "kind=send_email")
    assert "No task that can be retried matches." in page.text
    assert form.buttons == []


def test_an_action_needs_a_condition(client: TestClient) -> None:
    for query in ("", "kind=", "colour=green"):
        page = browse(client, f"/board/tasks/retry?{query}")
        assert page.status == 422
        assert "needs at least one condition" in page.text


def test_an_unreadable_action_is_refused(client: TestClient) -> None:
    queue_mails(client)
    assert browse(client, "/board/tasks/retry?status=done").status == 422
    _, form = confirm(client, "cancel", "kind=send_email")
    unreadable: list[dict[str, Any]] = [
        {"matches": ""},
        {"matches": "-1"},
        {"matches": "9" * 99},
        {"matches": "٣"},
        {"counted_at": ""},
        {"counted_at": "nan"},
        {"counted_at": "1e9"},
        {"counted_at": "9" * 99},
        {"counted_at": "٣"},
        {"status": "done"},
        {"since": "yesterday"},
        {"about": "\0"},
    ]
    for changes in unreadable:
        page = Page.of(submit(client, form, **changes))
        assert page.status == 422, changes
    assert ids(browse(client, "/board/tasks?kind=cancel_tasks")) == []


def test_a_form_of_another_site_is_refused(client: TestClient) -> None:
    (task_id,) = queue_mails(client)
    _, bulk = confirm(client, "cancel", "kind=send_email")
    forms = [Form(f"/board/tasks/{task_id}/{name}") for name in ("cancel", "retry")]
    for form in (bulk, *forms):
        for site in ("cross-site", "same-site", "none"):
            assert submit(client, form, {"Sec-Fetch-Site": site}).status_code == 403
    assert client.get(f"/tasks/{task_id}").json()["status"] == "queued"


# Hostile texts


FIELDS = ("about", "kind", "status", "batch_id", "request_id", "error", "since", "until", "period")


@pytest.mark.thorough
def test_a_hostile_text_in_a_field_is_a_text(client: TestClient) -> None:
    queue_mails(client)
    for text in HOSTILE:
        check_fields(client, text)


def check_fields(client: TestClient, text: str) -> None:
    """Write a text into every field, also into the fields of forms, and the path."""
    sent = quote(text.encode("utf-8", "surrogatepass"))
    for name, path in product((*FIELDS, "after"), ("/board/tasks", "/board/tasks/retry")):
        page = browse(client, f"{path}?{name}={sent}")
        assert page.status in {200, 404, 422}
        check_harmless(page)
    for path in ("/board/tasks/retry", "/board/tasks/cancel"):
        body = urlencode({"form_key": text, "matches": text, "about": text}, errors="replace")
        response = client.post(path, content=body, headers=BROWSER)
        assert response.status_code == 415
    check_harmless(browse(client, f"/board/tasks/{sent}"))


def test_a_hostile_text_in_a_row_is_a_text(client: TestClient, tmp_path: Path) -> None:
    (task_id,) = queue_mails(client)
    fail_all(client)
    for text in HOSTILE:
        rewrite(tmp_path, **hostile_columns(text))
        client.app_state["board"].reads._reads.clear()
        for path in ("/", f"/board/tasks/{task_id}", "/board/tasks", "/board/failures"):
            page = browse(client, path)
            assert page.status == 200
            check_harmless(page)


def hostile_columns(text: str) -> dict[str, str]:
    """Return the columns of a task with a text wherever a client, a server or a worker has one."""
    storable = text.encode(errors="replace").decode()
    as_json = json.dumps(text)
    return {
        "about": storable,
        "request_id": storable,
        "batch_id": storable,
        "owner": storable,
        "arguments": f'{{"args": [{as_json}, "\\ud800"], "kwargs": {{{as_json}: [{as_json}]}}}}',
        "result": f'{{{as_json}: {as_json}, "message_id": {as_json}}}',
        "error": json.dumps({"type": storable, "detail": storable, "smtp_code": storable}),
        "history": json.dumps(
            [
                {
                    "attempt": 1,
                    "started_at": 0,
                    "seconds": 0,
                    "worker": storable,
                    "error": {"type": storable, "detail": storable, "smtp_code": storable},
                }
            ]
        ),
    }


def rewrite(directory: Path, **columns: Any) -> None:
    """Write values into the rows of all tasks, behind the back of the service."""
    changes = ", ".join(f"{name} = ?" for name in columns)
    with closing(sqlite3.connect(directory / "queue.db")) as database, database:
        database.execute(f"UPDATE tasks SET {changes}", tuple(columns.values()))


def check_harmless(page: Page) -> None:
    """Assert that no text has become an element or an attribute."""
    (script,) = page.all("script")
    assert set(script.attributes) == {"src", "defer"}
    names = {name for element in page.elements for name in element.attributes}
    assert not {name for name in names if name.startswith("on")}
    assert "style" not in names
    assert all("/board/static/" in image.attributes["src"] for image in page.all("img"))
    tags = {element.tag for element in page.elements}
    assert tags.isdisjoint({"style", "iframe", "object", "embed", "base"})


DAMAGES: list[dict[str, Any]] = [
    {"error": "no JSON"},
    {"error": "[]"},
    {"error": '{"type": 1}'},
    {"history": "no JSON"},
    {"history": "[1]"},
    {"arguments": "no JSON"},
    {"arguments": "[]"},
    {"arguments": '{"args": 1, "kwargs": 2}'},
    {"result": "no JSON"},
    {"result": '"text"'},
    {"result": '["message_id"]'},
    {"started_at": None, "finished_at": None},
    {"created_at": 1e300, "due_at": -1e300, "updated_at": 1e18},
    {"progress": 7},
]


def test_a_damaged_row_is_shown(client: TestClient, tmp_path: Path) -> None:
    (task_id,) = queue_mails(client)
    fail_all(client)
    for damage in DAMAGES:
        rewrite(tmp_path, **damage)
        client.app_state["board"].reads._reads.clear()
        for path in ("/", f"/board/tasks/{task_id}", "/board/tasks", "/board/failures"):
            assert browse(client, path).status == 200, (damage, path)


# Prefix, and a database that is away


def test_every_link_and_form_has_the_prefix(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, worker_concurrency=0, root_path="/afterward")
    with TestClient(create_app(settings)) as client:
        queued = client.post("/upload", files={"file": ("a.txt", b"Hello")}).json()
        client.post("/send-notifications", json={"recipients": ["a@example.com"]})
        fail_all(client)
        for path in (
            "/board/tasks",
            f"/board/tasks/{queued['id']}",
            "/board/tasks?kind=save_upload",
            "/board/failures",
            "/board/tasks/retry?kind=send_email",
        ):
            page = browse(client, path)
            assert page.status == 200
            addresses = [*page.targets.values(), *(form.action for form in page.forms)]
            assert all(link.startswith(("/afterward/", "#main")) for link in addresses), addresses
        form = Form(f"/afterward/board/tasks/{queued['id']}/cancel")
        location = submit(client, form).headers["location"]
        assert location == f"/afterward/board/tasks/{queued['id']}"


def test_a_database_that_is_away_is_a_page(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: Any, **__: Any) -> Any:
        raise QueueUnavailable

    engine = client.app_state["queue"].engine
    for operation in ("list_tasks", "get", "count_failures", "count_tasks"):
        monkeypatch.setattr(engine, operation, refuse)
    for path in ("", "/x", "/retry?kind=send_email", "?kind=send_email"):
        page = browse(client, f"/board/tasks{path}")
        assert page.status == 503
        assert "The database does not answer just now." in page.text
    assert browse(client, "/board/failures").status == 503
