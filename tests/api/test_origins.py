"""Browser applications of other origins: those that CORS_ORIGINS names, and no others."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.hardening.origins import Origins
from app.main import create_app
from tests.api.requests import problem_of
from tests.support.gate import bearing
from tests.support.service import settings_in

PAGE = "https://app.example.com"
OTHER = "https://eve.example.org"
KEY = "key-of-ada"
SEND = "/send-notification/ada@example.com"


@contextmanager
def served(directory: Path, **settings: Any) -> Iterator[TestClient]:
    """A service without a worker, which browser applications of PAGE may use."""
    app = create_app(settings_in(directory, worker_concurrency=0, **settings))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def preflight(method: str, *headers: str, origin: str = PAGE) -> dict[str, str]:
    """The headers of a browser's question before a request of a page."""
    asked = {"Access-Control-Request-Headers": ", ".join(headers)} if headers else {}
    return {"Origin": origin, "Access-Control-Request-Method": method, **asked}


ASKED = [
    ("POST", SEND, ["authorization", "content-type", "idempotency-key"]),
    ("POST", "/upload", ["x-api-key", "x-request-id"]),
    ("GET", "/events", ["authorization", "last-event-id"]),
    ("GET", "/uploads/1/content", ["x-api-key", "range", "if-range", "if-none-match"]),
    ("HEAD", "/tasks", ["x-api-key"]),
    ("DELETE", "/uploads/1", ["x-api-key"]),
]


@pytest.mark.parametrize(("method", "path", "headers"), ASKED)
def test_a_browser_may_ask_without_a_key(
    tmp_path: Path, method: str, path: str, headers: list[str]
) -> None:
    with served(tmp_path, api_keys=f"ada: {KEY}", cors_origins=PAGE) as client:
        answer = client.options(path, headers=preflight(method, *headers))
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert method in answer.headers["access-control-allow-methods"].split(", ")
    allowed = answer.headers["access-control-allow-headers"].lower().split(", ")
    assert set(headers) <= set(allowed)
    assert "origin" in answer.headers["vary"].lower()
    assert "access-control-allow-credentials" not in answer.headers


def test_a_browser_may_ask_for_a_page_of_the_internet_about_a_service_in_its_network(
    tmp_path: Path,
) -> None:
    asked = preflight("POST") | {"Access-Control-Request-Private-Network": "true"}
    with served(tmp_path, cors_origins=PAGE) as client:
        answer = client.options(SEND, headers=asked)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize(
    "asked",
    [
        preflight("POST", origin=OTHER),
        preflight("POST", origin="null"),
        preflight("POST", origin=PAGE + ".example.org"),
        preflight("POST", origin=PAGE + ":8443"),
        preflight("POST", origin=PAGE.replace("https", "http")),
        preflight("PATCH"),
        preflight("POST", "x-something-else"),
    ],
)
def test_a_browser_is_told_what_is_not_allowed(tmp_path: Path, asked: dict[str, str]) -> None:
    with served(tmp_path, api_keys=f"ada: {KEY}", cors_origins=PAGE) as client:
        answer = client.options(SEND, headers=asked)
    problem_of(answer, 400)
    if asked["Origin"] != PAGE:
        assert "access-control-allow-origin" not in answer.headers


def test_a_page_reads_the_answer_and_its_headers(tmp_path: Path) -> None:
    with served(
        tmp_path, api_keys=f"ada: {KEY}", cors_origins=f"{OTHER}, {PAGE}", rate_limit="9/hour"
    ) as client:
        answer = client.post(SEND, headers=bearing(KEY) | {"Origin": PAGE, "Idempotency-Key": "1"})
    assert answer.status_code == 202
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "Origin" in answer.headers["vary"]
    exposed = answer.headers["access-control-expose-headers"].lower().split(", ")
    assert {"location", "x-request-id", "retry-after", "idempotency-replay"} <= set(exposed)
    ours = {name for name in answer.headers if name.startswith(("ratelimit", "x-", "location"))}
    assert ours <= set(exposed)


def test_a_page_reads_errors_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"api_keys": f"ada: {KEY}", "rate_limit": "3/hour", "max_body_bytes": 10}
    with served(tmp_path, cors_origins=PAGE, **settings) as client:

        async def fail(**_: object) -> None:
            raise LookupError("nobody expected this")

        monkeypatch.setattr(client.app_state["queue"].engine, "list_tasks", fail)
        from_page = {"Origin": PAGE}
        with_key = bearing(KEY) | from_page
        answers = [
            client.get("/tasks", headers=from_page),
            client.post(SEND, headers=with_key, json={"subject": "too long"}),
            client.get("/nowhere", headers=with_key),
            client.get("/tasks", headers=with_key),
            client.get("/tasks", headers=with_key),
        ]
    assert [answer.status_code for answer in answers] == [401, 413, 404, 500, 429]
    for answer in answers:
        problem_of(answer, answer.status_code)
        assert answer.headers["access-control-allow-origin"] == PAGE


def test_a_page_of_another_origin_reads_nothing(tmp_path: Path) -> None:
    with served(tmp_path, api_keys=f"ada: {KEY}", cors_origins=PAGE) as client:
        for origin in (OTHER, "null"):
            answer = client.get("/tasks", headers=bearing(KEY) | {"Origin": origin})
            assert "access-control-allow-origin" not in answer.headers
            assert "Origin" in answer.headers["vary"]  # or a cache gives this answer to PAGE


def test_without_keys_only_listed_pages_are_let_in(tmp_path: Path) -> None:
    with served(tmp_path, cors_origins=PAGE) as client:
        assert client.post(SEND, headers={"Origin": PAGE}).status_code == 202
        problem_of(client.post(SEND, headers={"Origin": OTHER}), 403)
        # A name that leads here by DNS rebinding is none of ours, whatever the origin says.
        rebound = {"Origin": PAGE, "Host": "app.example.com"}
        problem_of(client.post(SEND, headers=rebound), 403)


def test_any_page_may_be_let_in_where_there_are_keys(tmp_path: Path) -> None:
    with served(tmp_path, api_keys=f"ada: {KEY}", cors_origins="*") as client:
        assert client.options(SEND, headers=preflight("POST", "x-api-key")).status_code == 204
        answer = client.get("/tasks", headers=bearing(KEY) | {"Origin": OTHER})
        assert answer.headers["access-control-allow-origin"] == "*"
        problem_of(client.get("/tasks", headers={"Origin": OTHER}), 401)


def test_where_no_origin_is_listed_nothing_is_said_of_origins(tmp_path: Path) -> None:
    with served(tmp_path, api_keys=f"ada: {KEY}") as client:
        answer = client.options(SEND, headers=preflight("POST", "x-api-key"))
        problem_of(answer, 401)
        answers = [answer, client.get("/tasks", headers=bearing(KEY) | {"Origin": PAGE})]
        assert not any(
            name.startswith("access-control") for answer in answers for name in answer.headers
        )
    app = create_app(settings_in(tmp_path))
    assert Origins.__name__ not in str(app.user_middleware)


# Caches


def test_an_answer_to_a_key_is_kept_by_no_cache_in_between(tmp_path: Path) -> None:
    """Which would give it to others, or an answer without a key to those who have one."""
    with served(tmp_path, api_keys=f"ada: {KEY}") as client:
        for headers in ({}, {"X-API-Key": KEY}, bearing(KEY)):
            answer = client.get("/tasks", headers=headers)
            assert answer.headers["cache-control"] == "private"
            assert answer.headers["vary"] == "Authorization, X-API-Key"
        for path in ("/livez", "/docs", "/openapi.json"):
            assert "vary" not in client.get(path).headers
