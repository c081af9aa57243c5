"""The inbox in a real browser."""

import smtplib
import socket
from email.message import EmailMessage
from email.policy import SMTP
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.outside.conftest import NewPage, Serve
from tests.support.service import free_port

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


def test_a_mail_is_shown_in_the_inbox_and_its_scripts_do_not_run(
    new_page: NewPage, serve: Serve
) -> None:
    """The test follows the links from the front page to the mail, and to its task."""
    service = serve()
    mail = {"subject": SUBJECT, "message": MESSAGE}
    task = service.post("/send-notification/ada@example.com", json=mail).json()["id"]
    service.wait_for(task)

    page = new_page()
    page.goto(service.url)
    page.get_by_role("link", name="Inbox").click()
    page.get_by_role("link", name=SUBJECT).click()
    body = page.frame_locator("iframe").locator("body")
    expect(body).to_contain_text("It is done.")
    expect(body).to_contain_text("<img src=x onerror=alert(1)>")
    expect(page.get_by_role("heading", level=1)).to_have_text(SUBJECT)
    page.get_by_role("link", name="Text").click()
    expect(page.locator("pre")).to_contain_text("It is done.")
    page.get_by_role("link", name=task).click()
    page.wait_for_url(f"**/board/tasks/{task}")


def test_the_html_of_a_mail_connects_to_no_other_server(
    new_page: NewPage, serve: Serve, complaints: list[str]
) -> None:
    """A connection would tell the sender that the mail was read, even if it loads nothing.

    Chromium connects to the server of a frame before it finds that the policy forbids the frame.
    """
    mail = EmailMessage(policy=SMTP)
    mail["Subject"] = "Hello"
    port = free_port()
    service = serve(smtp_port=port)
    with socket.create_server(("127.0.0.1", 0)) as tracker:
        tracker.setblocking(False)
        at = f"http://127.0.0.1:{tracker.getsockname()[1]}/"
        mail.set_content(TRACKERS.format(at=at), subtype="html")
        with smtplib.SMTP("127.0.0.1", port) as smtp:
            smtp.send_message(mail, "bob@example.com", ["ada@example.com"])
        page = new_page()
        page.goto(f"{service.url}/inbox")
        page.get_by_role("link", name="Hello").click()
        expect(page.frame_locator("iframe").get_by_text("It is done.")).to_be_visible()
        page.wait_for_load_state("networkidle")
        with pytest.raises(BlockingIOError):
            tracker.accept()
    complaints.clear()  # the browser tells what the policy has forbidden


def test_mails_are_searched_saved_and_deleted_without_a_script(
    new_page: NewPage, serve: Serve
) -> None:
    mail = EmailMessage(policy=SMTP)
    mail["Subject"] = "Invoice"
    mail.set_content("<a href='javascript:alert(1)'>link</a>", subtype="html")
    mail.add_attachment(b"<script>alert(1)</script>", "text", "html", filename="../a.html")
    port = free_port()
    service = serve(smtp_port=port)
    for subject in (b"Invoice", b"Other"):
        with smtplib.SMTP("127.0.0.1", port) as smtp:
            raw = mail.as_bytes().replace(b"Invoice", subject)
            smtp.sendmail("bob@example.com", ["ada@example.com"], raw)

    page = new_page(java_script_enabled=False, viewport={"width": 360, "height": 740})
    page.goto(f"{service.url}/inbox")
    page.get_by_role("searchbox").fill("INVOICE bob@")
    page.get_by_role("button", name="Search").click()
    expect(page.get_by_role("rowheader")).to_have_text(["Invoice"])
    page.get_by_role("link", name="Invoice").click()
    page.get_by_role("link", name="Attachments (1)").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="a.html").click()
    assert download.value.suggested_filename == "a.html"
    with page.expect_download() as download:
        page.get_by_role("link", name="Download source").click()
    assert Path(download.value.path()).read_bytes() == mail.as_bytes()

    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("rowheader")).to_have_text(["Other"])
    page.get_by_text("Delete all").click()
    page.get_by_role("button", name="Delete 1 mail").click()
    expect(page.get_by_text("No mail yet.")).to_be_visible()


def test_new_mails_appear_and_what_a_person_has_opened_stays_open(
    new_page: NewPage, serve: Serve
) -> None:
    service = serve()
    page = new_page()
    page.goto(f"{service.url}/inbox")
    expect(page.locator("pre")).to_contain_text("curl -i -X POST")
    page.get_by_text("Addresses that fail on purpose").click()
    service.post("/send-notification/ada@example.com", json={"subject": "Hello"})
    expect(page.get_by_role("link", name="Hello")).to_be_visible()
    expect(page.get_by_text("refuse+550@example.com")).to_be_visible()
    expect(page.get_by_role("button", name="Delete 1 mail")).to_be_hidden()
