"""The timeline of a task: the events of its life, as its row tells them.

app.board.parsed_task concludes what happened, and this module puts it into words. A row does not
keep everything, and an event says where something is missing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from afterward.history import MOST_KEPT
from afterward.retry import MAX_CRASHES
from afterward.task import Status, Task
from app.api.schemas import FailedAttempt, TaskFailure
from app.board.parsed_task import ParsedTask

# A time may be this many seconds earlier than the one before it, although no clock was set back:
# workers on several machines write these times, and their clocks differ a little.
CLOCKS_DIFFER = 1.0
SHORTEST_WAIT = 0.001  # seconds; a shorter wait is not shown

_PERMANENT = {"PermanentError", "UnusableResult"}  # see afterward.errors


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineEvent:
    """One event of a task. Times are seconds since the epoch, durations are seconds.

    An event has the colour of `status`. `waited` is the time for which the task waited for this
    attempt, and `total` the time from the acceptance to this event. A time or a duration is None if
    the row does not keep it, or if it makes no sense for this event.
    """

    title: str
    status: Status = Status.QUEUED
    at: float | None = None
    seconds: float | None = None
    waited: float | None = None
    total: float | None = None
    worker: str | None = None
    error: TaskFailure | None = None
    text: str = ""
    is_attempt: bool = False
    is_planned: bool = False  # it lies in the future
    has_crashed: bool = False  # so its end is unknown
    clock_was_set_back: bool = False  # between the event before it and this one

    @property
    def end(self) -> float | None:
        """The time of its end. An event without a duration ends at once."""
        return None if self.at is None or self.has_crashed else self.at + (self.seconds or 0.0)

    @property
    def has_ended(self) -> bool:
        """Whether its duration is final."""
        return self.status is not Status.RUNNING and not self.is_planned


def timeline(task: Task, now: float) -> list[TimelineEvent]:
    """Return the events of a task in the order in which they happened. The last is its state now.

    For example, these are the events of a mail that the server has refused once:

        Accepted            12:00:00
        Attempt 1 failed    12:00:01, and took 0.2 s
        Attempt 2 is next   12:00:05, after 3.8 s of waiting
        Gives up            four days after 12:00:00
    """
    parsed = ParsedTask.of(task)
    events = [
        TimelineEvent(title="Accepted", at=task.created_at),
        *_missing(parsed),
        *_failures(parsed.history),
        *_latest_retry(parsed),
        *_given_back(parsed),
        *_present(task, now),
    ]
    return _compared(events)


def _compared(events: list[TimelineEvent]) -> list[TimelineEvent]:
    """Return the events with the waits between them, and notes on clocks that were set back."""
    compared = [events[0]]
    latest = events[0].at or 0.0
    for before, event in pairwise(events):
        waited = _wait(before, event)
        is_back = event.at is not None and event.at < latest - CLOCKS_DIFFER
        compared.append(replace(event, waited=waited, clock_was_set_back=is_back))
        latest = latest if event.at is None else event.end or event.at
    return compared


def _wait(before: TimelineEvent, event: TimelineEvent) -> float | None:
    """Return the time for which the task waited for an attempt; None if it is unknown or short."""
    if not event.is_attempt or event.at is None or before.end is None:
        return None
    wait = event.at - before.end
    return wait if wait >= SHORTEST_WAIT else None


# The past


def _missing(parsed: ParsedTask) -> Iterator[TimelineEvent]:
    """Yield an event for the attempts that the row keeps no longer, if there are any."""
    if parsed.is_unreadable:
        stored = parsed.task.error  # of the latest of them, apart from the list
        yield TimelineEvent(
            title="Failed attempts",
            text="The stored list of failed attempts cannot be read."
            + (" The latest error was:" if stored else ""),
            error=TaskFailure.of(stored) if stored else None,
        )
    elif parsed.may_be_cut:
        first = parsed.history[0].attempt
        yield TimelineEvent(
            title="Earlier attempts",
            text=f"A task keeps its newest {MOST_KEPT} failed attempts. "
            + (
                f"Those before attempt {first} are gone."
                if first > 1
                else "If there were others before a retry on request, they are gone."
            ),
        )


def _failures(history: list[FailedAttempt]) -> Iterator[TimelineEvent]:
    before = 0
    for attempt in history:
        if attempt.attempt <= before:
            yield _retried(None)
        yield _failure(attempt)
        before = attempt.attempt


def _failure(attempt: FailedAttempt) -> TimelineEvent:
    has_crashed = attempt.seconds is None
    return TimelineEvent(
        title=f"Attempt {attempt.attempt} {'crashed' if has_crashed else 'failed'}",
        status=Status.FAILED,
        at=None if attempt.started_at is None else attempt.started_at.timestamp(),
        seconds=attempt.seconds,
        worker=attempt.worker,
        error=attempt.error,
        text="Its worker sent no heartbeat, so it has most likely died." if has_crashed else "",
        is_attempt=True,
        has_crashed=has_crashed,
    )


def _latest_retry(parsed: ParsedTask) -> Iterator[TimelineEvent]:
    if parsed.is_retried:
        yield _retried(parsed.retried_at)


def _retried(at: float | None) -> TimelineEvent:
    return TimelineEvent(
        title="Retried on request", at=at, text="Its attempts are counted from 1 again."
    )


def _given_back(parsed: ParsedTask) -> Iterator[TimelineEvent]:
    """Yield an event for the attempts that stopping workers did not let finish."""
    is_counted = not parsed.is_unreadable and not parsed.may_be_cut
    times = parsed.unlisted_claims if is_counted else int(parsed.is_given_back)
    if times > 0:
        yield TimelineEvent(
            title="Given back" if times == 1 else f"Given back {times} times",
            at=parsed.task.updated_at if parsed.is_given_back else None,
            text="A worker that stopped did not let the attempt finish, so it does not count.",
        )


# The present


def _present(task: Task, now: float) -> list[TimelineEvent]:
    match task.status:
        case Status.QUEUED:
            return [_waiting(task, now)]
        case Status.RUNNING:
            return [_running(task, now)]
        case Status.RETRYING:
            return [_next_attempt(task, now), *_last_attempt(task)]
        case Status.SUCCEEDED:
            return [_success(task), _end(task, "Succeeded")]
        case Status.FAILED:
            return [_end(task, "Failed for good", _why_failed(task))]
        case Status.CANCELLED:
            return [_end(task, "Cancelled")]


def _waiting(task: Task, now: float) -> TimelineEvent:
    return TimelineEvent(
        title="Waiting for a worker", seconds=_between(task.due_at, now), is_planned=True
    )


def _running(task: Task, now: float) -> TimelineEvent:
    return TimelineEvent(
        title=f"Attempt {task.attempts} is running",
        status=Status.RUNNING,
        at=task.started_at,
        seconds=_between(task.started_at, now),
        worker=task.owner,
        is_attempt=True,
    )


def _next_attempt(task: Task, now: float) -> TimelineEvent:
    text = "" if task.max_attempts is None else f"It has {task.max_attempts} attempts at most. "
    if task.due_at <= now:
        text += "It is due, and waits for a worker."
    if task.crashes:
        text += " After a crash, a worker runs only one such task at a time."
    return TimelineEvent(
        title=f"Attempt {task.attempts + 1} is next",
        status=Status.RETRYING,
        at=task.due_at,
        text=text.strip(),
        is_attempt=True,
        is_planned=True,
    )


def _last_attempt(task: Task) -> list[TimelineEvent]:
    if task.gives_up_at is None:
        return []
    text = "If no attempt has succeeded by then, one more is made, and it is the last."
    total = _between(task.created_at, task.gives_up_at)
    return [
        TimelineEvent(
            title="Gives up", at=task.gives_up_at, total=total, text=text, is_planned=True
        )
    ]


def _success(task: Task) -> TimelineEvent:
    return TimelineEvent(
        title=f"Attempt {task.attempts} succeeded",
        status=Status.SUCCEEDED,
        at=task.started_at,
        seconds=_between(task.started_at, task.finished_at),
        worker=task.owner,
        is_attempt=True,
    )


def _end(task: Task, title: str, text: str = "") -> TimelineEvent:
    return TimelineEvent(
        title=title,
        status=task.status,
        at=task.finished_at,
        total=_between(task.created_at, task.finished_at),
        text=text,
    )


def _why_failed(task: Task) -> str:
    """Return the reason why a failed task is not tried again: see afterward.retry."""
    if task.error is not None and TaskFailure.of(task.error).type in _PERMANENT:
        return "The error is permanent: another attempt would fail as well."
    if task.crashes >= MAX_CRASHES:
        return f"Its worker has crashed {task.crashes} times in a row."
    if task.max_attempts is not None and task.attempts >= task.max_attempts:
        return f"It has used all of its attempts: {task.max_attempts}."
    if task.gives_up_at is not None and (task.finished_at or 0.0) >= task.gives_up_at:
        return "The time for its attempts was over."
    return f"It has had too many unexpected errors: {task.errors}." if task.errors else ""


def _between(start: float | None, end: float | None) -> float | None:
    """Return the seconds between two times: 0 if the clock was set back, None if one is unknown."""
    return None if start is None or end is None else max(0.0, end - start)
