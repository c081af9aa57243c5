"""Template code and HTML in subjects, messages, file names, and mails sent to the catcher.

Text shows such a value literally, and HTML shows it escaped. Both bodies of a mail, the inbox and
its pages contain the value unchanged, have only the elements of the templates, and compute nothing.
"""

import re
import smtplib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from jinja2 import Environment

from app.mail import templates
from app.mail.caught import Caught
from app.mail.templates import render
from app.main import create_app
from tests.support.forms import FORM, file_part, form_of
from tests.support.pages import BROWSER
from tests.support.service import free_port, mails_in, settings_in, wait_for
from tests.support.target import NOTIFICATION
from tests.support.torture import Tried

VALUES = {
    "Jinja, computed": "{{7*7}}",
    "Jinja, an import": "{% import os %}",
    "Jinja, an inclusion": "{% include 'mail/notification.txt' %}",
    "Jinja, a climb": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "Jinja, a comment": "{# nothing to see #}",
    "Jinja, unfinished": "{{ {% {#",
    "format": "{0.__class__}",
    "format, a name": "{subject}",
    "percent": "%(subject)s %s %d %n",
    "a shell": "$(id) `id` ${HOME}",
    "an expression": "${7*7} #{7*7} <%= 7*7 %> *{7*7}",
    "a script": "<script>alert(1)</script>",
    "a picture": "<img src=x onerror=alert(1)>",
    "the end of an attribute": "\"'><svg onload=alert(1)>",
    "the end of an element": "</title></p></main></pre></iframe><script>alert(1)</script>",
    "a comment": "<!-- --><!--",
    "an entity": "&lt;script&gt; &#60;script&#62; &amp;",
    "an address": "javascript:alert(1)",
    "a line of base64": "PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==",
}
EXPECTED_ELEMENTS = frozenset(
    re.findall(
        r"\w+",
        "html head meta title link script body header main footer nav a img ul li div form button "
        "input label table caption thead tbody tr th td h1 h2 p pre code bdi span br time iframe "
        "details summary dl dt dd",
    )
)


class Page(HTMLParser):
    """The text of a page, as a browser reads it, and whether its elements are those expected."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.has_only_expected_elements = True
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Compare an element with those of the templates, which have no event handlers.

        The service's scripts and pictures are files of its own.
        """
        attributes = dict(attrs)
        is_expected = tag in EXPECTED_ELEMENTS and not any(name[:2] == "on" for name in attributes)
        if tag in {"script", "img"}:
            is_expected &= (attributes.get("src") or "").startswith("/board/static/")
        self.has_only_expected_elements &= is_expected

    def handle_data(self, data: str) -> None:
        """Collect text."""
        self.text += data


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("templates")


@pytest.fixture(scope="module")
def smtp_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def client(directory: Path, smtp_port: int) -> Iterator[TestClient]:
    """A client of a service with its catcher and inbox."""
    with TestClient(create_app(settings_in(directory, smtp_port=smtp_port))) as client:
        yield client


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_value_is_literal_in_text_and_escaped_in_html(
    client: TestClient, directory: Path, value: str
) -> None:
    task = client.post(NOTIFICATION, json={"subject": value, "message": value}).json()
    wait_for(client, task["id"])
    mail = newest_mail(directory)
    assert mail.subject == value
    assert mail.text == f"{value}\n"
    assert mail.html is not None
    assert_shown(mail.html, value, times=3)

    assert_shown(page_of(client, f"/inbox/{mail.id}?view=text"), value, times=3)
    html = client.get(f"/inbox/{mail.id}/html")
    assert html.text == mail.html
    assert html.headers["content-security-policy"].startswith("sandbox; default-src 'none'")


def page_of(client: TestClient, path: str) -> str:
    """Return the page that a browser gets."""
    return client.get(path, headers=BROWSER).raise_for_status().text


def newest_mail(directory: Path) -> Caught:
    return mails_in(directory)[0]


def assert_shown(html: str, value: str, *, times: int = 1) -> None:
    """Check that the page shows this text so often or more often, and has no other elements."""
    page = Page(html)
    assert page.text.count(value) >= times
    assert page.has_only_expected_elements


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_file_name_is_literal(client: TestClient, value: str) -> None:
    escaped = value.replace("/", "|").replace("\\", "|").replace('"', "'")
    body = form_of(file_part(escaped.encode()))
    upload = client.post("/upload", content=body, headers=FORM).json()["upload"]
    listed = client.get(f"/uploads/{upload['id']}")
    assert upload["filename"] == listed.json()["filename"] == escaped
    assert listed.headers["content-type"] == "application/json"


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_foreign_mail_in_the_inbox_is_shown_escaped(
    client: TestClient, directory: Path, smtp_port: int, value: str
) -> None:
    """Any program that reaches the catcher's port can send it a mail."""
    raw = f"Subject: {value}\r\nMessage-ID: {value}\r\nFrom: {value}\r\n\r\n{value}".encode()
    with smtplib.SMTP("127.0.0.1", smtp_port, timeout=5) as other:
        other.sendmail("eve@example.com", "ada@example.com", raw)
    mail = newest_mail(directory)
    assert mail.html is None
    for view in ("text", "headers"):
        assert_shown(page_of(client, f"/inbox/{mail.id}?view={view}"), value, times=3)


def test_the_inbox_shows_all_subjects_escaped(client: TestClient, tried: Tried) -> None:
    for value in VALUES.values():
        task = client.post(NOTIFICATION, json={"subject": value}).json()
        wait_for(client, task["id"])
    html = page_of(client, "/inbox")
    for value in VALUES.values():
        assert_shown(html, value)
    tried(f"{len(VALUES)} values as subject, message and file name", "literal, 0 foreign elements")


# Negative controls


def test_control_a_value_in_the_template_itself_is_computed(tried: Tried) -> None:
    """This control puts the value into the template with an f-string, and renders the result."""
    text = (
        Environment(autoescape=True).from_string(f"Dear Ada, {VALUES['Jinja, computed']}").render()
    )
    assert text == "Dear Ada, 49"
    climb = f"Dear Ada, {VALUES['format']}".format("x")
    assert climb == "Dear Ada, <class 'str'>"
    tried("a message that is put into the template", "{{7*7}} is 49, {0.__class__} a class")


def test_control_without_escaping_values_become_elements(
    monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    """This control renders the service's template with Jinja's default, which does not escape."""
    environment = Environment(loader=templates._environment.loader)
    monkeypatch.setattr(templates, "_environment", environment)
    theirs = 0
    for value in VALUES.values():
        theirs += not Page(
            render("notification", subject=value, message=value).html
        ).has_only_expected_elements
    tried(f"{len(VALUES)} values, not escaped", f"foreign elements in {theirs} pages")
    assert theirs
