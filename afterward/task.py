"""A task as it is stored, its states, and the values that are written together with it."""

import json
import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """The states of a task. docs/states.md draws the transitions."""

    QUEUED = "queued"  # accepted and on disk; no worker has claimed it, or one has given it back
    RUNNING = "running"  # one worker has claimed it, under a lease
    RETRYING = "retrying"  # an attempt failed or crashed, and the task waits for its next attempt
    SUCCEEDED = "succeeded"  # its function returned
    FAILED = "failed"  # failed for good; `error` tells why
    CANCELLED = "cancelled"  # withdrawn before a worker claimed it


WAITING = (Status.QUEUED, Status.RETRYING)
GIVEN_UP = (Status.FAILED, Status.CANCELLED)
FINISHED = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)
ANSWERS_LIVE_SECONDS = 24 * 3600.0  # a stored response, for repeated requests
MOST_IN_INDEX = 255  # characters of a text by which tasks are found


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One row of the table of tasks. Times are seconds since the epoch."""

    id: str
    kind: str
    arguments: str  # JSON: {"args": [...], "kwargs": {...}}
    created_at: float
    updated_at: float
    due_at: float  # the earliest time of the next attempt
    max_attempts: int | None = None  # None where time is the bound
    gives_up_at: float | None = None  # None where attempts are the bound
    request_id: str | None = None
    trace_context: str | None = None  # of the code that added it, see afterward.tracing
    about: str | None = None  # the value that people search for, such as a mail's recipient
    batch_id: str | None = None  # the same for all tasks of a batch
    client: str = ""  # the owner; empty if the app does not tell its clients apart
    status: Status = Status.QUEUED
    attempts: int = 0  # counted at the claim, before the function runs
    errors: int = 0  # attempts that ended in an unexpected error: see retry.is_unexpected
    crashes: int = 0  # attempts in a row in which the worker crashed
    claims: int = 0  # all claims so far: the fencing token
    owner: str | None = None  # the worker that runs it, or ran its latest attempt
    started_at: float | None = None  # of its latest attempt
    finished_at: float | None = None
    progress: float | None = None
    result: str | None = None  # JSON
    error: str | None = None  # JSON: {"type", "detail", ...}
    history: str | None = None  # JSON: its failed attempts, see afterward.history

    @property
    def next_attempt_at(self) -> float | None:
        """The time of the next attempt after a failed one; None unless the task is RETRYING."""
        return self.due_at if self.status is Status.RETRYING else None


TASK_FIELDS = tuple(field.name for field in fields(Task))
# The fields that are written with a new task. The others have their default values then.
NEW_TASK_FIELDS = (
    *("id", "kind", "arguments", "request_id", "trace_context", "about", "client"),
    *("batch_id", "status", "max_attempts", "gives_up_at", "created_at", "updated_at", "due_at"),
)
_STATUSES = {status.value: status for status in Status}
_SETTERS = [getattr(Task, name).__set__ for name in TASK_FIELDS]
_set_status = _SETTERS[TASK_FIELDS.index("status")]


def restore_task(values: Iterable[Any]) -> Task:
    """Make a Task from the stored values of TASK_FIELDS. `status` is a str, such as "queued".

    A worker does this twice for each attempt. So this sets the fields itself, which takes 1.7 µs.
    The `__init__` of a frozen dataclass would take 4.7 µs.
    """
    task = object.__new__(Task)
    for set_field, value in zip(_SETTERS, values, strict=True):
        set_field(task, value)
    _set_status(task, _STATUSES[task.status])
    return task


@dataclass(frozen=True, slots=True)
class Record:
    """A small JSON document that is stored beside the tasks, and committed together with them.

    Collection, client and id identify it. So two clients may use the same id.
    """

    collection: str
    client: str
    id: str
    body: dict[str, Any]
    created_at: float


RECORD_FIELDS = tuple(field.name for field in fields(Record))


@dataclass(frozen=True, slots=True)
class Answer:
    """The stored response to a request with an idempotency key, for its repetitions.

    A request with the same key is a repetition if its fingerprint is the same too.
    """

    key: str
    fingerprint: str
    body: str  # JSON
    location: str
    created_at: float


@dataclass(frozen=True, slots=True)
class Writes:
    """The rows that one transaction writes."""

    tasks: tuple[Task, ...] = ()
    records: tuple[Record, ...] = ()
    answer: Answer | None = None
    removed: tuple[Record, ...] = ()


@dataclass(frozen=True, slots=True)
class Claim:
    """The tasks that a worker's claim has changed."""

    running: tuple[Task, ...] = ()
    """Claimed for this worker, which must run them; the oldest first."""
    recovered: tuple[Task, ...] = ()
    """Crashed tasks of other workers: RETRYING, or FAILED after too many crashes."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of an attempt. Follow-ups are written in the transaction that settles the task."""

    status: Status
    due_at: float | None = None  # of the next attempt
    result: str | None = None  # JSON
    error: str | None = None  # JSON
    counts: bool = True  # False: the worker stopped, and the attempt is not counted
    unexpected: bool = False  # see retry.is_unexpected
    follow_ups: Writes = field(default_factory=Writes)

    @property
    def is_failure(self) -> bool:
        """Whether the attempt failed, and belongs into the history of the task."""
        return self.counts and self.error is not None


