"""Requests without an API key, with a part of a key, or with malformed keys.

Each is answered 401 with a WWW-Authenticate header. The service stores keys as hashes and compares
them in constant time. No key appears in a log, a database or a repr. A change of the file of keys
takes effect at once.
"""

import gc
import hmac
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import FastAPI, Header, HTTPException
from fastapi.testclient import TestClient
from pydantic import SecretStr
from structlog.testing import capture_logs

from app.api.key_cookie import NAME
from app.hardening import access
from app.hardening import api_keys as keys_module
from app.hardening.api_keys import ApiKeys, BadKeys
from app.main import create_app
from tests.api.requests import problem_of
from tests.support.gate import bearing, served
from tests.support.service import PATIENCE, Json, Service, files_below, settings_in, until
from tests.support.torture import Tried, form
from tests.support.wire import say

KEY = "k3y-of-ada-0123456789abcdef"
OTHER = "k3y-of-eve-0123456789abcdef"
KEYS = f"ada: {KEY}, eve: {OTHER}"

Headers = list[tuple[bytes, bytes]]


def authorization(value: str | bytes) -> Headers:
    return [(b"Authorization", value if isinstance(value, bytes) else value.encode())]


def x_api_key(value: str | bytes) -> Headers:
    return [(b"X-API-Key", value if isinstance(value, bytes) else value.encode())]


