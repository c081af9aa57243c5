"""Requests take turns with tasks: both live on one event loop, and neither may starve the other."""

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

TASKS_TO_A_REQUEST = 3  # which waits once, and a mail about so often


class Turns:
    """Lets a few requests at a time be answered while `is_busy` says that tasks come and go.

    `tasks` is how many of those run at once. Each round of the event loop takes every request and
    every task one step further. Without a limit the rounds get longer with each client, and the
    tasks slower: ten times as much would be promised as is kept. With it, requests wait here, in
    the order in which they came.
    """

    def __init__(self, is_busy: Callable[[], bool], tasks: int) -> None:
        self._is_busy = is_busy
        self._turns = asyncio.Semaphore(max(1, round(tasks / TASKS_TO_A_REQUEST)))

    def one(self) -> AbstractAsyncContextManager[None]:
        """One request's turn, as a context; what waits for the client belongs before it."""
        return self._turns if self._is_busy() else contextlib.nullcontext()
