"""Nothing that a client can send is an error of the server's; what is refused leaves no trace."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from tests.api.requests import problem_of
from tests.support.service import files_below, settings_in

MIB = 1024 * 1024
MARK = "do-not-repeat-me"  # somewhere in the input, and nowhere in the answer
JSON = {"Content-Type": "application/json"}

NOTIFICATION = "/send-notification/ada@example.com"
SAVE_DATA = "/save-data/?user_id=ada"
PROCESS = "/process/"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad-input")


@pytest.fixture(scope="module")
def client(directory: Path) -> Iterator[TestClient]:
    """One service for the whole module, without a worker: what is queued would stay and be seen."""
    app = create_app(settings_in(directory, worker_concurrency=0))
    with TestClient(app, follow_redirects=False) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_has_happened(client: TestClient, directory: Path) -> Iterator[None]:
    """Each test leaves the tasks and the files as they were."""

    def traces() -> list[object]:
        files = [name for name in files_below(directory) if not name.startswith("queue.db")]
        return [client.get("/tasks").json(), files]

    before = traces()
    yield
    assert traces() == before


def refused(response: Any, *statuses: int) -> dict[str, Any]:
    """The problem, in which nothing of the input stands but the path (RFC 9457, 3.1.5)."""
    problem = problem_of(response, *statuses)
    assert MARK not in json.dumps(problem | {"instance": ""})
    assert MARK not in str(response.headers)
    return problem


# Bodies that are no JSON, or a kind of JSON that cannot be kept.

NO_JSON = {
    "NaN": b'{"subject": NaN}',
    "an infinity": b'{"message": -Infinity}',
    "a number that becomes an infinity": b'{"message": 1e999}',
    "half a surrogate pair": b'{"subject": "\\ud800"}',
    "half a surrogate pair as a name": b'{"\\udfff": 1}',
    "a byte that is no UTF-8": b'{"subject": "\xff"}',
    "an overlong NUL": b'{"subject": "\xc0\x80"}',
    "UTF-16": '{"subject": "x"}'.encode("utf-16"),
    "100,000 levels of lists": b"[" * 100_000 + b"]" * 100_000,
    "100,000 levels of objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "5,000 digits": b'{"message": ' + b"9" * 5_000 + b"}",
    "a comma too many": b'{"subject": "x",}',
    "one quote": b"{'subject': 'x'}",
    "half an object": b'{"subject": "do-not-repeat-me',
    "two objects": b"{}{}",
    "a comment": b"{} // do-not-repeat-me",
    "no value": b" ",
    "a word": b"do-not-repeat-me",
}


@pytest.mark.parametrize("path", [NOTIFICATION, SAVE_DATA, PROCESS])
@pytest.mark.parametrize("body", NO_JSON.values(), ids=NO_JSON)
def test_a_body_that_is_not_strictly_json_is_refused(
    client: TestClient, path: str, body: bytes
) -> None:
    refused(client.post(path, content=body, headers=JSON), 400, 422)


@pytest.mark.parametrize("path", [NOTIFICATION, SAVE_DATA, PROCESS])
@pytest.mark.parametrize("body", [b"[]", b'"x"', b"1", b"true", b"[{}]"])
def test_a_body_that_is_no_object_is_refused(client: TestClient, path: str, body: bytes) -> None:
    refused(client.post(path, content=body, headers=JSON), 422)


@pytest.mark.parametrize("path", [SAVE_DATA, PROCESS])
@pytest.mark.parametrize("body", [b"", b"null"])
def test_where_an_object_is_needed_it_must_be_there(
    client: TestClient, path: str, body: bytes
) -> None:
    refused(client.post(path, content=body, headers=JSON), 422)


@pytest.mark.parametrize("path", [NOTIFICATION, SAVE_DATA, PROCESS])
@pytest.mark.parametrize(
    "media_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", "é", ""]
)
def test_a_body_that_does_not_say_json_is_refused(
    client: TestClient, path: str, media_type: str
) -> None:
    headers = {b"Content-Type": media_type.encode()}
    refused(client.post(path, content=b"{}", headers=headers), 415)


@pytest.mark.parametrize("path", [NOTIFICATION, SAVE_DATA, PROCESS])
@pytest.mark.parametrize("announced", [True, False])
def test_a_body_over_the_limit_is_too_large(
    client: TestClient, path: str, *, announced: bool
) -> None:
    body = b'{"colour": "' + b"x" * 2 * MIB + b'"}'
    content = body if announced else iter([body[:MIB], body[MIB:]])
    refused(client.post(path, content=content, headers=JSON), 413)


# Fields.

BREAKS = ["\r", "\n", "\r\n", "\x85", "\u2028", "\u2029", "\v", "\f", "\0", "\x7f"]
SEPARATORS = ["\x1c", "\x1d", "\x1e", "\x1f"]
ENCODED_WORDS = ["=?utf-8?q?Bcc=3A_eve=40example.com?=", "=?UTF-8?B?QmNjOiBldmU=?="]


@pytest.mark.parametrize("inside", BREAKS + SEPARATORS + ENCODED_WORDS + ["\u202e", "\x1b[2J"])
def test_a_subject_that_could_break_its_header_is_refused(client: TestClient, inside: str) -> None:
    response = client.post(NOTIFICATION, json={"subject": f"{MARK} {inside} Bcc: eve@example.com"})
    (error,) = refused(response, 422)["errors"]
    assert error["pointer"] == "/subject"


@pytest.mark.parametrize("inside", ["\0", "\x1b[2J", "\v", "\f", "\x7f", "\x85"])
def test_a_message_with_control_characters_is_refused(client: TestClient, inside: str) -> None:
    response = client.post(NOTIFICATION, json={"message": MARK + inside})
    (error,) = refused(response, 422)["errors"]
    assert error["pointer"] == "/message"


@pytest.mark.parametrize(
    ("body", "pointers"),
    [
        ({"subject": True}, ["/subject"]),
        ({"subject": 1}, ["/subject"]),
        ({"subject": None}, ["/subject"]),
        ({"subject": [MARK]}, ["/subject"]),
        ({"subject": "x" * 201}, ["/subject"]),
        ({"message": {MARK: 1}}, ["/message"]),
        ({"subject": 1, "message": 2}, ["/subject", "/message"]),
        ({"colour": MARK}, ["/colour"]),
        ({"Subject": MARK}, ["/Subject"]),
        ({f"two words, {MARK}": 1}, [""]),
        ({MARK * 10: 1}, [""]),
    ],
)
def test_a_field_that_is_wrong_is_named_and_never_repeated(
    client: TestClient, body: object, pointers: list[str]
) -> None:
    errors = refused(client.post(NOTIFICATION, json=body), 422)["errors"]
    assert [error["pointer"] for error in errors] == pointers
    assert all(error["detail"] for error in errors)


@pytest.mark.parametrize("path", [NOTIFICATION, "/send-notification/" + quote("😀" * 300)])
def test_a_thousand_wrong_fields_are_a_small_problem(client: TestClient, path: str) -> None:
    body = {f"{number:040}": number for number in range(1000)}
    assert len(refused(client.post(path, json=body), 422)["errors"]) <= 20


# Addresses, percent-encoded as in a path.

NO_ADDRESSES = [
    "ada",
    "@example.com",
    "ada@",
    "ada@localhost",
    "ada%0d%0aBcc:eve@example.com",
    "ada@example.com%0d%0a",
    "ada@example.com%0aDATA",
    "ada%00@example.com",
    "%ff@example.com",
    "a,v@example.com",
    "ada@example.com,eve@example.com",
    "Ada%20%3Cada@example.com%3E",
    "g:%20a@example.com,b@example.com;",
    "%22a%20b%22@example.com",
    "ada@%5B127.0.0.1%5D",
    "x" * 65 + "@example.com",
    "ada@" + "x" * 250 + ".com",
    "ada@" + ".".join(["x" * 60] * 5) + ".com",
    "x" * 9000,
    "=%3Futf-8%3Fq%3Feve%3F=@example.com",
    "ad%C3%A9@example.com",
    "%ED%A0%80@example.com",
    "ada@example.com%E2%80%A8",
    "ada@-example.com",
    "ada@exa_mple.com",
    "ada..b@example.com",
    "%20ada@example.com",
]


@pytest.mark.parametrize("address", NO_ADDRESSES, ids=lambda address: address[:40])
@pytest.mark.parametrize("path", ["/send-notification/", "/send-email/?email=", "/items/7?email="])
def test_what_is_not_one_address_is_refused(client: TestClient, path: str, address: str) -> None:
    (error,) = refused(client.post(path + address), 422)["errors"]
    assert error["pointer"] == "/email"


@pytest.mark.parametrize("address", ["a%2Fb@example.com", "", "..%2f..%2fetc%2fpasswd"])
def test_an_address_that_is_no_single_part_of_the_path_is_not_found(
    client: TestClient, address: str
) -> None:
    refused(client.post(f"/send-notification/{address}"), 404)


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
def test_a_bad_argument_of_a_promise_is_refused(client: TestClient, path: str) -> None:
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
def test_a_bad_page_is_refused(client: TestClient, path: str, query: str) -> None:
    (error,) = refused(client.get(f"{path}?{query}"), 422)["errors"]
    assert error["pointer"] == "/" + query.partition("=")[0]


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("status=do-not-repeat-me", 422),
        ("status=Queued", 422),
        ("status=", 422),
        ("kind=" + "x" * 101, 422),
        ("after=do-not-repeat-me", 404),
        ("after=%00", 404),
        ("after=%ff", 404),
    ],
)
def test_a_bad_filter_of_tasks_is_refused(client: TestClient, query: str, status: int) -> None:
    refused(client.get(f"/tasks?{query}"), status)


@pytest.mark.parametrize(
    "query", ["kind=%00", "kind=%ff", "kind='%3B DROP TABLE tasks%3B --", "unknown=1", "&&=&", "%"]
)
def test_a_query_that_matches_nothing_finds_nothing(client: TestClient, query: str) -> None:
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
    ],
)
def test_an_id_that_is_none_of_ours_is_not_found(
    client: TestClient, method: str, path: str, odd_id: str
) -> None:
    refused(client.request(method, path.format(odd_id)), 404, 422)


@pytest.mark.parametrize(
    "path", ["/nowhere", "/%00", "/%ff", "/tasks/", "/uploads/", "/docs/x", "/" + "x" * 9000]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_is_not_there_is_not_found(client: TestClient, method: str, path: str) -> None:
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
def test_a_wrong_method_is_told_the_right_ones(
    client: TestClient, path: str, allowed: set[str], method: str
) -> None:
    if method not in allowed:
        response = client.request(method, path)
        refused(response, 405)
        assert set(response.headers["allow"].split(", ")) - {"HEAD"} == allowed


# Multipart.


def form(*parts: bytes, end: bytes = b"--b--\r\n") -> bytes:
    return b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + end


def part(disposition: bytes, *headers: bytes, content: bytes = b"do-not-repeat-me") -> bytes:
    lines = [b"Content-Disposition: form-data; " + disposition, *headers, b"", content]
    return b"\r\n".join(lines)


FILE = part(b'name="file"; filename="a.txt"')
BAD_FORMS = {
    "nothing": (b"", 400),
    "no part": (b"--b--\r\n", 422),
    "no form": (b"do-not-repeat-me", 400),
    "the end is missing": (form(FILE, end=b""), 400),
    "half a boundary": (form(FILE, end=b"--b"), 400),
    "half a header": (b"--b\r\nContent-Dispo", 400),
    "no name": (form(part(b'filename="a.txt"')), 400),
    "another field": (form(part(b'name="do-not-repeat-me"; filename="a.txt"')), 422),
    "no file name": (form(part(b'name="file"')), 422),
    "an empty file name": (form(part(b'name="file"; filename=""')), 422),
    "a file name with NUL": (form(part(b'name="file"; filename="a\0b"')), 422),
    "a file name that is no UTF-8": (form(part(b'name="file"; filename="\xff"')), 422),
    "a file name of 5,000 letters": (
        form(part(b'name="file"; filename="%s"' % (b"x" * 5000))),
        400,
    ),
    "two files": (form(FILE, FILE), 422),
    "a file and a field": (form(FILE, part(b'name="do-not-repeat-me"')), 422),
    "1,001 parts": (form(*[part(b'name="x"')] * 1001), 422),
    "9 headers": (
        form(part(b'name="file"; filename="a"', *[b"X-%d: x" % n for n in range(8)])),
        400,
    ),
    "a header of 5 KB": (form(part(b'name="file"; filename="a"', b"X: " + b"x" * 5000)), 400),
}


@pytest.mark.parametrize(("body", "status"), BAD_FORMS.values(), ids=BAD_FORMS)
@pytest.mark.parametrize("path", ["/upload", "/upload/"])
def test_a_form_that_is_wrong_is_refused(
    client: TestClient, path: str, body: bytes, status: int
) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    refused(client.post(path, content=body, headers=headers), status)


@pytest.mark.parametrize(
    "content_type",
    [
        b"",
        b"text/plain",
        b"application/json",
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b"multipart/form-data; boundary=" + b"b" * 300,
        b"multipart/form-data; boundary=\xff",
        b"multipart/mixed; boundary=b",
    ],
)
def test_an_upload_that_is_no_form_is_refused(client: TestClient, content_type: bytes) -> None:
    refused(
        client.post("/upload", content=form(FILE), headers={b"Content-Type": content_type}), 415
    )
