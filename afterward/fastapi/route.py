"""The route class: durable tasks are on disk before the response is sent."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from afterward.errors import QueueError, QueueUnavailable
from afterward.fastapi.unit_of_work import RequestUnitOfWork


class DurableRoute(APIRoute):
    """Commits what a route has added to `durable_tasks`, and then lets FastAPI send the response.

    FastAPI calls the handler below, and sends what the handler returns. So if the commit fails,
    there is no 202 yet that could be sent. A dependency of function scope commits at the same
    moment, but it takes a fifth of the time of a request, and it does not see the response, which
    is stored for a repeated Idempotency-Key.

    If the database refuses, the client gets 503 with Retry-After, unless the app has an exception
    handler of its own for QueueUnavailable.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler."""
        handle = super().get_route_handler()

        async def handle_and_commit(request: Request) -> Response:
            durable_tasks = RequestUnitOfWork(request)
            request.scope["state"]["durable_tasks"] = durable_tasks
            durable_tasks.hold_key()
            try:
                response = await handle(request)
                return await durable_tasks.commit(request, response)
            except QueueUnavailable as error:
                if _has_handler(request, error):
                    raise
                raise HTTPException(503, str(error), {"Retry-After": "2"}) from error
            finally:
                durable_tasks.release_key()

        return handle_and_commit


def _has_handler(request: Request, error: QueueError) -> bool:
    """Whether the app has an exception handler for this error, or for a class that it extends."""
    kinds = [kind for kind in type(error).__mro__ if issubclass(kind, QueueError)]
    return any(kind in request.app.exception_handlers for kind in kinds)
