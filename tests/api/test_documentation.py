"""The pages of the API documentation, which load all their files from this server."""

import re

import pytest
from fastapi.testclient import TestClient

from app.api.routes import documentation

PAGES = ["/docs", "/redoc"]
SOURCES = re.compile(r"""(?:src|href|data-document|spec-url)="([^"]*)\"""")
ELSEWHERE = re.compile(r"""(?:https?:)?//[^\s"')]+""")


@pytest.mark.parametrize("path", PAGES)
def test_a_page_loads_files_from_this_server_only(client: TestClient, path: str) -> None:
    page = client.get(path)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    sources = SOURCES.findall(page.text)
    assert "/openapi.json" in sources
    assert any(source.endswith(".js") for source in sources)
    assert ELSEWHERE.findall(page.text) == []
    for source in sources:
        assert client.get(source).status_code == 200


@pytest.mark.parametrize("path", PAGES)
def test_the_content_security_policy_allows_scripts_of_this_server_only(
    client: TestClient, path: str
) -> None:
    """So even a script of the documentation could not load a script from a different server."""
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


def test_a_browser_may_cache_a_file_for_a_day(client: TestClient) -> None:
    for path in documentation.PATHS - {"/docs", "/redoc", "/openapi.json"}:
        answer = client.get(path)
        assert answer.headers["cache-control"] == "public, max-age=86400"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert re.match("(text/(javascript|css)|image/)", answer.headers["content-type"])
        assert answer.content


def test_the_files_are_small_and_come_with_their_licences() -> None:
    sizes = [len(file.read_bytes()) for file, _ in documentation._FILES.values()]
    assert sum(sizes) < 4_000_000
    for name in ("swagger/LICENSE", "redoc/redoc.standalone.js.LICENSE.txt"):
        assert (documentation._PACKAGE / "static" / name).is_file()


def test_the_document_is_generated_only_once(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients may request it without a key, as often as they like."""
    first = client.get("/openapi.json")

    def describe() -> None:
        raise AssertionError("it is made again")

    monkeypatch.setattr(client.app, "openapi", describe)
    assert client.get("/openapi.json").content == first.content
    assert first.headers["content-type"] == "application/json"
