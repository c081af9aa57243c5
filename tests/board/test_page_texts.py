"""Times, numbers and addresses, as the pages show them."""

from datetime import UTC, datetime
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from afterward.task import new_id
from app.api.page_texts import (
    duration,
    exact_time,
    made_at,
    number,
    query_with,
    relative,
    size,
    when,
)

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "now"),
        (-0.9, "now"),
        (-1, "1 s ago"),
        (-59.9, "59 s ago"),
        (-60, "1 min ago"),
        (-3599, "59 min ago"),
        (-86_399, "23 h ago"),
        (-172_800, "2 d ago"),
        (250, "in 4 min"),
        (7300, "in 2 h"),
        (86_400 * 5000, "in 5,000 d"),
    ],
)
def test_a_relative_time_is_rounded_down(seconds: float, text: str) -> None:
    assert relative(seconds) == text


def test_a_time_is_relative_and_exact_on_hover() -> None:
    expected = (
        '<time datetime="2027-01-15T08:00:00.000Z" title="2027-01-15 08:00:00 UTC">4 min ago</time>'
    )
    assert when(NOW, NOW + 250) == expected
    assert when(datetime.fromtimestamp(NOW, UTC), NOW + 250) == expected


@pytest.mark.parametrize("at", [None, 1e300, float("inf"), float("nan"), -1e15])
def test_a_missing_or_damaged_time_is_a_dash(at: float | None) -> None:
    assert when(at) == "\u2013"
    assert at is None or exact_time(at) == "\u2013"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "\u2013"), (0, "0.000 s"), (0.0244, "0.024 s"), (1.55, "1.6 s"), (90, "1 min")],
)
def test_a_duration_has_few_digits(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\u2013"),
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (1_234_567, "1.2 MB"),
        (1 << 30, "1.1 GB"),
        (10**18, "1,000,000.0 TB"),
    ],
)
def test_a_size_has_a_unit(value: int | None, text: str) -> None:
    assert size(value) == text


def test_a_number_has_separators() -> None:
    assert number(1_234_567) == "1,234,567"


def test_an_id_tells_when_it_was_made() -> None:
    assert made_at(new_id(NOW)) == NOW
    assert made_at("no id") is None


@given(st.text(max_size=50))
def test_any_text_may_stand_in_place_of_an_id(text: str) -> None:
    when(made_at(text))


def request_for(query: str, prefix: str = "") -> Request:
    path = prefix + "/board/tasks"
    return Request(
        {
            "type": "http",
            "path": path,
            "root_path": prefix,
            "query_string": query.encode(),
            "headers": [(b"host", b"localhost")],
            "scheme": "http",
            "server": ("localhost", 80),
        }
    )


def test_a_query_is_changed_in_place() -> None:
    request = request_for("status=failed&after=a&about=%C3%A4%26")
    assert query_with(request, after="b") == "/board/tasks?status=failed&about=%C3%A4%26&after=b"
    assert query_with(request, status=None, after=None, about=None) == "/board/tasks"
    assert query_with(request_for("", "/p"), after="1") == "/p/board/tasks?after=1"


@given(st.dictionaries(st.text(min_size=1), st.text(min_size=1)), st.text(min_size=1))
def test_every_parameter_survives(parameters: dict[str, str], after: str) -> None:
    parameters = {name: value for name, value in parameters.items() if name != "after"}
    address = query_with(request_for(urlencode(parameters)), after=after)
    expected = {name: [value] for name, value in (parameters | {"after": after}).items()}
    assert parse_qs(urlsplit(address).query) == expected
