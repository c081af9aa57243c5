"""The counts on the pages of tasks. Viewers share them, because a count may take long.

To count a million failed tasks takes a second, in which SQLite does nothing else. So the pages show
a count that may be up to 30 s old (see `shared_read`), and the page that confirms an action counts
again.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.datastructures import QueryParams

from afterward.filter import FailureGroup
from afterward.queue import Queue
from app.api.task_actions import count_matches
from app.board.shared_read import SharedRead
from app.board.task_search import TaskSearch
from app.tasks.tools import Tools

MOST_READS = 1000  # whose results are kept for reuse
_FAILURES = "failures"  # in place of a query


@dataclass(frozen=True, slots=True)
class Matches:
    """How many tasks of a search a retry, and a cancellation, would change."""

    retry: int = 0
    cancel: int = 0


class Counts:
    """Counts the tasks of a search, and the groups of failed tasks."""

    def __init__(self, queue: Queue[Tools]) -> None:
        self._queue = queue
        self._reads: OrderedDict[tuple[str, str], SharedRead[Any]] = OrderedDict()

    async def matches(self, search: TaskSearch, client: str) -> Matches:
        """Count the tasks of a search. Raises QueueUnavailable."""
        read = partial(self._count_matches, search.query, client)
        matches: Matches = await self._shared((search.query, client), read).get()
        return matches

    async def failures(self, client: str) -> list[FailureGroup]:
        """Return the groups of failed tasks, the largest first. Raises QueueUnavailable."""
        count = partial(self._queue.engine.count_failures, client)
        groups: list[FailureGroup] = await self._shared((_FAILURES, client), count).get()
        return groups

    async def _count_matches(self, query: str, client: str) -> Matches:
        # The query is read each time, because a period ends now.
        search = TaskSearch.read(QueryParams(query), self._queue.now())
        wanted = search.filters.for_client(client)
        return Matches(
            await count_matches(self._queue, "retry", wanted),
            await count_matches(self._queue, "cancel", wanted),
        )

    def _shared(self, key: tuple[str, str], read: Callable[[], Awaitable[Any]]) -> SharedRead[Any]:
        """Return the shared read with this key, or make it, and forget the one unused longest."""
        if key not in self._reads:
            self._reads[key] = SharedRead(read)
            if len(self._reads) > MOST_READS:
                self._reads.popitem(last=False)
        self._reads.move_to_end(key)
        return self._reads[key]
