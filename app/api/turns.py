"""Requests take turns with tasks: both live on one event loop, and neither may starve the other."""

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

AT_ONCE = 8  # requests, while tasks run


class Turns:
    """Lets a few requests at a time be answered while `is_busy` says that tasks run.

    Each round of the event loop takes every request and every task one step further. Without a
    limit the rounds get longer with each client, and the tasks slower: ten times as much would be
    promised as is kept. With it, requests wait here, in the order in which they came.
    """

    def __init__(self, is_busy: Callable[[], bool]) -> None:
        self._is_busy = is_busy
        self._turns = asyncio.Semaphore(AT_ONCE)

    def one(self) -> AbstractAsyncContextManager[None]:
        """One request's turn, as a context; what waits for the client belongs before it."""
        return self._turns if self._is_busy() else contextlib.nullcontext()
