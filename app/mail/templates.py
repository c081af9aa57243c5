"""Renders the text and the HTML of a mail from the templates in `app/templates/mail`."""

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape


@dataclass(frozen=True)
class Rendered:
    """The body of a mail, as plain text and as HTML."""

    text: str
    html: str


def render(name: str, **values: object) -> Rendered:
    """Render the templates `{name}.txt` and `{name}.html`.

    Values are data: a value such as "{{ 7 * 7 }}" is not evaluated, and the HTML has it escaped.
    Raises jinja2.TemplateNotFound for an unknown name, and jinja2.UndefinedError if a value of the
    template is missing.
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
_environment.globals.clear()  # no template uses them, and each rendering would copy them
