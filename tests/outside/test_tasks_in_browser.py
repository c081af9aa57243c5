"""The pages of tasks in a real browser."""

from pathlib import Path

from playwright.sync_api import expect

from tests.outside.conftest import NewPage
from tests.support.service import PATIENCE, Service, until
from tests.support.smtp_server import SmtpServer

FAILURES = 312


def test_a_retry_is_watched_live(
    new_page: NewPage, tmp_path: Path, smtp_server: SmtpServer
) -> None:
    """After "Run now", the page follows the task to its end without a reload by hand."""
    smtp_server.once["rcpt"].append("451 4.7.1 Greylisted, <b>come back</b>")
    smtp_server.delay["dot"] = 2.0
    port = smtp_server.port
    with Service(tmp_path, catcher=False, smtp_port=port, retry_base_seconds=1e6) as service:
        answer = service.post("/send-notification/ada@example.com")
        service.wait_for(answer.json()["id"], "retrying")

        page = new_page()
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
    new_page: NewPage, tmp_path: Path, smtp_server: SmtpServer
) -> None:
    smtp_server.always["rcpt"] = "550 5.1.1 User unknown"
    with Service(tmp_path, catcher=False, smtp_port=smtp_server.port) as service:
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
        page.close()
    sent = [mail.recipients for mail in smtp_server.received]
    assert sorted(sent) == sorted((recipient,) for recipient in recipients)


def test_many_tasks_are_cancelled_without_a_script_on_a_phone(
    new_page: NewPage, tmp_path: Path
) -> None:
    """A person searches, confirms the number, and sees the action's task."""
    with Service(tmp_path, worker_concurrency=0) as service:
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
        wider = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wider <= 0
        page.close()


def _batch(service: Service, batch_id: str) -> dict[str, int]:
    counts: dict[str, int] = service.get(f"/batches/{batch_id}").json()
    return counts