WRONG_KEYS: dict[str, Headers] = {
    "nothing": [],
    "é in UTF-8": x_api_key("é"),
    "é in Latin-1": x_api_key(b"\xe9"),
    "a bearer of é": authorization("Bearer é"),
    "a key and é": x_api_key(KEY + "é"),
    "10 KB": x_api_key("x" * 10_000),
    "10 KB of keys": x_api_key(KEY * 400),
    "an empty key": x_api_key(""),
    "an empty header": authorization(""),
    "a bearer of nothing": authorization("Bearer "),
    "a bearer without a space": authorization(f"Bearer{KEY}"),
    "both headers": x_api_key(KEY) + authorization(f"Bearer {KEY}"),
    "the same header twice": x_api_key(KEY) * 2,
    "a bearer twice": authorization(f"Bearer {KEY}") * 2,
    "a right key and an empty one": x_api_key(KEY) + x_api_key(""),
    "a wrong key and a right one": x_api_key("x") + x_api_key(KEY),
    "a list of keys": x_api_key(f"{KEY}, {OTHER}"),
    "a bearer of two": authorization(f"Bearer {KEY} {OTHER}"),
    "all but its last letter": x_api_key(KEY[:-1]),
    "all but its first letter": x_api_key(KEY[1:]),
    "its first letter": x_api_key(KEY[0]),
    "one letter more": x_api_key(KEY + "x"),
    "in upper case": x_api_key(KEY.upper()),
    "a space inside": x_api_key(KEY[:5] + " " + KEY[5:]),
    "in quotes": x_api_key(f'"{KEY}"'),
    "percent-encoded": x_api_key(KEY.replace("-", "%2D")),
    "NUL behind it": x_api_key(KEY + "\0"),
    "NUL inside": x_api_key(KEY[:5] + "\0" + KEY[5:]),
    "its client's name": x_api_key("ada"),
    "its line of the file": x_api_key(f"ada: {KEY}"),
    "its hash": x_api_key("0" * 64),
    "as a user's password": authorization("Basic YWRhOms="),
    "as a token": authorization(f"Token {KEY}"),
    "without a scheme": authorization(KEY),
    "in another header": [(b"Api-Key", KEY.encode())],
    "in a cookie": [(b"Cookie", f"X-API-Key={KEY}".encode())],
}
RIGHT_KEYS = {
    "as a bearer": authorization(f"Bearer {KEY}"),
    "as a bearer in lower case": authorization(f"bearer {KEY}"),
    "as a bearer in upper case": authorization(f"BEARER {KEY}"),
    "as a bearer after spaces": authorization(f"Bearer   {KEY}"),
    "in its own header": x_api_key(KEY),
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    is_a_directory = tmp_path_factory.mktemp("keys")
    with served(is_a_directory, api_keys=KEYS, worker_concurrency=0) as client:
        yield client


@pytest.mark.parametrize("name", WRONG_KEYS)
def test_a_request_without_exactly_one_right_key_is_refused(client: TestClient, name: str) -> None:
    answer = client.post("/send-notification/ada@example.com", headers=WRONG_KEYS[name])
    problem_of(answer, 401)
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert KEY not in answer.text
    assert client.get("/tasks", headers=bearing(KEY)).json()["data"] == []


def test_a_key_in_the_query_is_refused(client: TestClient) -> None:
    for name in ("api_key", "X-API-Key", "key", "access_token"):
        problem_of(client.get(f"/tasks?{name}={KEY}"), 401)


@pytest.mark.parametrize("name", RIGHT_KEYS)
def test_the_right_key_is_accepted_in_each_of_its_forms(client: TestClient, name: str) -> None:
    assert client.get("/tasks", headers=RIGHT_KEYS[name]).status_code == 200


def test_report_the_number_of_wrong_keys(tried: Tried) -> None:
    tried(f"{len(WRONG_KEYS) + 4} requests without a right key", "all 401, 0 tasks")


# Comparison and storage of keys


def test_all_keys_are_compared_as_hashes_in_constant_time(
    monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    """Each request compares all keys, so its time reveals neither a place nor a part of a key."""
    compared: list[tuple[Any, Any]] = []

    def compare(one: Any, other: Any) -> bool:
        compared.append((one, other))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(keys_module, "hmac", type("", (), {"compare_digest": compare}))
    names = [f"client-{number}" for number in range(5)]
    keys = ApiKeys(",".join(f"{name}: key-of-{name}" for name in names), None)
    presented = [*(f"key-of-{name}" for name in names), "", "é", "key-of-client-0x", "x" * 10_000]
    for key in presented:
        compared.clear()
        found = keys.client_of(key.encode())
        assert found == (key.removeprefix("key-of-") if key in presented[:5] else None)
        assert len(compared) == len(names)
        assert all(
            isinstance(one, bytes) and len(one) == len(other) == 32 for one, other in compared
        )
    tried(f"{len(presented)} keys against 5", "5 comparisons of 32-byte digests each")


def test_no_key_is_in_the_log_the_database_or_the_responses(tmp_path: Path, tried: Tried) -> None:
    """This holds with the log level DEBUG, and for keys in each right and wrong form."""
    (tmp_path / "keys").write_text(f"eve: {OTHER}\n")
    settings: Json = {"api_keys": f"ada: {KEY}", "api_keys_file": tmp_path / "keys"}
    secret = (KEY, OTHER, "not-the-" + KEY)
    with Service(tmp_path / "service", log_level="DEBUG", **settings) as service:
        answers = []
        for headers in [*WRONG_KEYS.values(), *RIGHT_KEYS.values(), x_api_key(secret[2])]:
            head = b"".join(b"%b: %b\r\n" % header for header in headers)
            for target in (b"GET /tasks", b"POST /send-notification/a@example.com"):
                request = target + b" HTTP/1.1\r\nHost: localhost\r\n" + head
                answers.append(say(service.port, request + b"Connection: close\r\n\r\n").raw)
        task = service.post("/send-email/?email=a@example.com", headers=bearing(OTHER)).json()
        # wait_for adds no key to its requests, so the client needs the key as a default header.
        service.client.headers.update(bearing(OTHER))
        service.wait_for(task["id"])
        service.stop()
    files = [tmp_path / "service" / name for name in files_below(tmp_path / "service")]
    everything = [path.read_bytes() for path in files] + answers
    assert any(path.name == "queue.db" for path in files)
    assert '"level":"debug"' in service.log
    assert all(key.encode() not in content for key in secret for content in everything)
    tried(f"{len(answers)} requests at DEBUG", f"0 keys in {len(files)} files and the answers")


def test_no_key_is_in_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(ApiKeys, "_refresh", broken)
    with served(tmp_path, api_keys=KEYS) as client:
        problem_of(client.get("/tasks", headers=bearing(KEY)), 500)
    log = capfd.readouterr().err
    assert "ZeroDivisionError" in log
    assert KEY not in log


def test_no_key_is_in_the_repr_of_any_object_of_the_service(tmp_path: Path, tried: Tried) -> None:
    """The test looks at all objects that can be reached from the app."""
    (tmp_path / "keys").write_text(f"eve: {OTHER}\n")
    settings = settings_in(tmp_path, api_keys=f"ada: {KEY}", api_keys_file=tmp_path / "keys")
    app = create_app(settings)
    with TestClient(app) as client:
        assert client.get("/tasks", headers=bearing(KEY)).status_code == 200
        assert client.get("/tasks", headers=bearing(OTHER)).status_code == 200
        seen = [
            thing for thing in reachable_from([app, client.app_state]) if not isinstance(thing, str)
        ]
        assert any(thing is settings for thing in seen)
        assert any(isinstance(thing, ApiKeys) for thing in seen)
        shown = [text for thing in seen for text in (repr(thing), str(thing))]
    assert not [text for text in shown if KEY in text or OTHER in text]
    tried(f"repr and str of {len(seen)} objects", "0 keys")


def reachable_from(roots: list[Any]) -> list[Any]:
    """Return all objects that can be reached from these, but not the content of a SecretStr."""
    seen: dict[int, Any] = {}
    waiting = list(roots)
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type | type(gc)):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, SecretStr) or len(seen) > 20_000:
            continue
        if isinstance(thing, dict):
            waiting.extend(thing.values())
        elif isinstance(thing, list | tuple | set | frozenset):
            waiting.extend(thing)
        elif type(thing).__module__.startswith(("app", "fastapi", "starlette", "limits")):
            waiting.extend(vars(thing).values() if hasattr(thing, "__dict__") else [])
            waiting.extend(filter(None, [getattr(thing, "__closure__", None)]))
    return list(seen.values())


