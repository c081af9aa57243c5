"""The route class of the service: strict JSON in, turns with the tasks, JSON with a newline out."""

from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import Request, Response

from afterward.fastapi import DurableRoute
from app.api.dependencies import RequestState
from app.api.json_body import StrictRequest, check_json, end_with_newline

# Read from the request itself, so that it costs nothing where it is not used; and so named here.
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "The same key with the same request is carried out once, and answered as the "
    "first time. 1 to 255 visible ASCII characters, quoted or bare; kept for 24 hours.",
    "schema": {"type": "string", "pattern": r'^("[!#-~]{1,255}"|[!#-~][!-~]{0,254})$'},
}
_ACCEPTED = {
    "headers": {
        "Location": {
            "description": "The task or the batch, where one was queued.",
            "schema": {"type": "string", "pattern": "^(/[^/]+)*/(tasks|batches)/[^/]+$"},
        },
        "Idempotency-Replay": {
            "description": "Whether this is the answer to an earlier request with the same key.",
            "schema": {"type": "string", "enum": ["true"]},
        },
    }
}

_NO_TURN = nullcontext()
_WITHOUT_TURN = "answered_without_turn"

EndpointT = TypeVar("EndpointT", bound=Callable[..., Any])


def without_turn(endpoint: EndpointT) -> EndpointT:
    """Let a route be answered at once, however busy the tasks are; a decorator of its function.

    It is for routes that queue nothing, and for those that may wait long for something else than
    the database.
    """
    setattr(endpoint, _WITHOUT_TURN, True)
    return endpoint


class ServiceRoute(DurableRoute):
    """The route class of every router of this service.

    Around the unit of work of its base class it bounds the body, takes JSON only as RFC 8259 has
    it, and lets a request wait for its turn.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if options.get("status_code") == HTTPStatus.ACCEPTED:
            extra = options.get("openapi_extra") or {}
            options["openapi_extra"] = {
                **extra,
                "parameters": [_IDEMPOTENCY_KEY],
                "responses": {"202": _ACCEPTED},
            }
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the handler that commits."""
        handle_and_commit = super().get_route_handler()
        takes_json = self.body_field is not None
        turnless = getattr(self.endpoint, _WITHOUT_TURN, False)
        takes_file = "requestBody" in (self.openapi_extra or {})

        async def handle(request: Request) -> Response:
            state: RequestState = request.scope["state"]
            request = StrictRequest(request.scope, request.receive)
            # A client sends its body as slowly as it likes. So the body is read before the turn,
            # also where only the Idempotency-Key needs it; a file, which is a stream, has no turn.
            if not takes_file and await request.body() and takes_json:
                check_json(request)
            async with _NO_TURN if takes_file or turnless else state["turns"].take_turn():
                return end_with_newline(await handle_and_commit(request))

        return handle
