"""The search for tasks: the fields of its form as typed, and the filter that they mean."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Self
from urllib.parse import urlencode

from pydantic import ValidationError
from starlette.datastructures import ImmutableMultiDict

from app.api.forms import messages_of
from app.api.task_filters import TaskFilters

PERIODS = {
    "15m": timedelta(minutes=15),
    "1h": timedelta(hours=1),
    "24h": timedelta(hours=24),
    "7d": timedelta(days=7),
}
"""How far back a search goes: the choices, by their names in the form."""

Fields = ImmutableMultiDict[str, str]  # of a query or a form; a field may have several values

_CONDITIONS = tuple(name for name in TaskFilters.model_fields if name != "status")
_FOLDED = ("since", "until", "error", "batch_id", "request_id")
# The value of <input type="datetime-local">. It has no time zone; the form says that it is in UTC.
_LOCAL_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d(\.\d{1,9})?)?", re.ASCII)
_WITHOUT_SECONDS = len("2026-01-31T12:00")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSearch:
    """The state of the search form. `errors` has a message for each field that cannot be read."""

    typed: dict[str, str]
    statuses: tuple[str, ...]
    filters: TaskFilters  # without conditions if there are errors
    errors: dict[str, str]

    @classmethod
    def read(cls, fields: Fields, now: float) -> Self:
        """Read the fields of a query or of a form. Unknown fields are ignored."""
        typed = {name: fields.get(name, "") for name in (*_CONDITIONS, "period")}
        chosen = ",".join(fields.getlist("status")).split(",")
        statuses = tuple(status for status in chosen if status)
        filters, errors = _parse(typed, statuses, now)
        return cls(typed=typed, statuses=statuses, filters=filters, errors=errors)

    @property
    def has_conditions(self) -> bool:
        """Whether the filter leaves out any task."""
        return bool(self.filters.model_fields_set)

    @property
    def shows_more(self) -> bool:
        """Whether the folded part of the form has something to show."""
        return any(self.typed[name] or name in self.errors for name in _FOLDED)

    @property
    def query(self) -> str:
        """The fields as typed, as a query for links."""
        return urlencode(
            [
                *(("status", status) for status in self.statuses),
                *((name, text) for name, text in self.typed.items() if text),
            ]
        )


def conditions_of(filters: TaskFilters) -> dict[str, str]:
    """Return the conditions of a filter as the fields of a form, with absolute times."""
    return filters.model_dump(mode="json", exclude_none=True)


def is_local_time(text: str) -> bool:
    """Whether a browser shows this text in <input type="datetime-local">."""
    return not text or _LOCAL_TIME.fullmatch(text) is not None


def _parse(
    typed: dict[str, str], statuses: tuple[str, ...], now: float
) -> tuple[TaskFilters, dict[str, str]]:
    """Return the filters that the fields mean, and the errors by field. One of them is empty."""
    conditions = {name: typed[name].strip() for name in _CONDITIONS if typed[name].strip()}
    conditions |= {"status": ",".join(statuses)} if statuses else {}
    errors = _resolve_times(conditions, typed["period"], now)
    try:
        filters = TaskFilters.model_validate(conditions)
    except ValidationError as error:
        errors = messages_of(error) | errors
    return (TaskFilters(), errors) if errors else (filters, {})


def _resolve_times(conditions: dict[str, Any], period: str, now: float) -> dict[str, str]:
    """Replace local times and the period by times in UTC. Returns the errors, by field."""
    for name in ("since", "until"):
        if _LOCAL_TIME.fullmatch(text := conditions.get(name, "")):
            conditions[name] = text + (":00Z" if len(text) == _WITHOUT_SECONDS else "Z")
    if not period:
        return {}
    if period not in PERIODS:
        return {"period": f"Choose one of {', '.join(PERIODS)}."}
    if "since" in conditions:
        return {"since": "Choose a period or write a time, not both."}
    since = datetime.fromtimestamp(now, UTC) - PERIODS[period]
    conditions["since"] = since.isoformat()
    return {}