# Rotation


Write = Callable[[str], None]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("ada: old\n")
    return path


def overwrite(file: Path, text: str) -> None:
    file.write_text(text)


def replace(file: Path, text: str) -> None:
    file.with_suffix(".new").write_text(text)
    file.with_suffix(".new").replace(file)


@pytest.mark.parametrize("write", [overwrite, replace])
def test_an_added_key_and_a_removed_key_take_effect_at_once(
    tmp_path: Path, file: Path, write: Callable[[Path, str], None], tried: Tried
) -> None:
    """The client keeps its tasks."""
    with served(tmp_path, api_keys_file=file, worker_concurrency=0) as client:

        def let_in(key: str) -> bool:
            return client.get("/tasks", headers=bearing(key)).status_code == 200

        task = client.post("/items/7", headers=bearing("old")).json()
        for number in range(form(20, 500)):
            old, new = ("old", "new") if number % 2 == 0 else ("new", "old")
            assert not let_in(new)
            write(file, f"ada: {old} {new}\n")
            assert let_in(old)
            assert let_in(new)
            write(file, f"# one alone\nada: {new}\n")
            assert not let_in(old)
            assert let_in(new)
            path = f"/tasks/{task['id']}"
            assert client.get(path, headers=bearing(new)).json()["id"] == task["id"]
    tried(
        f"{form(20, 500)} changes of a key, {write.__name__}", "all in effect at the next request"
    )


