"""Signing in with an API key: the cookie, the forms that it protects, and the redirects."""

import re
from http.cookies import SimpleCookie
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from app.board.sign_in import own_page
from tests.api.requests import problem_of
from tests.support.gate import bearing, served
from tests.support.pages import BROWSER, HOSTILE, Page

KEYS = "ada: k1;=%+key other, eve: k2"
ADA, EVE = "k1;=%+key", "k2"
SIGN_IN = "/board/sign-in"
SEND = {"recipient": "ada@example.com", "subject": "Hello", "message": "It is done."}


def sign_in(client: TestClient, key: str, next_page: str = "/", **headers: str) -> str:
    """Sign in, and return the address of the page that follows."""
    client.headers.update(BROWSER)
    response = client.post(SIGN_IN, data={"key": key, "next": next_page}, headers=headers)
    assert response.status_code == 303
    return response.headers["location"]


def test_a_browser_without_a_key_is_sent_to_the_sign_in_and_back(tmp_path: Path) -> None:
    with served(tmp_path, api_keys=KEYS) as client:
        response = client.get("/board/uploads?after=x", headers=BROWSER)
        assert response.status_code == 303
        assert response.headers["location"] == f"{SIGN_IN}?next=%2Fboard%2Fuploads%3Fafter%3Dx"
        page = Page(client.get(response.headers["location"], headers=BROWSER).text)
        next_page = page.find("input", name="next").attributes["value"]
        assert sign_in(client, ADA, next_page) == "/board/uploads?after=x"
        assert client.get("/board/uploads").status_code == 200


def test_a_program_without_a_key_still_gets_401(tmp_path: Path) -> None:
    with served(tmp_path, api_keys=KEYS) as client:
        for path in ("/", "/board/workers", "/inbox", "/board/live", "/tasks"):
            assert "www-authenticate" in client.get(path).headers
            problem_of(client.get(path), 401)
        problem_of(client.get("/tasks", headers=BROWSER), 401)


def test_the_cookie_is_hidden_from_scripts_and_from_other_sites(tmp_path: Path) -> None:
    with served(tmp_path, api_keys=KEYS, root_path="/afterward") as client:
        client.headers.update(BROWSER)
        for origin, secure in (("http://testserver", False), ("https://testserver", True)):
            response = client.post(SIGN_IN, data={"key": ADA}, headers={"Origin": origin})
            (cookie,) = SimpleCookie(response.headers["set-cookie"]).values()
            assert cookie["httponly"]
            assert cookie["samesite"] == "strict"
            assert cookie["path"] == "/afterward"
            assert bool(cookie["secure"]) == secure
            assert not cookie["max-age"]
            assert ADA not in response.headers["set-cookie"]


def test_the_cookie_is_a_key_for_the_whole_service(tmp_path: Path) -> None:
    with served(tmp_path, api_keys=KEYS) as client:
        sign_in(client, ADA)
        queued = client.post("/send-notification/ada@example.com")
        assert queued.status_code == 202
        assert "Cookie" in queued.headers["vary"]
        assert client.get(f"/tasks/{queued.json()['id']}").status_code == 200
        assert "ada" in Page(client.get("/").text).text_of("bdi", class_="who")


def test_a_key_in_a_header_counts_rather_than_the_cookie(tmp_path: Path) -> None:
    with served(tmp_path, api_keys=KEYS) as client:
        task = client.post("/send-notification/ada@example.com", headers=bearing(EVE)).json()
        sign_in(client, ADA)
        assert client.get(f"/tasks/{task['id']}").status_code == 404
        assert client.get(f"/tasks/{task['id']}", headers=bearing(EVE)).status_code == 200


@pytest.mark.parametrize("key", ["", "k1", "K2", HOSTILE, "k2\r\nSet-Cookie: a=b", "x" * 10_000])
def test_a_wrong_key_leads_to_the_form_again(tmp_path: Path, key: str) -> None:
    with served(tmp_path, api_keys=KEYS) as client:
        response = client.post(
            SIGN_IN, data={"key": key, "next": "/board/uploads"}, headers=BROWSER
        )
        page = Page(response.text)
        assert response.status_code == 403
        assert "set-cookie" not in response.headers
        assert page.text_of("span", role="alert") == "This key is not valid."
        assert page.find("input", name="next").attributes["value"] == "/board/uploads"
        assert "value" not in page.find("input", name="key").attributes


def test_after_the_sign_out_the_cookie_is_gone(tmp_path: Path) -> None:
    with served(tmp_path, api_keys=KEYS) as client:
        sign_in(client, ADA)
        response = client.post("/board/sign-out")
        assert response.status_code == 303
        assert response.headers["location"] == SIGN_IN
        assert not client.cookies
        assert client.get("/").headers["location"] == f"{SIGN_IN}?next=%2F"


