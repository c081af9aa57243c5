"""The patterns of FastAPI's tutorials: the visible effect of each request."""

import json
import os
import time
from datetime import datetime
from io import BytesIO
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from app.main import create_app
from tests.api.requests import upload_of
from tests.support.service import PATIENCE, Service, mails_in, settings_in, wait_for

ENGINES = ["sqlite", "postgresql"]


def log_lines(directory: Path) -> list[str]:
    """Return the lines that `write_log` has written."""
    return (directory / "log.txt").read_text().splitlines()


# The simplest: a mail arrives.


def test_a_simple_email_arrives(client: TestClient, tmp_path: Path) -> None:
    queued = client.post("/send-email/?email=ada@example.com").json()
    task = wait_for(client, queued["id"])
    (mail,) = mails_in(tmp_path)
    assert mail.recipients == ("ada@example.com",)
    assert mail.sender == "notifications@example.com"
    assert mail.message_id == task["result"]["message_id"] == f"<{queued['id']}@example.com>"


# A dependency and the route add tasks to the same unit of work.


def test_a_notification_writes_two_lines_and_then_the_mail(
    client: TestClient, tmp_path: Path
) -> None:
    queued = client.post("/send-notification/ada@example.com?q=the%20query").json()
    assert log_lines(tmp_path) == ["found query: the query", "message to ada@example.com"]
    wait_for(client, queued["id"])
    (mail,) = mails_in(tmp_path)
    assert (mail.subject, mail.text) == ("Notification", "This is a notification.\n")


def test_a_notification_without_a_query_writes_one_line(client: TestClient, tmp_path: Path) -> None:
    client.post("/send-notification/ada@example.com")
    assert log_lines(tmp_path) == ["message to ada@example.com"]


@pytest.mark.parametrize(
    ("body", "subject", "text"),
    [
        ({"subject": "Hello"}, "Hello", "This is a notification.\n"),
        ({"message": "Dear Ada"}, "Notification", "Dear Ada\n"),
        ({"subject": "Grüße 😀", "message": "naïve\r\ncafé"}, "Grüße 😀", "naïve\ncafé\n"),
        ({"subject": "", "message": ""}, "", "\n"),
        ({"message": "{{7*7}} {% import os %} {0.__class__}"}, "Notification", None),
    ],
)
def test_the_mail_has_the_subject_and_the_text_of_the_notification(
    client: TestClient, tmp_path: Path, body: dict[str, str], subject: str, text: str | None
) -> None:
    wait_for(client, client.post("/send-notification/ada@example.com", json=body).json()["id"])
    (mail,) = mails_in(tmp_path)
    assert mail.subject == subject
    assert mail.text == (text if text is not None else body["message"] + "\n")


def test_markup_is_escaped_in_the_html_of_a_mail(client: TestClient, tmp_path: Path) -> None:
    body = {"subject": "<script>1</script>", "message": "<script>2</script>"}
    wait_for(client, client.post("/send-notification/ada@example.com", json=body).json()["id"])
    (mail,) = mails_in(tmp_path)
    assert mail.html is not None
    assert "<script>" not in mail.html
    assert "&lt;script&gt;2" in mail.html
    assert mail.text == "<script>2</script>\n"


@pytest.mark.parametrize(
    ("address", "recipient"),
    [
        ("a%252Fb@example.com", "a%2Fb@example.com"),
        ("-oQ@example.com", "-oQ@example.com"),
        ("a+b@EXAMPLE.com", "a+b@example.com"),
        ("a%2Bb@example.com", "a+b@example.com"),
        ("ada@%E2%93%94xample.com", "ada@example.com"),
        ("ada@b%C3%BCcher.example.com", "ada@xn--bcher-kva.example.com"),
    ],
)
def test_an_unusual_address_is_exactly_one_recipient(
    service: Service, address: str, recipient: str
) -> None:
    task = service.post(f"/send-notification/{address}").json()
    service.wait_for(task["id"])
    (mail,) = (mail for mail in service.mails if mail.message_id == f"<{task['id']}@example.com>")
    assert mail.recipients == (recipient,)


