"""A browser without scripts: it loads pages, reads them, follows links, and sends forms."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any, Self
from urllib.parse import urlencode

import httpx2
from fastapi.testclient import TestClient

# A browser asks for HTML, and says that a form comes from a page of this service.
BROWSER = {
    "Accept": "text/html,application/xhtml+xml,*/*;q=0.8",
    "Sec-Fetch-Site": "same-origin",
}
# Texts that a page must show as they are, and never carry out.
HOSTILE = (
    "</title></textarea><script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{7*7}}\u202e"
)
_FORM = {"Content-Type": "application/x-www-form-urlencoded"}
_VOID = {"meta", "link", "img", "input", "br", "hr"}
# Elements that a browser shows apart from the text before them.
_APART = {"td", "th", "li", "p", "h1", "h2", "h3", "pre", "label", "option", "summary"}


@dataclass
class Element:
    """An element of a page, with the text inside it."""

    tag: str
    attributes: dict[str, str]
    text: str = ""
    children: list["Element"] = field(default_factory=list)

    @property
    def words(self) -> str:
        """The text, with single spaces."""
        return " ".join(self.text.split())

    @property
    def descendants(self) -> list["Element"]:
        """All elements inside this one, in order."""
        return [e for child in self.children for e in (child, *child.descendants)]


@dataclass(frozen=True)
class Form:
    """A form: its fields as the page fills them, and the text of its buttons."""

    action: str
    fields: list[tuple[str, str]] = field(default_factory=list)
    buttons: list[str] = field(default_factory=list)


class Page(HTMLParser):
    """The elements of a page, in order. `find` and `all` choose by tag and attributes."""

    def __init__(self, html: str, status: int = 200) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.status = status
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {[element.tag for element in self._open]}"

    @classmethod
    def of(cls, response: httpx2.Response) -> Self:
        """Return the page that the service has answered with."""
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        return cls(response.text, response.status_code)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element, apart from the text before it."""
        if tag in _APART:
            self.handle_data(" ")
        element = Element(tag, {name: value or "" for name, value in attrs})
        if self._open:
            self._open[-1].children.append(element)
        self.elements.append(element)
        if tag not in _VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open and close an element, such as a line of an SVG."""
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close the element that is open."""
        if tag in {"p", "li", "td", "th", "tr", "tbody", "thead"}:
            assert tag in {element.tag for element in self._open}, f"</{tag}> without its start"
        assert self._open.pop().tag == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        """Add text to every open element."""
        for element in self._open:
            element.text += data

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """Return the elements with this tag and these attributes. `class_` is one of several."""
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [
            element
            for element in self.elements
            if element.tag == tag
            and all(
                value in element.attributes.get(name, "").split()
                if name == "class"
                else element.attributes.get(name) == value
                for name, value in wanted.items()
            )
        ]

    def find(self, tag: str, **attributes: str) -> Element:
        """Return the only element with this tag and these attributes."""
        (found,) = self.all(tag, **attributes)
        return found

    @property
    def text(self) -> str:
        """The text of the page, with single spaces."""
        return self.find("html").words

    def text_of(self, tag: str, **attributes: str) -> str:
        """Return the text of an element, with single spaces."""
        return self.find(tag, **attributes).words

    @property
    def links(self) -> list[str]:
        """The addresses of all links and files of the page."""
        return [
            value
            for element in self.elements
            for name, value in element.attributes.items()
            if name in {"href", "src", "action"}
        ]

    @property
    def targets(self) -> dict[str, str]:
        """The address of each link by its text."""
        return {link.words: link.attributes["href"] for link in self.all("a")}

    @property
    def forms(self) -> list[Form]:
        """The forms of the page."""
        return [_form(form) for form in self.all("form")]

    def form(self, action: str) -> Form:
        """Return the only form that is sent to this path."""
        (found,) = (form for form in self.forms if form.action == action)
        return found


def _form(form: Element) -> Form:
    return Form(
        form.attributes["action"],
        [pair for element in form.descendants for pair in _fields(element)],
        [element.words for element in form.descendants if element.tag == "button"],
    )


def _fields(element: Element) -> list[tuple[str, str]]:
    """Return what a browser sends for an input or a select. It leaves out an unchecked box."""
    attributes = element.attributes
    if element.tag == "select":
        chosen = [option for option in element.children if "selected" in option.attributes]
        option = (chosen or element.children)[0]
        return [(attributes["name"], option.attributes.get("value", option.words))]
    if element.tag == "input" and (attributes.get("type") != "checkbox" or "checked" in attributes):
        return [(attributes["name"], attributes.get("value", ""))]
    return []


def browse(client: TestClient, address: str, **headers: str) -> Page:
    """Load a page as a browser does."""
    return Page.of(client.get(address, headers=BROWSER | headers))


def submit(
    client: TestClient, form: Form, headers: dict[str, str] | None = None, **changes: Any
) -> httpx2.Response:
    """Send a form as a browser does; `changes` replace its fields. Redirects are not followed."""
    fields = [(name, text) for name, text in form.fields if name not in changes]
    return client.post(
        form.action,
        content=urlencode([*fields, *changes.items()]),
        headers=BROWSER | _FORM | (headers or {}),
        follow_redirects=False,
    )
