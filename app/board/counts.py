"""The counts on the pages of tasks. Viewers share them, because a count may take long.

Counting a million tasks can take a second, in which SQLite answers no other search. So the pages
show a count that may be up to 30 s old (see `app.api.shared_read`), and the page that confirms an
action counts again.
"""

from dataclasses import dataclass

from starlette.datastructures import QueryParams

from afterward.bulk import Action
from afterward.queue import Queue
from app.api.shared_read import SharedReads
from app.api.task_actions import count_matches
from app.board.task_search import TaskSearch
from app.tasks.tools import Tools


@dataclass(frozen=True, slots=True)
class Matches:
    """How many tasks of a search a retry, and a cancellation, would change."""

    retry: int = 0
    cancel: int = 0


class Counts:
    """Counts the tasks of a search."""

    def __init__(self, queue: Queue[Tools], reads: SharedReads) -> None:
        self._queue = queue
        self._reads = reads

    async def matches(self, search: TaskSearch, client: str) -> Matches:
        """Count the tasks of a search. Raises QueueUnavailable."""
        return await self._reads.of(self._count_matches, search.query, client).get()

    async def _count_matches(self, query: str, client: str) -> Matches:
        # The query is read each time, because a period ends now.
        search = TaskSearch.read(QueryParams(query), self._queue.now())
        wanted = search.filters.for_client(client)
        return Matches(
            await count_matches(self._queue, Action.RETRY, wanted),
            await count_matches(self._queue, Action.CANCEL, wanted),
        )
