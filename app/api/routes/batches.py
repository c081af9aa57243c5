"""POST /send-notifications, which queues one mail to many recipients, and GET /batches/{id}."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

from fastapi import APIRouter, BackgroundTasks, Request
from fastapi.exceptions import RequestValidationError

from afterward.fastapi import DurableTasks
from app.api.dependencies import ClientDep, QueueDep, check_recipient
from app.api.errors import InvalidRequest, documented
from app.api.route import ServiceRoute
from app.api.schemas import BatchTask, BatchView, Notifications, QueuedBatch, SearchText
from app.mail.message import address
from app.tasks.courtesies import write_log
from app.tasks.mail import send_email

# Characters of message, in all the mails of a batch together. Each task stores a copy of the
# message, so without a limit a request of 1 MB could store 1 GB.
MOST_TEXT = 4_000_000
PAUSE_AFTER = 0.005  # seconds of work on a batch, after which other requests get a chance to run

ItemT = TypeVar("ItemT")

router = APIRouter(tags=["notifications"], route_class=ServiceRoute)


@router.post(
    "/send-notifications",
    status_code=202,
    responses=documented(409, 413, 415, 422, 503, 507),
)
@router.post("/send-notifications/", status_code=202, include_in_schema=False)
async def send_notifications(
    notifications: Notifications,
    request: Request,
    background_tasks: BackgroundTasks,
    durable_tasks: DurableTasks,
) -> QueuedBatch:
    """Queue a mail to each recipient. Either all tasks are on disk before the 202, or none is.

    A recipient that is listed twice gets two mails. If one address is not valid or not allowed, the
    whole request is refused. All mails together may have four million characters of message, which
    are 4,000 characters for 1,000 recipients.
    """
    recipients = await _valid_addresses(notifications.recipients)
    message = notifications.message
    for email in recipients:
        check_recipient(request, email)
    if len(message) * len(recipients) > MOST_TEXT:
        most = MOST_TEXT // len(recipients)
        raise InvalidRequest(
            "/message", f"must have at most {most} characters for {len(recipients)} recipients"
        )
    background_tasks.add_task(
        write_log, request.state.log_file, f"message to a batch of {len(recipients)}"
    )
    batch_id = durable_tasks.as_batch()
    tasks = []
    async for email in _with_pauses(recipients):
        task = durable_tasks.add_task(
            send_email, recipient=email, subject=notifications.subject, message=message
        )
        tasks.append(BatchTask(id=task.id, email=email))
    return QueuedBatch(id=batch_id, total=len(tasks), tasks=tasks)


async def _valid_addresses(recipients: list[str]) -> list[str]:
    """Return the normalised addresses. Raises RequestValidationError with each invalid one."""
    addresses, errors = [], []
    async for number, recipient in _with_pauses(enumerate(recipients)):
        try:
            addresses.append(address(recipient))
        except ValueError as error:
            errors.append({"loc": ("body", "recipients", number), "msg": str(error)})
    if errors:
        raise RequestValidationError(errors)
    return addresses


async def _with_pauses(items: Iterable[ItemT]) -> AsyncIterator[ItemT]:
    """Yield the items, with pauses in which the event loop serves other requests."""
    began = time.monotonic()
    for item in items:
        if time.monotonic() > began + PAUSE_AFTER:
            await asyncio.sleep(0)
            began = time.monotonic()
        yield item


@router.get("/batches/{batch_id}", responses=documented(404, 422, 503))
async def read_batch(batch_id: SearchText, queue: QueueDep, client: ClientDep) -> BatchView:
    """Read how many tasks of a batch are in each status.

    A batch is kept as long as the last of its tasks.
    """
    return BatchView.of(batch_id, await queue.engine.count_batch(batch_id, client=client))
