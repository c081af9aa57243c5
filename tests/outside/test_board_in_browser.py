"""The dashboard in a real browser: live numbers, uploads, signing in, and life without a script."""

import re
from hashlib import file_digest
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, Route, expect

from tests.outside.conftest import NewPage, Serve

LARGE = 200_000_000
SEND = "/send-notification/ada@example.com"
LIVE = "**/board/live*"
# Notes each position of the first progress bar.
WATCH_PROGRESS = """() => {
    window.seen = [];
    const list = document.querySelector(".sending");
    const note = () => seen.push(list.querySelector("progress").value);
    new MutationObserver(note).observe(list, {subtree: true, attributes: true, childList: true});
}"""
# Chromium without a window shows every page, so the test hides one itself.
HIDE = """(hidden) => {
    Object.defineProperty(document, "hidden", {get: () => hidden, configurable: true});
    document.dispatchEvent(new Event("visibilitychange"));
}"""
DROP = """() => {
    const data = new DataTransfer();
    data.items.add(new File(["Hello"], "dropped.txt"));
    const options = {dataTransfer: data, bubbles: true, cancelable: true};
    for (const name of ["dragover", "drop"])
        document.getElementById("drop").dispatchEvent(new DragEvent(name, options));
}"""


def waiting(page: Page) -> Any:
    """The number of waiting tasks on the overview."""
    return page.locator(".card", has=page.get_by_role("link", name="Waiting")).locator("dd")


# Live


def test_the_numbers_change_while_the_page_is_open(new_page: NewPage, serve: Serve) -> None:
    service = serve(worker_concurrency=0)
    page = new_page()
    page.goto(service.url)
    expect(page.get_by_text("Nothing has happened yet")).to_be_visible()
    link = page.get_by_role("link", name="Waiting")
    link.focus()
    service.post(SEND)
    expect(waiting(page)).to_have_text("1")
    expect(page.get_by_text("Nothing has happened yet")).to_be_hidden()
    expect(link).to_be_focused()


def test_a_paused_page_is_not_updated(new_page: NewPage, serve: Serve) -> None:
    """It closes the stream of ticks. A second page shows that the numbers have changed."""
    service = serve(worker_concurrency=0)
    witness, page = new_page(), new_page()
    for opened in (witness, page):
        opened.goto(service.url)
        expect(opened.locator(".live-state")).to_have_text("Live")
    with page.expect_event("requestfailed", lambda request: "/board/live" in request.url):
        page.get_by_role("button", name="Pause").click()
    # "Resume, pressed" would be wrong: the name says what the button does, so it has no state.
    resume = page.get_by_role("button", name="Resume")
    assert resume.get_attribute("aria-pressed") is None
    service.post(SEND)
    expect(waiting(witness)).to_have_text("1")
    expect(waiting(page)).to_have_text("0")

    page.reload()  # the pause lasts
    expect(page.locator(".live-state")).to_have_text("Paused")
    resume.click()
    expect(page.locator(".live-state")).to_have_text("Live")
    service.post(SEND)
    expect(waiting(page)).to_have_text("2")


def test_a_hidden_tab_is_not_updated(new_page: NewPage, serve: Serve) -> None:
    service = serve(worker_concurrency=0)
    witness, page = new_page(), new_page()
    for opened in (witness, page):
        opened.goto(service.url)
        expect(opened.locator(".live-state")).to_have_text("Live")
    with page.expect_event("requestfailed", lambda request: "/board/live" in request.url):
        page.evaluate(HIDE, True)
    service.post(SEND)
    expect(waiting(witness)).to_have_text("1")
    expect(waiting(page)).to_have_text("0")
    with page.expect_request(LIVE):
        page.evaluate(HIDE, False)
    expect(waiting(page)).to_have_text("1")


def test_a_list_loads_itself_again_unless_a_person_types(new_page: NewPage, serve: Serve) -> None:
    service = serve()
    witness, page = new_page(), new_page()
    witness.goto(service.url + "/board/tasks")
    page.goto(service.url + "/board/tasks")
    page.get_by_label("About").press_sequentially("ada")
    service.post(SEND)
    expect(witness.get_by_role("rowheader")).to_have_count(1)
    expect(page.get_by_role("rowheader")).to_have_count(0)
    expect(page.get_by_label("About")).to_have_value("ada")


