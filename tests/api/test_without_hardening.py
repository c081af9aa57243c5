"""The API without app.hardening keeps every promise. It only lacks the protection."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_api, create_app
from tests.api.requests import problem_of, upload_of
from tests.support.service import ROOT, mails_in, settings_in, wait_for

LARGE = {"message": "x" * 100}


@pytest.fixture
def unprotected(tmp_path: Path) -> Iterator[TestClient]:
    """A client of an app to which `harden` was not applied."""
    with TestClient(create_api(settings_in(tmp_path, max_body_bytes=10))) as client:
        yield client


def test_a_mail_is_queued_and_sent(unprotected: TestClient, tmp_path: Path) -> None:
    queued = unprotected.post("/send-notification/ada@example.com", json={"subject": "Hello"})
    assert queued.status_code == 202
    wait_for(unprotected, queued.json()["id"])
    assert [mail.subject for mail in mails_in(tmp_path)] == ["Hello"]


def test_an_upload_is_stored_and_published(unprotected: TestClient) -> None:
    queued = upload_of(b"Hello").send(unprotected)
    assert queued.status_code == 202
    wait_for(unprotected, queued.json()["id"])
    upload_id = queued.json()["upload"]["id"]
    assert unprotected.get(f"/uploads/{upload_id}/content").content == b"Hello"


def test_a_repeated_idempotency_key_queues_one_task(unprotected: TestClient) -> None:
    headers = {"Idempotency-Key": "first"}
    ids = {
        unprotected.post("/send-email/?email=ada@example.com", headers=headers).json()["id"]
        for _ in range(2)
    }
    assert len(ids) == 1


def test_a_request_has_an_id_and_an_error_is_a_problem(unprotected: TestClient) -> None:
    answer = unprotected.get("/tasks/unknown", headers={"X-Request-ID": "mine"})
    problem_of(answer, 404)
    assert answer.headers["X-Request-ID"] == "mine"


def test_only_the_hardened_app_has_limits(unprotected: TestClient, tmp_path: Path) -> None:
    """The app of `create_app` refuses a large body, an ambiguous Host, and a foreign web page."""
    send = "/send-notification/ada@example.com"
    hardened = TestClient(create_app(settings_in(tmp_path, max_body_bytes=10)))
    for request, status in [
        ({"json": LARGE}, 413),
        ({"headers": [("Host", "one"), ("Host", "two")]}, 400),
        ({"headers": {"Origin": "https://evil.example"}}, 403),
    ]:
        assert unprotected.post(send, **request).status_code == 202  # type: ignore[arg-type]
        problem_of(hardened.post(send, **request), status)  # type: ignore[arg-type]


def test_it_is_attached_in_main_alone() -> None:
    """To the app in main.py, and to the server in __main__.py, where the server starts."""
    importing = re.compile(r"^\s*(from|import) app\.hardening", re.MULTILINE)
    files = [path for path in (ROOT / "app").rglob("*.py") if path.parent.name != "hardening"]
    assert {path.name for path in files if importing.search(path.read_text())} == {
        "main.py",
        "__main__.py",
    }
