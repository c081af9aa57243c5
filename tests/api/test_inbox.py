"""The inbox: it shows every mail that the catcher received, as JSON and as pages."""

import os
import re
import smtplib
from collections.abc import Iterator
from contextlib import contextmanager
from email import policy
from email.message import EmailMessage
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from app.board.inbox import LONGEST_TEXT
from app.main import create_app
from tests.api.requests import problem_of
from tests.support.gate import bearing
from tests.support.measures import Peak
from tests.support.service import PATIENCE, Service, settings_in, wait_for

MB = 1_000_000
HTML = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
FORM = {"Sec-Fetch-Site": "same-origin"} | HTML
NO_ID = "1735815845000000000-0123abcd"
HOSTILE = "<script>alert(1)</script>"

Json = dict[str, Any]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A client of one service for all tests."""
    settings = settings_in(tmp_path_factory.mktemp("service"))
    with TestClient(create_app(settings), follow_redirects=False) as client:
        yield client


@pytest.fixture
def client(running: TestClient) -> TestClient:
    """A client of the service with an empty inbox."""
    assert running.delete("/inbox").status_code == 204
    return running


@pytest.fixture
def directory(client: TestClient) -> Path:
    """The directory with the files of the mails."""
    return Path(client.app_state["settings"].catcher_directory)


def deliver(port: int, mail: bytes, recipient: bytes = b"<ada@example.com>") -> None:
    """Send a mail to the catcher; the mail and the recipient can be any bytes."""
    with smtplib.SMTP("127.0.0.1", port, timeout=PATIENCE) as smtp:
        smtp.ehlo()
        smtp.mail("bob@example.com")
        assert smtp.sock is not None
        smtp.sock.sendall(b"RCPT TO:" + recipient + b"\r\n")
        assert smtp.getreply()[0] == 250
        assert smtp.data(mail)[0] == 250


def caught(
    client: TestClient, mail: bytes | EmailMessage, recipient: str = "ada@example.com"
) -> str:
    """Send a mail to the catcher, and return its id."""
    raw = mail if isinstance(mail, bytes) else mail.as_bytes(policy=policy.SMTP)
    deliver(client.app_state["settings"].smtp_port, raw, f"<{recipient}>".encode())
    return str(client.get("/inbox").json()["data"][0]["id"])


def mail_with(*attachments: tuple[str, str, bytes], html: str | None = None) -> EmailMessage:
    """Make a mail with attachments of this name, media type and content."""
    mail = EmailMessage()
    mail["Subject"] = "Hello"
    mail.set_content("Dear Ada")
    if html is not None:
        mail.add_alternative(html, subtype="html")
    for name, media_type, content in attachments:
        mail.add_attachment(content, *media_type.split("/"), filename=name)
    return mail


def page_of(client: httpx2.Client, path: str, status: int = 200) -> str:
    """Return the page that a browser gets."""
    response = client.get(path, headers=HTML)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "'unsafe-inline'" not in response.headers["content-security-policy"]
    assert "<style" not in response.text
    return response.text


# JSON


def test_the_list_has_the_fields_of_each_mail(client: TestClient) -> None:
    assert client.get("/inbox").json() == {"data": [], "has_more": False}
    mail = mail_with(("a.pdf", "application/pdf", b"pdf"))
    mail_id = caught(client, mail)
    (listed,) = client.get("/inbox").json()["data"]
    assert listed.pop("received_at").endswith("Z")
    assert listed.pop("size") > 100
    assert listed == {
        "id": mail_id,
        "from": "bob@example.com",
        "to": ["ada@example.com"],
        "subject": "Hello",
        "attachments": 1,
    }


def test_one_mail_has_its_texts_header_fields_and_attachments(client: TestClient) -> None:
    mail = mail_with(("a.pdf", "application/pdf", b"pdf" * 100), html="<p>Dear Ada</p>")
    mail_id = caught(client, mail)
    (listed,) = client.get("/inbox").json()["data"]
    read = client.get(f"/inbox/{mail_id}").json()
    assert read["text"] == "Dear Ada\n"
    assert read["html"] == "<p>Dear Ada</p>\n"
    assert ["Subject", "Hello"] in read["headers"]
    attachment = {"filename": "a.pdf", "content_type": "application/pdf", "size": 300}
    assert read["attachments"] == [attachment]
    for name in listed.keys() - {"attachments"}:
        assert read[name] == listed[name]


def test_the_list_has_pages(client: TestClient) -> None:
    ids = [caught(client, b"Subject: %d\r\n\r\nx" % number) for number in range(5)]
    first = client.get("/inbox", params={"limit": 2}).json()
    assert [mail["subject"] for mail in first["data"]] == ["4", "3"]
    assert first["has_more"]
    # The mail at the end of a page may be gone when the next page is asked for.
    client.delete(f"/inbox/{ids[3]}")
    second = client.get("/inbox", params={"limit": 3, "after": ids[3]}).json()
    assert [mail["subject"] for mail in second["data"]] == ["2", "1", "0"]
    assert not second["has_more"]
    assert client.get("/inbox", params={"after": ids[0]}).json()["data"] == []


def test_the_list_is_searched_for_words(client: TestClient) -> None:
    caught(client, "Subject: Été in Paris\r\n\r\nrain".encode())
    caught(client, b"Subject: Winter\r\n\r\nrain", "grace@example.org")
    for search, subjects in (
        ("ÉTÉ", ["Été in Paris"]),
        ("  paris   ADA@ ", ["Été in Paris"]),
        ("bob@example.com", ["Winter", "Été in Paris"]),
        ("winter paris", []),
        ("rain", []),
        ("", ["Winter", "Été in Paris"]),
    ):
        found = client.get("/inbox", params={"q": search}).json()["data"]
        assert [mail["subject"] for mail in found] == subjects
    page = client.get("/inbox", params={"q": "in", "limit": 1}).json()
    assert (len(page["data"]), page["has_more"]) == (1, True)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("limit=0", "Input should be greater than or equal to 1"),
        ("limit=101", "Input should be less than or equal to 100"),
        ("limit=x", "Input should be a valid integer"),
        ("after=x", "Must be the id of a mail"),
        ("after=", "Must be the id of a mail"),
        (f"after={NO_ID}%0a", "Must be the id of a mail"),
        ("q=%00", "Must not contain a NUL character"),
        ("q=" + "x" * 201, "Must have at most 200 characters"),
    ],
)
def test_a_query_that_cannot_be_read_is_refused(
    client: TestClient, query: str, message: str
) -> None:
    name = query.partition("=")[0]
    problem = problem_of(client.get(f"/inbox?{query}"), 422)
    assert [error["pointer"] for error in problem["errors"]] == [f"/{name}"]
    page = page_of(client, f"/inbox?{query}&q=typed" if name != "q" else f"/inbox?{query}", 422)
    assert f"<b>{name}</b>: {message}" in page
    assert "data-live" not in page, "loaded again, it is refused again"
    assert ('value="typed"' in page) == (name != "q")


@pytest.mark.parametrize(
    ("accept", "gets_page"),
    [
        (HTML["Accept"], True),
        ("text/html", True),
        ("TEXT/HTML;charset=utf-8 , */*;q=0.1", True),
        ("text/*", True),
        ("application/json;q=0.5, text/html;q=0.6", True),
        ("application/json", False),
        ("*/*", False),
        ("", False),
        ("text/html, application/json", False),
        ("text/html;q=0, */*", False),
        ("text/html;q=0.5, application/*;q=0.9", False),
        ("text/html;q=2, application/json;q=1", False),
        ("image/png", False),
        (";;q=,,", False),
    ],
)
def test_a_client_that_prefers_html_gets_a_page_and_every_other_client_json(
    client: TestClient, accept: str, gets_page: bool
) -> None:
    mail_id = caught(client, b"Subject: x\r\n\r\nhi")
    for path, status in (("/inbox", 200), ("/inbox/", 200), (f"/inbox/{mail_id}", 200)):
        response = client.get(path, headers={"Accept": accept})
        assert response.status_code == status
        kind = "text/html; charset=utf-8" if gets_page else "application/json"
        assert response.headers["content-type"] == kind
        assert "Accept" in response.headers["vary"]
    missing = client.get(f"/inbox/{NO_ID}", headers={"Accept": accept})
    assert missing.status_code == 404
    kind = "text/html; charset=utf-8" if gets_page else "application/problem+json"
    assert missing.headers["content-type"] == kind
    assert "Accept" in missing.headers["vary"]


def test_a_client_without_the_header_gets_json(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(client.headers, "accept")
    assert client.get("/inbox").headers["content-type"] == "application/json"


def test_the_source_is_downloaded_byte_for_byte(client: TestClient) -> None:
    raw = b"Subject: <b>x</b>\r\n\r\n" + bytes(range(1, 256)).replace(b"\n", b"").replace(
        b"\r", b""
    )
    mail_id = caught(client, raw + b"\r\n")
    response = client.get(f"/inbox/{mail_id}/source", headers=HTML)
    assert response.content == raw + b"\r\n"
    assert response.headers["content-length"] == str(len(raw) + 2)
    assert response.headers["content-type"] == "message/rfc822"
    assert_only_saved(response, f"{mail_id}.eml")


def assert_only_saved(response: httpx2.Response, filename: str) -> None:
    """Check that a browser saves this response under this name, and shows nothing of it."""
    disposition = response.headers["content-disposition"]
    assert disposition.startswith("attachment; ")
    assert disposition.endswith(f"; filename*=UTF-8''{quote(filename, safe='')}")
    assert response.headers["content-security-policy"] == "sandbox"
    assert response.headers["x-content-type-options"] == "nosniff"


def test_one_mail_or_all_mails_are_deleted(client: TestClient) -> None:
    first, second, _ = (caught(client, b"Subject: %d\r\n\r\nx" % n) for n in range(3))
    deleted = client.delete(f"/inbox/{second}", headers=HTML)
    assert (deleted.status_code, deleted.content) == (204, b"")
    problem_of(client.delete(f"/inbox/{second}"), 404)
    problem_of(client.get(f"/inbox/{second}"), 404)
    assert client.get(f"/inbox/{first}").status_code == 200
    for _ in range(2):
        deleted = client.delete("/inbox")
        assert (deleted.status_code, deleted.content) == (204, b"")
        assert client.get("/inbox").json()["data"] == []


def test_a_mail_that_cannot_be_deleted_is_an_error_with_its_reason_in_the_log(
    client: TestClient, directory: Path
) -> None:
    (directory / f"{NO_ID}.eml").mkdir()
    for path in ("/inbox", f"/inbox/{NO_ID}"):
        with capture_logs() as lines:
            problem_of(client.delete(path), 503)
        assert "mail not deleted" in [line["event"] for line in lines]
    problem_of(client.get(f"/inbox/{NO_ID}/source"), 404)
    assert client.get("/inbox").json()["data"][0]["subject"] == "(cannot be read: Is a directory)"
    (directory / f"{NO_ID}.eml").rmdir()


def test_the_document_has_the_json_of_the_inbox(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    inbox = {path: set(methods) for path, methods in paths.items() if path.startswith("/inbox")}
    assert inbox == {
        "/inbox": {"get", "delete"},
        "/inbox/{mail_id}": {"get", "delete"},
        "/inbox/{mail_id}/source": {"get"},
        "/inbox/{mail_id}/attachments/{number}": {"get"},
    }
    assert list(paths["/inbox"]["get"]["responses"]["200"]["content"]) == ["application/json"]


def test_the_inbox_needs_a_key_and_all_clients_share_it(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, api_keys="ada: key-of-ada, eve: key-of-eve")
    with TestClient(create_app(settings), follow_redirects=False) as client:
        task = client.post(
            "/send-notification/ada@example.com", headers=bearing("key-of-ada")
        ).json()
        client.headers.update(bearing("key-of-eve"))
        wait_for_mail(client)
        for path in ("/inbox", "/inbox/x", "/inbox/x/source", f"/inbox/by-message-id/{task['id']}"):
            problem_of(client.get(path, headers={"Authorization": ""}), 401)
        problem_of(client.delete("/inbox", headers={"Authorization": ""}), 401)


def wait_for_mail(client: TestClient) -> Json:
    """Wait for a mail in the inbox, and return it."""
    deadline = PATIENCE * 100
    for _ in range(int(deadline)):
        if mails := client.get("/inbox").json()["data"]:
            return dict(mails[0])
    raise AssertionError("no mail")


def test_without_the_catcher_every_route_says_that_it_is_off(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, catcher=False, worker_concurrency=0)
    with TestClient(create_app(settings)) as client:
        for method, path in (
            ("GET", "/inbox"),
            ("GET", "/inbox/x"),
            ("GET", "/inbox/x/source"),
            ("GET", "/inbox/x/attachments/0"),
            ("GET", "/inbox/by-message-id/x"),
            ("DELETE", "/inbox"),
            ("DELETE", "/inbox/x"),
        ):
            assert "catcher is off" in problem_of(client.request(method, path), 404)["detail"]
        for path in ("/inbox", "/inbox/", "/inbox/x", "/inbox/x/html"):
            assert "catcher is off" in page_of(client, path, 404)
        for path in ("/inbox/delete", "/inbox/x/delete"):
            assert client.post(path, headers=FORM).status_code == 404


# Attachments

NAMES = {
    "../../etc/passwd": "passwd",
    "C:\\a\\b.txt": "b.txt",
    "na\u00efve.txt": "na\u00efve.txt",
    "a\u202egpj.exe": "attachment-1.png",
    "\u2066a\u2069": "attachment-1.png",
    "..": "attachment-1.png",
    "": "attachment-1.png",
    "x" * 300: "attachment-1.png",
    '<b>"': '<b>"',
}


@pytest.mark.parametrize(("given", "shown"), NAMES.items(), ids=map(repr, NAMES))
def test_an_attachment_is_saved_under_a_safe_name(
    client: TestClient, given: str, shown: str
) -> None:
    mail_id = caught(client, mail_with((given, "image/png", b"\x89PNG")))
    (attachment,) = client.get(f"/inbox/{mail_id}").json()["attachments"]
    assert attachment == {"filename": shown, "content_type": "image/png", "size": 4}
    response = client.get(f"/inbox/{mail_id}/attachments/0", headers=HTML)
    assert response.content == b"\x89PNG"
    assert response.headers["content-length"] == "4"
    assert response.headers["content-type"] == "image/png"
    assert_only_saved(response, shown)
    page = page_of(client, f"/inbox/{mail_id}?view=attachments")
    assert f"<bdi>{shown}</bdi>" in page.replace("&lt;", "<").replace("&gt;", ">").replace(
        "&#34;", '"'
    )
    for number in ("1", "-1", "x", "1" * 30):
        problem_of(client.get(f"/inbox/{mail_id}/attachments/{number}"), 404, 422)


def test_controls_in_the_name_of_an_attachment_are_left_out(client: TestClient) -> None:
    raw = b"Content-Disposition: attachment; filename*=UTF-8''a%0D%0AX:%20y%00.txt\r\n\r\nhi"
    mail_id = caught(client, b"Content-Type: image/png\r\n" + raw)
    assert client.get(f"/inbox/{mail_id}").json()["attachments"][0]["filename"] == "aX: y.txt"
    assert "x" not in client.get(f"/inbox/{mail_id}/attachments/0").headers


def test_html_and_mails_that_are_attached_are_saved_and_never_shown(client: TestClient) -> None:
    mail = mail_with(
        ("a.html", "text/html", HOSTILE.encode()), ("b.svg", "image/svg+xml", b"<svg>")
    )
    mail.add_attachment(mail_with(html=HOSTILE))
    mail_id = caught(client, mail)
    read = client.get(f"/inbox/{mail_id}").json()
    assert read["html"] is None
    assert [one["filename"] for one in read["attachments"]] == [
        "a.html",
        "b.svg",
        "attachment-3.eml",
    ]
    for number, attachment in enumerate(read["attachments"]):
        response = client.get(f"/inbox/{mail_id}/attachments/{number}", headers=HTML)
        assert response.headers["content-type"] == attachment["content_type"]
        assert len(response.content) == attachment["size"]
        assert_only_saved(response, attachment["filename"])


# Pages


def test_the_list_is_a_page_with_a_search(client: TestClient) -> None:
    for number in range(3):
        caught(client, mail_with(("a", "image/png", b"x")))
        caught(client, b"Subject: number %d\r\n\r\nx" % number)
    page = page_of(client, "/inbox?limit=2")
    assert "6 mails" in page
    assert [">Hello<" in page, ">number 2<" in page, ">number 1<" in page] == [True, True, False]
    (older,) = re.findall(r'<a rel="next" href="([^"]+)"', page)
    second = page_of(client, unescape(older))
    assert ">number 1<" in second
    assert '<a href="/inbox?limit=2">Newest</a>' in second
    assert "Delete all" not in second
    found = page_of(client, "/inbox?q=NUMBER")
    assert 'value="NUMBER"' in found
    assert (found.count('<th scope="row"'), ">Hello<" in found) == (3, False)
    assert "No mail has all of these words" in page_of(client, "/inbox?q=nothing")


def test_a_page_beyond_the_end_says_so(client: TestClient) -> None:
    mail_id = caught(client, b"Subject: x\r\n\r\nhi")
    assert "data-live" in page_of(client, "/inbox")
    page = page_of(client, f"/inbox?after={mail_id}", 404)
    assert "no older mails" in page
    assert "data-live" not in page
    assert "No older mail has" in page_of(client, f"/inbox?after={mail_id}&q=x", 404)


def test_an_empty_inbox_says_how_to_fill_it(client: TestClient) -> None:
    page = page_of(client, "/inbox")
    assert "/send-notification/" in page
    assert "refuse+550@example.com" in page


def test_a_mail_to_many_recipients_names_some_of_them_in_the_list(client: TestClient) -> None:
    with smtplib.SMTP("127.0.0.1", client.app_state["settings"].smtp_port) as smtp:
        recipients = [f"{number}@example.com" for number in range(100)]
        smtp.sendmail("", recipients, b"Subject: x\r\n\r\nhi")
    page = page_of(client, "/inbox")
    assert "2@example.com" in page
    assert "and 97 more" in page
    assert "99@example.com" in page_of(client, f"/inbox/{mail_id_in(page)}")


def mail_id_in(page: str) -> str:
    return str(re.findall(r'href="/inbox/([0-9a-f-]+)"', page)[0])


def test_a_mail_has_a_page_for_each_of_its_views(client: TestClient) -> None:
    mail_id = caught(client, mail_with(("a.pdf", "application/pdf", b"pdf"), html="<p>Hi</p>"))
    views = {
        view: page_of(client, f"/inbox/{mail_id}?view={view}")
        for view in ("html", "text", "headers", "attachments", "no-such")
    }
    frame = f'<iframe class="mail" sandbox src="/inbox/{mail_id}/html"'
    assert [view for view, page in views.items() if frame in page] == ["html", "no-such"]
    assert '<pre class="mail">Dear Ada' in views["text"]
    assert "<bdi>MIME-Version</bdi>" in views["headers"]
    assert (
        f'<a href="/inbox/{mail_id}/attachments/0" download><bdi>a.pdf</bdi></a>'
        in views["attachments"]
    )
    for view in ("html", "text", "headers", "attachments"):
        assert f'?view={view}" aria-current="page"' in views[view]
        assert "Attachments (1)" in views[view]
    assert client.get(f"/inbox/{mail_id}/html").text == "<p>Hi</p>\n"


@pytest.mark.parametrize("content", [b"no problem", b"{}", b'{"title": "Free money"}'], ids=str)
def test_an_attachment_cannot_pretend_to_be_an_error_of_the_service(
    client: TestClient, content: bytes
) -> None:
    """Otherwise a browser would get a page of this service with the texts of the sender."""
    mail_id = caught(client, mail_with(("a.json", "application/problem+json", content)))
    response = client.get(f"/inbox/{mail_id}/attachments/0", headers=HTML)
    assert (response.status_code, response.content) == (200, content)
    assert response.headers["content-disposition"].startswith("attachment")


@pytest.mark.parametrize(
    ("declared", "sent_as"),
    [
        ("text/javascript", "text/plain"),
        ("Application/X-JavaScript", "text/plain"),
        ("text/ecmascript", "text/plain"),
        ("text/jscript", "text/plain"),
        ("text/livescript", "text/plain"),
        ("text/javascript1.5", "text/plain"),
        ("text/css", "text/plain"),
        ("text/html", "text/html"),
        ("text/typescript", "text/typescript"),
        ("application/javascriptx", "application/javascriptx"),
    ],
)
def test_a_page_cannot_load_an_attachment_as_a_script_or_a_style_sheet(
    client: TestClient, declared: str, sent_as: str
) -> None:
    """The policy of the pages allows every script that comes from this server."""
    mail_id = caught(client, mail_with(("a", declared, b"alert(1)")))
    response = client.get(f"/inbox/{mail_id}/attachments/0")
    assert response.headers["content-type"] == sent_as
    assert response.headers["x-content-type-options"] == "nosniff"


def test_the_html_of_a_mail_lets_a_browser_prepare_no_connection(client: TestClient) -> None:
    """A lookup of the host, or a connection to it, tells the sender that the mail was read.

    The policy covers neither, so no <link> and no frame is left, however it is written.
    """
    html = (
        '<link rel="preconnect" href="//evil.example"><LINK/rel=dns-prefetch href=//evil.example>'
        "<svg><link\nrel=preconnect></svg><iframe src=//evil.example></iframe>"
        "<IFrame/src=//evil.example></iframe><frameset><frame src=//evil.example></frameset>"
        "<p>Hi</p>"
    )
    mail_id = caught(client, mail_with(html=html))
    response = client.get(f"/inbox/{mail_id}/html")
    assert not re.search("<(link|i?frame)", response.text, re.IGNORECASE)
    assert "<p>Hi</p>" in response.text
    assert response.headers["x-dns-prefetch-control"] == "off"


def test_a_view_without_content_says_so(client: TestClient) -> None:
    mail_id = caught(client, b"\r\nhi")
    for view, text in {
        "html": "This mail has no HTML.",
        "headers": "This mail has no header fields.",
        "attachments": "This mail has no attachments.",
    }.items():
        assert text in page_of(client, f"/inbox/{mail_id}?view={view}")
    assert "This mail has no HTML." in page_of(client, f"/inbox/{mail_id}/html", 404)
    mail_id = caught(client, b"Content-Type: image/png\r\n\r\nhi")
    assert "This mail has no text." in page_of(client, f"/inbox/{mail_id}")


def test_a_mail_and_its_task_lead_to_each_other(client: TestClient) -> None:
    task = client.post("/send-notification/ada@example.com").json()
    message_id = wait_for(client, task["id"])["result"]["message_id"]
    for name in (quote(message_id, safe=""), message_id.strip("<>")):
        response = client.get(f"/inbox/by-message-id/{name}", headers=HTML)
        assert response.status_code == 303
    assert f'href="/board/tasks/{task["id"]}"' in page_of(client, response.headers["location"])
    other = caught(client, b"Message-ID: <a/b@example.com>\r\n\r\nhi")
    assert "/board/tasks/0" not in page_of(client, f"/inbox/{other}")
    found = client.get("/inbox/by-message-id/a%2Fb@example.com")
    assert found.headers["location"] == f"/inbox/{other}"
    for missing in ("c@example.com", "%00", "%3C%3E", "html"):
        problem_of(client.get(f"/inbox/by-message-id/{missing}"), 404)
        assert "or not yet" in page_of(client, f"/inbox/by-message-id/{missing}", 404)


def send_form(client: TestClient, path: str, **fields: str) -> None:
    """Send a form; the response must lead back to the list."""
    response = client.post(path, data=fields, headers=FORM)
    assert (response.status_code, response.headers["location"]) == (303, "/inbox")


def test_a_mail_is_deleted_by_a_form_and_a_second_click_does_no_harm(client: TestClient) -> None:
    first, second = (caught(client, b"Subject: %d\r\n\r\nx" % n) for n in range(2))
    assert f'action="/inbox/{second}/delete"' in page_of(client, f"/inbox/{second}")
    for _ in range(2):
        send_form(client, f"/inbox/{second}/delete")
    assert [mail["id"] for mail in client.get("/inbox").json()["data"]] == [first]


def test_the_form_deletes_the_mails_that_the_page_has_shown(client: TestClient) -> None:
    for number in range(2):
        caught(client, b"Subject: %d\r\n\r\nx" % number)
    page = page_of(client, "/inbox")
    assert "Delete 2 mails" in page
    (newest,) = re.findall(r'name="newest" value="([^"]+)"', page)
    later = caught(client, b"Subject: later\r\n\r\nx")
    send_form(client, "/inbox/delete", other="")  # without its field, the form deletes nothing
    for _ in range(2):
        send_form(client, "/inbox/delete", newest=newest)
    assert [mail["id"] for mail in client.get("/inbox").json()["data"]] == [later]


def test_the_form_of_another_site_deletes_nothing(client: TestClient) -> None:
    mail_id = caught(client, b"Subject: x\r\n\r\nhi")
    for path in ("/inbox/delete", f"/inbox/{mail_id}/delete"):
        response = client.post(
            path, data={"newest": mail_id}, headers={"Sec-Fetch-Site": "cross-site"}
        )
        problem_of(response, 403)
    assert client.get(f"/inbox/{mail_id}").status_code == 200


# Hostile mails

ODD = {
    "message_id": b"Message-ID: <>\r\nSubject: odd\r\n\r\nhi",
    "quote": b'To: ada <ada@example.com>, "\r\nSubject: odd\r\n\r\nhi',
    "charset": b"Content-Type: text/html; charset=undefined\r\nSubject: odd\r\n\r\nhi",
    "surrogate": b"Content-Type: text/html; charset=utf-7\r\nSubject: odd\r\n\r\n+2AA-",
    "nul": b"Subject: odd\x00\r\nX-\x00: \x00\r\n\r\n\x00",
    "bidi": "Subject: odd \u202efdp.exe\u2066\r\nX-A: \u202e\r\n\r\n\u202etxet".encode(),
    "word": b"Subject: odd" + b"x" * 900 + b"\r\n\r\n" + b"x" * 900,
    "template": b"Subject: odd {{ 7*7 }}\r\n\r\n{{ 7*7 }}",
    "encoded": b"Subject: =?utf-8?B?b2RkDQpYOiB5?=\r\n\r\nhi",
    "markup": b"Subject: odd\r\nX-<b>: <script>alert(1)</script>\r\n\r\n<script>alert(1)</script>",
    "broken": b"Subject: odd\r\nContent-Type: multipart/mixed; boundary=\xff\r\n\r\n--\xff\r\n\r\n",
    "nested": b"Subject: odd\r\n"
    + b"".join(
        b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n)
        for n in range(1200)
    ),
    "parts": b"Subject: odd\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n"
    + b"--b\r\nContent-Disposition: attachment; filename=<script>\r\n\r\n\r\n" * 1200,
    "empty": b"",
}


@pytest.mark.parametrize("mail", ODD.values(), ids=ODD)
@pytest.mark.thorough
def test_a_malformed_mail_does_not_hide_other_mails(
    client: TestClient, directory: Path, mail: bytes
) -> None:
    port = client.app_state["settings"].smtp_port
    deliver(port, mail, b"<ad\xe9@example.com>")
    deliver(port, b"Subject: the other\r\n\r\nhi")
    (directory / f"{NO_ID}.eml").write_bytes(b"X-Envelope: {")
    page = page_of(client, "/inbox")
    assert "the other" in page
    assert "ad\N{REPLACEMENT CHARACTER}@example.com" in page
    listed = client.get("/inbox").json()["data"]
    assert len(listed) == 3
    for listed_mail in listed:
        path = f"/inbox/{listed_mail['id']}"
        read = client.get(path).json()
        for view in ("", "html", "text", "headers", "attachments"):
            page = page_of(client, f"{path}?view={view}")
            assert "<script>" not in page
            assert "<bdi>" in page
        assert client.get(f"{path}/source").is_success
        assert client.get(f"{path}/html").is_success == (read["html"] is not None)
        for number in range(min(3, len(read["attachments"]))):
            assert client.get(f"{path}/attachments/{number}").is_success


def test_the_html_of_a_mail_is_shown_in_a_sandbox(client: TestClient) -> None:
    mail_id = caught(client, mail_with(html=f"<p>HTML</p>{HOSTILE}"))
    page = page_of(client, f"/inbox/{mail_id}")
    assert HOSTILE not in page
    response = client.get(f"/inbox/{mail_id}/html", headers=HTML)
    assert "<p>HTML</p>" in response.text
    policy = response.headers["content-security-policy"].split("; ")
    assert {"sandbox", "default-src 'none'", "form-action 'none'"} <= set(policy)
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["x-content-type-options"] == "nosniff"


# Memory


@contextmanager
def large_mails(directory: Path) -> Iterator[list[str]]:
    """Store five mails with an attachment of 48 MB each. Yields their ids."""
    line = b'X-Envelope: {"sender": "a@example.com", "recipients": []}\r\n'
    text = b"Subject: large\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\nhi\r\n"
    attachment = b"--b\r\nContent-Disposition: attachment\r\n\r\n"
    ids = [f"{1735815845000000000 + number}-0123abcd" for number in range(5)]
    for mail_id in ids:
        path = directory / "inbox" / f"{mail_id}.eml"
        path.write_bytes(line + text + attachment)
        os.truncate(path, 48 * MB)
    yield ids


@pytest.mark.thorough
def test_mails_with_large_attachments_need_little_memory(tmp_path: Path) -> None:
    """Each mail has 48 MB; the service may grow by 32 MB for lists, pages and downloads."""
    with Service(tmp_path, worker_concurrency=0) as service:
        assert page_of(service.client, "/inbox")
        with large_mails(tmp_path) as ids:
            peak = Peak(service.pid)
            assert page_of(service.client, "/inbox?q=large").count("<bdi>large</bdi>") == 5
            path = f"/inbox/{ids[0]}"
            assert '<pre class="mail">hi</pre>' in page_of(service.client, path)
            (attachment,) = service.get(path).json()["attachments"]
            assert attachment["size"] > 47 * MB
            for name, size in (("source", 47 * MB), ("attachments/0", attachment["size"])):
                with service.client.stream("GET", f"{path}/{name}") as download:
                    assert sum(map(len, download.iter_bytes())) >= size
            assert peak.grown <= 32


@pytest.mark.thorough
def test_a_text_of_10_mb_is_cut_on_its_page_and_whole_in_its_source(client: TestClient) -> None:
    """Escaped, each of these characters becomes five. The text of 2 MiB took 180 MB."""
    raw = b"Subject: long\r\n\r\n" + (b'"' * 98 + b"\r\n") * 100_000
    mail_id = caught(client, raw)
    page = page_of(client, f"/inbox/{mail_id}")
    assert "a part of it is not shown" in page
    assert LONGEST_TEXT < len(page) < 5 * LONGEST_TEXT + 10_000
    assert 2 * MB < len(client.get(f"/inbox/{mail_id}").json()["text"]) < 3 * MB
    assert client.get(f"/inbox/{mail_id}/source").content == raw
