"""The dashboard in a real browser, with the keyboard only."""

import re
from pathlib import Path
from typing import Literal

from playwright.sync_api import Page, expect

from tests.outside.conftest import NewPage, Serve
from tests.support.keyboard import press_tab, tab_to

SEND = "/send-notification/ada@example.com"


def press(page: Page, name: str, key: str = "Enter") -> None:
    """Go to a button, and press it."""
    tab_to(page, page.get_by_role("button", name=name, exact=True))
    page.keyboard.press(key)


def type_into(
    page: Page, label: str, text: str, role: Literal["textbox", "combobox"] = "textbox"
) -> None:
    """Go to a field, and type."""
    tab_to(page, page.get_by_role(role, name=label))
    page.keyboard.type(text)


def test_a_person_signs_in_sends_a_mail_and_signs_out(new_page: NewPage, serve: Serve) -> None:
    service = serve(api_keys="ada: the-key")
    page = new_page()
    page.goto(service.url + "/board/send")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("This key is not valid.")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("the-key")
    press(page, "Sign in", "Space")
    expect(page.get_by_role("heading", name="Send a notification")).to_be_visible()
    type_into(page, "To", "ada@example.com")
    type_into(page, "Message", "Hello")
    press(page, "Send")
    expect(page.locator(".heading .pill")).to_have_text("succeeded")
    press(page, "Sign out")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


def test_a_person_searches_and_cancels_many_tasks(new_page: NewPage, serve: Serve) -> None:
    service = serve(worker_concurrency=0)
    for recipient in ("ada", "ada", "eve"):
        service.post(f"/send-notification/{recipient}@example.com")
    page = new_page()
    page.goto(service.url + "/board/tasks")
    tab_to(page, page.get_by_label("queued"))
    page.keyboard.press("Space")
    type_into(page, "About", "ada@example.com")
    type_into(page, "Kind", "send", "combobox")  # chooses send_email
    type_into(page, "Accepted", "in the last 15m", "combobox")
    press(page, "Search")
    expect(page.get_by_role("rowheader")).to_have_count(2)
    assert "kind=send_email" in page.url
    assert "period=15m" in page.url
    tab_to(page, page.get_by_role("link", name="Cancel these 2"))
    page.keyboard.press("Enter")
    press(page, "Cancel these 2")
    expect(page.get_by_role("heading", name="cancel_tasks")).to_be_visible()


def test_a_person_cancels_and_retries_a_task(new_page: NewPage, serve: Serve) -> None:
    service = serve(worker_concurrency=0)
    service.post(SEND)
    page = new_page()
    page.goto(service.url + "/board/tasks")
    tab_to(page, page.get_by_role("link", name="send_email"))
    page.keyboard.press("Enter")
    press(page, "Cancel")
    expect(page.locator(".heading .pill")).to_have_text("cancelled")
    press(page, "Retry", "Space")
    expect(page.locator(".heading .pill")).to_have_text("queued")


def test_a_person_uploads_and_deletes_a_file(
    new_page: NewPage, serve: Serve, tmp_path: Path, answers: dict[str, bool]
) -> None:
    (tmp_path / "a.txt").write_text("Hello")
    service = serve()
    page = new_page()
    page.on("filechooser", lambda chooser: chooser.set_files(tmp_path / "a.txt"))
    page.goto(service.url + "/board/uploads")
    file = page.get_by_label("Choose a file")
    tab_to(page, file)
    page.keyboard.press("Enter")
    expect(file).to_have_value(re.compile("a.txt"))
    press(page, "Upload")
    expect(page.get_by_role("link", name="a.txt")).to_be_visible()
    answers["Delete a.txt?"] = True
    press(page, "Delete a.txt")
    expect(page.get_by_text("No uploads yet.")).to_be_visible()


def test_a_person_pauses_the_updates(new_page: NewPage, serve: Serve) -> None:
    service = serve(worker_concurrency=0)
    page = new_page()
    page.goto(service.url)
    press(page, "Pause", "Space")
    expect(page.locator(".live-state")).to_have_text("Paused")
    expect(page.get_by_role("button", name="Resume")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".live-state")).to_have_text("Live")
    expect(page.get_by_role("button", name="Pause")).to_be_focused()


def test_the_focus_stays_when_a_list_is_loaded_again(new_page: NewPage, serve: Serve) -> None:
    service = serve(worker_concurrency=0)
    older, newer, newest = (service.post(SEND).json()["id"] for _ in range(3))
    page = new_page()
    page.goto(service.url + "/board/tasks")
    tab_to(page, page.get_by_role("link", name=f"send_email {newer}"))
    added = service.post(SEND).json()["id"]
    expect(page.get_by_role("link", name=f"send_email {added}")).to_be_visible()
    expect(page.get_by_role("link", name=f"send_email {newer}")).to_be_focused()
    press_tab(page)
    expect(page.get_by_role("link", name=f"send_email {older}")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("link", name=f"send_email {newest}")).to_be_focused()


def test_a_person_opens_the_html_of_a_mail(new_page: NewPage, serve: Serve) -> None:
    """Tab skips the frame, so the keyboard could not scroll a long mail in it."""
    service = serve()
    service.wait_for(service.post(SEND).json()["id"])
    page = new_page()
    page.goto(service.url + "/inbox")
    tab_to(page, page.get_by_role("link", name="Notification"))
    page.keyboard.press("Enter")
    tab_to(page, page.get_by_role("link", name="Show it without the frame"))
    page.keyboard.press("Enter")
    page.wait_for_url("**/html")


def test_a_person_skips_the_navigation(new_page: NewPage, serve: Serve) -> None:
    page = new_page(viewport={"width": 360, "height": 740})
    page.goto(serve().url)
    focus = press_tab(page)
    assert focus is not None
    assert focus.is_first
    assert focus.is_visible
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    press_tab(page)
    expect(page.locator("main :focus")).to_have_count(1)
