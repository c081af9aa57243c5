"""The pages of tasks in a real browser."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.support.service import PATIENCE, Service, until
from tests.support.smtp_server import SmtpServer

FAILURES = 312


@pytest.fixture
def page(chromium: str) -> Iterator[Page]:
    """A page in Chromium. A message in its console, a dialog or an error fails the test."""
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.set_default_timeout(1000 * PATIENCE)
        expect.set_options(timeout=1000 * PATIENCE)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("dialog", lambda dialog: complaints.append(f"a dialog: {dialog.message}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page
        browser.close()
    assert complaints == []


def test_a_retry_is_watched_live(page: Page, tmp_path: Path, smtp_server: SmtpServer) -> None:
    """After "Run now", the page follows the task to its end without a reload by hand."""
    smtp_server.once["rcpt"].append("451 4.7.1 Greylisted, <b>come back</b>")
    smtp_server.delay["dot"] = 2.0
    port = smtp_server.port
    with Service(tmp_path, catcher=False, smtp_port=port, retry_base_seconds=1e6) as service:
        answer = service.post("/send-notification/ada@example.com")
        service.wait_for(answer.json()["id"], "retrying")

        page.goto(service.url + "/board/tasks")
        page.get_by_role("link", name="send_email").click()
        timeline = page.get_by_role("list").filter(has_text="Accepted")
        expect(timeline).to_contain_text("451 4.7.1 Greylisted, <b>come back</b>")
        expect(timeline).to_contain_text("Attempt 2 is next")
        page.get_by_role("button", name="Run now").click()
        expect(timeline).to_contain_text("Attempt 2 is running")
        expect(timeline).to_contain_text("Attempt 2 succeeded")
        expect(page.locator(".heading .pill")).to_have_text("succeeded")
        page.close()  # before the service ends, and with it the stream of ticks


def test_as_many_tasks_are_retried_as_the_button_says(
    page: Page, tmp_path: Path, smtp_server: SmtpServer
) -> None:
    smtp_server.always["rcpt"] = "550 5.1.1 User unknown"
    with Service(tmp_path, catcher=False, smtp_port=smtp_server.port) as service:
        recipients = [f"user{n}@example.com" for n in range(FAILURES)]
        batch = service.post("/send-notifications", json={"recipients": recipients}).json()
        until(lambda: _batch(service, batch["id"])["failed"] == FAILURES, within=PATIENCE)
        smtp_server.always.clear()

        page.goto(service.url + "/board/failures")
        page.get_by_role("link", name=f"Retry these {FAILURES}").click()
        page.get_by_role("button", name=f"Retry these {FAILURES}").click()
        expect(page.locator(".heading .pill")).to_have_text("succeeded")
        expect(page.get_by_role("region", name="Result")).to_contain_text(f"done{FAILURES}")
        until(lambda: _batch(service, batch["id"])["succeeded"] == FAILURES, within=PATIENCE)
        page.close()
    sent = [mail.recipients for mail in smtp_server.received]
    assert sorted(sent) == sorted((recipient,) for recipient in recipients)


def _batch(service: Service, batch_id: str) -> dict[str, int]:
    counts: dict[str, int] = service.get(f"/batches/{batch_id}").json()
    return counts
