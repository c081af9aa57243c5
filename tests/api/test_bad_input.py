"""Invalid requests are refused and change nothing. For attacks, see tests/attacks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from afterward.task import Status
from app.main import create_app
from tests.api.requests import problem_of
from tests.support.service import files_below, settings_in

MARK = "do-not-repeat-me"  # part of the input, and never of the response
JSON = {"Content-Type": "application/json"}

NOTIFICATION = "/send-notification/ada@example.com"
SAVE_DATA = "/save-data/?user_id=ada"
PROCESS = "/process/"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad-input")


@pytest.fixture(scope="module")
def client(directory: Path) -> Iterator[TestClient]:
    """A service for the whole module. It has no worker, so a wrongly queued task would be seen."""
    app = create_app(settings_in(directory, worker_concurrency=0))
    with TestClient(app, follow_redirects=False) as client:
        yield client


@pytest.fixture(autouse=True)
def no_task_and_no_file_is_added(client: TestClient, directory: Path) -> Iterator[None]:
    """Check after each test that the tasks and the files are the same as before."""

    def traces() -> list[object]:
        files = [name for name in files_below(directory) if not name.startswith("queue.db")]
        return [client.get("/tasks").json(), files]

    before = traces()
    yield
    assert traces() == before


def refused(response: Any, *statuses: int) -> dict[str, Any]:
    """Return the problem, which may repeat only the path of the request (RFC 9457, 3.1.5)."""
    problem = problem_of(response, *statuses)
    assert MARK not in json.dumps(problem | {"instance": ""})
    assert MARK not in str(response.headers)
    return problem


# Bodies.


@pytest.mark.parametrize("path", [NOTIFICATION, SAVE_DATA, PROCESS])
@pytest.mark.parametrize("body", [b"[]", b'"x"', b"1", b"true", b"[{}]"])
def test_a_body_that_is_no_json_object_is_refused(
    client: TestClient, path: str, body: bytes
) -> None:
    refused(client.post(path, content=body, headers=JSON), 422)


@pytest.mark.parametrize("path", [SAVE_DATA, PROCESS])
@pytest.mark.parametrize("body", [b"", b"null"])
def test_a_missing_body_is_refused(client: TestClient, path: str, body: bytes) -> None:
    refused(client.post(path, content=body, headers=JSON), 422)


@pytest.mark.parametrize("path", [NOTIFICATION, SAVE_DATA, PROCESS])
@pytest.mark.parametrize(
    "media_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", "é", ""]
)
def test_a_body_without_the_media_type_of_json_is_refused(
    client: TestClient, path: str, media_type: str
) -> None:
    headers = {b"Content-Type": media_type.encode()}
    refused(client.post(path, content=b"{}", headers=headers), 415)


@pytest.mark.parametrize("path", [NOTIFICATION, SAVE_DATA, PROCESS])
@pytest.mark.parametrize("charset", ["utf-16", "latin-1", '"ISO-8859-1"', "utf-7", "x"])
def test_json_in_another_charset_is_refused(client: TestClient, path: str, charset: str) -> None:
    """The same bytes may be valid in UTF-8 too, with a different meaning."""
    headers = {"Content-Type": f"application/json; charset={charset}"}
    response = client.post(path, content=b"{}", headers=headers)
    refused(response, 415)
    assert "UTF-8" in response.json()["detail"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_the_refusal_of_a_byte_order_mark_names_it(client: TestClient, encoding: str) -> None:
    response = client.post(NOTIFICATION, content="{}".encode(encoding), headers=JSON)
    refused(response, 400)
    assert "byte order mark" in response.json()["detail"]


# Paths and queries.


@pytest.mark.parametrize(
    "path",
    [
        "/send-email/",
        "/save-data/",
        "/save-data/?user_id=",
        "/save-data/?user_id=" + "x" * 65,
        "/save-data/?user_id=..%2F..%2Fetc",
        "/save-data/?user_id=a%00",
        "/save-data/?user_id=a%0A",
        "/items/x",
        "/items/true",
        "/items/1.5",
        "/items/1e9",
        "/items/%00",
        "/items/" + "9" * 5000,
        NOTIFICATION + "?q=%00",
        NOTIFICATION + "?q=%1B%5B2J",
        NOTIFICATION + "?q=" + "x" * 1001,
    ],
    ids=lambda path: path[:40],
)
def test_an_invalid_argument_of_a_durable_task_is_refused(client: TestClient, path: str) -> None:
    refused(client.post(path, json={} if path.startswith("/save-data") else None), 422)


@pytest.mark.parametrize("path", ["/tasks", "/uploads"])
@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=-1",
        "limit=101",
        "limit=99999999999999999999",
        "limit=" + "9" * 5000,
        "limit=true",
        "limit=1.5",
        "limit=NaN",
        "limit=",
        "limit=%00",
        "limit=do-not-repeat-me",
        "after=" + "x" * 65,
    ],
    ids=lambda query: query[:30],
)
def test_an_invalid_limit_or_position_of_a_page_is_refused(
    client: TestClient, path: str, query: str
) -> None:
    (error,) = refused(client.get(f"{path}?{query}"), 422)["errors"]
    assert error["pointer"] == "/" + query.partition("=")[0]


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("status=do-not-repeat-me", 422),
        ("status=Queued", 422),
        ("status=", 422),
        ("kind=" + "x" * 101, 422),
        ("after=do-not-repeat-me", 422),
        ("after=%00", 422),
        ("kind=%00", 422),
        ("after=%ff", 422),
    ],
)
def test_an_invalid_filter_of_tasks_is_refused(client: TestClient, query: str, status: int) -> None:
    refused(client.get(f"/tasks?{query}"), status)


@pytest.mark.parametrize(
    ("path", "pointer", "detail"),
    [
        (
            "/tasks?status=faild",
            "/status",
            f"must be one or more of {', '.join(Status)}, separated by commas",
        ),
        ("/tasks?about=%00", "/about", "must not contain a NUL character"),
        ("/tasks?kind=" + "x" * 101, "/kind", "must have at most 100 characters"),
        ("/tasks?after=x%0A", "/after", "must be the id of a task"),
        ("/inbox?after=x", "/after", "must be the id of a mail"),
        (
            "/save-data/a%20b",
            "/user_id",
            "must be 1 to 64 letters, digits and characters of ._@-",
        ),
    ],
)
def test_the_refusal_of_a_text_is_a_sentence_and_no_pattern(
    client: TestClient, path: str, pointer: str, detail: str
) -> None:
    problem = refused(client.get(path), 422)
    assert problem["errors"] == [{"pointer": pointer, "detail": detail}]


def test_the_refusal_of_a_long_subject_counts_its_characters(client: TestClient) -> None:
    problem = refused(client.post(NOTIFICATION, json={"subject": "x" * 201}), 422)
    assert problem["errors"] == [
        {"pointer": "/subject", "detail": "must have at most 200 characters"}
    ]


@pytest.mark.parametrize(
    "query", ["kind=%ff", "kind='%3B DROP TABLE tasks%3B --", "unknown=1", "&&=&", "%"]
)
def test_a_filter_that_matches_no_task_gives_an_empty_list(client: TestClient, query: str) -> None:
    response = client.get(f"/tasks?{query}")
    assert (response.status_code, response.json()["data"]) == (200, [])


ODD_IDS = [
    "do-not-repeat-me",
    "0",
    "-1",
    "%00",
    "%0d%0a",
    "%ff",
    "%ED%A0%80",
    "%F0%9F%98%80",
    "..%5C..%5Cetc",
    "..%2f..%2fetc%2fpasswd",
    "'%3B DROP TABLE tasks%3B --",
    "00000000-0000-0000-0000-000000000000",
    "x" * 5000,
]


@pytest.mark.parametrize("odd_id", ODD_IDS, ids=lambda odd_id: odd_id[:30])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/tasks/{}"),
        ("GET", "/tasks/{}/events"),
        ("POST", "/tasks/{}/cancel"),
        ("POST", "/tasks/{}/retry"),
        ("GET", "/uploads/{}"),
        ("GET", "/uploads/{}/content"),
        ("GET", "/uploads/{}/thumbnail"),
        ("DELETE", "/uploads/{}"),
        ("GET", "/save-data/{}"),
        ("GET", "/inbox/{}"),
        ("GET", "/inbox/{}/html"),
        ("GET", "/inbox/{}/source"),
        ("GET", "/inbox/{}/attachments/0"),
        ("GET", "/inbox/by-message-id/{}"),
        ("DELETE", "/inbox/{}"),
    ],
)
@pytest.mark.thorough
def test_an_unknown_id_is_not_found(
    client: TestClient, method: str, path: str, odd_id: str
) -> None:
    refused(client.request(method, path.format(odd_id)), 404, 422)


@pytest.mark.parametrize(
    "path", ["/nowhere", "/%00", "/%ff", "/tasks/", "/uploads/", "/docs/x", "/" + "x" * 9000]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_path_is_not_found(client: TestClient, method: str, path: str) -> None:
    refused(client.request(method, path), 404)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/", {"GET"}),
        ("/livez", {"GET"}),
        ("/tasks", {"GET"}),
        ("/tasks/x/cancel", {"POST"}),
        ("/uploads", {"GET"}),
        ("/uploads/x", {"GET", "DELETE"}),
        ("/upload", {"POST"}),
        ("/upload/", {"POST"}),
        ("/send-notification/ada@example.com", {"POST"}),
        ("/send-email", {"POST"}),
        ("/save-data/ada", {"GET"}),
        ("/items/7/", {"POST"}),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "TRACE", "QUUX"])
@pytest.mark.thorough
def test_the_refusal_of_a_method_names_the_allowed_methods(
    client: TestClient, path: str, allowed: set[str], method: str
) -> None:
    if method not in allowed:
        response = client.request(method, path)
        refused(response, 405)
        named = set(response.headers["allow"].split(", "))
        assert named == allowed | {"OPTIONS"} | ({"HEAD"} & named)
        assert ("HEAD" in named) == ("GET" in allowed)
