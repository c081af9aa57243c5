"""A browser without scripts: it loads pages, follows their links, and sends their forms."""

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import httpx2
from fastapi.testclient import TestClient

from tests.support.pages import BROWSER, Element
from tests.support.pages import Page as Elements

# Elements that a browser shows apart from the text before them.
_APART = {"td", "th", "li", "p", "h1", "h2", "h3", "pre", "label", "option", "summary"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@dataclass(frozen=True)
class Form:
    """A form: its fields as the page fills them, and the text of its buttons."""

    action: str
    fields: list[tuple[str, str]] = field(default_factory=list)
    buttons: list[str] = field(default_factory=list)


class Page(Elements):
    """A page that the service has answered with."""

    def __init__(self, response: httpx2.Response) -> None:
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        super().__init__(response.text)
        self.html = response.text
        self.status = response.status_code
        self.targets = {words(link): link.attributes["href"] for link in self.all("a")}
        """The address of each link by its text."""
        self.forms = [_form(form) for form in self.all("form")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element, apart from the text before it."""
        if tag in _APART:
            self.handle_data(" ")
        super().handle_starttag(tag, attrs)

    def form(self, action: str) -> Form:
        """Return the only form that is sent to this path."""
        (found,) = (form for form in self.forms if form.action == action)
        return found


def words(element: Element) -> str:
    """Return the text of an element, with single spaces."""
    return " ".join(element.text.split())


def _form(form: Element) -> Form:
    inside = [*_descendants(form)]
    return Form(
        form.attributes["action"],
        [pair for element in inside for pair in _fields(element)],
        [words(element) for element in inside if element.tag == "button"],
    )


def _descendants(element: Element) -> list[Element]:
    return [e for child in element.children for e in (child, *_descendants(child))]


def _fields(element: Element) -> list[tuple[str, str]]:
    """Return what a browser sends for an input or a select. It leaves out an unchecked box."""
    attributes = element.attributes
    if element.tag == "select":
        chosen = [option for option in element.children if "selected" in option.attributes]
        option = (chosen or element.children)[0]
        return [(attributes["name"], option.attributes.get("value", words(option)))]
    if element.tag == "input" and (attributes.get("type") != "checkbox" or "checked" in attributes):
        return [(attributes["name"], attributes.get("value", ""))]
    return []


def browse(client: TestClient, address: str, **headers: str) -> Page:
    """Load a page as a browser does."""
    return Page(client.get(address, headers=BROWSER | headers))


def submit(
    client: TestClient, form: Form, headers: dict[str, str] | None = None, **changes: Any
) -> httpx2.Response:
    """Send a form as a browser does; `changes` replace its fields. Redirects are not followed."""
    fields = [(name, text) for name, text in form.fields if name not in changes]
    return client.post(
        form.action,
        content=urlencode([*fields, *changes.items()]),
        headers=BROWSER | FORM | (headers or {}),
        follow_redirects=False,
    )
