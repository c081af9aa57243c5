"""The text and the HTML of a mail, rendered from templates."""

import pytest
from jinja2 import TemplateNotFound, UndefinedError

from app.mail.templates import render


def test_a_notification_has_its_message_in_the_text_and_also_its_subject_in_the_html() -> None:
    mail = render("notification", subject="News", message="One.\n\nTwo.")
    assert mail.text == "One.\n\nTwo.\n"
    assert "<h1" in mail.html
    assert "News</h1>" in mail.html
    assert "One.\n\nTwo.</p>" in mail.html


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        render("notification", subject="News")


@pytest.mark.parametrize("name", ["unknown", "../mail/notification"])
def test_an_unknown_template_is_an_error(name: str) -> None:
    with pytest.raises(TemplateNotFound):
        render(name)