def test_a_page_follows_again_when_the_typed_text_is_removed(
    new_page: NewPage, serve: Serve
) -> None:
    """Meanwhile it says why it does not move. The focus is elsewhere, so the text alone counts."""
    service = serve()
    page = new_page()
    page.goto(service.url + "/board/tasks?since=2026-01-01T10:00:00")
    page.get_by_label("About").fill("a")
    page.get_by_role("heading", level=1).click()
    service.post(SEND)
    expect(page.locator(".live-state")).to_have_text("Paused: in use")
    expect(page.get_by_role("rowheader")).to_have_count(0)
    page.get_by_label("About").fill("")
    page.get_by_role("heading", level=1).click()
    expect(page.get_by_role("rowheader")).to_have_count(1)
    expect(page.locator(".live-state")).to_have_text("Live")


def test_numbers_that_come_while_text_is_selected_are_shown_afterwards(
    new_page: NewPage, serve: Serve
) -> None:
    service = serve(worker_concurrency=0)
    page = new_page()
    page.goto(service.url)
    expect(page.locator(".live-state")).to_have_text("Live")
    page.evaluate("getSelection().selectAllChildren(document.getElementById('counts'))")
    service.post(SEND)
    expect(page.locator(".live-state")).to_have_text("Paused: in use")
    expect(waiting(page)).to_have_text("0")
    page.evaluate("getSelection().empty()")
    expect(waiting(page)).to_have_text("1")
    expect(page.locator(".live-state")).to_have_text("Live")


def test_a_slow_load_is_not_overtaken_by_the_next(new_page: NewPage, serve: Serve) -> None:
    """The first answer comes late. A second request is sent only after it."""
    service = serve()
    page = new_page()
    page.goto(service.url + "/board/tasks")
    running: list[Route] = []
    page.route("**/board/tasks", lambda route: running.append(route))  # noqa: PLW0108
    service.post(SEND)
    for _ in range(2):
        page.wait_for_timeout(6000)
        assert len(running) == 1
        service.post(SEND)
    running[0].continue_()
    expect(page.get_by_role("rowheader")).not_to_have_count(0)
    page.unroute_all(behavior="ignoreErrors")


def test_a_page_that_cannot_be_loaded_tries_again_without_a_change(
    new_page: NewPage, serve: Serve
) -> None:
    service = serve()
    page = new_page()
    page.goto(service.url + "/board/tasks")
    page.route("**/board/tasks", lambda route: route.fulfill(status=503, body="away"))
    service.post(SEND)
    expect(page.locator(".live-state")).to_have_text("Cannot be loaded")
    page.unroute("**/board/tasks")
    expect(page.get_by_role("rowheader")).to_have_count(1)
    expect(page.locator(".live-state")).to_have_text("Live")


def test_a_page_says_that_the_connection_is_lost_and_follows_again(
    new_page: NewPage, serve: Serve, complaints: list[str]
) -> None:
    service = serve(worker_concurrency=0)
    page = new_page()
    page.goto(service.url)
    expect(page.locator(".live-state")).to_have_text("Live")
    service.kill()
    expect(page.locator(".live-state")).to_have_text("Connection lost")
    service.start()
    service.post(SEND)
    expect(waiting(page)).to_have_text("1")
    lost = re.compile("Failed to load resource: net::ERR_")
    complaints[:] = [message for message in complaints if not lost.match(message)]


# Uploads


def test_200_megabytes_are_uploaded_with_a_moving_bar(
    new_page: NewPage, serve: Serve, tmp_path: Path
) -> None:
    large = tmp_path / "large.bin"
    with large.open("wb") as file:
        file.truncate(LARGE)  # a sparse file, which takes no space on the disk
    service = serve()
    page = new_page()
    page.goto(service.url + "/board/uploads")
    page.evaluate(WATCH_PROGRESS)
    page.get_by_label("Choose a file").set_input_files(large)
    page.get_by_role("button", name="Upload").click()
    expect(page.locator(".sending li")).to_contain_text("uploaded")
    expect(page.get_by_role("link", name="large.bin")).to_be_visible()
    seen = page.evaluate("window.seen")
    assert seen == sorted(seen)
    assert len({value for value in seen if 0 < value < 1}) > 1
    (upload,) = service.get("/uploads").json()["data"]
    with large.open("rb") as file:
        assert upload["sha256"] == file_digest(file, "sha256").hexdigest()
    service.client.delete(f"/uploads/{upload['id']}")


