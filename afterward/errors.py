"""The few errors of the queue; each docstring is what a person is told."""

from afterward.task import Answer


class QueueError(Exception):
    """Something is wrong with the queue."""

    def __str__(self) -> str:
        """Give the message: what was passed in, else the docstring."""
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


class QueueUnavailable(QueueError):
    """The database does not answer just now. Try again, with the same Idempotency-Key if any."""


class CommitUnknown(QueueUnavailable):
    """The outcome of the commit is unknown. Try again, with the same Idempotency-Key if any."""


class QueueFull(QueueUnavailable):
    """The database's disk is full; nothing was accepted. Try again."""


class BacklogFull(QueueUnavailable):
    """There are as many unfinished tasks as this service takes; nothing was accepted. Try again."""


class CannotStart(QueueError):
    """The queue cannot start."""


class KeyTaken(QueueError):
    """The idempotency key was used before."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer


class TaskError(Exception):
    """An error that a task raises on purpose, with what is known about it.

    `facts` stand beside `type` and `detail` in the task's error, as in `smtp_code=550`.
    """

    def __init__(self, detail: str, **facts: int | str | None) -> None:
        super().__init__(detail)
        self.facts = {name: fact for name, fact in facts.items() if fact is not None}


class TemporaryError(TaskError):
    """The outside world says later: the task is tried again, for as long as its policy allows."""


class ServiceUnavailable(TemporaryError):
    """The service that every task of this kind needs is away: they all wait for its return."""


class PermanentError(TaskError):
    """Trying again cannot help: the task fails at once."""


class UnusableResult(PermanentError):
    """The work was done, but its result is not JSON. It is not done again."""
