"""The search for tasks: what its fields mean, and what is wrong with them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import QueryParams

from app.api.task_filters import TaskFilters
from app.board.task_search import TaskSearch, conditions_of
from tests.library.support import NOW


def search(query: str) -> TaskSearch:
    return TaskSearch.read(QueryParams(query), NOW)


@pytest.mark.parametrize(
    ("query", "conditions"),
    [
        ("", {}),
        ("about=&kind=+&status=&status=,&period=&since=", {}),
        ("colour=green", {}),
        ("about=+ada@example.com+", {"about": "ada@example.com"}),
        ("status=failed&status=queued,running", {"status": "failed,queued,running"}),
        ("since=2023-11-14T22:13", {"since": "2023-11-14T22:13:00Z"}),
        ("since=2023-11-14T22:13:20", {"since": "2023-11-14T22:13:20Z"}),
        ("until=2023-11-14T22:13:20.5", {"until": "2023-11-14T22:13:20.500000Z"}),
        ("until=2023-11-14T23:13:20%2B01:00", {"until": "2023-11-14T23:13:20+01:00"}),
        ("period=1h", {"since": "2023-11-14T21:13:20Z"}),
        ("period=7d&until=2023-11-14T22:00Z", None),
    ],
)
def test_the_fields_are_read(query: str, conditions: dict[str, str] | None) -> None:
    found = search(query)
    if conditions is None:
        assert found.errors.keys() == {"until"}
    else:
        assert found.errors == {}
        assert conditions_of(found.filters) == conditions
        assert found.has_conditions == bool(conditions)


@pytest.mark.parametrize(
    ("query", "field", "message"),
    [
        ("status=done", "status", "Must be one or more of queued, running, retrying"),
        ("about=" + "x" * 1001, "about", "Must have at most 1,000 characters"),
        ("about=%00", "about", "Must not contain a NUL character"),
        ("kind=" + "x" * 101, "kind", "Must have at most 100 characters"),
        ("since=yesterday", "since", "Must be a date and time"),
        ("since=2026-13-01T00:00", "since", "month"),
        ("until=2026-01-01", "until", "Must be a date and time"),
        ("period=1y", "period", "Choose one of 15m, 1h, 24h, 7d."),
        ("period=1h&since=2026-01-01T00:00", "since", "not both"),
        ("request_id=" + "x" * 201, "request_id", "Must have at most 200 characters"),
        ("error=" + "x" * 201, "error", "Must have at most 200 characters"),
        ("batch_id=%00", "batch_id", "Must not contain a NUL character"),
    ],
)
def test_an_unreadable_field_has_a_message(query: str, field: str, message: str) -> None:
    found = search(query)
    assert message in found.errors[field]
    assert found.typed | {"status": ",".join(found.statuses)} == QUERY_FIELDS | dict(
        QueryParams(query)
    )
    assert not found.has_conditions


QUERY_FIELDS = dict.fromkeys(
    ("status", "kind", "about", "batch_id", "request_id", "error", "since", "until", "period"), ""
)


def test_the_query_of_a_search_is_the_same_search() -> None:
    query = "status=failed&status=queued&about=%22%26%3D%2B+%C3%A4&period=1h"
    assert search(search(query).query) == search(query)


def test_the_conditions_of_a_search_have_absolute_times() -> None:
    """A form has them in hidden fields, which mean the same filter whenever it is sent."""
    filters = search("period=1h&status=failed").filters
    again = TaskSearch.read(QueryParams(conditions_of(filters)), NOW + 9999)
    assert again.filters.for_client("") == filters.for_client("")


NAMES = st.sampled_from([*TaskFilters.model_fields, "period", "colour"])
TIMES = st.from_regex(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d:\d\d)?", fullmatch=True
)
TEXTS = st.sampled_from(["failed", "queued,failed", "15m", "0001-01-01T00:00:00+23:59"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NAMES, TEXTS | TIMES | st.text(max_size=20)), max_size=5))
def test_a_confirmed_search_selects_the_tasks_of_the_page(fields: list[tuple[str, str]]) -> None:
    """The form of the page that confirms an action has the conditions of the search, and no others.

    Any text in any field is a condition or an error.
    """
    found = TaskSearch.read(QueryParams(fields), NOW)
    again = TaskSearch.read(QueryParams([*conditions_of(found.filters).items()]), NOW)
    assert (again.filters, again.errors) == (found.filters, {})
    assert again.filters.for_client("ada") == found.filters.for_client("ada")
