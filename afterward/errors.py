"""The errors of the queue and of tasks. The docstring of a QueueError is its message."""

from collections.abc import Mapping
from types import MappingProxyType

from afterward.task import Answer


class QueueError(Exception):
    """Something is wrong with the queue."""

    def __str__(self) -> str:
        """Return the message that was passed in, else the docstring."""
        return super().__str__() or (type(self).__doc__ or "")


class TaskNotFound(QueueError):
    """There is no such task; finished tasks are kept for the retention time only."""


class BatchNotFound(QueueError):
    """There is no such batch; a batch is kept as long as the last of its tasks."""


class RecordNotFound(QueueError):
    """There is no such record."""


class TaskHasStarted(QueueError):
    """The task has started or is finished, so it cannot be cancelled."""


class TaskNotGivenUp(QueueError):
    """Only a failed or a cancelled task can be retried."""


class TaskNotRetrying(QueueError):
    """Only a task that waits for its next attempt can be run now."""


class QueueUnavailable(QueueError):
    """The database does not answer just now. Try again, with the same Idempotency-Key if any."""


class CommitUnknown(QueueUnavailable):
    """The outcome of the commit is unknown. Try again, with the same Idempotency-Key if any."""


class DiskFull(QueueUnavailable):
    """The database's disk is full; nothing was accepted. Try again."""


class QueueDamaged(QueueUnavailable):
    """The database file is damaged. No task is accepted or started until it has been repaired."""


class BacklogFull(QueueUnavailable):
    """There are as many unfinished tasks as the queue takes; nothing was accepted. Try again."""


class CannotStart(QueueError):
    """The queue cannot start."""


class TablesMissing(CannotStart):
    """The database has no tables of this version: `afterward.engines.make_tables` makes them.

    `reason` is the message without its last sentence, for an app with a command of its own.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}. Call afterward.engines.make_tables(url).")
        self.reason = reason


class KeyTaken(QueueError):
    """The idempotency key was used before."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer


class TaskError(Exception):
    """An error that a task raises on purpose.

    `facts`, such as `smtp_code=550`, are stored beside `type` and `detail` in the task's error.
    """

    facts: Mapping[str, int | str] = MappingProxyType({})  # if a subclass does not call __init__

    def __init__(self, detail: str, **facts: int | str | None) -> None:
        super().__init__(detail)
        self.facts = {name: fact for name, fact in facts.items() if fact is not None}


class TemporaryError(TaskError):
    """A failure that may pass. The task is tried again for as long as its policy allows."""


class ServiceUnavailable(TemporaryError):
    """The service that all tasks of this kind need is away, so the worker pauses all of them.

    After each pause, one task runs as a probe, and this is an attempt of that task. With the
    default policy of 8 attempts, a task that waits alone is each probe, and fails after about 1.5
    minutes. So give tasks that may have to wait for longer a RetryPolicy with `give_up_after`.
    """


class PermanentError(TaskError):
    """A failure that a retry cannot mend. The task fails at once."""


class UnusableResult(PermanentError):
    """The task has run, but its result has no JSON form. It does not run again."""


class WorkerStopped(PermanentError):
    """The worker stopped during the only attempt that the task has. It does not run again.

    The work may be done or not. A policy that allows one attempt asks for no second run.
    """
