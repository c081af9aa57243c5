"""What every route does around its function: strict JSON in, promises on disk before the answer."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from app.api.body import StrictRequest, says_json
from app.api.promises import Promises


class Route(APIRoute):
    """The route class of every router here.

    FastAPI calls the handler below, and sends what it returns. So when a commit fails, there is
    no 202 yet that could be sent. A dependency of function scope commits at the same moment, but
    costs a fifth of the request, and does not see the response, which a repeated
    Idempotency-Key is to be answered with.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler."""
        handle = super().get_route_handler()
        takes_json = self.body_field is not None

        async def handle_and_keep_promises(request: Request) -> Response:
            request = StrictRequest(request.scope, request.receive)
            if takes_json and not says_json(request) and await request.body():
                raise HTTPException(415, "Send JSON, with Content-Type: application/json.")
            request.state.promises = promises = Promises(request)
            with promises.key_in_flight():
                response = await handle(request)
                await promises.commit(request, response)
            return response

        return handle_and_keep_promises