# Arguments are passed to a task.


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"colour": "green", "sizes": [1, 2.5, None, True], "deep": {"er": {}}},
        {"": "", "\0": "\0\r\n\u2028", "😀": 10**30},
    ],
)
def test_saved_data_reads_back_unchanged(client: TestClient, data: object) -> None:
    wait_for(client, client.post("/save-data/?user_id=ada", json=data).json()["id"])
    response = client.get("/save-data/ada")
    assert (response.status_code, response.json()) == (200, data)


def test_the_data_that_was_saved_last_replaces_older_data(client: TestClient) -> None:
    for number in (1, 2):
        queued = client.post("/save-data/?user_id=ada", json={"number": number}).json()
        wait_for(client, queued["id"])
    assert client.get("/save-data/ada").json() == {"number": 2}
    assert client.get("/save-data/eve").status_code == 404


# The background tasks of a request run one after the other.


def test_the_tasks_of_a_request_run_in_order(client: TestClient, tmp_path: Path) -> None:
    client.post("/multiple-tasks/")
    assert log_lines(tmp_path) == ["first task", "second task"]


def test_data_without_an_error_is_processed(service: Service) -> None:
    response = service.post(
        "/process/", json={"colour": "green"}, headers={"X-Request-ID": "processed"}
    )
    assert response.json() == {"message": "Processing queued"}
    service.get("/livez")
    lines = [json.loads(line) for line in service.log.splitlines()]
    of_this = [line for line in lines if line.get("request_id") == "processed"]
    assert [(line["event"], line["level"]) for line in of_this] == [
        ("request", "info"),
        ("data processed", "info"),
    ]


# A confirmation after something was created.


@pytest.mark.parametrize(
    ("query", "recipient"),
    [("", "customer@example.com"), ("?email=ada@example.com", "ada@example.com")],
)
def test_an_item_is_confirmed_by_a_mail_about_it(
    client: TestClient, tmp_path: Path, query: str, recipient: str
) -> None:
    response = client.post(f"/items/42{query}")
    assert response.json()["item_id"] == 42
    wait_for(client, response.json()["id"])
    (mail,) = mails_in(tmp_path)
    assert mail.recipients == (recipient,)
    assert "42" in mail.subject


# How a background task is tested.


def test_the_test_client_waits_for_background_tasks(client: TestClient, tmp_path: Path) -> None:
    client.post("/test-task/")
    assert log_lines(tmp_path) == ["test task"]


@pytest.mark.thorough
def test_a_real_server_answers_before_its_background_tasks_are_done(tmp_path: Path) -> None:
    """The log file is a pipe: the task waits until a reader opens it, the response does not."""
    log = tmp_path / "log.txt"
    os.mkfifo(log)
    with Service(tmp_path) as service:
        assert service.post("/test-task/").status_code == 202
        with log.open() as reader:
            assert reader.readline() == "test task\n"


# Work for the processor does not block the event loop.


def test_the_event_loop_stays_responsive_while_a_thumbnail_is_made(service: Service) -> None:
    png = BytesIO()
    Image.new("L", (7000, 7000)).save(png, "PNG")
    call = upload_of(png.getvalue(), "large.png", "image/png")
    upload = call.send(service.client).json()["upload"]
    pauses, made = [], False
    while not made:
        response = service.get(f"/uploads/{upload['id']}/thumbnail")
        pauses.append(response.elapsed)
        made = response.is_success
    (task, *_) = service.get("/tasks?kind=make_thumbnail").json()["data"]
    task = service.wait_for(task["id"])
    took = datetime.fromisoformat(task["finished_at"]) - datetime.fromisoformat(task["started_at"])
    assert max(pauses) < took / 2


# Finished tasks are removed after their retention; tests/tasks/test_clean_up.py has the details.


def test_a_finished_task_is_gone_after_its_retention(tmp_path: Path) -> None:
    with TestClient(create_app(settings_in(tmp_path))) as client:
        queued = client.post("/save-data/?user_id=ada", json={}).json()
        wait_for(client, queued["id"])
    with TestClient(create_app(settings_in(tmp_path, retention_days=0))) as client:
        deadline = time.monotonic() + PATIENCE
        while client.get(f"/tasks/{queued['id']}").status_code != 404:
            assert time.monotonic() < deadline
        assert client.get("/save-data/ada").status_code == 200
