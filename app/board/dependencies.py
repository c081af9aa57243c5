"""The objects behind the dashboard, and the parameter `board: BoardDep` of its routes."""

from dataclasses import dataclass
from typing import Annotated, Self

from fastapi import Depends, Request

from afterward.events import Event
from afterward.queue import Queue
from app.api.dependencies import State
from app.api.health_checks import Health
from app.board.activity import Activity
from app.board.counts import Counts
from app.board.numbers import Overview
from app.board.ticks import Ticks
from app.tasks.tools import Tools


@dataclass(frozen=True, slots=True)
class Board:
    """The objects of one process that its dashboards share. `record` subscribes to events."""

    activity: Activity
    overview: Overview
    ticks: Ticks
    counts: Counts

    @classmethod
    def make(cls, queue: Queue[Tools], health: Health) -> Self:
        """Make the objects."""
        activity = Activity(queue.engine, now=queue.now)
        overview = Overview(queue, health, activity)
        return cls(activity, overview, Ticks(overview), Counts(queue))

    def record(self, event: Event) -> None:
        """Count an event of the queue, and tell the open pages of it."""
        self.activity.record(event)
        self.ticks.record(event)


class BoardState(State):
    """The state of the lifespan, with the board."""

    board: Board


async def _board(request: Request) -> Board:
    board: Board = request.state.board
    return board


BoardDep = Annotated[Board, Depends(_board)]