def test_files_are_uploaded_one_after_another_and_deleted(
    new_page: NewPage, serve: Serve, tmp_path: Path, answers: dict[str, bool]
) -> None:
    names = ["first.txt", "second <b>.txt", "too large.bin"]
    files = [tmp_path / name for name in names]
    for file, size in zip(files, (5, 5, 50_000), strict=True):
        file.write_bytes(bytes(size))
    service = serve(max_upload_bytes=40_000)
    page = new_page()
    page.goto(service.url + "/board/uploads")
    page.get_by_label("Choose a file").set_input_files(files)
    page.get_by_role("button", name="Upload").click()
    lines = page.locator(".sending li")
    expect(lines.nth(0)).to_contain_text("uploaded")
    expect(lines.nth(1)).to_contain_text("uploaded")
    expect(lines.nth(2)).to_contain_text("larger than this service takes")
    second = page.get_by_role("link", name="second <b>.txt")
    expect(second).to_be_visible()

    answers["Delete second <b>.txt?"] = False
    page.get_by_role("button", name="Delete second <b>.txt").click()
    assert answers == {}
    expect(second).to_be_visible()
    answers["Delete second <b>.txt?"] = True
    page.get_by_role("button", name="Delete second <b>.txt").click()
    expect(second).to_have_count(0)
    expect(page.get_by_role("link", name="first.txt")).to_be_visible()


def test_a_file_can_be_dropped_on_the_page(new_page: NewPage, serve: Serve) -> None:
    service = serve()
    page = new_page()
    page.goto(service.url + "/board/uploads")
    page.evaluate(DROP)
    expect(page.get_by_role("link", name="dropped.txt")).to_be_visible()


# Signing in


def test_a_person_signs_in_sends_a_mail_and_signs_out(new_page: NewPage, serve: Serve) -> None:
    service = serve(api_keys="ada: the-key")
    page = new_page()
    page.goto(service.url + "/board/send")
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_have_text("This key is not valid.")
    page.get_by_label("API key").fill("the-key")
    page.get_by_role("button", name="Sign in").click()
    page.get_by_label("To").fill("ada@example.com")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".heading .pill")).to_have_text("succeeded")

    (cookie,) = page.context.cookies()
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Strict"
    assert cookie["expires"] == -1, "it ends with the browser"
    assert page.evaluate("document.cookie") == ""

    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    assert page.context.cookies() == []
    page.go_back()  # to the page with the task
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    page.goto(service.url + "/board/uploads")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


# Without a script


def test_everything_works_without_a_script(new_page: NewPage, serve: Serve, tmp_path: Path) -> None:
    """The tests of the inbox and of the tasks do the same with a search, and with many tasks."""
    (tmp_path / "a.txt").write_text("Hello")
    service = serve(api_keys="ada: the-key")
    page = new_page(java_script_enabled=False)
    page.goto(service.url + "/board/send")
    page.get_by_label("API key").fill("the-key")
    page.get_by_role("button", name="Sign in").click()
    page.get_by_label("To").fill("ada@example.com")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("heading", name="send_email")).to_be_visible()

    page.get_by_role("link", name="Uploads").click()
    page.get_by_label("Choose a file").set_input_files(tmp_path / "a.txt")
    page.get_by_role("button", name="Upload").click()
    expect(page.get_by_role("rowheader").get_by_text("a.txt")).to_be_visible()
    page.get_by_role("button", name="Delete a.txt").click()
    expect(page.get_by_text("No uploads yet.")).to_be_visible()

    for name in ("Overview", "Tasks", "Failures", "Batches", "Workers", "Inbox"):
        page.get_by_role("link", name=name, exact=True).click()
        expect(page.get_by_role("heading", level=1)).to_have_text(name)
        expect(page.get_by_role("button", name="Pause")).to_have_count(0)
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


# The tests themselves


def test_a_violation_of_the_policy_is_noticed(
    new_page: NewPage, serve: Serve, complaints: list[str]
) -> None:
    page = new_page()
    page.goto(serve().url)
    attempts = (
        "fetch('https://example.com').catch(() => null)",
        "document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:1/a.png'}))",
        "document.body.insertAdjacentHTML('beforeend', '<p style=\"color: red\">')",
        "document.body.append(Object.assign(document.createElement('script'), {text: '1'}))",
    )
    for attempt in attempts:
        with page.expect_event("console"):
            page.evaluate(f"() => {{ {attempt} }}")
        assert "Content Security Policy" in " ".join(complaints), attempt
        complaints.clear()
