"""The pages as a browser asks for them, and as it reads them."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

# A browser asks for HTML, and says that a form comes from a page of this service.
BROWSER = {
    "Accept": "text/html,application/xhtml+xml,*/*;q=0.8",
    "Sec-Fetch-Site": "same-origin",
}
# Texts that a page must show as they are, and never carry out.
HOSTILE = (
    "</title></textarea><script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{7*7}}\u202e"
)
_VOID = {"meta", "link", "img", "input", "br", "hr"}


@dataclass
class Element:
    """An element of a page, with the text inside it."""

    tag: str
    attributes: dict[str, str]
    text: str = ""
    children: list["Element"] = field(default_factory=list)


class Page(HTMLParser):
    """The elements of a page, in order. `find` and `all` choose by tag and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {[element.tag for element in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element."""
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
        return " ".join(self.find("html").text.split())

    def text_of(self, tag: str, **attributes: str) -> str:
        """Return the text of an element, with single spaces."""
        return " ".join(self.find(tag, **attributes).text.split())

    @property
    def links(self) -> list[str]:
        """The addresses of all links and files of the page."""
        return [
            value
            for element in self.elements
            for name, value in element.attributes.items()
            if name in {"href", "src", "action"}
        ]
