"""The objects behind the dashboard, and the parameter `board: BoardDep` of its routes."""

from dataclasses import dataclass
from typing import Annotated, Self

from fastapi import Depends, Request

from afterward.events import Event
from afterward.queue import Queue
from app.api.dependencies import State
from app.api.health_checks import Health
from app.api.shared_read import SharedReads
from app.board.activity import Activity
from app.board.counts import Counts
from app.board.numbers import OverviewNumbers
from app.board.ticks import Ticks
from app.tasks.tools import Tools


@dataclass(frozen=True, slots=True)
class Board:
    """The objects of one process that its dashboards share. `record` subscribes to events."""

    activity: Activity
    numbers: OverviewNumbers
    ticks: Ticks
    counts: Counts
    reads: SharedReads

    @classmethod
    def make(cls, queue: Queue[Tools], health: Health) -> Self:
        """Make the objects."""
        activity = Activity(queue.engine, now=queue.now)
        reads = SharedReads()
        numbers = OverviewNumbers(queue, health, activity, reads)
        return cls(activity, numbers, Ticks(numbers), Counts(queue, reads), reads)

    def record(self, event: Event) -> None:
        """Count an event of the queue, and tell the open pages of it."""
        self.activity.record(event)
        self.ticks.record(event)

    def catch_up(self, since: float) -> None:
        """Look at the database again, because events since then may be lost.

        `since` is in seconds since the epoch.
        """
        self.activity.catch_up(since)
        self.ticks.catch_up()


class BoardState(State):
    """The state of the lifespan, with the board."""

    board: Board


async def _board(request: Request) -> Board:
    board: Board = request.state.board
    return board


BoardDep = Annotated[Board, Depends(_board)]
