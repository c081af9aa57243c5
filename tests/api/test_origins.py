"""CORS: browser applications of the origins in CORS_ORIGINS may use the service."""

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
    """Run a service without a worker, with these settings."""
    app = create_app(settings_in(directory, worker_concurrency=0, **settings))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def preflight(method: str, *headers: str, origin: str = PAGE) -> dict[str, str]:
    """Return the headers of a preflight request, which a browser sends before a page's request."""
    asked = {"Access-Control-Request-Headers": ", ".join(headers)} if headers else {}
    return {"Origin": origin, "Access-Control-Request-Method": method, **asked}


ALLOWED_PREFLIGHTS = [
    ("POST", SEND, ["authorization", "content-type", "idempotency-key"]),
    ("POST", "/upload", ["x-api-key", "x-request-id"]),
    ("GET", "/events", ["authorization", "last-event-id"]),
    ("GET", "/uploads/1/content", ["x-api-key", "range", "if-range", "if-none-match"]),
    ("HEAD", "/tasks", ["x-api-key"]),
    ("DELETE", "/uploads/1", ["x-api-key"]),
]


@pytest.mark.parametrize(("method", "path", "headers"), ALLOWED_PREFLIGHTS)
def test_a_preflight_request_needs_no_key(
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


def test_a_public_page_may_use_a_service_in_the_browser_s_private_network(
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
def test_a_preflight_request_for_anything_else_is_refused(
    tmp_path: Path, asked: dict[str, str]
) -> None:
    with served(tmp_path, api_keys=f"ada: {KEY}", cors_origins=PAGE) as client:
        answer = client.options(SEND, headers=asked)
    problem_of(answer, 400)
    if asked["Origin"] != PAGE:
        assert "access-control-allow-origin" not in answer.headers


def test_a_page_of_a_listed_origin_can_read_the_response_and_its_headers(tmp_path: Path) -> None:
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


def test_a_page_of_a_listed_origin_can_read_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_page_of_an_unlisted_origin_can_read_no_response(tmp_path: Path) -> None:
    with served(tmp_path, api_keys=f"ada: {KEY}", cors_origins=PAGE) as client:
        for origin in (OTHER, "null"):
            answer = client.get("/tasks", headers=bearing(KEY) | {"Origin": origin})
            assert "access-control-allow-origin" not in answer.headers
            # Otherwise a cache could give this response to PAGE.
            assert "Origin" in answer.headers["vary"]


def test_without_api_keys_only_listed_origins_may_send_requests(tmp_path: Path) -> None:
    with served(tmp_path, cors_origins=PAGE) as client:
        assert client.post(SEND, headers={"Origin": PAGE}).status_code == 202
        problem_of(client.post(SEND, headers={"Origin": OTHER}), 403)
        # DNS rebinding leads a foreign host name here; the right Origin does not make it ours.
        rebound = {"Origin": PAGE, "Host": "app.example.com"}
        problem_of(client.post(SEND, headers=rebound), 403)


def test_with_api_keys_every_origin_may_be_allowed(tmp_path: Path) -> None:
    with served(tmp_path, api_keys=f"ada: {KEY}", cors_origins="*") as client:
        assert client.options(SEND, headers=preflight("POST", "x-api-key")).status_code == 204
        answer = client.get("/tasks", headers=bearing(KEY) | {"Origin": OTHER})
        assert answer.headers["access-control-allow-origin"] == "*"
        problem_of(client.get("/tasks", headers={"Origin": OTHER}), 401)


def test_without_listed_origins_no_response_has_cors_headers(tmp_path: Path) -> None:
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


def test_shared_caches_may_not_keep_a_response_behind_an_api_key(tmp_path: Path) -> None:
    """A shared cache could give it to a client without a key, or a 401 to a client with one."""
    with served(tmp_path, api_keys=f"ada: {KEY}") as client:
        for headers in ({}, {"X-API-Key": KEY}, bearing(KEY)):
            answer = client.get("/tasks", headers=headers)
            assert answer.headers["cache-control"] == "private"
            assert answer.headers["vary"] == "Authorization, X-API-Key, Cookie"
        for path in ("/livez", "/docs", "/openapi.json"):
            assert "vary" not in client.get(path).headers
