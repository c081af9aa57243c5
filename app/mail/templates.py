"""Render the text and the HTML form of a mail from `app/templates/mail`."""

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape


@dataclass(frozen=True)
class Rendered:
    """One mail's body, twice: as plain text, and as HTML."""

    text: str
    html: str


def render(name: str, **values: object) -> Rendered:
    """Fill the templates `{name}.txt` and `{name}.html`.

    Values are data, never templates, and are escaped in the HTML. Raises jinja2.TemplateNotFound
    for an unknown name and jinja2.UndefinedError for a value that was not given.
    """
    return Rendered(
        text=_environment.get_template(f"{name}.txt").render(values),
        html=_environment.get_template(f"{name}.html").render(values),
    )


_environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent.parent / "templates" / "mail"),
    autoescape=select_autoescape(enabled_extensions=("html",), default=False),
    undefined=StrictUndefined,
    auto_reload=False,
    keep_trailing_newline=True,
)
_environment.globals.clear()  # no template asks for them, and each rendering copies them
