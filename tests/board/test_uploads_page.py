"""The page of the uploads, and its forms, which work without a script."""

import asyncio
import threading
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from afterward.task import Record, Writes
from tests.support.gate import bearing, served
from tests.support.pages import BROWSER, HOSTILE, Page
from tests.support.pictures import picture
from tests.support.service import PATIENCE, until


def send(client: TestClient, name: str = "a.txt", content: bytes = b"Hello") -> str:
    """Upload a file by the form, and return the id of the upload."""
    response = client.post("/board/uploads", files={"file": (name, content)})
    assert response.status_code == 303
    assert response.headers["location"] == "/board/uploads"
    newest = client.get("/uploads").json()["data"][0]
    return str(newest["id"])


def test_a_file_sent_by_the_form_is_listed_and_deleted(browser: TestClient) -> None:
    upload_id = send(browser)
    until(lambda: "published" in browser.get("/board/uploads").text, within=PATIENCE)
    page = Page(browser.get("/board/uploads").text)
    row = page.find("tr", id=f"upload-{upload_id}")
    assert "a.txt" in row.text
    assert "5 bytes" in row.text
    assert browser.get(page.find("a", download="").attributes["href"]).content == b"Hello"

    (form,) = [form for form in page.all("form") if form.attributes["action"].endswith("delete")]
    for _ in range(2):  # a double click
        deleted = browser.post(form.attributes["action"])
        assert (deleted.status_code, deleted.headers["location"]) == (303, "/board/uploads")
    assert "No uploads yet." in Page(browser.get("/board/uploads").text).text


def test_a_picture_is_shown_by_its_thumbnail(browser: TestClient) -> None:
    upload_id = send(browser, "a.png", picture(20, 10))
    text = send(browser)
    thumbnail = f"/board/uploads/{upload_id}/thumbnail"
    until(lambda: thumbnail in browser.get("/board/uploads").text, within=PATIENCE)
    page = Page(browser.get("/board/uploads").text)
    assert page.find("img", class_="thumbnail").attributes["src"] == thumbnail
    response = browser.get(thumbnail)
    assert response.headers["content-type"] == "image/png"
    assert response.headers["content-security-policy"] == "sandbox"
    assert response.headers["cache-control"].startswith("private")
    for other in (text, "unknown"):
        assert browser.get(f"/board/uploads/{other}/thumbnail").status_code == 404
    assert "thumbnail" not in browser.get(f"/uploads/{upload_id}").json()


