"""The route class of the service: it adds strict JSON and turns to DurableRoute."""

from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from http import HTTPStatus
from operator import attrgetter
from typing import Any, TypeVar

from fastapi import Request, Response

from afterward.fastapi import DurableRoute
from app.api.dependencies import RequestState
from app.api.json_body import StrictRequest, check_json, end_with_newline

# The header is no parameter of the routes, because DurableRoute reads it from the request. So it is
# described here.
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "A repeated request with the same key queues nothing more, and gets the "
    "first response. 1 to 255 visible ASCII characters, quoted or bare; kept for 24 hours.",
    "schema": {"type": "string", "pattern": r'^("[!#-~]{1,255}"|[!#-~][!-~]{0,254})$'},
}
_ACCEPTED = {
    "headers": {
        "Location": {
            "description": "The queued task or batch.",
            "schema": {"type": "string", "pattern": "^(/[^/]+)*/(tasks|batches)/[^/]+$"},
        },
        "Idempotency-Replay": {
            "description": "Present if this is the response to an earlier request with this key.",
            "schema": {"type": "string", "enum": ["true"]},
        },
    }
}

_NO_TURN = nullcontext()
_WITHOUT_TURN = "answered_without_turn"
_READS_STREAM = "reads_stream"

EndpointT = TypeVar("EndpointT", bound=Callable[..., Any])


def without_turn(endpoint: EndpointT) -> EndpointT:
    """Decorate a route: its requests are answered at once, without a turn.

    Use it for routes that do not touch the tasks, and for routes that may wait long for something
    besides the database, such as the SMTP server or the store of uploads. A request that waits
    would hold its turn.
    """
    setattr(endpoint, _WITHOUT_TURN, True)
    return endpoint


def reads_stream(endpoint: EndpointT) -> EndpointT:
    """Decorate a route that reads the body of its requests itself, as a stream.

    The body may be large and slow. So it is not read before the route runs, and takes no turn.
    """
    setattr(endpoint, _READS_STREAM, True)
    return without_turn(endpoint)


class ServiceRoute(DurableRoute):
    """The route class of every router of this service.

    Before the route runs, it reads the body, accepts JSON only as RFC 8259 defines it, and waits
    for a turn. Its base class commits the durable tasks.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if options.get("status_code") == HTTPStatus.ACCEPTED:
            extra = options.get("openapi_extra") or {}
            options["openapi_extra"] = {
                **extra,
                "parameters": [_IDEMPOTENCY_KEY],
                "responses": {"202": _ACCEPTED},
            }
        # The name of the operation in the OpenAPI document, and in clients made from it, is that of
        # the function: `send_notification`. FastAPI's own choice repeats the path and the method.
        options["generate_unique_id_function"] = attrgetter("name")
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the handler that runs the route and commits."""
        handle_and_commit = super().get_route_handler()
        takes_json = self.body_field is not None
        needs_no_turn = getattr(self.endpoint, _WITHOUT_TURN, False)
        reads_stream = getattr(self.endpoint, _READS_STREAM, False)

        async def handle(request: Request) -> Response:
            state: RequestState = request.scope["state"]
            request = StrictRequest(request.scope, request.receive)
            # The body is read before the turn, because the client may send it slowly. A body that
            # only the fingerprint of an Idempotency-Key needs is read here, too.
            if not reads_stream and await request.body() and takes_json:
                check_json(request)
            async with _NO_TURN if needs_no_turn else state["turns"].take_turn():
                return end_with_newline(await handle_and_commit(request))

        return handle
