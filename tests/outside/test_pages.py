"""The pages in a real browser."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from tests.support.service import Service

SUBJECT = "Hello <script>alert(1)</script>"
MESSAGE = "It is done.\n<img src=x onerror=alert(1)>"


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
    """The test follows the links from the front page to the mail."""
    with Service(tmp_path) as service:
        answer = service.post(
            "/send-notification/ada@example.com", json={"subject": SUBJECT, "message": MESSAGE}
        )
        service.wait_for(answer.json()["id"])

        page.goto(service.url)
        page.screenshot(path=tmp_path / "home.png")
        page.get_by_role("link", name="/inbox").click()
        page.screenshot(path=tmp_path / "inbox.png")
        page.get_by_role("link", name=SUBJECT).click()
        frame = page.frame_locator("iframe")
        frame.get_by_text("It is done.").wait_for()
        page.screenshot(path=tmp_path / "mail.png", full_page=True)

        assert SUBJECT in page.get_by_role("heading", level=1).inner_text()
        assert "onerror=alert(1)" in frame.locator("body").inner_text()
        assert "It is done." in page.locator("pre").inner_text()


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
