"""The durable tasks that retry or cancel many tasks, in slices. See afterward.bulk."""

from dataclasses import replace

import structlog

from afterward.bulk import Action, Slice
from afterward.errors import QueueUnavailable, TemporaryError
from afterward.filter import TaskFilter
from afterward.retry import RetryPolicy
from app.settings import Settings
from app.tasks.tools import Context

# As long as for a mail (RFC 5321, 4.5.4.1): a full backlog drains, or the database comes back.
BULK_RETRY_SECONDS = 4 * 24 * 3600.0
LONGEST_WAIT_SECONDS = 60.0  # for places in the backlog, which may be filled again soon

log = structlog.get_logger(__name__)


async def retry_tasks(
    context: Context, *, wanted: TaskFilter, accepted_at: float, matched: int
) -> dict[str, int]:
    """Queue the failed and cancelled tasks again that matched the filter at that time.

    `matched` is their number. No more tasks are retried than these. Returns how many `matched`,
    were `done`, and were `skipped` because they had changed, or were removed, in the meantime.
    Raises TemporaryError while the backlog is full or the database refuses; the next attempt goes
    on where this one has come to.
    """
    return await _act(context, Action.RETRY, wanted, accepted_at, matched)


async def cancel_tasks(
    context: Context, *, wanted: TaskFilter, accepted_at: float, matched: int
) -> dict[str, int]:
    """Cancel the queued and retrying tasks that matched the filter at that time.

    Returns and raises as retry_tasks does.
    """
    return await _act(context, Action.CANCEL, wanted, accepted_at, matched)


def acted_on(wanted: TaskFilter, action: Action, accepted_at: float) -> TaskFilter:
    """Return the filter of the tasks that an action changes if it is accepted at this time.

    Unless the filter names their kind, bulk actions are left out. For example, "retry all that
    failed today" must not repeat a bulk retry that failed this morning, or cancel everything again.
    """
    if wanted.kind is None:
        wanted = replace(wanted, not_kinds=(retry_tasks.__name__, cancel_tasks.__name__))
    return wanted.acted_on(action, accepted_at)


async def _act(
    context: Context, action: Action, wanted: TaskFilter, accepted_at: float, matched: int
) -> dict[str, int]:
    # The client is taken from this task, and not from the stored arguments.
    own = acted_on(replace(wanted, client=context.task.client), action, accepted_at)
    while not (piece := await _change_slice(context, own, matched)).is_last:
        await context.report_progress(piece.done / matched)
    await context.report_progress(1.0)
    log.info("bulk action done", action=action, matched=matched, done=piece.done)
    return {"matched": matched, "done": piece.done, "skipped": matched - piece.done}


async def _change_slice(context: Context, wanted: TaskFilter, matched: int) -> Slice:
    """Do the next slice. It is one transaction, so an error leaves no half of it behind."""
    try:
        piece = await context.tools.queue.change_slice(context.task, wanted, most=matched)
    except QueueUnavailable as error:  # also a full backlog, or the unknown outcome of a commit
        raise TemporaryError(str(error)) from error
    if piece is None:
        raise TemporaryError("another worker has this task, because the lease of this one expired")
    return piece


def retry_policy(settings: Settings) -> RetryPolicy:
    """Return the policy for bulk actions: four days of waiting, a few attempts for a bug."""
    return RetryPolicy(
        settings.retry_attempts,
        settings.retry_base_seconds,
        min(settings.retry_max_seconds, LONGEST_WAIT_SECONDS),
        give_up_after=BULK_RETRY_SECONDS,
    )
