"""The JSON of requests and responses, as pydantic models."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    JsonValue,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, from_json
from pydantic_core.core_schema import no_info_after_validator_function

from afterward.history import failed_attempts
from afterward.task import FINISHED, Record, Status, Task
from app.mail.message import address, body_text, header_text


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern for a text: `Annotated[str, Pattern("[0-9]", "must be a digit")]`.

    The message is for people, who would get the pattern itself from `Field(pattern=...)`. The
    OpenAPI document has the pattern.
    """

    pattern: str
    message: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Return the schema of the text, with this check after it."""
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the JSON Schema of the text, with the pattern."""
        return handler(schema) | {"pattern": f"^{self.pattern}$"}

    def _check(self, text: str) -> str:
        if not re.fullmatch(self.pattern, text):
            raise ValueError(self.message)
        return text


# JSON Schema only knows the format "email"; app.mail.message checks an address in full.
_EMAIL = Field(max_length=320, json_schema_extra={"format": "email"}, examples=["ada@example.com"])
Address = Annotated[str, _EMAIL, AfterValidator(address)]
# Patterns for the OpenAPI document. They match what header_text and body_text accept.
_LINE = r"^(?!.*=\?.*\?=)[^\u0000-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069]*$"
_LINES = r"^[^\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f]*$"

# The length comes first: after a validator, its message would speak of "items".
Subject = Annotated[
    str,
    Field(max_length=200, json_schema_extra={"pattern": _LINE}),
    AfterValidator(header_text),
]
Text = Annotated[str, AfterValidator(body_text), Field(json_schema_extra={"pattern": _LINES})]
LogText = Annotated[
    str,
    Field(max_length=1000, json_schema_extra={"pattern": _LINES}),
    AfterValidator(body_text),
]
# A name or an id to search for. PostgreSQL raises an error if a query contains a NUL character.
SearchText = Annotated[str, Pattern(r"[^\x00]*", "must not contain a NUL character")]
Name = Annotated[
    str,
    Pattern("[A-Za-z0-9._@-]{1,64}", "must be 1 to 64 letters, digits and characters of ._@-"),
    Field(examples=["ada"]),
]
_FIRST = datetime(1, 1, 1, tzinfo=UTC).timestamp()
_LAST = datetime(9999, 12, 31, tzinfo=UTC).timestamp()

JsonObject = Annotated[dict[str, JsonValue], Field(examples=[{"colour": "green"}])]


class Notification(BaseModel):
    """The mail to send."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"subject": "Hello", "message": "It is done."}]},
    )

    subject: Subject = "Notification"
    message: Text = "This is a notification."


class Notifications(Notification):
    """The same mail to each recipient. A recipient that is listed twice gets two mails."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "recipients": ["ada@example.com", "grace@example.com"],
                    "subject": "Hello",
                    "message": "It is done.",
                }
            ]
        },
    )

    # Not Address, because checking 1,000 domains may take long. The route checks them, with pauses.
    recipients: Annotated[list[Annotated[str, _EMAIL]], Field(min_length=1, max_length=1000)]


class TaskSummary(BaseModel):
    """The id, kind and status of a task."""

    id: str
    kind: str
    status: Status
    created_at: datetime


class Queued(TaskSummary):
    """A promise: the task is on disk, and will run even after a crash."""

    message: str

    @classmethod
    def of(cls, task: Task, message: str, **more: Any) -> Self:
        """Return the response to a request that has queued `task`."""
        return cls(
            id=task.id,
            kind=task.kind,
            status=Status.QUEUED,
            message=message,
            created_at=_time(task.created_at),
            **more,
        )


class Accepted(BaseModel):
    """A courtesy: the task will run, unless the process dies first."""

    message: str


class TaskFailure(BaseModel):
    """The error of the last attempt."""

    model_config = ConfigDict(extra="allow")

    type: str = "Unknown"
    detail: str = ""

    @classmethod
    def of(cls, error: str) -> Self:
        """Parse a stored error. If it is damaged, the task can still be shown."""
        try:
            return cls(**from_json(error))
        except (ValueError, TypeError):  # no JSON, no object, or fields of other types
            return cls(detail="The stored error cannot be read.")


