"""The frame of every page: navigation, security headers, static files, and errors as pages."""

import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from afterward.errors import QueueUnavailable
from app.api.static_files import STATIC_PATHS, static_file, static_url
from tests.api.requests import problem_of
from tests.support.gate import served
from tests.support.pages import BROWSER, Page
from tests.support.service import ROOT

PAGES = [
    "/",
    "/board/tasks",
    "/board/failures",
    "/board/batches",
    "/board/uploads",
    "/board/workers",
    "/board/send",
    "/inbox",
]
WITHOUT_DATABASE = {"/board/send", "/inbox"}


@pytest.mark.parametrize("path", PAGES)
def test_a_page_has_the_frame_and_loads_nothing_from_elsewhere(
    browser: TestClient, path: str
) -> None:
    response = browser.get(path)
    page = Page(response.text)

    assert response.status_code == 200
    assert page.all("title")[0].text.endswith("· Afterward")
    assert page.find("main", id="main")
    assert page.find("a", class_="skip").attributes["href"] == "#main"
    assert len(page.all("h1")) == 1
    assert all(link.startswith(("/", "#")) and not link.startswith("//") for link in page.links)


@pytest.mark.parametrize("path", PAGES)
def test_a_page_has_no_script_and_no_style_in_its_html(browser: TestClient, path: str) -> None:
    response = browser.get(path)
    page = Page(response.text)
    policy = response.headers["content-security-policy"]

    assert {"default-src 'none'", "script-src 'self'", "style-src 'self'"} <= set(
        policy.split("; ")
    )
    assert {"base-uri 'none'", "frame-ancestors 'none'"} <= set(policy.split("; "))
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "same-origin"
    assert response.headers["cache-control"] == "no-store"
    assert not page.all("style")
    assert [script.text for script in page.all("script")] == [""]
    for element in page.elements:
        assert "style" not in element.attributes
        assert not [name for name in element.attributes if name.startswith("on")]


@pytest.mark.parametrize("path", PAGES)
def test_a_page_names_its_place_in_the_navigation(browser: TestClient, path: str) -> None:
    page = Page(browser.get(path).text)
    current = [link.attributes["href"] for link in page.all("a", aria_current="page")]

    assert current == ([] if path == "/board/send" else [path])


@pytest.mark.parametrize("path", ["/board", "/board/"])
def test_the_board_is_the_overview(browser: TestClient, path: str) -> None:
    response = browser.get(path)
    assert (response.status_code, response.headers["location"]) == (303, "/")


def test_every_table_has_column_headers_and_every_field_a_label(browser: TestClient) -> None:
    for path in PAGES:
        page = Page(browser.get(path).text)
        labels = page.all("label")
        labelled = {label.attributes.get("for") for label in labels}
        inside = {id(field) for label in labels for field in label.children}
        for header in page.all("th"):
            assert header.attributes["scope"] in {"col", "row"}
        for field in page.all("input") + page.all("textarea") + page.all("select"):
            is_hidden = field.attributes.get("type") == "hidden"
            is_labelled = field.attributes.get("id") in labelled or id(field) in inside
            assert is_hidden or is_labelled, f"{path}: {field.attributes}"


def test_a_table_that_becomes_cards_on_a_phone_stays_a_table_for_screen_readers() -> None:
    """Some browsers forget the role of a cell whose `display` changes, so the HTML repeats it."""
    roles = {"table": "table", "thead": "rowgroup", "tbody": "rowgroup", "tr": "row", "td": "cell"}
    roles |= {'th scope="col"': "columnheader", 'th scope="row"': "rowheader"}
    for path in (ROOT / "app/templates/pages").rglob("*.html"):
        # A table without a class stays a table on a phone.
        text = re.sub(r"<table>.*?</table>", "", path.read_text(), flags=re.DOTALL)
        for tag in re.findall(r"<(?:table|thead|tbody|tr|td|th)\b[^>]*>", text):
            role = next(roles[start] for start in roles if tag.startswith(f"<{start}"))
            assert f'role="{role}"' in tag, f"{path.name}: {tag}"


