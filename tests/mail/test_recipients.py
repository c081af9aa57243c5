"""The allow-list of recipients."""

import pytest

from app.mail.recipients import Recipients


def test_without_a_list_every_recipient_is_permitted() -> None:
    assert Recipients().permit("ada@example.com")


@pytest.mark.parametrize(
    ("pattern", "address"),
    [
        ("ada@example.com", "ada@example.com"),
        ("ada@example.com", "Ada@example.com"),
        ("*@example.com", "ada@example.com"),
        ("*@example.com", "x+y.z=@example.com"),
        ("a*@example.com", "a@example.com"),
        ("*-list@example.com", "ada-list@example.com"),
        ("*@*.example.com", "ada@a.b.example.com"),
        ("*@mail*.example.com", "ada@mail7.example.com"),
        ("*@xn--bcher-kva.example", "ada@xn--bcher-kva.example"),
        ("*@*", "ada@example.com"),
    ],
)
def test_an_address_that_matches_a_pattern_is_permitted(pattern: str, address: str) -> None:
    assert Recipients([pattern]).permit(address)


@pytest.mark.parametrize(
    ("pattern", "address"),
    [
        ("ada@example.com", "xada@example.com"),
        ("ada@example.com", "ada@example.com.example.net"),
        ("ada@example.com", "ada@exampleXcom"),
        ("ada@example.com", "ada@example.com\n"),
        ("*@example.com", "ada@sub.example.com"),
        ("*@example.com", "ada@example.net@example.com"),
        ("*@*.example.com", "ada@example.com"),
        ("a.a@example.com", "aXa@example.com"),
        ("a+@example.com", "aa@example.com"),
        ("[a-z]@example.com", "a@example.com"),
        ("s@example.com", "\N{LATIN SMALL LETTER LONG S}@example.com"),
    ],
)
def test_an_address_that_matches_a_pattern_only_partly_is_refused(
    pattern: str, address: str
) -> None:
    assert not Recipients([pattern]).permit(address)


def test_an_address_must_match_any_of_several_patterns() -> None:
    recipients = Recipients(["*@example.com", "ada@example.org"])
    assert recipients.permit("grace@example.com")
    assert recipients.permit("ada@example.org")
    assert not recipients.permit("grace@example.org")
    assert not recipients.permit("ada@example.net")
