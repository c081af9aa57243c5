"""What a task is: its record, its states, and what is written together with it."""

import json
import random
import threading
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """Where a task stands; docs/states.md draws the ways between them."""

    QUEUED = "queued"  # accepted and on disk; no worker has it
    RUNNING = "running"  # one worker holds it, under a lease
    RETRYING = "retrying"  # an attempt failed; the next one waits for its time
    SUCCEEDED = "succeeded"  # its function returned
    FAILED = "failed"  # given up: the error is kept with it
    CANCELLED = "cancelled"  # withdrawn while it was waiting


WAITING = (Status.QUEUED, Status.RETRYING)
ANSWERS_LIVE_SECONDS = 24 * 3600.0
FINISHED = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One row of the record. Times are seconds since the epoch."""

    id: str
    kind: str
    arguments: str  # JSON: {"args": [...], "kwargs": {...}}
    created_at: float
    updated_at: float
    due_at: float  # not to be run before
    max_attempts: int | None = None  # None where time is the bound
    gives_up_at: float | None = None  # None where attempts are the bound
    request_id: str | None = None
    client: str = ""  # whose it is; nobody's where there are no API keys
    status: Status = Status.QUEUED
    attempts: int = 0  # counted before the run
    errors: int = 0  # attempts that ended in an error that is neither temporary nor permanent
    crashes: int = 0  # attempts in a row whose process died
    claims: int = 0  # times it was ever claimed: the fencing token
    owner: str | None = None
    started_at: float | None = None
    finished_at: float | None = None
    progress: float | None = None
    result: str | None = None  # JSON
    error: str | None = None  # JSON: {"type", "detail", ...}

    @property
    def next_attempt_at(self) -> float | None:
        """When a failed attempt is made again; None for a task that waits for nothing."""
        return self.due_at if self.status is Status.RETRYING else None


@dataclass(frozen=True, slots=True)
class Record:
    """A small JSON document kept beside the tasks, and committed together with them.

    A client's documents are named apart from everybody else's.
    """

    collection: str
    client: str
    id: str
    body: dict[str, Any]
    created_at: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered to a request that carried an idempotency key, to be answered again.

    Two requests are the same if their fingerprints are.
    """

    key: str
    fingerprint: str
    body: str  # JSON
    location: str
    created_at: float


@dataclass(frozen=True, slots=True)
class Writes:
    """What one transaction writes: all of it, or nothing."""

    tasks: tuple[Task, ...] = ()
    records: tuple[Record, ...] = ()
    answer: Answer | None = None
    batch_id: str | None = None  # of all the tasks, if they are to be counted as one
    removed: tuple[Record, ...] = ()


@dataclass(frozen=True, slots=True)
class Claim:
    """The tasks that one claim of a worker has changed."""

    running: tuple[Task, ...] = ()
    """Claimed by this worker, which has to run them; the oldest first."""
    recovered: tuple[Task, ...] = ()
    """Crashed tasks of other workers: RETRYING, or FAILED after their last crash."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended. Follow-ups are written in the transaction that settles the task."""

    status: Status
    due_at: float | None = None
    result: str | None = None
    error: str | None = None
    counts: bool = True  # False: the attempt was given back, as if never begun
    unexpected: bool = False  # the attempt ended in an error that nobody raised on purpose
    follow_ups: Writes = field(default_factory=Writes)


@dataclass(frozen=True, slots=True)
class Backlog:
    """How many tasks stand where, and since when the oldest due one has waited."""

    counts: dict[Status, int]
    oldest_due_at: float | None


class _Sequence:
    """Numbers of 74 bits for the ids of each millisecond, in ascending order within a process.

    The first one is random, and each further one is larger by a random amount (RFC 9562, section
    6.2, method 2). Routes that are no coroutines make ids in threads.
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
                # Half of the range is left for the further ones of this millisecond.
                self._milliseconds, self._last = milliseconds, random.getrandbits(73)
            return self._last


_sequence = _Sequence()


def new_id(now: float) -> str:
    """A UUID of version 7 for the time `now`, in seconds since the epoch (RFC 9562, section 5.7).

    Ids are unique, and sorted by time. Those of one process and one millisecond are sorted by the
    order in which they were made, so that the tasks of a batch keep their order.
    """
    # Unique, but no secret: who may see a task is decided by other means.
    milliseconds = int(now * 1000)
    random_bits = _sequence.next(milliseconds)
    version, variant = 0x7 << 76, 0b10 << 62
    high, low = random_bits >> 62 << 64, random_bits & (1 << 62) - 1
    digits = f"{milliseconds << 80 | version | high | variant | low:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def to_json(value: object) -> str:
    """Compact ASCII JSON, which any database and any log takes.

    Raises TypeError for what JSON has no form for, ValueError for NaN and infinities.
    """
    return _encode(value)


_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
