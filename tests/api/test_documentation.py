"""The pages of the documentation need nothing but this server."""

import re

import pytest
from fastapi.testclient import TestClient

from app.api.routes import documentation

PAGES = ["/docs", "/redoc"]
SOURCES = re.compile(r"""(?:src|href|data-document|spec-url)="([^"]*)\"""")
ELSEWHERE = re.compile(r"""(?:https?:)?//[^\s"')]+""")


@pytest.mark.parametrize("path", PAGES)
def test_a_page_loads_nothing_from_elsewhere(client: TestClient, path: str) -> None:
    page = client.get(path)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    sources = SOURCES.findall(page.text)
    assert "/openapi.json" in sources
    assert any(source.endswith(".js") for source in sources)
    assert ELSEWHERE.findall(page.text) == []
    for source in sources:
        assert client.get(source).status_code == 200


@pytest.mark.parametrize("path", PAGES)
def test_its_policy_allows_no_script_but_files_of_this_server(
    client: TestClient, path: str
) -> None:
    """So that not even a script of theirs could load another one."""
    page = client.get(path)
    policy = dict(
        directive.split(" ", 1) for directive in page.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "'self' data:"
    assert "http" not in page.headers["content-security-policy"]
    assert re.findall(r"<script(?![^>]* src=)", page.text) == []
    assert re.findall(r"<style|\sstyle=|\son\w+=", page.text) == []


def test_a_file_may_be_kept_for_a_day(client: TestClient) -> None:
    for path in documentation.PATHS - {"/docs", "/redoc", "/openapi.json"}:
        answer = client.get(path)
        assert answer.headers["cache-control"] == "public, max-age=86400"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert re.match("(text/(javascript|css)|image/)", answer.headers["content-type"])
        assert answer.content


def test_the_files_are_small_and_there_is_a_licence_with_them() -> None:
    sizes = [len(file.read_bytes()) for file, _ in documentation._FILES.values()]
    assert sum(sizes) < 4_000_000
    for name in ("swagger/LICENSE", "redoc/redoc.standalone.js.LICENSE.txt"):
        assert (documentation._PACKAGE / "static" / name).is_file()


def test_the_document_is_made_once(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody may ask for it, and as often as they like."""
    first = client.get("/openapi.json")

    def describe() -> None:
        raise AssertionError("it is made again")

    monkeypatch.setattr(client.app, "openapi", describe)
    assert client.get("/openapi.json").content == first.content
    assert first.headers["content-type"] == "application/json"
