"""The form that sends a notification."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from afterward.errors import BacklogFull
from tests.support.gate import served
from tests.support.pages import BROWSER, HOSTILE, Page
from tests.support.service import mails_in, wait_for

MAIL = {"recipient": "ada@example.com", "subject": "Hello", "message": "It is done."}


def form_of(client: TestClient, path: str = "/board/send") -> dict[str, str]:
    """Return the fields of the form as the page has them."""
    page = Page(client.get(path).text)
    fields = {
        field.attributes["name"]: field.attributes["value"]
        for field in page.all("input")
        if "name" in field.attributes
    }
    return fields | {"message": page.find("textarea").text.removeprefix("\n")}


def test_a_mail_sent_by_the_form_arrives(browser: TestClient, tmp_path: Path) -> None:
    response = browser.post(
        "/board/send", data=form_of(browser) | MAIL | {"message": "It\r\nis done."}
    )
    assert response.status_code == 303
    task_id = response.headers["location"].removeprefix("/board/tasks/")
    wait_for(browser, task_id)
    (mail,) = mails_in(tmp_path)
    assert (mail.subject, mail.text) == ("Hello", "It\nis done.\n")
    assert "message to ada@example.com" in (tmp_path / "log.txt").read_text()


def test_the_form_is_filled_with_the_defaults(browser: TestClient) -> None:
    fields = form_of(browser)
    assert fields.pop("form_key")
    assert fields == {
        "recipient": "",
        "subject": "Notification",
        "message": "This is a notification.",
    }


def test_the_form_is_filled_with_the_mail_of_a_task(idle_browser: TestClient) -> None:
    """Its page leads to the form, and the copy is a task of its own."""
    first = idle_browser.post("/board/send", data=MAIL | {"subject": HOSTILE[:60]})
    assert first.status_code == 303
    (link,) = [
        link
        for link in Page(idle_browser.get(first.headers["location"]).text).links
        if link.startswith("/board/send?like=")
    ]
    form = form_of(idle_browser, link)
    assert form.pop("form_key")
    assert form == MAIL | {"subject": HOSTILE[:60]}
    second = idle_browser.post("/board/send", data=form)
    assert second.headers["location"] != first.headers["location"]


def test_a_form_like_a_task_that_sends_no_mail_is_refused(idle_browser: TestClient) -> None:
    task = idle_browser.post("/save-data/?user_id=1", json={}).json()
    response = idle_browser.get(f"/board/send?like={task['id']}")
    assert response.status_code == 422
    assert "cannot be copied" in Page(response.text).text
    assert idle_browser.get(f"/board/send?like={'0' * 36}").status_code == 404


def test_hidden_arguments_are_in_no_form(tmp_path: Path) -> None:
    with served(tmp_path, worker_concurrency=0, hide_arguments=True) as client:
        client.headers.update(BROWSER)
        location = client.post("/board/send", data=MAIL).headers["location"]
        assert "/board/send?like=" not in client.get(location).text
        response = client.get(f"/board/send?like={location.removeprefix('/board/tasks/')}")
        assert response.status_code == 422
        assert MAIL["message"] not in response.text


def test_a_form_that_is_sent_twice_queues_and_logs_one_mail(
    idle_browser: TestClient, tmp_path: Path
) -> None:
    form = form_of(idle_browser) | MAIL
    first, second = (idle_browser.post("/board/send", data=form) for _ in range(2))
    assert first.headers["location"] == second.headers["location"]
    assert (tmp_path / "log.txt").read_text().count("message to ada@example.com") == 1
    changed = idle_browser.post("/board/send", data=form | {"subject": "Another"})
    assert changed.headers["location"] != first.headers["location"]
    assert len(idle_browser.get("/tasks").json()["data"]) == 2


@pytest.mark.parametrize("form_key", ["", "x", HOSTILE, "x" * 1000])
def test_a_form_with_an_odd_key_is_sent_all_the_same(
    idle_browser: TestClient, form_key: str
) -> None:
    response = idle_browser.post("/board/send", data=MAIL | {"form_key": form_key})
    assert response.status_code == 303


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("recipient", "", "Must be one email address"),
        ("recipient", "ada", "Must be one email address"),
        ("recipient", HOSTILE, "Must be one email address"),
        ("recipient", "x" * 400, "Must have at most 320 characters"),
        ("subject", "x" * 201, "Must have at most 200 characters"),
        ("subject", "a\r\nBcc: eve@example.com", "Must"),
        ("subject", HOSTILE, "Must"),
        ("message", "a\0b", "Must"),
    ],
)
def test_a_form_that_is_not_valid_is_shown_as_typed(
    idle_browser: TestClient, field: str, value: str, message: str
) -> None:
    typed = MAIL | {field: value}
    response = idle_browser.post("/board/send", data=typed)
    page = Page(response.text)
    assert response.status_code == 422
    (invalid,) = [e for e in page.elements if e.attributes.get("aria-invalid") == "true"]
    assert invalid.attributes["id"] == field
    assert page.text_of("span", id=f"{field}-problem").startswith(message)
    assert page.find("input", id="recipient").attributes["value"] == typed["recipient"]
    assert page.find("input", id="subject").attributes["value"] == typed["subject"].replace(
        "\r\n", "\n"
    )
    assert idle_browser.get("/tasks").json()["data"] == []


def test_a_recipient_that_is_not_allowed_is_refused_on_the_page(tmp_path: Path) -> None:
    with served(tmp_path, allowed_recipients="*@example.org") as client:
        client.headers.update(BROWSER)
        response = client.post("/board/send", data=MAIL)
        assert response.status_code == 403
        assert "may not be sent" in Page(response.text).text_of("span", id="recipient-problem")


def test_a_full_backlog_is_a_page(
    idle_browser: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(_: object) -> None:
        raise BacklogFull

    monkeypatch.setattr(idle_browser.app_state["queue"], "commit", refuse)
    response = idle_browser.post("/board/send", data=MAIL)
    assert response.status_code == 503
    assert Page(response.text).text_of("h1") == "Service Unavailable"


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b'{"recipient": "ada@example.com"}', "application/json", 415),
        (b"recipient=%ff", "application/x-www-form-urlencoded", 400),
        (b"recipient=\xff", "application/x-www-form-urlencoded", 400),
        (b"a=1&" * 5000, "application/x-www-form-urlencoded", 400),
        (b"", "application/x-www-form-urlencoded", 422),
        (b"&&==&;", "application/x-www-form-urlencoded; charset=utf-8", 422),
    ],
)
def test_a_body_that_is_no_form_is_refused(
    browser: TestClient, body: bytes, content_type: str, status: int
) -> None:
    response = browser.post("/board/send", content=body, headers={"Content-Type": content_type})
    assert response.status_code == status
    assert Page(response.text).all("h1")


def test_a_form_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with served(tmp_path, max_body_bytes=1000) as client:
        response = client.post("/board/send", data={"message": "x" * 2000}, headers=BROWSER)
        assert response.status_code == 413
