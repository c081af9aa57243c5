"""The operations that a database must have. `afterward.engines` has SQLite and PostgreSQL."""

from collections.abc import Sequence
from typing import Protocol

from afterward.events import Event, Subscriber
from afterward.task import Backlog, Claim, Outcome, Record, Status, Task, Writes


class Engine(Protocol):
    """Stores the tasks. When a method has returned, its changes are on disk.

    Every method raises QueueUnavailable while the database refuses, and QueueFull when its disk is
    full. Then nothing has changed. It raises CommitUnknown, a kind of QueueUnavailable, if it
    cannot tell whether the commit succeeded, for example because the connection broke. Then, and
    after a cancellation, either all or nothing was written.
    """

    async def start(self) -> None:
        """Open the database. Raises CannotStart with the reason in one line."""

    async def stop(self) -> None:
        """Finish the operations that have begun, and close the database."""

    # For routes.

    async def put(self, writes: Writes) -> None:
        """Write everything in one transaction.

        Raises KeyTaken if the idempotency key of `writes.answer` was used before, and
        RecordNotFound if a record of `writes.removed` is gone. Then nothing was written.
        """

    async def get(self, task_id: str) -> Task:
        """Return the task. Raises TaskNotFound."""

    async def list_tasks(
        self,
        *,
        client: str,
        status: Status | None,
        kind: str | None,
        after: str | None,
        limit: int,
    ) -> list[Task]:
        """Return up to `limit` tasks of a client, by descending ids: the newest first.

        `after` is the last id of the previous page. The list continues with the next older task,
        even if retention has removed the task of that id. `status` and `kind` filter, unless None.
        """

    async def count_batch(self, batch_id: str, *, client: str) -> dict[Status, int]:
        """Return the number of tasks in each state of a client's batch. Raises BatchNotFound.

        Tasks that retention has removed still count, in their last state, until retention has
        removed the whole batch.
        """

    async def cancel(self, task_id: str, now: float) -> Task:
        """Cancel a waiting task. Raises TaskNotFound, TaskHasStarted."""

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

        Its attempts, errors and crashes start from 0. `writes`, which has at most an answer, is
        written in the same transaction. Raises TaskNotFound, TaskNotGivenUp, KeyTaken.
        """

    async def backlog(self) -> Backlog:
        """Count the tasks in each state."""

    async def check(self) -> None:
        """Write without a change, for the readiness check. Raises QueueUnavailable."""

    # For workers.

    async def claim(
        self,
        owner: str,
        *,
        kinds: Sequence[str],
        limit: int,
        suspect: bool = True,
        now: float,
        lease: float,
    ) -> Claim:
        """Claim due tasks, and re-queue the tasks of crashed workers, in one transaction.

        Up to `limit` due tasks of these kinds become RUNNING for `lease` seconds, the oldest first.
        Their attempts are counted. They are returned as `running`. At most one of them is a
        suspect, and none unless `suspect`. A suspect is a task that ran when a worker crashed.

        Running tasks of other owners, of any kind, become RETRYING if their lease has expired. They
        become FAILED instead after MAX_CRASHES crashes in a row, or after their last attempt. They
        are returned as `recovered`.

        A task that was written with a `due_at` in the future is due from that time on. Any other
        waiting task is due at once, even if the clock has been set back since.
        """

    async def extend(self, owner: str, *, now: float, lease: float) -> set[tuple[str, int]]:
        """Extend the lease of every attempt of this owner to `lease` seconds from now.

        Returns the attempts that the owner still holds, each by the task's id and `claims`.
        """

    async def settle(self, task: Task, outcome: Outcome, now: float) -> Task | None:
        """Write the outcome of an attempt, and return the task.

        Returns None, and writes nothing, if the claim was lost: another worker has re-queued the
        task since. An outcome that counts sets `crashes` to 0. An unexpected one adds 1 to
        `errors`. After QueueUnavailable the caller may repeat the call, with the same `now`.
        """

    async def report(self, task: Task, progress: float, now: float) -> Task | None:
        """Write the progress, from 0 to 1, and return the task.

        Returns None, and writes nothing, if the claim was lost.
        """

    async def pull_forward(self, *, now: float, longest_wait: float) -> None:
        """Make every retry due that would wait for more than `longest_wait` seconds.

        No policy gives such a wait. It is seen after the clock was set back.
        """

    async def wait_for_tasks(self, at_most: float) -> None:
        """Return when tasks may have been added, at the latest after `at_most` seconds."""

    async def purge(self, *, finished_before: float, answered_before: float, limit: int) -> int:
        """Remove up to `limit` old tasks and as many old answers. Returns the number removed."""

    # Records: JSON documents beside the tasks.

    async def read_record(self, collection: str, record_id: str, *, client: str | None) -> Record:
        """Return a client's record, or any client's if `client` is None. Raises RecordNotFound."""

    async def list_records(
        self, collection: str, *, client: str, after: str | None, limit: int
    ) -> list[Record]:
        """Return up to `limit` records by descending ids. `after` ended the previous page."""

    async def update_record(self, record: Record) -> bool:
        """Replace the body of a record. Returns False if the record is gone."""

    async def delete_record(self, record: Record) -> bool:
        """Remove a record. Returns False if it was gone already."""

    # Events of other processes.

    def publish(self, event: Event) -> None:
        """Send an event to the other processes on this database. Subscribe it to the queue.

        It returns at once. An event that cannot be sent is dropped.
        """

    def subscribe(self, *subscribers: Subscriber) -> None:
        """Call `subscribers` with each event of the other processes from now on."""