def test_the_open_event_streams_of_a_removed_key_end(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a stolen key could be used for as long as the connection lasts."""
    monkeypatch.setattr(access, "KEY_CHECKED_SECONDS", 0.02)
    file.write_text("ada: old new\n")
    cookie = {"Cookie": f"{NAME}=old"}
    with (
        ThreadPoolExecutor(max_workers=7) as threads,  # a thread for each stream
        served(tmp_path, api_keys_file=file, worker_concurrency=0) as client,
    ):
        queued = client.post("/send-email/?email=a@example.com", headers=bearing("old"))
        paths = ("/events", f"{queued.headers['location']}/events", "/board/live")
        streams = [
            threads.submit(client.get, path, headers=headers)
            for path in paths
            for headers in (bearing("old"), cookie)
        ]
        kept = threads.submit(client.get, "/events", headers=bearing("new"))
        readers = client.app_state["event_stream"]._readers
        until(lambda: len(readers.get(("ada", None), ())) == 3, within=PATIENCE)
        time.sleep(0.1)  # longer than between two checks of the keys
        assert not any(stream.done() for stream in (*streams, kept))
        replace(file, "ada: new\n")  # at once, because an overwritten file is empty for a moment
        assert all(stream.result(5).status_code == 200 for stream in streams)
        assert not kept.done()


@pytest.fixture
def coarse_clock(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system whose time stamps do not change between two writes."""
    facts = file.stat()
    monkeypatch.setattr(Path, "stat", lambda _: facts)


def changes_missed(file: Path) -> int:
    """Return how many of 100 changes of the key are not noticed; all keys have the same length."""
    keys, missed = ApiKeys(None, file), 0
    for number in range(100):
        file.write_text(f"ada: {number:03}\n")
        missed += keys.client_of(b"%03d" % number) is None
    return missed


@pytest.mark.usefixtures("coarse_clock")
def test_a_second_write_within_the_same_time_stamp_takes_effect(file: Path, tried: Tried) -> None:
    assert changes_missed(file) == 0
    tried("100 writes within a time stamp", "all in effect at once")


def is_missing(file: Path) -> None:
    file.unlink()


def has_no_keys(file: Path) -> None:
    file.write_text("ada: new, two words: new2\n")


def is_not_text(file: Path) -> None:
    file.write_bytes(b"ada: n\xffw\n")


def has_the_same_key_twice(file: Path) -> None:
    file.write_text("ada: new\neve: new\n")


def is_a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    "spoil", [is_missing, has_no_keys, is_not_text, has_the_same_key_twice, is_a_directory]
)
def test_a_broken_file_of_keys_changes_nothing_and_is_logged_once(
    file: Path, spoil: Callable[[Path], None]
) -> None:
    keys = ApiKeys(None, file)
    with capture_logs() as lines:
        spoil(file)
        for _ in range(50):
            assert keys.client_of(b"old") == "ada"
            assert keys.client_of(b"new") is None
    (line,) = lines
    assert line["log_level"] == "error"
    assert "new" not in str(line)


def test_each_broken_version_of_the_file_is_logged_and_a_good_one_takes_effect(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "RACY_SECONDS", 0.0)
    keys = ApiKeys(None, file)
    with capture_logs() as lines:
        for bad in ("a b\n", "c d e\n"):
            file.write_text(bad)
            for _ in range(3):
                assert keys.client_of(b"old") == "ada"
        file.write_text("ada: newer\n")
        assert keys.client_of(b"newer") == "ada"
        assert keys.client_of(b"old") is None
    assert len(lines) == 2