class TaskView(TaskSummary):
    """A task with all its fields."""

    attempts: int
    max_attempts: Annotated[
        int | None, Field(description="Null if the task is retried until `gives_up_at`.")
    ]
    gives_up_at: Annotated[
        datetime | None, Field(description="Null if the task is retried up to `max_attempts`.")
    ]
    updated_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    next_attempt_at: datetime | None
    progress: float | None
    result: JsonValue
    error: TaskFailure | None
    about: Annotated[
        str | None, Field(description="The recipient of a mail, or the id of an upload.")
    ]
    batch_id: str | None
    request_id: str | None
    worker: Annotated[
        str | None, Field(description="The worker that runs the task, or ran its last attempt.")
    ]

    @classmethod
    def of(cls, task: Task, **more: Any) -> Self:
        """Return the public fields of a task."""
        return cls(
            id=task.id,
            kind=task.kind,
            status=task.status,
            attempts=task.attempts,
            max_attempts=task.max_attempts,
            gives_up_at=_time_or_none(task.gives_up_at),
            created_at=_time(task.created_at),
            updated_at=_time(task.updated_at),
            started_at=_time_or_none(task.started_at),
            finished_at=_time_or_none(task.finished_at),
            next_attempt_at=_time_or_none(task.next_attempt_at),
            progress=task.progress,
            result=_result(task.result),
            error=None if task.error is None else TaskFailure.of(task.error),
            about=task.about,
            batch_id=task.batch_id,
            request_id=task.request_id,
            worker=task.owner,
            **more,
        )


class FailedAttempt(BaseModel):
    """An attempt that failed, or that ended because its worker crashed."""

    attempt: int
    started_at: datetime | None
    seconds: Annotated[
        float | None, Field(description="Null after a crash, because the length is unknown.")
    ]
    worker: str | None
    error: TaskFailure | None


class TaskDetail(TaskView):
    """A task with its failed attempts: the newest 20 of them, the oldest first."""

    history: list[FailedAttempt]

    @classmethod
    def of(cls, task: Task, **more: Any) -> Self:
        """Return the public fields of a task, and its history."""
        try:
            return super().of(task, history=failed_attempts(task.history), **more)
        except (ValueError, RecursionError):  # a damaged history; the task can still be shown
            return super().of(task, history=[], **more)


class BatchTask(BaseModel):
    """The task of one recipient in a batch."""

    id: str
    email: str


class QueuedBatch(BaseModel):
    """A promise for each recipient, in the order of the request."""

    id: str
    total: int
    tasks: list[BatchTask]


class BatchView(BaseModel):
    """The number of tasks of a batch in each status. `progress` is the finished part, 0 to 1."""

    id: str
    total: int
    queued: int
    running: int
    retrying: int
    succeeded: int
    failed: int
    cancelled: int
    progress: Annotated[float, Field(ge=0, le=1)]

    @classmethod
    def of(cls, batch_id: str, counts: dict[Status, int]) -> "BatchView":
        """Return the view of a batch with these numbers of tasks."""
        total = sum(counts.values())
        finished = sum(counts[status] for status in FINISHED)
        return cls(id=batch_id, total=total, progress=finished / total, **counts)


class TaskPage(BaseModel):
    """A page of tasks, newest first.

    If `has_more` is true, the next page has the tasks `after` the last id of this page.
    """

    data: list[TaskView]
    has_more: bool


class UploadSummary(BaseModel):
    """The file as it arrived."""

    id: str
    filename: str
    size: int
    sha256: str
    content_type: str


class UploadView(BaseModel):
    """An upload. Its status is `received` until its task has checked it, then `published`.

    A field is null if it is missing or damaged in the database.
    """

    id: str
    filename: str | None
    size: int | None
    sha256: str | None
    content_type: str | None
    status: str | None
    created_at: datetime

    @classmethod
    def of(cls, record: Record) -> "UploadView":
        """Return the public fields of an upload's record."""
        body = record.body if isinstance(record.body, dict) else {}
        size = body.get("size")
        texts = {name: body.get(name) for name in ("filename", "sha256", "content_type", "status")}
        return cls(
            id=record.id,
            size=size if isinstance(size, int) else None,
            created_at=_time(record.created_at),
            **{name: text if isinstance(text, str) else None for name, text in texts.items()},
        )


class UploadPage(BaseModel):
    """A page of uploads, newest first.

    If `has_more` is true, the next page has the uploads `after` the last id of this page.
    """

    data: list[UploadView]
    has_more: bool


class QueuedUpload(Queued):
    """A promise to publish a file. Its bytes are on disk already."""

    upload: UploadSummary


class QueuedItem(Queued):
    """A promise to confirm an item by mail."""

    item_id: int


class Readiness(BaseModel):
    """`ready`; `degraded` while mail has to wait; `unready` if nothing can be accepted."""

    status: str
    checks: dict[str, str]


class InvalidField(BaseModel):
    """An invalid field of the request, and the reason."""

    pointer: str
    detail: str


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    errors: list[InvalidField] | None = None


def _result(stored: str | None) -> Any:
    """Return a stored result. A damaged one, or one of more than 200 levels, is shown as None."""
    try:
        return None if stored is None else from_json(stored)
    except ValueError:
        return None


def _time(seconds: float) -> datetime:
    """Return a stored time; for a damaged one, such as 1e300, the first or last of a datetime.

    One damaged row must not hide the others of a list.
    """
    return datetime.fromtimestamp(min(max(_FIRST, seconds), _LAST), UTC)


def _time_or_none(seconds: float | None) -> datetime | None:
    return None if seconds is None else _time(seconds)
