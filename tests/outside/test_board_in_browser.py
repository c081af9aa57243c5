"""The dashboard in a real browser: live numbers, uploads, signing in, and life without a script."""

from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect

from tests.outside.conftest import NewPage
from tests.support.service import PATIENCE, Service, until

PAGES = [
    "/",
    "/board/tasks",
    "/board/failures",
    "/board/batches",
    "/board/uploads",
    "/board/workers",
    "/board/send",
]
SEND = "/send-notification/ada@example.com"


def waiting(page: Page) -> Any:
    """The number of waiting tasks on the overview."""
    return page.locator(".card", has=page.get_by_role("link", name="Waiting")).locator("dd")


def test_the_numbers_change_while_the_page_is_open(new_page: NewPage, tmp_path: Path) -> None:
    """Until they are paused. What a person has opened or focused stays as it is."""
    with Service(tmp_path, worker_concurrency=0) as service:
        page = new_page()
        page.goto(service.url)
        expect(page.get_by_text("Nothing has happened yet")).to_be_visible()
        link = page.get_by_role("link", name="Waiting")
        link.focus()
        service.post(SEND)
        expect(waiting(page)).to_have_text("1")
        expect(page.get_by_text("Nothing has happened yet")).to_be_hidden()
        expect(link).to_be_focused()

        page.get_by_role("button", name="Pause").click()
        expect(page.get_by_role("button", name="Resume")).to_have_attribute("aria-pressed", "true")
        service.post(SEND)
        page.wait_for_timeout(1500)
        expect(waiting(page)).to_have_text("1")
        page.reload()  # the pause lasts
        expect(page.get_by_role("status").first).to_have_text("Paused")
        page.get_by_role("button", name="Resume").click()
        service.post(SEND)
        expect(waiting(page)).to_have_text("3")
        page.close()


def test_a_list_loads_itself_again_unless_a_person_types(new_page: NewPage, tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        page = new_page()
        page.goto(service.url + "/board/batches")
        batch = service.post("/send-notifications", json={"recipients": ["ada@example.com"]}).json()
        expect(page.get_by_text(batch["id"])).to_be_visible()
        page.close()


def test_files_are_uploaded_with_progress_and_errors(new_page: NewPage, tmp_path: Path) -> None:
    large = tmp_path / "large.bin"
    with large.open("wb") as file:
        file.truncate(30_000_000)
    (tmp_path / "small <b>.txt").write_text("Hello")
    too_large = tmp_path / "too large.bin"
    with too_large.open("wb") as file:
        file.truncate(50_000_000)
    with Service(tmp_path / "service", max_upload_bytes=40_000_000) as service:
        page = new_page()
        page.goto(service.url + "/board/uploads")
        page.evaluate(
            """() => {
                window.seen = [];
                const list = document.querySelector(".sending");
                const note = () => seen.push(list.querySelector("progress").value);
                const changes = {subtree: true, attributes: true, childList: true};
                new MutationObserver(note).observe(list, changes);
            }"""
        )
        files = [large, tmp_path / "small <b>.txt", too_large]
        page.get_by_label("Choose a file").set_input_files(files)
        page.get_by_role("button", name="Upload").click()
        lines = page.locator(".sending li")
        expect(lines.nth(0)).to_contain_text("uploaded")
        expect(lines.nth(1)).to_contain_text("uploaded")
        expect(lines.nth(2)).to_contain_text("larger than this service takes")
        expect(page.get_by_role("link", name="small <b>.txt")).to_be_visible()
        expect(page.get_by_role("link", name="large.bin")).to_be_visible()
        seen = page.evaluate("window.seen")
        assert any(0 < value < 1 for value in seen)

        # Delete one, after a question.
        page.once("dialog", lambda dialog: dialog.dismiss())
        page.get_by_role("button", name="Delete small <b>.txt").click()
        expect(page.get_by_role("link", name="small <b>.txt")).to_be_visible()
        page.once("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Delete small <b>.txt").click()
        expect(page.get_by_role("link", name="small <b>.txt")).to_have_count(0)
        page.close()


def test_a_file_can_be_dropped_on_the_page(new_page: NewPage, tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        page = new_page()
        page.goto(service.url + "/board/uploads")
        page.evaluate(
            """() => {
                const data = new DataTransfer();
                data.items.add(new File(["Hello"], "dropped.txt"));
                const options = {dataTransfer: data, bubbles: true, cancelable: true};
                for (const name of ["dragover", "drop"])
                    document.getElementById("drop").dispatchEvent(new DragEvent(name, options));
            }"""
        )
        expect(page.get_by_role("link", name="dropped.txt")).to_be_visible()
        page.close()


def test_a_person_signs_in_sends_a_mail_and_signs_out(new_page: NewPage, tmp_path: Path) -> None:
    with Service(tmp_path, api_keys="ada: the-key") as service:
        page = new_page()
        page.goto(service.url + "/board/send")
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert")).to_have_text("This key is not valid.")
        page.get_by_label("API key").fill("the-key")
        page.get_by_role("button", name="Sign in").click()
        page.get_by_label("To").fill("ada@example.com")
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_text("succeeded").first).to_be_visible()
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        page.goto(service.url + "/board/uploads")
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        page.close()


def test_everything_works_without_a_script(new_page: NewPage, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hello")
    with Service(tmp_path / "service") as service:
        page = new_page(java_script_enabled=False)
        for path in PAGES:
            page.goto(service.url + path)
            assert page.get_by_role("button", name="Pause").count() == 0
        page.get_by_label("To").fill("ada@example.com")
        page.get_by_role("button", name="Send").click()
        assert "/board/tasks/" in page.url
        page.goto(service.url + "/board/uploads")
        page.get_by_label("Choose a file").set_input_files(tmp_path / "a.txt")
        page.get_by_role("button", name="Upload").click()
        expect(page.get_by_role("rowheader").get_by_text("a.txt")).to_be_visible()
        page.get_by_role("button", name="Delete a.txt").click()
        expect(page.get_by_text("No uploads yet.")).to_be_visible()


def test_every_page_fits_a_phone_and_can_be_used_by_keyboard(
    new_page: NewPage, tmp_path: Path
) -> None:
    with Service(tmp_path) as service:
        service.post("/send-notifications", json={"recipients": ["ada@example.com"] * 3})
        service.post("/upload", files={"file": ("x" * 200, b"Hello")})
        until(lambda: "alive" in service.get("/board/workers").text, within=PATIENCE)
        page = new_page(viewport={"width": 360, "height": 740}, color_scheme="dark")
        for path in PAGES:
            page.goto(service.url + path)
            wider = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wider <= 0, path
            page.keyboard.press("Tab")
            expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
            expect(page.get_by_role("link", name="Skip to the content")).to_be_in_viewport()
            page.keyboard.press("Enter")
            expect(page.locator("main")).to_be_focused()
        page.close()
