"""The operations that the queue needs from a database; `afterward.engines` has the databases."""

from collections.abc import Sequence
from typing import Protocol

from afterward.events import Event, Listener
from afterward.task import Backlog, Claim, Outcome, Record, Status, Task, Writes


class Engine(Protocol):
    """Keeps the record of tasks. Whatever it has returned from is on disk.

    Any method raises QueueUnavailable while the database refuses, and QueueFull when its disk is
    full: then nothing has changed. It raises CommitUnknown, which is a QueueUnavailable, if the
    answer to a commit was lost: then everything was written, or nothing. The same holds after a
    cancellation.
    """

    async def start(self) -> None:
        """Open the database, or raise CannotStart with the reason in one line."""

    async def stop(self) -> None:
        """Finish what was asked for, and close."""

    # What the API asks.

    async def put(self, writes: Writes) -> None:
        """Write all of it, or nothing.

        Raises KeyTaken if its answer's key was used before, and RecordNotFound if a record that is
        to be removed is gone: then nothing was written, nor after any QueueUnavailable but
        CommitUnknown. After CommitUnknown or a cancellation it may have been.
        """

    async def get(self, task_id: str) -> Task:
        """The task, or TaskNotFound."""

    async def list_tasks(
        self,
        *,
        client: str,
        status: Status | None,
        kind: str | None,
        after: str | None,
        limit: int,
    ) -> list[Task]:
        """List a client's tasks in descending order of their ids, which is newest first.

        `after` is the last id of the page before. It need not be there any more: the list goes on
        with the next older id, also after one that retention has removed.
        """

    async def count_batch(self, batch_id: str, *, client: str) -> dict[Status, int]:
        """How many tasks of a client's batch stand where, or BatchNotFound.

        Those that were purged are counted as they ended, until the last one is.
        """

    async def cancel(self, task_id: str, now: float) -> Task:
        """Withdraw a waiting task. Raises TaskNotFound, TaskHasStarted."""

    async def retry(
        self,
        task_id: str,
        now: float,
        writes: Writes,
        *,
        max_attempts: int | None,
        gives_up_at: float | None,
    ) -> Task:
        """Queue a failed or cancelled task afresh, with these bounds.

        Its attempts, errors and crashes are counted from 0 again. `writes`, which holds at most an
        answer, is written in the same transaction. Raises TaskNotFound, TaskNotGivenUp, KeyTaken.
        """

    async def backlog(self) -> Backlog:
        """How much is waiting."""

    async def check(self) -> None:
        """Write something, so that a database which refuses is noticed."""

    # What a worker asks.

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
        """Claim up to `limit` due tasks of these kinds for `lease` seconds, oldest first.

        They come back as `Claim.running`, and the attempt is counted. Tasks of other kinds wait. A
        suspect is a task whose worker crashed while it ran: at most one comes with the others, and
        none unless `suspect`.

        The same transaction re-queues the running tasks, of any kind, of other owners whose lease
        has expired. They come back as `Claim.recovered`: RETRYING, or FAILED if workers crashed
        MAX_CRASHES times in a row, or in the last attempt.

        A waiting task is due from its `due_at` on if that was still to come when the task was
        written. Otherwise it is due at any time, also by a clock that has been set back.
        """

    async def extend(self, owner: str, *, now: float, lease: float) -> set[tuple[str, int]]:
        """Extend the lease of every attempt of this owner to `lease` seconds from now.

        Gives the task's id and the number of the claim for each attempt that is still held.
        """

    async def settle(self, task: Task, outcome: Outcome, now: float) -> Task | None:
        """Write how the attempt ended. None, and nothing written, if the claim was lost.

        An outcome that counts sets `crashes` to 0; an unexpected one adds to `errors`. A caller
        that did not get the answer may ask again, with the same `now`.
        """

    async def report(self, task: Task, progress: float, now: float) -> Task | None:
        """Note the progress, 0 to 1. None, and nothing written, if the claim was lost."""

    async def pull_forward(self, *, now: float, longest_wait: float) -> None:
        """Make due each retry that waits for longer than `longest_wait` seconds.

        No retry is given such a wait, so the clock was set back.
        """

    async def wait_for_tasks(self, at_most: float) -> None:
        """Return when tasks may have been put, after `at_most` seconds in any case."""

    async def purge(self, *, finished_before: float, answered_before: float, limit: int) -> int:
        """Remove up to `limit` old tasks and up to `limit` old answers; gives how many."""

    # Documents beside the tasks.

    async def read_record(self, collection: str, record_id: str, *, client: str | None) -> Record:
        """A client's record, or anybody's if `client` is None; RecordNotFound if there is none."""

    async def list_records(
        self, collection: str, *, client: str, after: str | None, limit: int
    ) -> list[Record]:
        """A client's records in descending order of their ids; `after` is the last one before."""

    async def update_record(self, record: Record) -> bool:
        """Replace a record's body, unless it is gone: then False."""

    async def delete_record(self, record: Record) -> bool:
        """Remove a record; False if it is gone."""

    # What other processes do.

    def publish(self, event: Event) -> None:
        """Let other processes on this database know; a listener of the queue's events.

        As a courtesy: it does not wait, and what cannot be told is not.
        """

    def subscribe(self, *listeners: Listener) -> None:
        """Pass to `listeners` what other processes tell, from now on."""
