"""The service with turns taken before a request's body has arrived, for a negative control.

`python -m tests.support.early_turns` serves like `python -m app`.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response

from app.__main__ import main
from app.api.route import ServiceRoute

Handle = Callable[[Request], Coroutine[Any, Any, Response]]


def _take_turns_first() -> None:
    handler_of = ServiceRoute.get_route_handler

    def get_route_handler(route: ServiceRoute) -> Handle:
        handle = handler_of(route)

        async def in_turn(request: Request) -> Response:
            async with request.scope["state"]["turns"].take_turn():
                return await handle(request)

        return in_turn

    ServiceRoute.get_route_handler = get_route_handler  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    _take_turns_first()
    main()