def test_links_begin_with_the_prefix_of_the_proxy(tmp_path: Path) -> None:
    with served(tmp_path, root_path="/afterward") as client:
        for path in PAGES:
            page = Page(client.get(path, headers=BROWSER).text)
            assert all(link.startswith(("/afterward/", "#")) for link in page.links)


# Static files


@pytest.mark.parametrize("path", STATIC_PATHS)
def test_a_static_file_is_kept_by_browsers_as_long_as_it_is_current(
    browser: TestClient, path: str
) -> None:
    current = browser.get(static_url(STATIC_PATHS[path]))
    other = browser.get(path, params={"v": "old"})

    assert current.content == other.content == static_file(STATIC_PATHS[path]).content
    assert current.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert other.headers["cache-control"] == "no-cache"
    etag = other.headers["etag"]
    for tags in (etag, f"W/{etag}", f'"other", {etag}', "*"):  # a proxy that compresses adds W/
        again = browser.get(path, headers={"If-None-Match": tags})
        assert (again.status_code, again.content) == (304, b"")
    assert browser.get(path, headers={"If-None-Match": '"other"'}).status_code == 200


def test_static_files_need_no_key(tmp_path: Path) -> None:
    with served(tmp_path, api_keys="ada: k1") as client:
        for path in STATIC_PATHS:
            response = client.get(path)
            assert response.status_code == 200
            assert "private" not in response.headers["cache-control"]


def test_the_style_sheet_and_the_script_load_nothing() -> None:
    for name in ("board.css", "board.js"):
        text = static_file(name).content.decode()
        assert not re.search(r"https?:|@import|url\(|import\(", text)


# Errors


def test_an_error_is_a_page_for_a_browser_and_a_problem_for_a_program(browser: TestClient) -> None:
    response = browser.get("/board/nowhere")
    page = Page(response.text)

    assert response.status_code == 404
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-request-id"]
    assert page.text_of("h1") == "Not Found"
    assert "There is nothing at this path." in page.text
    problem_of(browser.get("/board/nowhere", headers={"Accept": "*/*"}), 404)
    problem_of(browser.get("/board/nowhere", headers={"Accept": "application/json"}), 404)
    problem_of(browser.get("/nowhere"), 404)


def test_a_page_of_a_service_without_its_database_says_so(
    browser: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise QueueUnavailable

    engine = browser.app_state["queue"].engine
    for method in ("backlog", "list_tasks", "list_records", "list_batches", "count_failures"):
        monkeypatch.setattr(engine, method, refuse)
    for path in PAGES:
        response = browser.get(path)
        page = Page(response.text)
        if path in WITHOUT_DATABASE:
            assert response.status_code == 200
        else:
            assert response.status_code == 503
            assert response.headers["retry-after"]
            assert "Service Unavailable" in page.text_of("h1")


def test_an_unexpected_error_is_a_page_with_the_id_of_its_log_lines(
    browser: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise LookupError("a secret place")

    monkeypatch.setattr(browser.app_state["queue"].engine, "list_records", fail)
    response = browser.get("/board/workers", headers={"X-Request-ID": "my-request"})

    assert response.status_code == 500
    assert "my-request" in Page(response.text).text
    assert "secret" not in response.text


@pytest.mark.parametrize("path", ["/board/uploads", "/board/batches"])
@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("after=zzzz", 200),
        ("after=00000000-0000-7000-8000-000000000000", 200),
        ("after=%00", 422),
        ("after=" + "x" * 100, 422),
        ("a=1&" * 500, 200),
    ],
)
def test_a_page_beyond_the_end_is_a_page(
    browser: TestClient, path: str, query: str, status: int
) -> None:
    response = browser.get(f"{path}?{query}")

    assert response.status_code == status
    assert Page(response.text).all("h1")
