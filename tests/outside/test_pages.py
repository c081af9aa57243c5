"""The pages in a real browser."""

import smtplib
import socket
from collections.abc import Iterator
from email.message import EmailMessage
from email.policy import SMTP
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from tests.support.service import Service, free_port

SUBJECT = "Hello <script>alert(1)</script>"
MESSAGE = "It is done.\n<img src=x onerror=alert(1)>"
TRACKERS = """\
<link rel=preconnect href={at}><link rel=stylesheet href={at}><base href={at}>
<meta http-equiv=refresh content="0;url={at}">
<style>@import "{at}"; p {{ background: url({at}) }}</style>
<p>It is done.</p>
<img src={at}><img srcset="{at} 1x"><video poster={at} src={at}></video><input type=image src={at}>
<object data={at}></object><embed src={at}><svg><image href={at} /></svg><iframe src={at}></iframe>
<iframe srcdoc="<img src={at}>"></iframe><script>fetch("{at}")</script>
"""


@pytest.fixture
def page(chromium: str, tmp_path: Path) -> Iterator[Page]:
    """A page in Chromium. A message in its console, a dialog or an error fails the test."""
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 900, "height": 900})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("dialog", lambda dialog: complaints.append(f"a dialog: {dialog.message}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page
        browser.close()
    assert complaints == []


def test_a_mail_is_shown_in_the_inbox_and_its_scripts_do_not_run(
    page: Page, tmp_path: Path
) -> None:
    """The test follows the links from the front page to the mail, and to its task."""
    with Service(tmp_path) as service:
        answer = service.post(
            "/send-notification/ada@example.com", json={"subject": SUBJECT, "message": MESSAGE}
        )
        service.wait_for(answer.json()["id"])

        page.goto(service.url)
        page.get_by_role("link", name="Inbox").click()
        page.screenshot(path=tmp_path / "inbox.png")
        page.get_by_role("link", name=SUBJECT).click()
        frame = page.frame_locator("iframe")
        frame.get_by_text("It is done.").wait_for()
        page.screenshot(path=tmp_path / "mail.png", full_page=True)

        assert SUBJECT in page.get_by_role("heading", level=1).inner_text()
        assert "onerror=alert(1)" in frame.locator("body").inner_text()
        page.get_by_role("link", name="Text").click()
        assert "It is done." in page.locator("pre").inner_text()
        page.get_by_role("link", name=answer.json()["id"]).click()
        page.wait_for_url(f"**/board/tasks/{answer.json()['id']}")
        page.close()


def test_the_html_of_a_mail_connects_to_no_other_server(chromium: str, tmp_path: Path) -> None:
    """A connection would tell the sender that the mail was read, even if it loads nothing.

    Chromium connects to the server of a frame before it finds that the policy forbids the frame.
    """
    mail = EmailMessage(policy=SMTP)
    mail["Subject"] = "Hello"
    port = free_port()
    with (
        socket.create_server(("127.0.0.1", 0)) as tracker,
        Service(tmp_path, smtp_port=port) as service,
        sync_playwright() as playwright,
    ):
        tracker.setblocking(False)
        at = f"http://127.0.0.1:{tracker.getsockname()[1]}/"
        mail.set_content(TRACKERS.format(at=at), subtype="html")
        with smtplib.SMTP("127.0.0.1", port) as smtp:
            smtp.send_message(mail, "bob@example.com", ["ada@example.com"])
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"{service.url}/inbox")
        page.get_by_role("link", name="Hello").click()
        page.frame_locator("iframe").get_by_text("It is done.").wait_for()
        page.wait_for_timeout(1_000)
        with pytest.raises(BlockingIOError):
            tracker.accept()
        browser.close()


def test_mails_are_searched_saved_and_deleted_without_a_script(
    chromium: str, tmp_path: Path
) -> None:
    mail = EmailMessage(policy=SMTP)
    mail["Subject"] = "Invoice"
    mail.set_content("<a href='javascript:alert(1)'>link</a>", subtype="html")
    mail.add_attachment(b"<script>alert(1)</script>", "text", "html", filename="../a.html")
    port = free_port()
    with Service(tmp_path, smtp_port=port) as service, sync_playwright() as playwright:
        for subject in (b"Invoice", b"Other"):
            with smtplib.SMTP("127.0.0.1", port) as smtp:
                raw = mail.as_bytes().replace(b"Invoice", subject)
                smtp.sendmail("bob@example.com", ["ada@example.com"], raw)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(java_script_enabled=False, viewport={"width": 360, "height": 740})

        page.goto(f"{service.url}/inbox")
        page.get_by_role("searchbox").fill("INVOICE bob@")
        page.get_by_role("button", name="Search").click()
        assert page.get_by_role("rowheader").all_inner_texts() == ["Invoice"]
        page.get_by_role("link", name="Invoice").click()
        page.get_by_role("link", name="Attachments (1)").click()
        with page.expect_download() as download:
            page.get_by_role("link", name="a.html").click()
        assert download.value.suggested_filename == "a.html"
        with page.expect_download() as download:
            page.get_by_role("link", name="Download source").click()
        assert Path(download.value.path()).read_bytes() == mail.as_bytes()

        page.get_by_role("button", name="Delete").click()
        assert page.get_by_role("rowheader").all_inner_texts() == ["Other"]
        page.get_by_text("Delete all").click()
        page.get_by_role("button", name="Delete 1 mail").click()
        page.get_by_text("No mail yet.").wait_for()
        browser.close()


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_the_documentation_is_shown_without_the_internet(
    page: Page, tmp_path: Path, path: str
) -> None:
    """Each file comes from the service, and its Content-Security-Policy allows each file."""
    loaded: list[str] = []
    page.on("request", lambda request: loaded.append(request.url))
    with Service(tmp_path) as service:
        page.goto(service.url + path)
        page.get_by_text("/send-notification/{email}").first.wait_for()
        page.screenshot(path=tmp_path / "documentation.png")
    assert loaded
    assert all(url.startswith((service.url, f"blob:{service.url}", "data:")) for url in loaded)


def test_try_it_out_in_the_documentation_sends_a_request(page: Page, tmp_path: Path) -> None:
    with Service(tmp_path, root_path="/afterward") as service:
        page.goto(f"{service.url}/afterward/docs")
        page.locator("#operations-health-livez").click()
        page.get_by_role("button", name="Try it out").click()
        page.get_by_role("button", name="Execute").click()
        answer = page.locator(".live-responses-table")
        answer.wait_for()
        assert f"{service.url}/afterward/livez" in page.locator(".request-url").inner_text()
        assert "200" in answer.inner_text()


def test_an_empty_inbox_shows_the_command_that_sends_a_mail(page: Page, tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        page.goto(f"{service.url}/inbox")

        assert "curl -i -X POST" in page.locator("pre").inner_text()
        page.close()
