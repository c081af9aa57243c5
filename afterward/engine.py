"""The operations that the queue needs from a database. `afterward.engines` implements them."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from afterward.bulk import Slice
from afterward.events import Event, Subscriber
from afterward.filter import FailureGroup, TaskFilter
from afterward.retry import Bounds
from afterward.task import Answer, Backlog, Claim, Outcome, Record, Status, Task, Writes


class Engine(Protocol):
    """Stores tasks, records and the answers to idempotent requests in a database.

    When a method returns, its changes are durable: they survive a crash of the machine. Every
    method may raise one of four errors:

        QueueUnavailable  the database cannot be reached, or it refuses; nothing has changed
        DiskFull          the disk of the database is full; nothing has changed
        QueueDamaged      the file of the database is damaged; nothing has changed
        CommitUnknown     the reply to a commit was lost; all changes were written, or none

    The others are subclasses of QueueUnavailable. If a caller is cancelled while
    it waits for a method, the outcome is unknown as well: all changes were written, or none.

    A class with the base Engine can only be instantiated if it implements every method.
    """

    @abstractmethod
    async def start(self) -> None:
        """Open the database. Raises CannotStart with the reason in one line."""

    @abstractmethod
    async def stop(self) -> None:
        """Finish the operations that have begun, and close the database."""

    # For the API

    @abstractmethod
    async def put(self, writes: Writes) -> None:
        """Write everything in `writes` in one transaction.

        Raises KeyTaken if the idempotency key of `writes.answer` was used before, and otherwise
        RecordNotFound if a record in `writes.removed` does not exist. Then nothing was written.
        """

    @abstractmethod
    async def check_key(self, answer: Answer) -> None:
        """Raise KeyTaken if the idempotency key of an answer was used before. Writes nothing."""

    @abstractmethod
    async def put_through(self, connection: object, task: Task) -> None:
        """Write a task through the caller's own connection, as a part of its transaction.

        The task exists once the caller commits, and only then. Raises TypeError for a connection of
        another kind, RuntimeError for a connection in no transaction or a database that does not
        have this, and the errors of the database as the caller's connection raises them.
        """

    @abstractmethod
    async def get(self, task_id: str) -> Task:
        """Return a task. Raises TaskNotFound."""

    @abstractmethod
    async def list_tasks(
        self,
        wanted: TaskFilter,
        *,
        after: str | None = None,
        limit: int,
    ) -> list[Task]:
        """Return up to `limit` of the wanted tasks, newest first: in descending order of their ids.

        Their `arguments` are empty, and their `history` is None. `after` is the last id of the
        previous page. The list continues with the next older id, even if retention has removed the
        task `after` in the meantime.
        """

    @abstractmethod
    async def count_tasks(self, wanted: TaskFilter) -> int:
        """Return the number of tasks that match."""

    @abstractmethod
    async def count_failures(self, client: str) -> list[FailureGroup]:
        """Return the groups of a client's failed tasks, the largest first."""

    @abstractmethod
    async def list_failed(self, client: str, *, limit: int) -> list[Task]:
        """Return up to `limit` failed tasks of a client, the latest failure first.

        Their `arguments` are empty, and their `history` is None.
        """

    @abstractmethod
    async def list_changed(
        self, client: str, *, since: float, now: float, limit: int
    ) -> list[Task] | None:
        """Return a client's tasks that have changed since then, ordered by their last change.

        Each task is listed once, as it is now. Its `arguments` are empty, and its `history` is
        None. Returns None if more than `limit` rows would have to be read. Among these rows are
        some that the list leaves out: tasks that other clients have added since then, and running
        tasks that have not changed.
        """

    @abstractmethod
    async def count_batch(self, batch_id: str, *, client: str) -> dict[Status, int]:
        """Count the tasks of a client's batch in each status. Raises BatchNotFound.

        Tasks that retention has removed still count, with their last status, until retention has
        removed the last task of the batch.
        """

    @abstractmethod
    async def list_batches(self, client: str, *, after: str | None = None, limit: int) -> list[str]:
        """Return the ids of up to `limit` batches of a client, newest first.

        `after` is the last id of the previous page. A batch is listed until retention removes the
        last of its tasks.
        """

    @abstractmethod
    async def cancel(self, task_id: str, now: float) -> Task:
        """Cancel a queued or retrying task. Raises TaskNotFound, and TaskHasStarted otherwise."""

    @abstractmethod
    async def retry(
        self,
        task_id: str,
        now: float,
        writes: Writes,
        *,
        max_attempts: int | None,
        gives_up_at: float | None,
    ) -> Task:
        """Queue a failed or cancelled task again, with new bounds.

        Its attempts, errors and crashes are counted from 0 again. `writes` contains an answer or is
        empty, and is written in the same transaction. Raises TaskNotFound, KeyTaken, and
        TaskNotGivenUp if the task is neither failed nor cancelled.
        """

    @abstractmethod
    async def run_now(self, task_id: str, now: float) -> Task:
        """Make the next attempt of a retrying task due now.

        Raises TaskNotFound, and TaskNotRetrying if the task does not wait for its next attempt.
        """

    @abstractmethod
    async def backlog(self) -> Backlog:
        """Count the tasks in each status, and return the earliest due time of a waiting task."""

    @abstractmethod
    async def oldest_queued(self, client: str) -> float | None:
        """Return the due time of a client's oldest queued task; None if the client has none.

        The oldest is the task that was accepted first. Unlike `backlog`, this leaves out retries,
        because no index has a client's retries in the order of their due times.
        """

    @abstractmethod
    async def check(self) -> None:
        """Check that the database accepts writes. Changes no data."""

    # For a worker

    @abstractmethod
    async def claim(
        self,
        owner: str,
        *,
        kinds: Sequence[str],
        urgent: Collection[str] = (),
        limit: int,
        suspect: bool = True,
        now: float,
        lease: float,
    ) -> Claim:
        """Claim up to `limit` due tasks of these kinds for `lease` seconds, oldest first.

        Tasks of the `urgent` ones of these kinds come before the others, whenever they became due.
        The tasks are returned as running, and this attempt is already counted. A suspect is a
        waiting task whose worker crashed during its last attempt. A claim takes at most one
        suspect, and none if `suspect` is False, because a worker runs suspects one at a time: a
        task that crashes its process must not take the other suspects down with it again.

        The same transaction re-queues the crashed tasks, of any kind: running tasks of other
        owners, whose leases have expired. They are returned as recovered, and are retrying. A task
        fails instead if it has crashed MAX_CRASHES times in a row, or if this was its last attempt.

        A waiting task is due from `due_at` on if this time was in the future when the task was
        written. Any other waiting task is due at once, even if the clock has been set back.
        """

    @abstractmethod
    async def extend(self, owner: str, *, now: float, lease: float) -> set[tuple[str, int]]:
        """Extend the leases of this owner to `lease` seconds from now: its heartbeat.

        Returns the id of the task and the number of the claim for each attempt that it still holds.
        """

    @abstractmethod
    async def settle(self, task: Task, outcome: Outcome, now: float) -> Task | None:
        """Write how an attempt ended, and return the task after that.

        `task` is the task as it was claimed. Its number of claims is the fencing token: if the task
        has been re-queued in the meantime, nothing is written, and the method returns None.

        An outcome that counts sets `crashes` to 0, and an unexpected outcome increments `errors`.
        After CommitUnknown, the caller may repeat the call with the same `now`.
        """

    @abstractmethod
    async def report(self, task: Task, progress: float, now: float) -> Task | None:
        """Write the progress of an attempt, from 0 to 1, and return the task after that.

        If the worker has lost its claim, nothing is written, and the method returns None.
        """

    @abstractmethod
    async def change_slice(
        self,
        task: Task,
        wanted: TaskFilter,
        *,
        limit: int,
        most: int,
        bounds_of: Callable[[str], Bounds],
        now: float,
    ) -> Slice | None:
        """Do the next slice of a bulk action, and write how far it came. See afterward.bulk.

        `task` is the durable task of the action, as it was claimed; `wanted.allows` is the action.
        Up to `limit` tasks are changed, in descending order of their ids, and all slices of the
        action together change no more than `most`. `bounds_of` returns the bounds of a retried
        task, by its kind. If the worker has lost its claim, no task is changed, and the method
        returns None.

        A slice sets `crashes` of `task` to 0. So the durable task of an action survives any number
        of crashes, as long as there is a slice between them.
        """

    @abstractmethod
    async def pull_forward(
        self, *, kinds: Sequence[str], now: float, longest_wait: float, limit: int
    ) -> int:
        """Make retries of these kinds due that would have to wait for over `longest_wait` seconds.

        No retry of these kinds is planned for so late a time. So the clock was set back after the
        retry was planned. Changes at most `limit` tasks, and returns their number.
        """

    @abstractmethod
    async def wait_for_tasks(self, at_most: float) -> None:
        """Return when tasks may have been added, but after `at_most` seconds in any case."""

    @abstractmethod
    async def purge(
        self,
        *,
        finished_before: float,
        failed_before: float,
        answered_before: float,
        limit: int,
    ) -> int:
        """Remove old tasks and old answers, at most `limit` of each, and return their number.

        Tasks that ended before `finished_before` are removed, failed ones before `failed_before`.
        The record of a bulk action is removed after its task.
        """

    # Records: documents that are stored beside the tasks

    @abstractmethod
    async def read_record(self, collection: str, record_id: str, *, client: str | None) -> Record:
        """Return a record of this client, or of any client if `client` is None.

        Raises RecordNotFound.
        """

    @abstractmethod
    async def list_records(
        self, collection: str, *, client: str, after: str | None, limit: int
    ) -> list[Record]:
        """Return up to `limit` records of a client, in descending order of their ids.

        `after` is the last id of the previous page.
        """

    @abstractmethod
    async def update_record(self, record: Record) -> bool:
        """Replace the body of a record. Returns False if the record does not exist."""

    @abstractmethod
    async def delete_record(self, record: Record) -> bool:
        """Remove a record. Returns False if the record does not exist."""

    # Events of other processes

    @abstractmethod
    def publish(self, event: Event) -> None:
        """Send an event to the other processes that use this database.

        Delivery is not guaranteed: this does not wait, and an event that cannot be sent is dropped.
        """

    @abstractmethod
    def subscribe(self, *subscribers: Subscriber) -> None:
        """Call `subscribers` with each event that another process publishes from now on.

        They are added to earlier ones, and stay when the engine stops and starts again.
        """

    @abstractmethod
    def subscribe_to_gaps(self, *subscribers: Callable[[float], None]) -> None:
        """Call `subscribers` when events of other processes may have been lost.

        That is so after the connection for events has broken, and after the start. The argument is
        the time of the first event that may be lost, in seconds since the epoch. The call comes
        when events arrive again, so the database has all changes that these events would have
        reported.
        """
