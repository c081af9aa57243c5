"""The pages of tasks in a real browser."""

import time
from typing import Any

from playwright.sync_api import Page, expect

from tests.outside.conftest import NewPage, Serve
from tests.support.pages import BROWSER
from tests.support.service import PATIENCE, Service, until
from tests.support.smtp_server import SmtpServer

FAILURES = 312
DAYS_AWAY: dict[str, Any] = {"retry_base_seconds": 1e6, "retry_max_seconds": 1e6}
"""Settings by which the next attempt of a mail is most likely days away."""


def test_a_person_searches_by_recipient_kind_and_time(new_page: NewPage, serve: Serve) -> None:
    service = serve(worker_concurrency=0)
    for recipient in ("ada", "ada", "eve"):
        service.post(f"/send-notification/{recipient}@example.com")
    service.post("/save-data/?user_id=ada@example.com", json={})
    page = new_page()
    page.goto(service.url + "/board/tasks")
    rows = page.get_by_role("rowheader")
    expect(rows).to_have_count(4)
    page.get_by_label("About").fill("ada@example.com")
    page.get_by_label("Kind").select_option("send_email")
    accepted = page.get_by_role("combobox", name="Accepted")
    accepted.select_option("in the last 15m")
    page.get_by_label("queued").check()
    page.get_by_role("button", name="Search").click()
    expect(rows).to_have_count(2)
    assert all(text.startswith("send_email") for text in rows.all_inner_texts())
    expect(page.get_by_role("link", name="Cancel these 2")).to_be_visible()

    # The form keeps its conditions. A time that is to come leaves nothing.
    accepted.select_option("at any time")
    page.get_by_text("More conditions").click()
    tomorrow = time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time() + 86_400))
    page.get_by_label("Accepted from (UTC)").fill(tomorrow)
    page.get_by_role("button", name="Search").click()
    expect(page.get_by_text("No task matches this search.")).to_be_visible()
    expect(page.get_by_label("About")).to_have_value("ada@example.com")
    expect(page.get_by_label("Accepted from (UTC)")).to_have_value(tomorrow)
    page.get_by_role("link", name="Clear").click()
    expect(rows).to_have_count(4)


def test_a_retry_is_watched_live(new_page: NewPage, serve: Serve, smtp_server: SmtpServer) -> None:
    """After "Run now", the page follows the task to its end without a reload by hand.

    What a person has opened stays open, and a focused link stays focused.
    """
    smtp_server.once["rcpt"].append("451 4.7.1 Greylisted, <b>come back</b>")
    smtp_server.delay["dot"] = 2.0
    service, task = _retrying(serve, smtp_server)
    page = new_page()
    page.goto(service.url + "/board/tasks")
    page.get_by_role("link", name="send_email").click()
    timeline = page.get_by_role("list").filter(has_text="Accepted")
    expect(timeline).to_contain_text("451 4.7.1 Greylisted, <b>come back</b>")
    expect(timeline).to_contain_text("Attempt 2 is next")
    page.get_by_role("button", name="Run now").click()
    expect(timeline).to_contain_text("Attempt 2 is running")
    page.get_by_text("characters").click()
    link = page.get_by_role("link", name=f"/tasks/{task}")
    link.focus()
    expect(timeline).to_contain_text("Attempt 2 succeeded")
    expect(page.locator(".heading .pill")).to_have_text("succeeded")
    expect(page.get_by_role("region", name="Result")).to_be_visible()
    expect(page.get_by_text("A long text.")).to_be_visible()
    expect(link).to_be_focused()


def test_as_many_tasks_are_retried_as_the_button_says(
    new_page: NewPage, serve: Serve, smtp_server: SmtpServer
) -> None:
    smtp_server.always["rcpt"] = "550 5.1.1 User unknown"
    service = serve(catcher=False, smtp_port=smtp_server.port)
    recipients = [f"user{n}@example.com" for n in range(FAILURES)]
    batch = service.post("/send-notifications", json={"recipients": recipients}).json()
    until(lambda: _batch(service, batch["id"])["failed"] == FAILURES, within=PATIENCE)
    smtp_server.always.clear()

    page = new_page()
    page.goto(service.url + "/board/failures")
    page.get_by_role("link", name=f"Retry these {FAILURES}").click()
    page.get_by_role("button", name=f"Retry these {FAILURES}").click()
    expect(page.locator(".heading .pill")).to_have_text("succeeded")
    expect(page.get_by_role("region", name="Result")).to_contain_text(f"done{FAILURES}")
    until(lambda: _batch(service, batch["id"])["succeeded"] == FAILURES, within=PATIENCE)
    sent = [mail.recipients for mail in smtp_server.received]
    assert sorted(sent) == sorted((recipient,) for recipient in recipients)


def test_a_task_is_cancelled_and_retried(new_page: NewPage, serve: Serve) -> None:
    service = serve(worker_concurrency=0)
    task = service.post("/send-notification/ada@example.com").json()["id"]
    page = new_page()
    page.goto(f"{service.url}/board/tasks/{task}")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".heading .pill")).to_have_text("cancelled")
    expect(page.get_by_role("heading", name="Cancelled")).to_be_visible()
    assert service.get(f"/tasks/{task}").json()["status"] == "cancelled"
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".heading .pill")).to_have_text("queued")
    assert service.get(f"/tasks/{task}").json()["status"] == "queued"


