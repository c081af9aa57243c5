"""Requests take turns with tasks, because both run on one event loop."""

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

# A request waits once, a mail about three times. So three tasks and one request get equal shares.
TASKS_TO_A_REQUEST = 3


class Turns:
    """Limits how many requests are answered at once while `is_busy` says that tasks come and go.

    `tasks` is the number of tasks that run at once. With 10 tasks, 3 requests are answered at a
    time; the others wait in the order of their arrival.

    Every iteration of the event loop takes each request and each task one step further. Without a
    limit, more clients make each iteration longer and the tasks slower, until the service accepts
    ten times as many tasks as it runs.
    """

    def __init__(self, is_busy: Callable[[], bool], tasks: int) -> None:
        self._is_busy = is_busy
        self._turns = asyncio.Semaphore(max(1, round(tasks / TASKS_TO_A_REQUEST)))

    def take_turn(self) -> AbstractAsyncContextManager[None]:
        """Wait for the request's turn, which is the body of an `async with`.

        A turn must not wait for the client, because a slow client would hold up the others. So the
        body of the request is read before.
        """
        return self._turns if self._is_busy() else contextlib.nullcontext()