@dataclass(frozen=True, slots=True)
class Backlog:
    """The number of tasks in each state, and the due time of the oldest waiting task."""

    counts: dict[Status, int]
    oldest_due_at: float | None


class _Sequence:
    """Makes the 74 random bits of ids. They ascend within a process and a millisecond.

    The first number of a millisecond is random. Each further number is larger by a random amount
    (RFC 9562, section 6.2, method 2). The lock is for routes without `async`, which FastAPI runs in
    threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._milliseconds = -1
        self._last = 0

    def next(self, milliseconds: int) -> int:
        with self._lock:
            if milliseconds == self._milliseconds:
                self._last += 1 + random.getrandbits(32)
            else:
                # 73 bits leave half of the range for the further numbers of this millisecond.
                self._milliseconds, self._last = milliseconds, random.getrandbits(73)
            return self._last


_sequence = _Sequence()


def new_id(now: float) -> str:
    """Return a UUID of version 7 for a time in seconds since the epoch (RFC 9562, section 5.7).

    Ids sort by time. Within one process and millisecond they sort in the order in which they were
    made, so the tasks of a batch keep their order.
    """
    # The random bits make ids unique, not secret. API keys decide who may read a task.
    milliseconds = int(now * 1000)
    random_bits = _sequence.next(milliseconds)
    version, variant = 0x7 << 76, 0b10 << 62
    high, low = random_bits >> 62 << 64, random_bits & (1 << 62) - 1
    digits = f"{milliseconds << 80 | version | high | variant | low:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def body_of_record(stored: str) -> Any:
    """Parse the body of a record. A damaged one is None, so that it hides no other record."""
    try:
        return json.loads(stored)
    except (ValueError, RecursionError):
        return None


def lowest_id(at: float) -> str:
    """Return an id that no id made by `new_id` at this time, or later, is below."""
    digits = f"{max(0, int(at * 1000)):012x}"
    return f"{digits[:8]}-{digits[8:]}-0000-0000-000000000000"


def storable_text(text: str) -> str:
    """Return the beginning of a text, up to MOST_IN_INDEX characters, as every database stores it.

    PostgreSQL has no NUL in a text, and no text of 2,700 bytes or more in an index. Neither
    database stores half of a surrogate pair.
    """
    return text[:MOST_IN_INDEX].replace("\0", "").encode(errors="replace").decode()


def json_encoder(convert: Callable[[object], object]) -> Callable[[object], str]:
    """Return a function like `to_json`, which calls `convert` for values without a JSON form."""
    return json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=convert).encode


def to_json(value: object) -> str:
    """Return compact ASCII JSON, which every database and log can store.

    Raises TypeError for a value without a JSON form, ValueError for NaN and infinities, and
    RecursionError for a value that is nested too deeply.
    """
    return _encode(value)


def _refuse(value: object) -> None:
    raise TypeError(f"{type(value).__name__} has no JSON form")


_encode = json_encoder(_refuse)