def test_a_file_that_cannot_be_read_for_a_moment_is_read_later(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process may be out of file descriptors. A revoked key must not work on after that."""
    monkeypatch.setattr(keys_module, "RACY_SECONDS", 0.0)
    keys = ApiKeys(None, file)
    replace(file, "ada: new\n")

    def refuse(_: Path) -> bytes:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert keys.client_of(b"old") == "ada"
    assert keys.client_of(b"old") is None
    assert keys.client_of(b"new") == "ada"


def test_an_emptied_file_of_keys_refuses_all_requests(tmp_path: Path, file: Path) -> None:
    with served(tmp_path, api_keys_file=file) as client:
        for text in ("", "\n\n", "# ada: old\n"):
            file.write_text(text)
            problem_of(client.get("/tasks", headers=bearing("old")), 401)
            problem_of(client.get("/tasks"), 401)


# The syntax of keys


@pytest.mark.parametrize(
    ("text", "clients"),
    [
        ("ada: one", {"one": "ada"}),
        (" ada:  one  two ", {"one": "ada", "two": "ada"}),
        ("ada: one\neve: two\n", {"one": "ada", "two": "eve"}),
        ("ada: one, eve: two,", {"one": "ada", "two": "eve"}),
        ("ada: one\n# eve: two\nada: three", {"one": "ada", "three": "ada"}),
        ("ada: one:two=/+~", {"one:two=/+~": "ada"}),
    ],
)
def test_keys_are_parsed_with_their_clients(text: str, clients: dict[str, str]) -> None:
    keys = ApiKeys(text, None)
    assert {key: keys.client_of(key.encode()) for key in clients} == clients
    assert keys.client_of(b"ada") is keys.client_of(b"ada:") is keys.client_of(b"#") is None


def test_a_key_without_a_name_is_a_separate_client() -> None:
    keys = ApiKeys("one,two\nthree", None)
    clients = {keys.client_of(key) for key in (b"one", b"two", b"three")}
    assert len(clients) == 3
    assert not any(key in str(clients) for key in ("one", "two", "three"))


def test_keys_from_the_variable_and_from_the_file_are_accepted(file: Path) -> None:
    keys = ApiKeys("eve: one", file)
    assert [keys.client_of(key) for key in (b"one", b"old")] == ["eve", "ada"]
    file.write_text("")
    assert [keys.client_of(key) for key in (b"one", b"old")] == ["eve", None]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "there is no key in it"),
        (" , \n# ada: one", "there is no key in it"),
        ("ada:", "must be KEY, or NAME: KEY KEY"),  # otherwise `ada:` would be a valid key
        ("ada: one, eve: ", "must be KEY, or NAME: KEY KEY"),
        ("one two", "must be KEY, or NAME: KEY KEY"),
        ("ada lovelace: one", "must be KEY, or NAME: KEY KEY"),
        ("one # the first", "must be KEY, or NAME: KEY KEY"),  # otherwise `first` would be a key
        ("ada: one # laptop", "must be KEY, or NAME: KEY KEY"),
        ("ada: eve: one", "must be KEY, or NAME: KEY KEY"),
        ("ada: öne", "must be KEY, or NAME: KEY KEY"),
        ("ada: one\x00", "must be KEY, or NAME: KEY KEY"),
        ("ada:\tone", "must be KEY, or NAME: KEY KEY"),
        ("ädä: one", "must be KEY, or NAME: KEY KEY"),
        ("x" * 65 + ": one", "must be KEY, or NAME: KEY KEY"),
        ("ada: one, eve: one", "two clients have the same key"),
        ("ada: one, one", "two clients have the same key"),
    ],
)
def test_text_that_could_become_a_key_by_mistake_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(BadKeys) as bad:
        ApiKeys(text, None)
    assert str(bad.value).startswith(f"API_KEYS: {complaint}")


def test_a_file_without_keys_prevents_the_start(tmp_path: Path) -> None:
    (tmp_path / "keys").touch()
    with pytest.raises(BadKeys, match="API_KEYS_FILE: there is no key"):
        ApiKeys(None, tmp_path / "keys")
    with pytest.raises(BadKeys, match="API_KEYS_FILE: cannot be read: No such file"):
        ApiKeys(None, tmp_path / "nowhere")


# Negative controls: the code of tutorials


@pytest.fixture
def naive() -> Iterator[TestClient]:
    """A service with the comparison of FastAPI's documentation, but without encoding to bytes."""
    app = FastAPI()

    @app.get("/tasks")
    async def tasks(x_api_key: Annotated[str, Header()]) -> None:
        if not secrets.compare_digest(x_api_key, KEY):
            raise HTTPException(401)

    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def test_control_keys_compared_as_text_cause_server_errors(naive: TestClient, tried: Tried) -> None:
    assert naive.get("/tasks", headers=x_api_key(KEY)).status_code == 200
    failed = [
        name for name in WRONG_KEYS if naive.get("/tasks", headers=WRONG_KEYS[name]).is_server_error
    ]
    assert "é in UTF-8" in failed
    tried("secrets.compare_digest on text", f"500 for {len(failed)} of {len(WRONG_KEYS)}")


@pytest.mark.usefixtures("coarse_clock")
def test_control_a_file_that_is_read_once_for_each_time_stamp_misses_changes(
    file: Path, tried: Tried, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "RACY_SECONDS", 0.0)
    missed = changes_missed(file)
    assert missed > 90
    tried(
        "100 writes within a time stamp, a file read only if its time changed", f"{missed} missed"
    )
