"""The names that routes ask for: what the lifespan made, by type."""

from typing import Annotated, TypedDict

from fastapi import Depends, Request
from starlette.exceptions import HTTPException

from afterward.queue import Queue
from app.api.event_stream import EventStream
from app.api.health_checks import Health
from app.api.turns import Turns
from app.mail.catcher import Catcher
from app.mail.recipients import Recipients
from app.mail.smtp import Mailer
from app.observability.metrics import Metrics
from app.settings import Settings
from app.tasks.log_file import LogFile
from app.tasks.pending_uploads import PendingUploads
from app.tasks.tools import Tools
from app.uploads.store import Store


class State(TypedDict):
    """What the lifespan yields, and each request carries as its state."""

    settings: Settings
    queue: Queue[Tools]
    uploads: Store
    pending_uploads: PendingUploads
    log_file: LogFile
    mailer: Mailer
    recipients: Recipients
    metrics: Metrics
    event_stream: EventStream
    catcher: Catcher | None
    health: Health
    turns: Turns


class RequestState(State):
    """What is added to it for each request."""

    request_id: str
    client: str  # the owner of the API key; "" where the service has no keys
    response_headers: list[tuple[bytes, bytes]]  # added to every response


async def _settings(request: Request) -> Settings:
    return request.state.settings  # type: ignore[no-any-return]


async def _queue(request: Request) -> Queue[Tools]:
    return request.state.queue  # type: ignore[no-any-return]


async def _uploads(request: Request) -> Store:
    return request.state.uploads  # type: ignore[no-any-return]


async def _pending_uploads(request: Request) -> PendingUploads:
    return request.state.pending_uploads  # type: ignore[no-any-return]


async def _log_file(request: Request) -> LogFile:
    return request.state.log_file  # type: ignore[no-any-return]


async def _metrics(request: Request) -> Metrics:
    return request.state.metrics  # type: ignore[no-any-return]


async def _event_stream(request: Request) -> EventStream:
    return request.state.event_stream  # type: ignore[no-any-return]


async def _catcher(request: Request) -> Catcher | None:
    return request.state.catcher  # type: ignore[no-any-return]


async def _health(request: Request) -> Health:
    return request.state.health  # type: ignore[no-any-return]


async def _client(request: Request) -> str:
    return request.state.client  # type: ignore[no-any-return]


def permit(request: Request, recipient: str) -> None:
    """Make sure that mail may be sent to this address; raises HTTPException 403."""
    if not request.state.recipients.permit(recipient):
        raise HTTPException(403, "Mail may not be sent to this address.")


ClientDep = Annotated[str, Depends(_client)]
SettingsDep = Annotated[Settings, Depends(_settings)]
QueueDep = Annotated[Queue[Tools], Depends(_queue)]
UploadsDep = Annotated[Store, Depends(_uploads)]
PendingUploadsDep = Annotated[PendingUploads, Depends(_pending_uploads)]
LogFileDep = Annotated[LogFile, Depends(_log_file)]
MetricsDep = Annotated[Metrics, Depends(_metrics)]
EventStreamDep = Annotated[EventStream, Depends(_event_stream)]
HealthDep = Annotated[Health, Depends(_health)]
CatcherDep = Annotated[Catcher | None, Depends(_catcher)]