def test_a_picture_is_not_shown_before_its_thumbnail_is_made(
    browser: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An open page leaves an `<img>` alone that has not changed, so it would stay empty."""
    store, may_store = browser.app_state["uploads"], threading.Event()
    save = store.save_thumbnail

    async def save_later(upload_id: str, content: bytes) -> None:
        await asyncio.to_thread(may_store.wait)
        await save(upload_id, content)

    monkeypatch.setattr(store, "save_thumbnail", save_later)
    send(browser, "a.png", picture(20, 10))
    try:
        until(lambda: "published" in browser.get("/board/uploads").text, within=PATIENCE)
        page = Page(browser.get("/board/uploads").text)
    finally:
        may_store.set()
    assert not page.all("img", class_="thumbnail")
    until(lambda: 'class="thumbnail"' in browser.get("/board/uploads").text, within=PATIENCE)


def test_a_hostile_name_is_only_text(idle_browser: TestClient) -> None:
    send(idle_browser, "<script>alert(1)<script>.txt")
    send(idle_browser, HOSTILE)
    response = idle_browser.get("/board/uploads")
    page = Page(response.text)
    assert "<script>alert(1)<script>.txt" in page.text
    assert "\u202e" not in response.text
    assert [script.text for script in page.all("script")] == [""]


def test_a_form_that_is_no_upload_ends_on_a_page(browser: TestClient) -> None:
    for options in (
        {"data": {"file": "a"}},
        {"files": {"other": ("a.txt", b"Hello")}},
        {"content": b"--x", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
    ):
        response = browser.post("/board/uploads", **options)
        assert response.status_code in {400, 415, 422}
        assert Page(response.text).find("div", role="alert").text.strip()


def test_a_file_that_is_too_large_ends_on_a_page(tmp_path: Path) -> None:
    with served(tmp_path, max_upload_bytes=1000) as client:
        client.headers.update(BROWSER)
        assert "At most 1.0 kB each." in Page(client.get("/board/uploads").text).text
        response = client.post("/board/uploads", files={"file": ("a", b"x" * 5000)})
        assert response.status_code == 413
        assert Page(response.text).text_of("h1") == "Content Too Large"
        assert client.get("/uploads").json()["data"] == []


def test_a_form_may_be_as_large_as_an_upload(tmp_path: Path) -> None:
    with served(tmp_path, max_upload_bytes=100_000, max_body_bytes=1000) as client:
        client.headers.update(BROWSER)
        send(client, content=b"x" * 90_000)


def test_a_long_list_has_pages(idle_browser: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.board.uploads.LISTED", 2)
    sent = [send(idle_browser, f"{number}.txt") for number in range(5)][::-1]
    shown, address = [], "/board/uploads"
    while address:
        page = Page(idle_browser.get(address).text)
        shown += [row.attributes["id"] for row in page.all("tr") if "id" in row.attributes]
        address = "".join(link.attributes["href"] for link in page.all("a", rel="next"))
    assert shown == [f"upload-{upload_id}" for upload_id in sent]
    assert (
        "There are no older uploads." in idle_browser.get(f"/board/uploads?after={sent[-1]}").text
    )


def test_a_task_leads_to_its_upload_however_many_are_newer(
    idle_browser: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.board.uploads.LISTED", 2)
    first = send(idle_browser, "first.txt")
    task = idle_browser.get(f"/tasks?about={first}").json()["data"][0]["id"]
    for number in range(3):
        send(idle_browser, f"{number}.txt")
    address = Page(idle_browser.get(f"/board/tasks/{task}").text).targets["See the file"]
    page = Page(idle_browser.get(address).text)
    rows = [row.attributes["id"] for row in page.all("tr") if "id" in row.attributes]
    assert rows == [f"upload-{first}"]
    assert page.text_of("th", scope="row").startswith("first.txt")
    assert page.targets["All uploads"] == "/board/uploads"
    (form,) = page.forms
    assert idle_browser.post(form.action).headers["location"] == "/board/uploads"
    gone = idle_browser.get(address)
    assert gone.status_code == 404
    assert "There is no such upload." in Page(gone.text).text


def test_a_client_sees_and_deletes_only_its_own_uploads(tmp_path: Path) -> None:
    with served(tmp_path, api_keys="ada: k1, eve: k2", worker_concurrency=0) as client:
        ada, eve = (BROWSER | bearing(key) for key in ("k1", "k2"))
        client.post("/board/uploads", files={"file": ("secret.txt", b"Hello")}, headers=ada)
        upload = client.get("/uploads", headers=ada).json()["data"][0]["id"]
        assert "secret.txt" in client.get("/board/uploads", headers=ada).text
        assert "secret.txt" not in client.get("/board/uploads", headers=eve).text
        assert client.post(f"/board/uploads/{upload}/delete", headers=eve).status_code == 303
        for path in (f"/board/uploads/{upload}", f"/board/uploads/{upload}/thumbnail"):
            assert client.get(path, headers=eve).status_code == 404
        assert client.get(f"/uploads/{upload}", headers=ada).status_code == 200


def test_a_damaged_record_is_listed(idle_browser: TestClient) -> None:
    engine = idle_browser.app_state["queue"].engine
    damaged = Record("uploads", "", "x", {"filename": 7, "status": "<b>"}, 1.8e9)
    idle_browser.portal.call(engine.put, Writes(records=(damaged,)))  # type: ignore[union-attr]
    page = Page(idle_browser.get("/board/uploads").text)
    assert page.find("span", class_="pill").attributes["class"] == "pill unknown"
    assert "(name is damaged)" in page.text
