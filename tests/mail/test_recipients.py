"""Whom mail may be sent to."""

import pytest

from app.mail.recipients import Recipients


def test_without_a_list_anybody_may_be_written_to() -> None:
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
def test_an_address_that_matches_is_permitted(pattern: str, address: str) -> None:
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
def test_an_address_that_does_not_match_all_of_a_pattern_is_not(pattern: str, address: str) -> None:
    assert not Recipients([pattern]).permit(address)


def test_one_of_several_patterns_is_enough() -> None:
    recipients = Recipients(["*@example.com", "ada@example.org"])
    assert recipients.permit("grace@example.com")
    assert recipients.permit("ada@example.org")
    assert not recipients.permit("grace@example.org")
    assert not recipients.permit("ada@example.net")