def test_a_key_that_was_revoked_leads_to_the_sign_in(tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("ada: k1\n")
    with served(tmp_path, api_keys_file=keys) as client:
        sign_in(client, "k1")
        assert client.get("/").status_code == 200
        keys.write_text("ada: new\n")
        assert client.get("/").headers["location"].startswith(SIGN_IN)
        assert client.post("/board/send", data=SEND).headers["location"] == SIGN_IN


def test_a_service_without_keys_needs_no_sign_in(browser: TestClient) -> None:
    assert browser.get(SIGN_IN).headers["location"] == "/"
    assert browser.post(SIGN_IN, data={"key": "k"}).headers["location"] == "/"


@pytest.mark.parametrize(
    ("address", "followed"),
    [
        ("/", True),
        ("/?a=b", True),
        ("/board/tasks?status=failed", True),
        ("/inbox", True),
        ("/inbox/abc", True),
        ("https://evil.example/", False),
        ("//evil.example/board/", False),
        ("/\\evil.example", False),
        ("/boardwalk", False),
        ("/board/../tasks", False),
        ("/board/a/..", False),
        ("/board/.%2E/tasks", False),
        ("/inbox/%2e%2E?a=b", False),
        ("/board/..\\tasks", False),
        ("/board/..//evil.example", False),
        ("/inbox/by-message-id/a..b@example.com", True),
        ("/board/tasks?about=/../", True),
        ("/tasks", False),
        ("/board/\nSet-Cookie: a=b", False),
        ("/board/\u20ac", False),
        ("javascript:alert(1)", False),
        ("", False),
    ],
)
def test_only_a_page_of_the_service_follows_the_sign_in(address: str, *, followed: bool) -> None:
    assert own_page(address) == (address if followed else "/")


PARTS = st.sampled_from(["board", "inbox", "tasks", "", ".", "..", "%2E.", "%2e", "\\..", "?a=b"])


@settings(max_examples=100, deadline=None)
@given(st.lists(PARTS, max_size=5).map("/".join).map("/board/{}".format) | st.text(max_size=20))
def test_no_address_leads_a_browser_from_the_sign_in_to_another_path(address: str) -> None:
    seen = re.sub("%2e", ".", own_page(address).replace("\\", "/"), flags=re.IGNORECASE)
    followed = urlsplit(urljoin("http://here/board/sign-in", seen))
    assert followed.netloc == "here"
    assert re.match("/(board|inbox|$)", followed.path)


# Forms of other sites

FROM = {
    "another site": {"Sec-Fetch-Site": "cross-site"},
    "another port": {"Sec-Fetch-Site": "same-site"},
    "another site, whatever its Origin": {
        "Sec-Fetch-Site": "cross-site",
        "Origin": "http://testserver",
    },
    "an old browser on another site": {"Origin": "http://evil.example"},
    "a sandboxed page": {"Origin": "null"},
    "no one can tell": {},
}


@pytest.mark.parametrize("headers", FROM.values(), ids=FROM)
def test_a_request_of_another_site_changes_nothing(tmp_path: Path, headers: dict[str, str]) -> None:
    with served(tmp_path, api_keys=KEYS) as client:
        sign_in(client, ADA)
        del client.headers["Sec-Fetch-Site"]
        for method, path in [
            ("POST", "/board/send"),
            ("POST", "/board/sign-out"),
            ("POST", SIGN_IN),
            ("POST", "/send-notification/ada@example.com"),
            ("DELETE", "/inbox"),
            ("DELETE", "/uploads/x"),
        ]:
            response = client.request(method, path, data=SEND, headers=headers)
            assert response.status_code == 403, path
        assert client.get("/tasks").json()["data"] == []


@pytest.mark.parametrize("headers", FROM.values(), ids=FROM)
def test_without_keys_a_form_of_another_site_is_refused(
    browser: TestClient, headers: dict[str, str]
) -> None:
    del browser.headers["Sec-Fetch-Site"]
    for path in ("/board/send", "/board/uploads", "/board/uploads/x/delete"):
        response = browser.post(path, data=SEND, headers=headers)
        assert response.status_code == 403
        assert Page(response.text).text_of("h1") == "Forbidden"


@pytest.mark.parametrize(
    "headers",
    [{"Sec-Fetch-Site": "same-origin"}, {"Origin": "http://testserver"}],
    ids=["same-origin", "an old browser"],
)
def test_a_form_of_the_service_itself_is_accepted(tmp_path: Path, headers: dict[str, str]) -> None:
    with served(tmp_path, api_keys=KEYS, worker_concurrency=0) as client:
        sign_in(client, ADA)
        del client.headers["Sec-Fetch-Site"]
        response = client.post("/board/send", data=SEND, headers=headers)
        assert response.headers["location"].startswith("/board/tasks/")


def test_a_program_with_a_key_in_a_header_may_send_forms(tmp_path: Path) -> None:
    with served(tmp_path, api_keys=KEYS, worker_concurrency=0) as client:
        response = client.post("/board/send", data=SEND, headers=bearing(EVE))
        assert response.headers["location"].startswith("/board/tasks/")


def test_sign_ins_are_limited_by_the_rate(tmp_path: Path) -> None:
    with served(tmp_path, api_keys=KEYS, rate_limit="3/day") as client:
        client.headers.update(BROWSER)
        statuses = [client.post(SIGN_IN, data={"key": "x"}).status_code for _ in range(4)]
        assert statuses == [403, 403, 403, 429]


def test_clients_without_a_key_can_send_no_large_body(tmp_path: Path) -> None:
    """The service would hold it in memory, however many such clients there are."""
    with served(tmp_path, api_keys=KEYS) as client:
        client.headers.update(BROWSER)
        assert client.post(SIGN_IN, data={"key": "x" * 30_000}).status_code == 403
        assert client.post(SIGN_IN, data={"key": "x" * 33_000}).status_code == 413
        without_length = (b"key=" + b"x" * 11_000 for _ in range(3))
        assert client.post(SIGN_IN, content=without_length).status_code == 413


def test_no_key_is_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with served(tmp_path, api_keys=KEYS) as client:
        sign_in(client, ADA)
        client.get("/")
        client.post(SIGN_IN, data={"key": "a-wrong-key"})
    log = "".join(capfd.readouterr())
    assert '"event":"signed in"' in log
    assert "k1" not in log
    assert "a-wrong-key" not in log
