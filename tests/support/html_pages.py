"""A page as a browser without scripts sees it: its text, links and forms."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urlencode, urlsplit

import httpx2
from fastapi.testclient import TestClient

BROWSER = {"Accept": "text/html,application/xhtml+xml", "Sec-Fetch-Site": "same-origin"}
_FORM = {"Content-Type": "application/x-www-form-urlencoded"}
_VOID = {"input", "link", "meta", "img", "br", "hr"}


@dataclass
class Form:
    """A form: its fields as the page fills them, and the text of its buttons."""

    action: str
    method: str
    fields: list[tuple[str, str]] = field(default_factory=list)
    buttons: list[str] = field(default_factory=list)


class Page(HTMLParser):
    """A parsed page."""

    def __init__(self, response: httpx2.Response) -> None:
        super().__init__()
        self.status = response.status_code
        self.path = urlsplit(str(response.url)).path
        self.html = response.text
        self.words: list[str] = []
        self.links: dict[str, str] = {}  # the address by the text of the link
        self.forms: list[Form] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self._open: list[str] = []
        self._link: tuple[str, int] | None = None  # its address, and the place of its first word
        self._button: int | None = None
        self._select = ""
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        self.feed(self.html)

    @property
    def text(self) -> str:
        """The text of the page, with single spaces."""
        return " ".join(" ".join(self.words).split())

    def form(self, path: str) -> Form:
        """Return the only form with this path."""
        (found,) = (form for form in self.forms if form.action == path)
        return found

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note links, forms and fields."""
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag not in _VOID:
            self._open.append(tag)
        if tag == "a":
            self._link = found.get("href") or "", len(self.words)
        elif tag == "form":
            self.forms.append(Form(found.get("action") or "", found.get("method") or "get"))
        elif tag == "button":
            self._button = len(self.words)
        elif tag == "select":
            self._select = found.get("name") or ""
        elif tag == "option" and "selected" in found:
            self.forms[-1].fields.append((self._select, found.get("value") or ""))
        elif tag == "input" and (found.get("type") != "checkbox" or "checked" in found):
            self.forms[-1].fields.append((found.get("name") or "", found.get("value") or ""))

    def handle_endtag(self, tag: str) -> None:
        """Check that the elements are nested, and note the texts of links and buttons."""
        assert self._open, f"</{tag}> without its beginning"
        opened = self._open.pop()
        assert opened == tag, f"<{opened}> is closed by </{tag}>"
        if tag == "a" and self._link is not None:
            address, first = self._link
            self.links[" ".join(self.words[first:])] = address
            self._link = None
        elif tag == "button" and self._button is not None and self.forms:
            self.forms[-1].buttons.append(" ".join(self.words[self._button :]))
            self._button = None

    def handle_data(self, data: str) -> None:
        """Note the words."""
        self.words += data.split()


def browse(client: TestClient, address: str) -> Page:
    """Load a page as a browser does. Every element must be closed in its order."""
    page = Page(client.get(address, headers=BROWSER))
    assert page._open == []
    return page


def submit(
    client: TestClient, form: Form, headers: dict[str, str] | None = None, **changes: str
) -> httpx2.Response:
    """Send a form as a browser does; `changes` replace its fields. Redirects are not followed."""
    fields = [(name, text) for name, text in form.fields if name not in changes]
    body = urlencode([*fields, *changes.items()])
    return client.post(
        form.action,
        content=body,
        headers=BROWSER | _FORM | (headers or {}),
        follow_redirects=False,
    )
