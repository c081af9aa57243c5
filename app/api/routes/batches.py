"""POST /send-notifications: one mail to many, promised as a whole; and how far such a batch is."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

from fastapi import APIRouter, BackgroundTasks, Request
from fastapi.exceptions import RequestValidationError

from afterward.fastapi import DurableTasks
from app.api.dependencies import ClientDep, QueueDep, permit
from app.api.errors import InvalidRequest, documented
from app.api.route import ServiceRoute
from app.api.schemas import BatchTask, BatchView, Notifications, QueuedBatch, Sought
from app.mail.message import address
from app.tasks.courtesies import write_log
from app.tasks.mail import send_email

# Each task keeps a copy of the message: without a limit, a request of 1 MB could ask for 1 GB.
MOST_TEXT = 4_000_000  # characters of message, in all the mails of a batch together
TURN_SECONDS = 0.005  # of work on a batch, before others have their turn

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
    """Queue a mail to each recipient: all of them are on disk before the 202, or none is.

    Who is named twice gets two. One address that is not valid, or not allowed, refuses them all.
    Together they may have four million characters of message: 4,000 for each of 1,000.
    """
    recipients, message = await _addresses(notifications.recipients), notifications.message
    for email in recipients:
        permit(request, email)
    if len(message) * len(recipients) > MOST_TEXT:
        most = MOST_TEXT // len(recipients)
        raise InvalidRequest("/message", f"must have at most {most} characters for so many")
    background_tasks.add_task(
        write_log, request.state.log_file, f"message to a batch of {len(recipients)}"
    )
    tasks = []
    async for email in _in_turns(recipients):
        task = durable_tasks.add_task(
            send_email, recipient=email, subject=notifications.subject, message=message
        )
        tasks.append(BatchTask(id=task.id, email=email))
    return QueuedBatch(id=durable_tasks.as_batch(), total=len(tasks), tasks=tasks)


async def _addresses(recipients: list[str]) -> list[str]:
    """The recipients' addresses; raises RequestValidationError, which names each that is none."""
    addresses, errors = [], []
    async for number, recipient in _in_turns(enumerate(recipients)):
        try:
            addresses.append(address(recipient))
        except ValueError as error:
            errors.append({"loc": ("body", "recipients", number), "msg": str(error)})
    if errors:
        raise RequestValidationError(errors)
    return addresses


async def _in_turns(items: Iterable[ItemT]) -> AsyncIterator[ItemT]:
    """The items one by one, with pauses for others who wait."""
    began = time.monotonic()
    for item in items:
        if time.monotonic() > began + TURN_SECONDS:
            await asyncio.sleep(0)
            began = time.monotonic()
        yield item


@router.get("/batches/{batch_id}", responses=documented(404, 422, 503))
async def read_batch(batch_id: Sought, queue: QueueDep, client: ClientDep) -> BatchView:
    """How far a batch is. It is kept as long as the last of its tasks."""
    return BatchView.of(batch_id, await queue.engine.count_batch(batch_id, client=client))