def test_many_tasks_are_cancelled_without_a_script_on_a_phone(
    new_page: NewPage, serve: Serve
) -> None:
    """A person searches, confirms the number, and sees the action's task."""
    service = serve(worker_concurrency=0)
    for number in range(3):
        service.post(f"/send-notification/user{number}@example.com")
    page = new_page(java_script_enabled=False, viewport={"width": 360, "height": 740})
    page.goto(service.url + "/board/tasks")
    page.get_by_label("queued").check()
    page.get_by_label("Kind").select_option("send_email")
    page.get_by_role("button", name="Search").click()
    expect(page.get_by_role("row").filter(has_text="send_email")).to_have_count(3)
    page.get_by_role("link", name="Cancel these 3").click()
    page.get_by_role("button", name="Cancel these 3").click()
    expect(page.get_by_role("heading", name="cancel_tasks")).to_be_visible()


# A part that comes or goes while a page is open takes neither the place nor the focus of another.


def test_cancel_does_not_take_the_focus_of_run_now(
    new_page: NewPage, serve: Serve, smtp_server: SmtpServer
) -> None:
    """The task becomes due, so "Run now" vanishes, and "Cancel" is the only button."""
    smtp_server.once["rcpt"].append("451 4.7.1 Greylisted")
    smtp_server.delay["dot"] = 2 * PATIENCE
    service, task = _retrying(serve, smtp_server, worker_concurrency=1)
    other = service.post("/send-notification/eve@example.com").json()["id"]
    service.wait_for(other, "running")  # and so the only worker is busy
    page = new_page()
    page.goto(f"{service.url}/board/tasks/{task}")
    page.get_by_role("button", name="Run now").focus()
    service.post(f"/board/tasks/{task}/run-now", headers=BROWSER)
    expect(page.get_by_text("It is due, and waits for a worker.")).to_be_visible()
    expect(page.get_by_role("button", name="Run now")).to_have_count(0)
    assert _focused(page) != "Cancel"


def test_retry_does_not_take_the_focus_of_cancel(
    new_page: NewPage, serve: Serve, smtp_server: SmtpServer
) -> None:
    """A task of the search fails, so "Retry these 1" appears before "Cancel these 1"."""
    smtp_server.delay["rcpt"] = 1.0
    smtp_server.always["rcpt"] = "550 5.1.1 User unknown"
    service = serve(catcher=False, smtp_port=smtp_server.port, **DAYS_AWAY)
    smtp_server.once["rcpt"].append("451 4.7.1 Greylisted")
    task = service.post("/send-notification/ada@example.com").json()["id"]
    service.wait_for(task, "retrying")
    page = new_page()
    page.goto(service.url + "/board/tasks?kind=send_email")
    cancel = page.get_by_role("link", name="Cancel these 1")
    cancel.focus()
    service.post("/send-notification/eve@example.com")
    expect(page.get_by_role("link", name="Retry these 1")).to_be_visible()
    expect(cancel).to_be_focused()


def test_the_list_keeps_its_focus_when_an_action_appears_above_it(
    new_page: NewPage, serve: Serve
) -> None:
    service = serve()
    task = service.post("/send-notification/ada@example.com").json()["id"]
    service.wait_for(task)
    page = new_page()
    page.goto(service.url + "/board/tasks?kind=send_email")
    row = page.get_by_role("link", name=f"send_email {task}")
    row.focus()
    _fail(service, 550)
    expect(page.get_by_role("link", name="Retry these 1")).to_be_visible()
    expect(row).to_be_focused()


def test_a_group_of_failures_keeps_its_focus_when_it_moves(new_page: NewPage, serve: Serve) -> None:
    """The largest group comes first, and the focused one becomes the largest."""
    service = serve()
    _fail(service, 550, 550, 552)
    page = new_page()
    page.goto(service.url + "/board/failures")
    rows = page.get_by_role("row").filter(has=page.get_by_role("rowheader"))
    expect(rows.nth(1)).to_contain_text("PermanentError 552")
    page.get_by_role("link", name="Retry these 1").focus()
    _fail(service, 552, 552)
    expect(rows.nth(1)).to_contain_text("PermanentError 550")
    expect(page.get_by_role("link", name="Retry these 3")).to_be_focused()


def _fail(service: Service, *codes: int) -> None:
    """Send a mail to an address that refuses it, for each of these codes."""
    for code in codes:
        task = service.post(f"/send-notification/refuse+{code}@example.com").json()["id"]
        service.wait_for(task, "failed")


def _retrying(serve: Serve, smtp_server: SmtpServer, **settings: Any) -> tuple[Service, str]:
    """Return a service with a task that has failed once, and whose next attempt is far away."""
    service = serve(catcher=False, smtp_port=smtp_server.port, **DAYS_AWAY, **settings)
    mail = {"message": "A long text. " * 900}
    task = service.post("/send-notification/ada@example.com", json=mail).json()["id"]
    service.wait_for(task, "retrying")
    return service, task


def _focused(page: Page) -> str:
    text: str = page.evaluate("document.activeElement.textContent")
    return text


def _batch(service: Service, batch_id: str) -> dict[str, int]:
    counts: dict[str, int] = service.get(f"/batches/{batch_id}").json()
    return counts
