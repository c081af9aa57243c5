"""The filters of tasks, as the list, the actions on many tasks and the pages take them."""

import re
from datetime import datetime
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from afterward.filter import TaskFilter, storable_about
from afterward.task import Status
from app.api.schemas import Pattern, SearchText

TASK_ID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"

_STATUS = f"({'|'.join(Status)})"
_NO_STATUS = f"must be one or more of {', '.join(Status)}, separated by commas"
_DATE_TIME = re.compile(
    r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII
)


def _check_date_time(text: object) -> object:
    """Refuse the other forms that pydantic reads, such as numbers (RFC 3339, section 5.6)."""
    if not isinstance(text, str) or not _DATE_TIME.fullmatch(text):
        raise ValueError(
            "must be a date and time with its offset from UTC, such as 2026-01-31T12:00:00Z. "
            "In a URL, write + as %2B"
        )
    return text


Statuses = Annotated[
    str,
    Pattern(f"{_STATUS}(,{_STATUS})*", _NO_STATUS),
    Field(
        max_length=100,
        description="One status, or several separated by commas.",
        examples=["failed", "queued,retrying"],
    ),
]
DateTime = Annotated[AwareDatetime, BeforeValidator(_check_date_time)]
ShortText = Annotated[SearchText, Field(max_length=100)]


class TaskFilters(BaseModel):
    """Conditions that a task must all meet. A condition that is left out selects every task."""

    model_config = ConfigDict(extra="forbid")

    status: Statuses | None = None
    kind: ShortText | None = None
    about: (
        Annotated[
            SearchText,
            Field(
                max_length=1000,
                description="Matched exactly: the recipient of a mail, or the id of an upload.",
            ),
        ]
        | None
    ) = None
    batch_id: ShortText | None = None
    request_id: Annotated[SearchText, Field(max_length=200)] | None = None
    error: (
        Annotated[
            SearchText,
            Field(
                max_length=200,
                description="A group of failed tasks: the type of the error, and its SMTP code if "
                "it has one.",
                examples=["PermanentError 550"],
            ),
        ]
        | None
    ) = None
    since: Annotated[DateTime, Field(description="Created at this time or later.")] | None = None
    until: Annotated[DateTime, Field(description="Created before this time.")] | None = None

    def for_client(self, client: str) -> TaskFilter:
        """Return the filter for the tasks of this client."""
        return TaskFilter(
            client=client,
            statuses=tuple(map(Status, self.status.split(","))) if self.status else (),
            kind=self.kind,
            about=storable_about(self.about),
            batch_id=self.batch_id,
            request_id=self.request_id,
            error=self.error,
            since=None if self.since is None else _seconds(self.since),
            until=None if self.until is None else _seconds(self.until),
        )


def _seconds(at: datetime) -> float:
    """Return a time in seconds since the epoch, for the comparison with `created_at`.

    The API rounds `created_at` to microseconds. So subtract half a microsecond: `since` then
    includes every task that the API shows with that time.
    """
    return at.timestamp() - 0.5e-6
