"""The parameters that routes ask for by type, such as `queue: QueueDep`."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypedDict

from fastapi import Depends, Request
from starlette.exceptions import HTTPException

from afterward.queue import Queue
from app.api.event_stream import EventStream
from app.api.health_checks import Health
from app.api.replay import Replay
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
    """The objects that the lifespan of the app yields. Starlette puts them into each request."""

    settings: Settings
    queue: Queue[Tools]
    uploads: Store
    pending_uploads: PendingUploads
    log_file: LogFile
    mailer: Mailer
    recipients: Recipients
    metrics: Metrics
    event_stream: EventStream
    replay: Replay
    catcher: Catcher | None
    health: Health
    turns: Turns


class RequestState(State):
    """The state of a request: the objects of the lifespan, and the values that middleware adds."""

    request_id: str
    client: str  # the owner of the API key; "" where the service has no keys
    response_headers: list[tuple[bytes, bytes]]  # added to the response, also to an error


def _state(name: str) -> Callable[[Request], Coroutine[Any, Any, Any]]:
    """Make a dependency that returns one value of the request's state."""

    async def value_of(request: Request) -> Any:
        return getattr(request.state, name)

    return value_of


ClientDep = Annotated[str, Depends(_state("client"))]
SettingsDep = Annotated[Settings, Depends(_state("settings"))]
QueueDep = Annotated[Queue[Tools], Depends(_state("queue"))]
UploadsDep = Annotated[Store, Depends(_state("uploads"))]
PendingUploadsDep = Annotated[PendingUploads, Depends(_state("pending_uploads"))]
LogFileDep = Annotated[LogFile, Depends(_state("log_file"))]
MetricsDep = Annotated[Metrics, Depends(_state("metrics"))]
EventStreamDep = Annotated[EventStream, Depends(_state("event_stream"))]
ReplayDep = Annotated[Replay, Depends(_state("replay"))]
HealthDep = Annotated[Health, Depends(_state("health"))]
CatcherDep = Annotated[Catcher | None, Depends(_state("catcher"))]


def check_recipient(request: Request, recipient: str) -> None:
    """Raise HTTPException 403 unless ALLOWED_RECIPIENTS permits mail to this address."""
    if not request.state.recipients.permit(recipient):
        raise HTTPException(403, "Mail may not be sent to this address.")
